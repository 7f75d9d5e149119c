"""RubiksNet for inference: batch norm folded away, few passes over memory."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rubiks.models.clips import as_clips
from rubiks.nn import ChannelShift, RubiksBlock
from rubiks.ops.fused import mix_frames

if TYPE_CHECKING:
    from rubiks.models.rubiksnet import RubiksNet

# Measured on two CPU cores.
PIXELS_AT_ONCE = 8 * 224 * 224  # larger batches are taken apart: their buffers would be fetched from the system anew
ELEMENTS_AT_ONCE = 1_500_000  # between a norm and its convolution, so that they are still in the cache
SMALL_IMAGE = 14 * 14  # pixels; from here on one large matrix is better than one per frame


class Grid(NamedTuple):
    """Where the columns of a layer's matrices lie in the clips.

    Activations are matrices (B, C, P) that convolutions multiply: one for each frame, (N*T, C, H*W), or a single one
    with the columns of all frames, (1, C, N*T*H*W).
    """

    clips: int
    frames: int
    height: int
    width: int
    single: bool

    def volume(self, x: Tensor) -> Tensor:
        """(B, C, P) -> view (N, T, C, H, W)."""
        clips, frames, height, width, single = self
        if single:
            return x.view(x.shape[1], clips, frames, height, width).permute(1, 2, 0, 3, 4)
        return x.view(clips, frames, x.shape[1], height, width)

    def matrices(self, x: Tensor) -> Tensor:
        """(N, T, C, H, W) -> (B, C, P), a view where x has the same order in memory."""
        clips, frames, height, width, single = self
        if single:
            return x.permute(2, 0, 1, 3, 4).reshape(1, x.shape[2], clips * frames * height * width)
        return x.reshape(clips * frames, x.shape[2], height * width)

    def strided(self, stride: int) -> Grid:
        return self._replace(height=-(-self.height // stride), width=-(-self.width // stride))


class Rectifier(nn.Module):
    """Batch norm and ReLU as a clamp, whose result only lacks a scale and an offset.

    relu(s x + b) is s max(x, t) + b with t = -b / s where s is positive, and s min(x, t) + b where it is negative. The
    next linear layer takes up s and b.

    Args:
        scale, bias: s and b (C,); scales are not 0.
        dtype: of x.

    Attributes:
        threshold: t (C, 1). Where x is at it, the rectified value is 0.
    """

    threshold: Tensor
    low: Tensor
    high: Tensor | None

    def __init__(self, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        threshold = (-bias / scale)[:, None]
        falling = scale[:, None] < 0
        infinity = torch.full_like(threshold, torch.inf)
        self.register_buffer("threshold", threshold.to(dtype))
        self.register_buffer("low", torch.where(falling, -infinity, threshold).to(dtype))
        # Scales are rarely negative: mostly the second bound is not needed.
        self.register_buffer("high", torch.where(falling, threshold, infinity).to(dtype) if falling.any() else None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, P) -> a new tensor of the same shape."""
        out = torch.maximum(x, self.low)
        return out if self.high is None else torch.minimum(out, self.high, out=out)


