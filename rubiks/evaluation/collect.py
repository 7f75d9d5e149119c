"""Scores of every video, gathered from all processes."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor


class CollectPredictions(Callback):
    """Gathers the outputs of `predict_step`, so that every process holds each video's scores once, in list order.

    Attributes, after ``trainer.predict``:
        logits: (videos, classes) float32.
        labels, indices: (videos,) int64; indices are places in the list, ascending.
    """

    logits: Tensor
    labels: Tensor
    indices: Tensor

    def on_predict_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._outputs: list[dict[str, Tensor]] = []

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
        everything = self._outputs
        if trainer.world_size > 1:
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, self._outputs)
            everything = [output for part in parts for output in part]
        indices = torch.cat([output["index"] for output in everything])
        self.indices, order = torch.sort(indices)
        if len(self.indices.unique()) != len(self.indices):
            raise RuntimeError("a video was scored more than once")
        self.logits = torch.cat([output["logits"] for output in everything])[order]
        self.labels = torch.cat([output["label"] for output in everything])[order]
