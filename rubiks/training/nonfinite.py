"""Steps whose gradient is not finite: skipped on the device, reported, and an error if there are too many in a row."""

from __future__ import annotations

import logging
from collections import deque
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from torch import Tensor, nn

from rubiks.errors import InputError
from rubiks.training.optim import flat, running_statistics, write_flat

log = logging.getLogger(__name__)


class Step(NamedTuple):
    """What to report about an optimiser step if its gradient turns out not to be finite."""

    number: int
    lr: float
    indices: list[Tensor]  # of the videos of each batch
    outcome: Tensor  # on the CPU, bool (2,): the gradient, and this process's own loss, are not finite
    known: torch.cuda.Event | None  # reached when `outcome` has arrived


class SkipNonFinite(Callback):
    """Skips optimiser steps whose gradient is not finite, and ends training if there are too many in a row.

    The decision is made on the device: the fused optimisers skip a step whose `found_inf` is 1, and the running
    statistics that the forward pass has changed are restored. The CPU reads the outcome when it has arrived, some steps
    later, so that no step waits for the GPU. With 16-mixed the gradient scaler skips the step itself.

    Processes average their gradients before, so all of them skip the same steps.

    Args:
        limit: steps in a row that may be skipped. 16-mixed needs up to 16 to find its scale.

    Attributes:
        skipped: steps skipped so far.

    Raises:
        InputError: from the hooks, if `limit` steps in a row are not finite.
    """

    def __init__(self, limit: int = 20) -> None:
        self.limit = limit
        self.skipped = 0
        self._row = 0
        self._pending: deque[Step] = deque()
        self._indices: list[Tensor] = []
        self._buffers: list[Tensor] = []
        self._saved = torch.empty(0)

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._buffers = running_statistics(module.net)
        self._pending.clear()
        self._indices = []
        module.finite_losses = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if not self._indices and self._buffers:
            self._saved = flat(self._buffers)
        self._indices.append(batch["index"])
        self._read(trainer)

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: torch.optim.Optimizer) -> None:
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        bad = ~nn.utils.get_total_norm(gradients, float("inf")).isfinite()
        if self._buffers:
            write_flat(torch.where(bad, self._saved, flat(self._buffers)), self._buffers)
        if trainer.scaler is None:
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # as a gradient scaler sets it
        outcome, known = torch.stack([bad, ~torch.stack(module.finite_losses).all()]), None
        module.finite_losses.clear()
        if bad.is_cuda:
            arrived = torch.empty(2, dtype=torch.bool, pin_memory=True)
            outcome = arrived.copy_(outcome, non_blocking=True)
            known = torch.cuda.Event()
            known.record()
        self._pending.append(Step(trainer.global_step, optimizer.param_groups[0]["lr"], self._indices, outcome, known))
        self._indices = []

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._read(trainer, wait=True)

    def check(self, trainer: pl.Trainer, module: Any) -> None:
        """Before the state is saved, wait for outcomes that are still unknown.

        Raises:
            InputError: the weights themselves are not finite.
        """
        self._read(trainer, wait=True)
        if not nn.utils.get_total_norm([*module.parameters(), *self._buffers], float("inf")).isfinite():
            raise InputError(
                f"the network's weights are no longer finite at step {trainer.global_step:,}; the state is not saved. "
                f"{_REMEDY}"
            )

    def _read(self, trainer: pl.Trainer, wait: bool = False) -> None:
        """Read the outcomes that have arrived; with `wait`, all of them."""
        while self._pending and (wait or self._pending[0].known is None or self._pending[0].known.query()):
            step = self._pending.popleft()
            if step.known is not None:
                step.known.synchronize()
            bad, own = step.outcome.tolist()
            if not bad:
                self._row = 0
                continue
            self.skipped += 1
            self._row += 1
            # The first process warns, and so does the one with the videos.
            if self.skipped == 1 and (trainer.is_global_zero or own):
                log.warning("%s; the step is skipped, as are others like it", _describe(trainer, step))
            if self._row >= self.limit:
                raise InputError(f"{self._row} steps in a row were skipped: {_describe(trainer, step)}. {_REMEDY}")


_REMEDY = (
    "Resume from the saved state with a lower learning rate (recipe.lr), or clip the gradient (recipe.clip_grad_norm)"
)


def _describe(trainer: pl.Trainer, step: Step) -> str:
    indices = torch.cat(step.indices).tolist()
    names = [trainer.datamodule.records["train"][index].path for index in indices]  # type: ignore[attr-defined]
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    scale = "" if trainer.scaler is None else ", which is normal while 16-mixed searches for its loss scale"
    process = f" of process {trainer.global_rank}" if trainer.world_size > 1 else ""
    return (
        f"the gradient of step {step.number + 1:,} is not finite{scale} (learning rate {step.lr:.3g}; videos{process}: "
        f"{listed})"
    )
