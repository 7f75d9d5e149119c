"""The shift as a module: learned, and the fixed ones of the ablations."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rubiks.ops import shift2d, shift3d


def shift_clips(x: Tensor, offsets: Tensor, stride: int, quantize: bool) -> Tensor:
    """Shift every channel of x (N, T, C, H, W) by its offset, (3, C) or (2, C) -> (N, T, C, H', W').

    With two rows, H and W, each frame is shifted on its own. The other arguments are as in `ChannelShift`.
    """
    if len(offsets) == 2:
        frames = shift2d(x.flatten(0, 1), offsets, stride=stride, quantize=quantize)
        return frames.unflatten(0, x.shape[:2])
    return shift3d(x, offsets, stride=(1, stride, stride), quantize=quantize)


class ChannelShift(nn.Module):
    """Shift every channel of a clip by an offset of its own.

    Args:
        stride: of H and W; time is never strided.

    Attributes:
        shift: rows T, H, W (3, C), in frames and pixels; or rows H, W (2, C).
        quantize: move by the nearest whole numbers; the gradient of the offsets is that of interpolation.
    """

    shift: Tensor
    quantize = False

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def offsets(self) -> Tensor:
        """What the channels move by: (3, C), or (2, C) where each frame is shifted on its own."""
        return self.shift

    def time_offsets(self) -> Tensor | None:
        """The row T of the offsets (C,), a view that can be written to; None where each frame is shifted on its own."""
        return self.shift[0] if len(self.shift) == 3 else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C, H, W) -> (N, T, C, H', W')."""
        return shift_clips(x, self.offsets(), self.stride, self.quantize)

    def extra_repr(self) -> str:
        axes = "T, H, W" if len(self.offsets()) == 3 else "H, W"
        return f"{self.shift.shape[1]}, axes=({axes}), stride={self.stride}"


class LearnableShift(ChannelShift):
    """Shift by learned offsets, drawn from U(-1, 1) (RubiksNet, ECCV 2020, section 3.1).

    Args:
        channels: C.
        stride: of H and W; time is never strided.
        temporal: learn an offset in time too. Then ``shift`` has rows T, H, W, in frames and pixels; otherwise rows
            H, W, and each frame is shifted on its own.
    """

    shift: nn.Parameter

    def __init__(self, channels: int, stride: int = 1, temporal: bool = True) -> None:
        super().__init__(stride)
        self.shift = nn.Parameter(torch.empty(3 if temporal else 2, channels).uniform_(-1, 1))


class QuantizedShift(LearnableShift):
    """`LearnableShift` by the nearest whole numbers, with the straight-through gradient."""

    quantize = True


class FixedTimeShift(LearnableShift):
    """Learned in space, ``shift`` (2, C); in time the rule of TSM, which is saved but not trained.

    Attributes:
        time: the buffer (1, C) of offsets in frames, `tsm_offsets`.
    """

    time: Tensor

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(channels, stride, temporal=False)
        self.register_buffer("time", tsm_offsets(channels)[None])

    def offsets(self) -> Tensor:
        return torch.cat((self.time, self.shift))

    def time_offsets(self) -> Tensor:
        return self.time[0]


class GroupedShift(ChannelShift):
    """A fixed shift: the 3x3 grouped shift of ShiftNet in space and the rule of TSM in time.

    Attributes:
        shift: the buffer (3, C), `tsm_offsets` and `grouped_offsets`.
    """

    quantize = True  # all offsets are whole numbers, so no interpolation is needed

    def __init__(self, channels: int, stride: int = 1) -> None:
        super().__init__(stride)
        self.register_buffer("shift", torch.cat((tsm_offsets(channels)[None], grouped_offsets(channels))))


def tsm_offsets(channels: int) -> Tensor:
    """(C,) offsets in time by the rule of TSM (Lin et al., ICCV 2019).

    The first eighth of the channels takes the next frame, the second the previous one, and the others stay.
    """
    eighth = channels // 8
    offsets = torch.zeros(channels)
    offsets[:eighth] = 1
    offsets[eighth : 2 * eighth] = -1
    return offsets


def grouped_offsets(channels: int) -> Tensor:
    """(2, C) offsets in H and W by the rule of ShiftNet (Wu et al., CVPR 2018).

    Nine groups of C // 9 channels have the displacements {-1, 0, 1}^2; the remaining channels stay. The groups are
    interleaved, so that each run of channels, such as TSM's eighths, has every displacement.
    """
    displacements = torch.cartesian_prod(torch.arange(-1.0, 2), torch.arange(-1.0, 2)).t()
    offsets = displacements.repeat(1, channels // 9)
    return torch.cat((offsets, torch.zeros(2, channels % 9)), dim=1)
