"""The scores of a list of videos."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from rubiks.errors import InputError


@dataclass(frozen=True)
class Predictions:
    """The scores of videos under a protocol.

    Attributes:
        names: of the videos, as in the data set's list.
        labels: (N,) int64.
        logits: (N, classes) float32, finite.
        classes: class names in label order.
    """

    names: list[str]
    labels: np.ndarray
    logits: np.ndarray
    classes: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def check(self, network: str) -> None:
        """Raise InputError if there are no videos, or if a score is not finite; `network` is the checkpoint's name."""
        if not len(self):
            raise InputError("no video could be scored: all are missing or unreadable")
        wrong = np.flatnonzero(~np.isfinite(self.logits).all(1))
        if len(wrong):
            raise InputError(
                f"{network} gives scores that are not finite for {len(wrong):,} of {len(self):,} videos, the first is "
                f"{self.names[wrong[0]]}; its weights are broken, or do not suit precision: try precision=32-true"
            )

    @cached_property
    def ranking(self) -> np.ndarray:
        """(N, classes): classes from the highest score to the lowest; of equal ones the first class comes first."""
        return np.argsort(-self.logits, axis=1, kind="stable")

    @property
    def predicted(self) -> np.ndarray:
        """(N,): the class with the highest score."""
        return self.ranking[:, 0]

    @cached_property
    def probabilities(self) -> np.ndarray:
        """(N, classes) float64: the softmax of the logits."""
        return torch.from_numpy(self.logits).double().softmax(1).numpy()

    @property
    def confidence(self) -> np.ndarray:
        """(N,): the probability of the predicted class."""
        return self.probabilities.max(1)

    def right(self, k: int = 1) -> np.ndarray:
        """(N,) bool: whether the label is among the k classes with the highest scores."""
        return (self.ranking[:, :k] == self.labels[:, None]).any(1)
