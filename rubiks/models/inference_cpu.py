"""Inference on a CPU: batch norm folded away, few passes over memory."""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rubiks.models.backbone import Backbone
from rubiks.models.block_plan import BlockPlan, norm_affine, read_plans, running_statistics
from rubiks.models.clips import as_clips
from rubiks.nn.shift import shift_clips
from rubiks.ops.fused import excite_, mix_frames

# Measured on two CPU cores.
PIXELS_AT_ONCE = 8 * 224 * 224  # larger batches are split: their buffers would be requested from the system every time
ELEMENTS_AT_ONCE = 1_500_000  # between a norm and its convolution, so that they are still in the cache
SMALL_IMAGE = 14 * 14  # pixels; up to this size one large matrix is faster than one per frame


class Grid(NamedTuple):
    """Which pixels the columns of a layer's matrices are.

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
    """Batch norm and ReLU as a clamp, up to a scale and an offset.

    relu(s x + b) is s max(x, t) + b with t = -b / s where s is positive, and s min(x, t) + b where it is negative. The
    next linear layer includes s and b.

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
        # Scales are rarely negative, so the second bound is rarely needed.
        self.register_buffer("high", torch.where(falling, threshold, infinity).to(dtype) if falling.any() else None)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, P) -> a new tensor of the same shape."""
        out = torch.maximum(x, self.low)
        return out if self.high is None else torch.minimum(out, self.high, out=out)


class Block(nn.Module):
    """A residual block that works in place.

    Args:
        plan: of the block.
        offset: (C_in,), of the input: it has yet to be added to x.
        dtype: of the weights.

    Attributes:
        offset: of the output, likewise left to the next block. It holds the bias of a folded shortcut.
        attention: weights (3, C_in, 1, 1) of a soft attention shift.
        moved: the channels of a hard one that take another frame; the first `looking_back` of them the previous one.
    """

    shift: Tensor
    conv2: Tensor
    bias2: Tensor
    conv3: Tensor
    shortcut: Tensor | None
    attention: Tensor | None
    moved: Tensor | None
    se_reduce: Tensor | None
    se_expand: Tensor | None

    def __init__(self, plan: BlockPlan, offset: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        folded, temporal = plan.fold(), plan.attention
        self.stride, self.quantize = plan.shift.stride, plan.shift.quantize
        scale1 = folded.scale
        bias1 = folded.bias if offset is None else folded.bias + scale1 * offset
        self.rectify = Rectifier(scale1, bias1, dtype)
        attention = moved = None
        if temporal is not None and temporal.back is not None and temporal.ahead is not None:
            self.looking_back = len(temporal.back)
            channels = torch.cat((temporal.back, temporal.ahead))
            if len(channels):
                moved = channels
                self.rectify_moved = Rectifier(scale1[moved], bias1[moved], dtype)
        elif folded.attention is not None:  # back, stay, ahead; as in (C, H, W)
            attention = folded.attention.t()[:, :, None, None]
        shortcut, self.offset = None, offset
        if folded.shortcut is not None:
            shortcut = (folded.shortcut * scale1).to(dtype)
            self.offset = folded.shortcut @ bias1
        for name, value in (
            ("attention", attention),
            ("moved", moved),
            ("conv2", (folded.conv2 * scale1).to(dtype)),
            ("bias2", (folded.conv2 @ bias1 + folded.conv2_bias)[:, None].to(dtype)),
            ("shift", folded.shift),
            ("se_reduce", folded.se_reduce),
            ("se_expand", folded.se_expand),
            ("conv3", folded.conv3.to(dtype)),
            ("shortcut", shortcut),
        ):
            self.register_buffer(name, value)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """(B, C_in, P), which is overwritten -> (B, C_out, P')."""
        mixed = None if self.attention is None else self._attend(grid.volume(self.rectify(x)), grid)
        moved = None if self.moved is None else self._move(x, grid)
        h = self.convolve(x, mixed, moved)
        z = shift_clips(grid.volume(h), self.shift, self.stride, self.quantize)
        return self.finish(x, z, grid)

    def finish(self, x: Tensor, z: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        """From the shift on: x (B, C_in, P), which is overwritten, and z (N, T, C_out, H', W') -> (B, C_out, P')."""
        if self.shortcut is not None:
            strided = grid.volume(x)[..., :: self.stride, :: self.stride]
            grid = grid.strided(self.stride)
            a = self.rectify(grid.matrices(strided))
            x = torch.bmm(self.shortcut.expand(len(a), -1, -1), a)
        if self.se_reduce is not None and self.se_expand is not None:
            excite_(z, self.se_reduce, self.se_expand)
        return x.baddbmm_(self.conv3.expand(len(x), -1, -1), grid.matrices(z)), grid

    def convolve(self, x: Tensor, mixed: Tensor | None, moved: Tensor | None) -> Tensor:
        """Up to the shift: (B, C_in, P) -> (B, C_out, P).

        Args:
            x: the block's input.
            mixed: the result (B, C_in, P) of the soft attention shift, if there is one.
            moved: the channels (B, moved, P) that whole-frame shifts move, if there are any: moved and rectified.
        """
        x = x if mixed is None else mixed
        images, channels, columns = x.shape
        out = x.new_empty(images, len(self.conv2), columns)
        step = max(1, ELEMENTS_AT_ONCE // (channels * columns))
        for index, (part, result) in enumerate(zip(x.split(step), out.split(step), strict=True)):
            a = self.rectify(part) if mixed is None else part
            if moved is not None:
                a.index_copy_(1, self.moved, moved[index * step : (index + 1) * step])
            weight = self.conv2.expand(len(a), -1, -1)
            torch.baddbmm(self.bias2, weight, a, out=result).relu_()
        return out

    def _move(self, x: Tensor, grid: Grid) -> Tensor:
        """The channels that whole-frame shifts move, moved and rectified: (B, C_in, P) -> (B, moved, P)."""
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

    It has its own weights, so further training of the network does not change it, and computes in their type: float64,
    float32 or bfloat16. It has no gradient. Batch norm uses the running statistics whatever the mode.

    Args:
        backbone, classifier: of the network, whose weights are copied.
    """

    stem: Tensor

    @torch.no_grad()
    def __init__(self, backbone: Backbone, classifier: nn.Linear) -> None:
        super().__init__()
        dtype = classifier.weight.dtype
        self.register_buffer("stem", backbone.conv1.weight.clone())
        offset = None
        self.blocks = nn.ModuleList()
        for plan in read_plans(backbone.blocks()):
            block = Block(plan, offset, dtype)
            offset = block.offset
            self.blocks.append(block)
        last = backbone.bn_last
        scale, bias = norm_affine(last.weight, last.bias, running_statistics(last))
        if offset is not None:
            bias = bias + scale * offset
        self.rectify = Rectifier(scale, bias, dtype)
        self.fc = copy.deepcopy(classifier)
        self.fc.weight.copy_(classifier.weight * scale)
        self.fc.bias.copy_(classifier.bias + classifier.weight.double() @ bias)
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