class Block(nn.Module):
    """A residual block that works in place.

    Args:
        block: whose weights to take.
        offset: (C_in,), of the input: it is to be added to x first.

    Attributes:
        offset: that of the output, likewise left to the next block. The bias of a folded shortcut ends there.
        attention: weights (3, C_in, 1, 1) of a soft attention shift.
        moved: the channels of a hard one that take another frame; the first `looking_back` of them the previous one.
    """

    conv2: Tensor
    bias2: Tensor
    conv3: Tensor
    shortcut: Tensor | None
    attention: Tensor | None
    moved: Tensor | None

    def __init__(self, block: RubiksBlock, offset: Tensor | None) -> None:
        super().__init__()
        dtype = block.conv3.weight.dtype
        scale1, bias1 = affine(block.bn1, offset)
        scale2, bias2 = affine(block.bn2)
        self.rectify = Rectifier(scale1, bias1, dtype)
        attention = moved = None
        temporal = block.attention
        if temporal is not None and temporal.back is not None and temporal.ahead is not None:
            self.looking_back = len(temporal.back)
            channels = torch.cat((temporal.back, temporal.ahead))
            if len(channels):
                moved = channels
                self.rectify_moved = Rectifier(scale1[moved], bias1[moved], dtype)
        elif temporal is not None:  # back, stay, ahead; as in (C, H, W)
            attention = temporal.attention().t()[:, :, None, None]
        self.register_buffer("moved", moved)
        weight2 = scale2[:, None] * exact_weight(block.first_convolution)
        self.register_buffer("attention", attention)
        self.register_buffer("conv2", (weight2 * scale1).to(dtype))
        self.register_buffer("bias2", (weight2 @ bias1 + bias2)[:, None].to(dtype))
        self.shift: ChannelShift = copy.deepcopy(block.shift)
        self.register_buffer("conv3", block.conv3.weight.flatten(1).clone())
        self.register_buffer("shortcut", None)
        self.offset = offset
        if block.shortcut is not None:
            self.shortcut = (exact_weight(block.shortcut) * scale1).to(dtype)
            self.offset = exact_weight(block.shortcut) @ bias1
        self.se = copy.deepcopy(block.se)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, C_in, P), which is overwritten -> (B, C_out, P')."""
        h = self._first_half(x, grid)
        z = self.shift(grid.volume(h))
        if self.shortcut is not None:
            stride = self.shift.stride
            every = grid.volume(x)[..., ::stride, ::stride]
            grid = grid.strided(stride)
            a = self.rectify(grid.matrices(every))
            x = torch.bmm(self.shortcut.expand(len(a), -1, -1), a)
        if self.se is not None:
            z *= self.se.fc(z.mean((3, 4)))[..., None, None]
        return x.baddbmm_(self.conv3.expand(len(x), -1, -1), grid.matrices(z)), grid

    def _first_half(self, x: Tensor, grid: Grid) -> Tensor:
        """Up to the shift: (B, C_in, P) -> (B, C_out, P)."""
        if self.attention is not None:
            x = self._attend(grid.volume(self.rectify(x)), grid)
        moved = None if self.moved is None else self._move(x, grid)
        images, channels, columns = x.shape
        out = x.new_empty(images, len(self.conv2), columns)
        step = max(1, ELEMENTS_AT_ONCE // (channels * columns))
        for index, (part, result) in enumerate(zip(x.split(step), out.split(step), strict=True)):
            a = self.rectify(part) if self.attention is None else part
            if moved is not None:
                a.index_copy_(1, self.moved, moved[index * step : (index + 1) * step])
            weight = self.conv2.expand(len(a), -1, -1)
            torch.baddbmm(self.bias2, weight, a, out=result).relu_()
        return out

    def _move(self, x: Tensor, grid: Grid) -> Tensor:
        """The channels that whole-frame shifts move, rectified: (B, C_in, P) -> (B, moved, P)."""
        assert self.moved is not None
        a = grid.volume(self.rectify_moved(x.index_select(1, self.moved)))
        zero = self.rectify_moved.threshold[:, :, None]  # what frames outside the clip count as
        back, ahead = a[:, :, : self.looking_back], a[:, :, self.looking_back :]
        back.copy_(back.roll(1, dims=1))[:, 0] = zero[: self.looking_back]
        ahead.copy_(ahead.roll(-1, dims=1))[:, -1] = zero[self.looking_back :]
        return grid.matrices(a)

    def _attend(self, x: Tensor, grid: Grid) -> Tensor:
        """The attention shift: (N, T, C, H, W) -> (B, C, P)."""
        assert self.attention is not None
        back, _, ahead = self.attention
        # Frames outside the clip count as zero, which is the threshold here.
        zero = self.rectify.threshold[:, :, None]
        out = mix_frames(x, self.attention)
        out[:, 0] += zero * back
        out[:, -1] += zero * ahead
        return grid.matrices(out)


class InferenceNet(nn.Module):
    """The logits of a network in evaluation mode, computed faster.

    It holds its own weights, so the network can be trained further without changing it, and computes in their type:
    float64, float32 or bfloat16. It has no gradient. Batch norm uses the running statistics whatever the mode.

    Args:
        net: whose weights to take.
    """

    stem: Tensor

    @torch.no_grad()
    def __init__(self, net: RubiksNet) -> None:
        super().__init__()
        self.register_buffer("stem", net.backbone.conv1.weight.clone())
        offset = None
        self.blocks = nn.ModuleList()
        for layer in net.backbone.layers():
            for block in layer:
                assert isinstance(block, RubiksBlock)
                folded = Block(block, offset)
                offset = folded.offset
                self.blocks.append(folded)
        scale, bias = affine(net.backbone.bn_last, offset)
        self.rectify = Rectifier(scale, bias, net.new_fc.weight.dtype)
        self.fc = copy.deepcopy(net.new_fc)
        self.fc.weight.copy_(net.new_fc.weight * scale)
        self.fc.bias.copy_(net.new_fc.bias + net.new_fc.weight.double() @ bias)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """(N, T, 3, H, W), or the official (N, T*3, H, W); any T, H and W -> logits (N, num_classes)."""
        clips = as_clips(clips)
        if not len(clips):
            return clips.new_empty(0, self.fc.out_features)
        with torch.autocast(clips.device.type, enabled=False):
            frames, _, height, width = clips.shape[1:]
            at_once = max(1, PIXELS_AT_ONCE // (frames * height * width))
            return torch.cat([self._classify(part) for part in clips.split(at_once)])

    def _classify(self, clips: Tensor) -> Tensor:
        x = F.conv2d(clips.flatten(0, 1), self.stem, stride=2, padding=1)
        grid = Grid(clips.shape[0], clips.shape[1], x.shape[2], x.shape[3], single=False)
        x = x.flatten(2)
        for block in self.blocks:
            if not grid.single and grid.height * grid.width <= SMALL_IMAGE:
                volume = grid.volume(x)
                grid = grid._replace(single=True)
                x = grid.matrices(volume)
            x, grid = block(x, grid)
        return self.fc(grid.volume(self.rectify(x)).mean((1, 3, 4)))


def affine(norm: nn.BatchNorm2d, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and bias (C,), float64, of a batch norm with its running statistics, of which no scale is quite 0.

    `offset` (C,) is to be added to the norm's input first.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    scale = torch.where(scale.abs() < 1e-30, 1e-30, scale)
    mean = norm.running_mean.double()
    return scale, norm.bias.double() - scale * (mean if offset is None else mean - offset)


def exact_weight(conv: nn.Module) -> Tensor:
    """Weight (C_out, C_in), float64, of a 1x1 convolution."""
    assert isinstance(conv, nn.Conv2d)
    return conv.weight.flatten(1).double()
