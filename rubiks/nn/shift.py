"""The learnable shift as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rubiks.ops import shift2d, shift3d


class LearnableShift(nn.Module):
    """Shift every channel of a clip by a learned offset, drawn from U(-1, 1) (RubiksNet, ECCV 2020, section 3.1).

    Args:
        channels: C.
        stride: of H and W; time is never strided.
        temporal: learn an offset in time too. Then ``shift`` has rows T, H, W, in frames and pixels; without, rows
            H, W, and each frame is shifted by itself.
    """

    def __init__(self, channels: int, stride: int = 1, temporal: bool = True) -> None:
        super().__init__()
        self.stride = stride
        self.shift = nn.Parameter(torch.empty(3 if temporal else 2, channels).uniform_(-1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C, H, W) -> (N, T, C, H', W')."""
        shift = self.shift
        if len(shift) == 2:
            frames = shift2d(x.flatten(0, 1), shift, stride=self.stride)
            return frames.unflatten(0, x.shape[:2])
        return shift3d(x, shift, stride=(1, self.stride, self.stride))

    def extra_repr(self) -> str:
        axes = "T, H, W" if len(self.shift) == 3 else "H, W"
        return f"{self.shift.shape[1]}, axes=({axes}), stride={self.stride}"
