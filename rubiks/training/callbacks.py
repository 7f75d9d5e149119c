"""Progress output of a training run."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.utilities import rank_zero_only


class Throughput(Callback):
    """Logs clips per second over all processes, and the share of time that training waited for data.

    Both are measured from one log step to the next, without validation. The loader's `waited` is the time spent waiting
    for its latest batch. A GPU keeps working meanwhile, so there it counts only if the GPU has run out of work when the
    batch arrives. A share near 0 means that the network is the bottleneck, a large one that reading video is.
    """

    def __init__(self) -> None:
        self._work: torch.cuda.Event | None = None  # reached when the GPU has done the latest step
        self._restart()

    def _restart(self) -> None:
        self._clips = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restart()

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restart()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._work is None or self._work.query():
            loader: Any = trainer.train_dataloader
            self._waited += loader.waited
        self._clips += batch["label"].numel()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.device.type == "cuda":
            self._work = torch.cuda.Event()
            self._work.record()
        elapsed = time.perf_counter() - self._since
        last = batch_idx + 1 == trainer.num_training_batches
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]  # set from outside Lightning's class
        if elapsed > 0 and (last or (every and (batch_idx + 1) % every == 0)):
            rate = torch.tensor(self._clips * trainer.world_size / elapsed)  # on the CPU, see VideoClassifier
            module.log_dict({"clips/s": rate, "data wait": torch.tensor(self._waited / elapsed)}, prog_bar=True)
            self._restart()


class ProgressLines(Callback):
    """Prints a line about every half minute and one after each validation, if there is no terminal for a bar.

    With ``bar=True`` a progress bar shows what happens within an epoch, and lines are printed only after validations.
    """

    def __init__(self, bar: bool, every_seconds: float = 30.0) -> None:
        self.bar = bar
        self.every_seconds = every_seconds
        self._printed = time.monotonic()

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.bar or time.monotonic() - self._printed < self.every_seconds:
            return
        self._printed = time.monotonic()
        metrics = trainer.callback_metrics
        parts = [f"batch {batch_idx + 1}/{trainer.num_training_batches}", f"loss {metrics['train/loss_step']:.3f}"]
        if "clips/s" in metrics:
            parts += [f"{metrics['clips/s']:.1f} clips/s", f"{metrics['data wait']:.0%} of time waiting for data"]
        self._print(trainer, parts)

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        metrics = trainer.callback_metrics
        if "val/top1" in metrics:
            top1, top5 = metrics["val/top1"], metrics["val/top5"]
            self._print(
                trainer, [f"validation top-1 {top1:.1%}", f"top-5 {top5:.1%}", f"loss {metrics['val/loss']:.3f}"]
            )

    def _print(self, trainer: pl.Trainer, parts: list[str]) -> None:
        print(f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}", *parts, sep="  ", flush=True)
