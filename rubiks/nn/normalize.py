"""From uint8 pixels to the network's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalize(nn.Module):
    """uint8 RGB (..., 3, H, W) -> float32, scaled to [0, 1] and normalised by the ImageNet mean and deviation.

    It runs where the pixels are, so that batches travel to a GPU as bytes.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        # Constants, not learned state: they stay out of checkpoints.
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", 1 / (255 * torch.tensor(IMAGENET_STD).view(3, 1, 1)), persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        return (frames - self.mean) * self.scale
