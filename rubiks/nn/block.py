"""The residual block of RubiksNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from rubiks.nn.attention import AttentionShift
from rubiks.nn.shift import ChannelShift, LearnableShift


def pointwise(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)


class SqueezeExcite(nn.Module):
    """Scale each channel of a frame by a gate computed from the frame's channel means (Hu et al., CVPR 2018)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = channels // reduction
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    @property
    def reduce(self) -> nn.Linear:
        """From the channels to fewer."""
        return self._linear(0)

    @property
    def expand(self) -> nn.Linear:
        """Back to the channels."""
        return self._linear(2)

    def _linear(self, index: int) -> nn.Linear:
        layer = self.fc[index]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(N*T, C, H, W) -> the same shape."""
        gate = self.fc(x.mean((2, 3)))
        return x * gate[:, :, None, None]


class RubiksBlock(nn.Module):
    """Pre-activation residual block: 1x1 convolution, shift, 1x1 convolution (RubiksNet, ECCV 2020).

    The parameters have the names of the official state dict, so that official files load without renaming.

    Args:
        channels_in, channels_out: of the block.
        stride: of H and W, applied by the shift and by the shortcut.
        temporal_attention: put an attention shift in time before the first convolution, as in the AQ variant.
        reduction: of the squeeze-excite after the shift; None for no squeeze-excite.
        shift: makes the shift from a number of channels and a stride. None: a learned one, in space alone if there is
            temporal attention, else in time and space.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        stride: int,
        temporal_attention: bool,
        reduction: int | None,
        shift: Callable[[int, int], ChannelShift] | None = None,
    ) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        conv2 = pointwise(channels_in, channels_out)
        self.conv2 = nn.Sequential(AttentionShift(channels_in), conv2) if temporal_attention else conv2
        self.bn2 = nn.BatchNorm2d(channels_out)
        as3 = (shift or partial(LearnableShift, temporal=not temporal_attention))(channels_out, stride)
        learned_in_3d = isinstance(as3, LearnableShift) and len(as3.shift) == 3
        self.as3 = nn.Sequential(OrderedDict(rubiks3d=as3)) if learned_in_3d else as3
        self.se = None if reduction is None else SqueezeExcite(channels_out, reduction)
        self.conv3 = pointwise(channels_out, channels_out)
        changes = stride != 1 or channels_in != channels_out
        self.shortcut = pointwise(channels_in, channels_out, stride) if changes else None

    @property
    def attention(self) -> AttentionShift | None:
        """The attention shift before the first convolution, which only the AQ variant has."""
        conv2: nn.Module = self.conv2
        if not isinstance(conv2, nn.Sequential):
            return None
        assert isinstance(conv2[0], AttentionShift)
        return conv2[0]

    @property
    def first_convolution(self) -> nn.Conv2d:
        conv2: nn.Module = self.conv2
        convolution = conv2[1] if isinstance(conv2, nn.Sequential) else conv2
        assert isinstance(convolution, nn.Conv2d)
        return convolution

    @property
    def shift(self) -> ChannelShift:
        as3: nn.Module = self.as3
        shift = as3[0] if isinstance(as3, nn.Sequential) else as3
        assert isinstance(shift, ChannelShift)
        return shift

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(N*T, C_in, H, W), clip after clip -> (N*T, C_out, H', W')."""

        def split(images: Tensor) -> Tensor:
            return images.unflatten(0, (len(images) // frames, frames))

        a = F.relu(self.bn1(x), inplace=True)
        shortcut = x if self.shortcut is None else self.shortcut(a)
        if self.attention is not None:
            a = self.attention(split(a)).flatten(0, 1)
        h = F.relu(self.bn2(self.first_convolution(a)), inplace=True)
        z = self.as3(split(h)).flatten(0, 1)
        if self.se is not None:
            z = self.se(z)
        return self.conv3(z) + shortcut
