"""Early stopping."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping


class Patience(EarlyStopping):
    """Stops training when validation top-1 has not risen for so many validations in a row.

    Unlike Lightning's own, it takes its patience from the current settings when a run is resumed, and counts only
    networks that may become the best checkpoint: with attention quantisation those within the budget, after the choice.

    Args:
        patience: validations.
        keep_best: whether a resumed run keeps its best score; false if scores are no longer comparable.
    """

    def __init__(self, patience: int, keep_best: bool = True) -> None:
        super().__init__("val/top1", mode="max", patience=patience, check_on_train_epoch_end=False)
        self.keep_best = keep_best

    @property
    def exhausted(self) -> bool:
        """Whether it is what stopped training."""
        return self.wait_count >= self.patience

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.keep_best:
            super().load_state_dict(state | {"patience": self.patience})

    def on_validation_end(self, trainer: pl.Trainer, module: Any) -> None:
        if module.annealing is None or module.annealing.hard:
            super().on_validation_end(trainer, module)
