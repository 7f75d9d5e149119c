"""How and when checkpoints are written."""

from __future__ import annotations

import contextlib
import io
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.io.torch_io import TorchCheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from rubiks.errors import InputError
from rubiks.files import write_atomically
from rubiks.runs import Run
from rubiks.stopping import Interrupted, Stop
from rubiks.training.nonfinite import SkipNonFinite
from rubiks.training.position import Position


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the same folder and renames it.

    Lightning's own writer copies from the system's temporary folder: a full disk or a crash partway leaves half a file
    in place of a good one.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike, storage_options: Any | None = None
    ) -> None:
        content = io.BytesIO()  # torch.save to a file reports a full disk without its reason
        torch.save(checkpoint, content)
        write_atomically(path, lambda temporary: temporary.write_bytes(content.getbuffer()))


class Checkpoints(Checkpoint):
    """Saves the state of training so that a run can resume from it as if it had not stopped.

    ``last.ckpt`` is written when an epoch's batches are done, before and after their validation, every
    `every_n_steps` optimiser steps, and when a signal stops the run, at the end of a step that all processes agree on.
    The one before it is kept as ``previous.ckpt``. ``best.ckpt`` has the best validation top-1.

    A state is only saved between two optimiser steps, where it is exact. An error within a step leaves the last state.

    Args:
        run: the run whose folder they are written to.
        stop: whether a signal has come.
        non_finite: checks before each save that the weights are finite.
        every_n_steps: also save within epochs, every so many optimiser steps; None for not.
        every_n_epochs: also keep the state after every so many epochs, as ``epoch-NNNN.ckpt``; None for not.
        max_steps: training stops after so many optimiser steps; None for no limit.
        val_check_interval: optimiser steps between validations within an epoch, if a whole number; otherwise a share
            of the epoch. The end of an epoch is validated in any case, if Lightning's check_val_every_n_epoch includes
            the epoch.
        keep_best: whether a resumed run keeps its best.ckpt; false if scores are no longer comparable.

    Attributes:
        best: the best validation top-1 so far; None before the first validation.

    Raises:
        Interrupted: from the hooks, if a signal stops the run.
        InputError: a file cannot be written, or the weights are not finite.
    """

    def __init__(
        self,
        run: Run,
        stop: Stop,
        non_finite: SkipNonFinite,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        max_steps: int | None = None,
        val_check_interval: int | float = 1.0,
        keep_best: bool = True,
    ) -> None:
        self.run = run
        self.stop = stop
        self.non_finite = non_finite
        self.every_n_steps = every_n_steps
        self.every_n_epochs = every_n_epochs
        self.max_steps = max_steps
        self.val_check_interval = val_check_interval
        self.keep_best = keep_best
        self.best: float | None = None
        self._saved_at = 0  # optimiser steps

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.keep_best:
            self.best = state["best"]

    def forget_best(self) -> None:
        """Choose the best checkpoint from here on, whatever the scores were before."""
        self.best = None

    # ---- where states are exact

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self.stop.patient = True
        self._saved_at = trainer.global_step
        self._validate_last(trainer)
        if module.start is not None and module.start.validation_due_within:
            done: Any = trainer.fit_loop.epoch_loop.batch_progress.current
            trainer.val_check_batch = done.completed

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        self.stop.beat()
        # Not at the end of a batch, since Lightning counts it as done only after those hooks.
        if batch_idx % trainer.accumulate_grad_batches:
            return
        if self.stop.agreed():
            self._save_last(trainer, module)
            assert self.stop.signal is not None
            raise Interrupted(self.stop.signal)
        if self.every_n_steps is not None and trainer.global_step - self._saved_at >= self.every_n_steps:
            self._save_last(trainer, module)

    def on_before_backward(self, trainer: pl.Trainer, module: pl.LightningModule, loss: torch.Tensor) -> None:
        self.stop.beat()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.max_steps is not None and trainer.global_step >= self.max_steps:
            trainer.should_stop = True
        if trainer.should_stop and not _between_steps(trainer, batch_idx + 1):  # trainer.max_time is up
            trainer.should_stop = False  # until the end of the step, when it is still up
        # Lightning validates after batches whose number is a multiple of this.
        trainer.val_check_batch = batch_idx + (1 if self._validates_after(trainer, batch_idx + 1) else 2)

    def _validates_after(self, trainer: pl.Trainer, batches: int) -> bool:
        """Whether a validation is due after so many batches of an epoch."""
        if batches >= trainer.num_training_batches:
            return True
        per_step, interval = trainer.accumulate_grad_batches, self.val_check_interval
        if isinstance(interval, float):
            interval = max(1, int(interval * math.ceil(trainer.num_training_batches / per_step)))
        return batches % (interval * per_step) == 0

    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._validate_last(trainer)

    def _validate_last(self, trainer: pl.Trainer) -> None:
        """Validate the last epoch, even if check_val_every_n_epoch would skip it."""
        if trainer.current_epoch + 1 == trainer.max_epochs:
            trainer.check_val_every_n_epoch = 1

    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        done: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        if not trainer.sanity_checking and _between_steps(trainer, done.completed):
            self._save_last(trainer, module, validates=True)  # a validation may take long, and may be interrupted

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self.stop.beat()
        if self.stop.signal is not None and not trainer.sanity_checking:
            raise Interrupted(self.stop.signal)  # the state before the validation has been saved

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        score = trainer.callback_metrics.get("val/top1")
        if trainer.sanity_checking or score is None or (self.best is not None and not score > self.best):
            return
        self.best = float(score)
        self.non_finite.check(trainer, module)
        self._save(trainer, module, self.run.best)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        position = self._save_last(trainer, module, epoch_over=True)
        if self.every_n_epochs is None or position.videos or position.epoch % self.every_n_epochs:
            return
        if trainer.is_global_zero:
            _copy(self.run.last, self.run.checkpoints / f"epoch-{position.epoch:04d}.ckpt")

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.stop.end()
        self.stop.patient = False

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        done: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        between = done.started == done.completed and _between_steps(trainer, done.completed)
        alone = trainer.world_size == 1  # several processes would have to save together
        if alone and between and self.stop.patient and trainer.training and trainer.global_step > self._saved_at:
            with contextlib.suppress(InputError):  # if saving fails, the first error is the one to report
                self._save_last(trainer, module)
        self.stop.patient = False

    # ---- writing

    def _save_last(
        self, trainer: pl.Trainer, module: pl.LightningModule, epoch_over: bool = False, validates: bool = False
    ) -> Position:
        self.non_finite.check(trainer, module)
        if trainer.is_global_zero and self.run.last.is_file():
            _copy(self.run.last, self.run.previous)
        self._saved_at = trainer.global_step
        return self._save(trainer, module, self.run.last, epoch_over, validates)

    def _save(
        self, trainer: pl.Trainer, module: Any, path: Path, epoch_over: bool = False, validates: bool = False
    ) -> Position:
        """Save the state to a file; all processes must call this."""
        module.position = position = _position(trainer, module, epoch_over, validates)
        trainer.save_checkpoint(path)
        return position


