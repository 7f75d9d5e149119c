"""What a training step consists of, by PyTorch's profiler."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback
from torch.profiler import profile, schedule

from rubiks.files import write_atomically

log = logging.getLogger(__name__)

WAIT, WARM_UP, RECORDED = 5, 2, 3  # batches; over the first ones, kernels are chosen and CUDA graphs recorded


class StepProfile(Callback):
    """Records the operators and kernels of a few training batches: pytorch.txt, a table, and pytorch.json, a trace.

    Lightning's PyTorchProfiler hooks into modules, with which the fused blocks do not run, and its table is of whatever
    it recorded last, which is validation.

    Args:
        folder: for the two files; only the first process writes them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._profile: profile | None = None
        self._written = False

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            plan = schedule(wait=WAIT, warmup=WARM_UP, active=RECORDED, repeat=1)
            self._profile = profile(schedule=plan, on_trace_ready=self._write)
            self._profile.start()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profile is not None:
            self._profile.step()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._end()
        if trainer.is_global_zero and not self._written:
            log.warning("trainer.profiler=pytorch: nothing recorded, which takes more than %d batches", WAIT + WARM_UP)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._end()

    def _end(self) -> None:
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, recorded: profile) -> None:
        averages = recorded.key_averages()
        by = "device" if any(event.device_time_total for event in averages) else "cpu"
        table = averages.table(sort_by=f"self_{by}_time_total", row_limit=50)
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(self.folder / "pytorch.txt", lambda path: path.write_text(table))
        write_atomically(self.folder / "pytorch.json", lambda path: recorded.export_chrome_trace(str(path)))
        self._written = True
