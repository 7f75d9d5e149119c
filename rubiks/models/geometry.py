"""Clips as channel-major matrices."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Geometry(NamedTuple):
    """Which pixels the columns of a matrix (C, P) are: in the order N, H, W, T, as in `rubiks.ops.fused`."""

    clips: int
    frames: int
    height: int
    width: int

    def volume(self, x: Tensor) -> Tensor:
        """(C, P) -> view (N, T, C, H, W)."""
        return x.view(len(x), self.clips, self.height, self.width, self.frames).permute(1, 4, 0, 2, 3)

    def strided(self, stride: int) -> Geometry:
        """After a convolution or shift with this stride of H and W."""
        return self._replace(height=-(-self.height // stride), width=-(-self.width // stride))


def matrix(volume: Tensor) -> Tensor:
    """(N, T, C, H, W) -> (C, P), contiguous."""
    return volume.permute(2, 0, 3, 4, 1).flatten(1).contiguous()
