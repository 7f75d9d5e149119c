"""Scores of every video, gathered from all processes."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor


class CollectPredictions(Callback):
    """Gathers the outputs of `Scorer`, so that every process holds each video's scores once, in list order.

    Attributes, after ``trainer.predict``:
        logits: (videos, orders, classes) float32.
        labels, indices: (videos,) int64; indices are places in the list, ascending.
        readers: how many videos each library has read.
        bad: the videos that could not be read, path to reason.
    """

    logits: Tensor
    labels: Tensor
    indices: Tensor
    readers: dict[str, int]
    bad: dict[str, str]

    def on_predict_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._outputs: list[dict[str, Any]] = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._outputs.append(outputs)

    def on_predict_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        own = self._outputs, trainer.datamodule.bad["val"]  # type: ignore[attr-defined]
        parts: list[Any] = [own]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, own)
        outputs = [output for part, _ in parts for output in part]
        self.bad = {path: reason for _, bad in parts for path, reason in bad.items()}
        self.readers = dict(sorted(Counter(name for output in outputs for name in output["reader"]).items()))
        self.indices, order = torch.sort(torch.cat([output["index"] for output in outputs]))
        if len(self.indices.unique()) != len(self.indices):
            raise RuntimeError("a video was scored more than once")
        self.logits = torch.cat([output["logits"] for output in outputs])[order]
        self.labels = torch.cat([output["label"] for output in outputs])[order]
