"""How checkpoints reach the disk."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from rubiks.errors import InputError
from rubiks.files import write_atomically


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and renames it.

    Lightning's own writer copies from the system's temporary folder: a full disk or a crash in the middle leaves half a
    file in the place of a good one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        content = io.BytesIO()  # torch.save to a file reports a full disk without its reason
        torch.save(checkpoint, content)
        write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


def forget_best(trainer: pl.Trainer) -> None:
    """Let the best checkpoint be chosen from here on, whatever the scores were before."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            callback.best_k_models = {}
            callback.kth_best_model_path = callback.best_model_path = ""
            callback.best_model_score = None


class SaveOnInterrupt(Callback):
    """Saves the state of training when it is interrupted (Ctrl-C, an error), so that the run can go on from there.

    Ctrl-C waits for the end of the optimiser's step, or of a validation, so that the run goes on as if it had not been
    interrupted; a second one does not. Several processes, which would not all end after the same step, are interrupted
    at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._interrupted = False
        self._handler: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.world_size == 1 and threading.current_thread() is threading.main_thread():
            self._handler = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._restore()

    def _restore(self) -> None:
        if self._handler is not None:
            signal.signal(signal.SIGINT, self._handler)
            self._handler = None

    def _interrupt(self, number: int, frame: Any) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        print("Stopping after this step or validation; Ctrl-C again stops at once", flush=True)

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        # Not where a batch ends, since Lightning counts it as done only after the hooks for that.
        if self._interrupted and batch_idx % trainer.accumulate_grad_batches == 0:
            raise KeyboardInterrupt

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()
        # Before the first batch there is nothing new to save.
        begun = trainer.global_step > 0 and trainer.num_training_batches != float("inf") and not trainer.sanity_checking
        if begun:
            with contextlib.suppress(InputError):  # where saving fails, the first error is the one to tell
                trainer.save_checkpoint(self.path)
