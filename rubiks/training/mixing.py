"""Mixup and cutmix, on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2


class Mixing:
    """Mixes each clip of a batch with its neighbour: mixup (Zhang et al., 2018), cutmix (Yun et al., 2019), or both.

    Mixup blends the two clips; cutmix pastes a box of one into the other. The share, and the box, are the same in all
    frames and for the whole batch. If both are on, each batch gets one of them, at even odds.

    Args:
        mixup, cutmix: alpha of the Beta(alpha, alpha) distribution of the share; 0 for none; at least one is above 0.
        num_classes: number of classes.
        seed: seed of the random choices.
    """

    def __init__(self, mixup: float, cutmix: float, num_classes: int, seed: int) -> None:
        kinds = [(kind, alpha) for kind, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
        self._transform = v2.RandomChoice([kind(alpha=float(alpha), num_classes=num_classes) for kind, alpha in kinds])
        self._seed = seed

    def __call__(self, clips: Tensor, labels: Tensor, key: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Clips float (N, T, 3, H, W), labels int64 (N,) -> the mixed clips, and their class shares,
        float (N, num_classes).

        The random choices follow from the seed and `key`, numbers that identify this batch.
        """
        with torch.random.fork_rng(devices=[]):  # torchvision draws from PyTorch's CPU generator
            torch.random.default_generator.manual_seed(draw_seed(self._seed, *key))
            mixed, targets = self._transform(tv_tensors.Video(clips), labels)
        return mixed.as_subclass(Tensor), targets


def draw_seed(*key: int) -> int:
    """A seed for PyTorch that follows from these numbers."""
    return int(np.random.default_rng(key).integers(2**63))
