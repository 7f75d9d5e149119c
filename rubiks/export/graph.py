"""A network in standard operators alone, for other runtimes.

Activations are channel-major, (N, C, T, H, W), so that each part of a block is an ordinary 2D convolution of a view:

- 1x1 convolutions, of (N, C, T*H, W);
- interpolation along W, depthwise with kernel (1, K), of the same view;
- interpolation along T and H, depthwise with kernel (K, K), of (N, C, T, H*W). Along H*W its dilation is W, so that
  a tap is a whole number of rows away, and taps above or below the frame are in the padding.

Interpolation is linear and zero outside (`rubiks.ops.reference`), so a depthwise kernel with each channel's two weights
per axis gives exactly the shift, whichever offsets the channels have.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rubiks.models import RubiksNet
from rubiks.models.block_plan import BlockPlan, norm_affine, read_plans, running_statistics
from rubiks.nn import Normalize

EPS = 1e-5  # PyTorch wants it positive


def taps(offsets: Tensor, quantize: bool, length: float) -> Tensor:
    """Weights (C, 2 R + 1) of the pixels at -R to R that each channel's interpolation along one axis takes.

    R is as small as the offsets (C,) allow. Pixels `length` or more away are always outside.
    """
    offsets = offsets.float()  # rounded as where the network computes
    base = (offsets + 0.5).floor() if quantize else offsets.floor()
    fraction = torch.zeros_like(base) if quantize else offsets - base
    ends = torch.cat((base, (base + 1)[fraction > 0])).abs()
    ends = ends[ends < length]
    reach = int(ends.max()) if len(ends) else 0
    places = torch.arange(-reach, reach + 1)
    left, right = places == base[:, None], places == base[:, None] + 1
    return left * (1 - fraction[:, None]) + right * fraction[:, None]


class Affine(nn.Module):
    """Scale and bias (C,) of each channel, as a batch norm, which runtimes know how to fuse."""

    scale: Tensor
    bias: Tensor
    mean: Tensor
    var: Tensor

    def __init__(self, scale: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale.float())
        self.register_buffer("bias", bias.float())
        self.register_buffer("mean", torch.zeros(len(scale)))
        self.register_buffer("var", torch.ones(len(scale)) - EPS)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.scale, self.bias, eps=EPS)


class Shift(nn.Module):
    """The shift of a block: (N, C, T*H, W) -> (N, C, T*H', W').

    Args:
        offsets: (3, C), or (2, C) without time.
        stride: of H and W.
        quantize: move by the nearest whole numbers.
        size: T, H and W of the input.
    """

    along_w: Tensor  # (C, 1, 1, K)
    along_t_h: Tensor  # (C, 1, K, K')

    def __init__(self, offsets: Tensor, stride: int, quantize: bool, size: tuple[int, int, int]) -> None:
        super().__init__()
        self.stride, self.height = stride, size[1]
        rows = offsets if len(offsets) == 3 else torch.cat((torch.zeros_like(offsets[:1]), offsets))
        t, h, w = (taps(row, quantize, length) for row, length in zip(rows, size, strict=True))
        self.register_buffer("along_w", w[:, None, None])
        self.register_buffer("along_t_h", (t[:, :, None] * h[:, None])[:, None])

    def forward(self, x: Tensor, frames: int) -> Tensor:
        kernel = self.along_w
        x = F.conv2d(x, kernel, stride=(1, self.stride), padding=(0, kernel.shape[3] // 2), groups=len(kernel))
        kernel, (_, channels, _, width) = self.along_t_h, x.shape
        padding = kernel.shape[2] // 2, kernel.shape[3] // 2 * width
        x = x.reshape(-1, channels, frames, self.height * width)
        x = F.conv2d(x, kernel, padding=padding, dilation=(1, width), groups=len(kernel))
        if self.stride > 1:
            x = x.reshape(-1, channels, frames, self.height, width)[:, :, :, :: self.stride]
        return x.reshape(-1, channels, frames * -(-self.height // self.stride), width)


class Attention(nn.Module):
    """The soft attention shift, of weights (C, 3): (N, C, T, P) -> the same shape."""

    weights: Tensor

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights[:, None, :, None].float())

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weights, padding=(1, 0), groups=len(self.weights))


class Move(nn.Module):
    """The hard attention shift, which puts the channels in another order: those that stay, look back, look ahead.

    (N, C, T, P) -> the same shape.

    Args:
        back, ahead: indices of the channels that take the previous and the next frame.
        channels: C.
    """

    stay: Tensor
    back: Tensor
    ahead: Tensor

    def __init__(self, back: Tensor, ahead: Tensor, channels: int) -> None:
        super().__init__()
        moved = torch.cat((back, ahead))
        every = torch.arange(channels)
        for name, value in (("stay", every[~torch.isin(every, moved)]), ("back", back), ("ahead", ahead)):
            self.register_buffer(name, value.clone())

    def order(self) -> Tensor:
        """The channel (C,) that each channel of the result comes from."""
        return torch.cat((self.stay, self.back, self.ahead))

    def forward(self, x: Tensor) -> Tensor:
        parts = [x.index_select(1, self.stay)] if len(self.stay) else []
        if len(self.back):
            parts.append(F.pad(x.index_select(1, self.back)[:, :, :-1], (0, 0, 1, 0)))
        if len(self.ahead):
            parts.append(F.pad(x.index_select(1, self.ahead)[:, :, 1:], (0, 0, 0, 1)))
        return torch.cat(parts, 1)


class Residual(nn.Module):
    """What a block in evaluation mode does within each frame, apart from its shift.

    Attributes:
        temporal: the attention shift, if it does something; after a `Move`, conv2 takes the channels in its order.
        stride: of H and W.
    """

    conv2: Tensor
    bias2: Tensor
    conv3: Tensor
    shortcut: Tensor | None
    reduce: Tensor | None
    expand: Tensor | None

    def __init__(self, plan: BlockPlan) -> None:
        super().__init__()
        folded, temporal = plan.fold(), plan.attention
        self.norm = Affine(folded.scale, folded.bias)
        conv2 = folded.conv2
        self.temporal: Attention | Move | None = None
        if temporal is not None and temporal.back is not None and temporal.ahead is not None:
            if not temporal.still:
                self.temporal = Move(temporal.back, temporal.ahead, len(folded.scale))
                conv2 = conv2[:, self.temporal.order()]
        elif folded.attention is not None:
            self.temporal = Attention(folded.attention)
        self.stride = plan.shift.stride
        self.register_buffer("bias2", folded.conv2_bias.float())
        for name, matrix in (
            ("conv2", conv2),
            ("conv3", folded.conv3),
            ("shortcut", folded.shortcut),
            ("reduce", folded.se_reduce),
            ("expand", folded.se_expand),
        ):
            self.register_buffer(name, None if matrix is None else matrix[..., None, None].float())

    def excite(self, z: Tensor, frames: int) -> Tensor:
        """Squeeze-excite, if there is any: (N, C, T*H, W) -> the same shape."""
        if self.reduce is None or self.expand is None:
            return z
        pixels = z.reshape(-1, z.shape[1], frames, z.shape[2] // frames * z.shape[3])
        gate = F.conv2d(F.relu(F.conv2d(pixels.mean(3, keepdim=True), self.reduce)), self.expand).sigmoid()
        return (pixels * gate).reshape(z.shape)


class Block(Residual):
    """A residual block for clips of one size: T, H and W."""

    def __init__(self, plan: BlockPlan, size: tuple[int, int, int]) -> None:
        super().__init__(plan)
        self.height = size[1]
        self.shift = Shift(plan.parameters.shift.detach(), self.stride, plan.shift.quantize, size)

    def forward(self, x: Tensor, frames: int) -> Tensor:
        """(N, C, T*H, W) -> (N, C', T*H', W')."""
        _, channels, rows, width = x.shape
        a = F.relu(self.norm(x))
        if self.shortcut is not None:
            picked = a
            if self.stride > 1:
                picked = a.reshape(-1, channels, frames, self.height, width)[..., :: self.stride, :: self.stride]
                picked = picked.flatten(2, 3)
            x = F.conv2d(picked, self.shortcut)
        if self.temporal is not None:
            a = self.temporal(a.reshape(-1, channels, frames, self.height * width)).reshape(-1, channels, rows, width)
        h = F.relu(F.conv2d(a, self.conv2, self.bias2))
        return F.conv2d(self.excite(self.shift(h, frames), frames), self.conv3) + x


class Ends(nn.Module):
    """What comes before and after a network's blocks.

    Args:
        net: on the CPU; its weights are copied.
        uint8: take pixels from 0 to 255, and scale and normalise them.
    """

    conv1: Tensor

    def __init__(self, net: RubiksNet, uint8: bool) -> None:
        super().__init__()
        self.normalize = Normalize() if uint8 else None
        self.register_buffer("conv1", net.backbone.conv1.weight.detach().float().clone())
        last = net.backbone.bn_last
        self.norm = Affine(*norm_affine(last.weight.detach(), last.bias.detach(), running_statistics(last)))
        self.classifier = copy.deepcopy(net.new_fc).float()

    def stem(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H', W')."""
        frames = frames if self.normalize is None else self.normalize(frames)
        return F.conv2d(frames, self.conv1, stride=2, padding=1)

    def classify(self, x: Tensor) -> Tensor:
        """(N, C, H', W') -> (N, classes)."""
        return self.classifier(F.relu(self.norm(x)).mean((2, 3)))


class ExportNet(Ends):
    """The logits of a network in evaluation mode, for clips of one size, on the CPU in float32.

    Args:
        net, uint8: as in `Ends`.
        frames: of the clips, at most.
        height, width: of the clips.
    """

    @torch.no_grad()
    def __init__(self, net: RubiksNet, frames: int, height: int, width: int, uint8: bool = False) -> None:
        super().__init__(net, uint8)
        height, width = -(-height // 2), -(-width // 2)
        self.blocks = nn.ModuleList()
        for plan in read_plans(net.backbone.blocks()):
            self.blocks.append(Block(plan, (frames, height, width)))
            height, width = (-(-side // plan.shift.stride) for side in (height, width))
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(N, T, 3, H, W) -> (N, classes)."""
        frames = pixel_values.shape[1]
        x = self.stem(pixel_values.flatten(0, 1))
        x = x.unflatten(0, pixel_values.shape[:2]).transpose(1, 2).flatten(2, 3)
        for block in self.blocks:
            x = block(x, frames)
        return self.classify(x)