def _between_steps(trainer: pl.Trainer, batches: int) -> bool:
    """Whether an optimiser step ends after so many batches of an epoch."""
    return batches % trainer.accumulate_grad_batches == 0 or batches >= trainer.num_training_batches


def forget_best(trainer: pl.Trainer) -> None:
    """Call `Checkpoints.forget_best`, if the trainer has such a callback."""
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, Checkpoints):
            callback.forget_best()


def _position(trainer: pl.Trainer, module: Any, epoch_over: bool, validates: bool) -> Position:
    """Where training stands, from Lightning's counters.

    `epoch_over`: called from the hook at an epoch's end. `validates`: called from the one before a validation.
    """
    loop: Any = trainer.fit_loop
    batches = loop.epoch_loop.batch_progress.current.completed
    all_done = batches >= trainer.num_training_batches
    epoch = loop.epoch_progress.current.processed - epoch_over
    if all_done and epoch_over:
        return Position(epoch + 1, 0, trainer.global_step)
    videos, within = module.epoch.videos_of(batches), validates and not all_done
    return Position(epoch, videos, trainer.global_step, validation_due=all_done, validation_due_within=within)


def _copy(source: Path, target: Path) -> None:
    """Make a hard link to a checkpoint, or a copy if the file system has no links."""
    with contextlib.suppress(OSError):
        target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        try:
            shutil.copyfile(source, target)
        except OSError as error:
            raise InputError(f"{target} cannot be written: {error.strerror or error}") from None
