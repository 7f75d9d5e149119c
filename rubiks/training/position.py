"""Where a training run stands, counted in videos, so that it can resume with batches of another size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Position:
    """How far a training run has come.

    Attributes:
        epoch: completed epochs.
        videos: how many videos of the current epoch's order all processes together have trained on.
        steps: optimiser steps taken, skipped ones included.
        validation_due: the epoch's batches are all done, but it has not been validated.
        validation_due_within: batches are left, but a validation comes before them (trainer.val_check_interval).
    """

    epoch: int = 0
    videos: int = 0
    steps: int = 0
    validation_due: bool = False
    validation_due_within: bool = False

    @property
    def begun_epochs(self) -> int:
        return self.epoch + (self.videos > 0)

    def __str__(self) -> str:
        within = "" if not self.videos else f" and {self.videos:,} videos of the next"
        return f"{self.epoch} epoch{'' if self.epoch == 1 else 's'}{within} ({self.steps:,} steps)"


@dataclass(frozen=True)
class Epoch:
    """How an epoch's list of videos becomes batches and optimiser steps.

    Attributes:
        videos: videos in the list.
        batch_size: videos in a batch of one process.
        processes: processes that train together.
        accumulate: batches per optimiser step.
        limit: Lightning's limit_train_batches: a number of batches, or a share of them.
    """

    videos: int
    batch_size: int
    processes: int = 1
    accumulate: int = 1
    limit: int | float = 1.0

    @property
    def batches(self) -> int:
        """Batches of each process. A list too short for a full batch is one batch."""
        full = self._full_batches
        return min(full, self.limit) if isinstance(self.limit, int) else int(full * self.limit)

    @property
    def _full_batches(self) -> int:
        return max(1, self.videos // self.processes // self.batch_size)

    @property
    def left_out(self) -> int:
        """Videos that are left over when every process has its full batches, whatever the limit."""
        return self.videos - self.videos_of(self._full_batches)

    @property
    def steps(self) -> int:
        return math.ceil(self.batches / self.accumulate)

    def videos_of(self, batches: int) -> int:
        """How many videos there are in this many batches of each process."""
        return batches * min(self.batch_size, self.videos // self.processes) * self.processes

    def batches_of(self, position: Position) -> int:
        """Batches of this epoch that count as done at a position, which may come from batches of another size.

        They end with an optimiser step. If the videos do not fill the last step, it still counts as done: no video is
        trained on twice, and the videos of less than one step are left out.
        """
        if position.validation_due:
            return self.batches
        step = self.videos_of(self.accumulate)
        return min(self.batches, math.ceil(position.videos / step) * self.accumulate) if position.videos else 0

    def scheduled_steps(self, position: Position) -> int:
        """Steps of the learning-rate schedule that are done at a position."""
        return position.epoch * self.steps + math.ceil(self.batches_of(position) / self.accumulate)

    def settle(self, position: Position) -> Position:
        """The position adjusted to these batches: an epoch without batches left is done."""
        if position.videos and not position.validation_due and self.batches_of(position) == self.batches:
            return Position(position.epoch, position.videos, position.steps, validation_due=True)
        return position


def epoch_of(trainer: Any, data: Any) -> Epoch:
    """How the epochs of Lightning's trainer on a `VideoDataModule` are divided."""
    count, limit = len(data.records["train"]), trainer.limit_train_batches
    return Epoch(count, data.batch_size, trainer.world_size, trainer.accumulate_grad_batches, limit)


def write_loops(loops: dict[str, Any], position: Position, batches: int) -> None:
    """Set the counters of Lightning's fit loop in a checkpoint to those of a position.

    Lightning's own values depend on the hook in which a checkpoint was written, and on the size of the batches.

    Args:
        loops: the checkpoint's `loops`.
        position: where training resumes.
        batches: batches of the current epoch that are done (`Epoch.batches_of`).
    """
    fit = loops["fit_loop"]
    epochs = position.epoch
    begun = epochs + (1 if batches or position.validation_due else 0)
    done, validation = fit["epoch_loop.batch_progress"], fit["epoch_loop.val_loop.batch_progress"]
    for tracker in ("total", "current"):
        fit["epoch_progress"][tracker].update(ready=begun, started=begun, processed=epochs, completed=epochs)
        done[tracker].update(ready=batches, started=batches, processed=batches, completed=batches)
        validation[tracker].update(ready=0, started=0, processed=0, completed=0)
    done["is_last_batch"] = position.validation_due
    # Counters of a started validation make Lightning begin with it.
    due = int(position.validation_due or position.validation_due_within)
    validation["total"].update(ready=due, started=due)
    validation["is_last_batch"] = False
    # During a validation, Lightning has not yet counted the step before it.
    fit["epoch_loop.state_dict"]["_batches_that_stepped"] = position.steps - due
