"""The backbone in training on a GPU: channel-major matrices from the stem to the last norm (`rubiks.nn.fused`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rubiks.nn import RubiksBlock
from rubiks.nn.fused import Geometry, attention_weights, has_hooks, plain, supports, train_blocks
from rubiks.ops import fused

if TYPE_CHECKING:
    from rubiks.models.rubiksnet import Backbone


def serves(backbone: Backbone, images: Tensor, frames: int) -> bool:
    """Whether `features` is faster than the modules and does what they would do now."""
    return (
        images.is_cuda
        and not images.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _working_type(images) == torch.bfloat16
        and fused.available(images.device)
        and images.numel() > 0
        and frames in fused.FRAMES
        and replaceable(backbone)
    )


def replaceable(backbone: Backbone) -> bool:
    """Whether the modules of the backbone are those that `features` knows, in training mode and without hooks."""
    stem = backbone.conv1
    return (
        type(stem) is nn.Conv2d
        and plain(stem, kernel=3, stride=2, padding=1)
        and not has_hooks(stem)
        and all(supports(block) for layer in backbone.layers() for block in layer)
    )


def features(backbone: Backbone, images: Tensor, frames: int) -> Tensor:
    """(N*T, 3, H, W), the frames of a clip adjoining -> (N*T, C), equal to the modules' but for rounding."""
    dtype = _working_type(images)
    with torch.autocast(images.device.type, enabled=False):
        height, width = (-(-side // 2) for side in images.shape[2:])
        geometry = Geometry(len(images) // frames, frames, height, width)
        x, sums = Stem.apply(images, frames, backbone.conv1.weight, dtype)
        layers = [[block for block in layer if isinstance(block, RubiksBlock)] for layer in backbone.layers()]
        attentions = iter(attention_weights([block for blocks in layers for block in blocks]))
        for blocks in layers:
            x, sums, geometry = train_blocks(blocks, [next(attentions) for _ in blocks], x, sums, geometry)
        last = backbone.bn_last(geometry.volume(x).flatten(0, 1))
        return F.relu(last, inplace=True).mean((2, 3))


class Stem(torch.autograd.Function):
    """The first convolution as a matrix product. Its images have no gradient."""

    @staticmethod
    def forward(ctx, images: Tensor, frames: int, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(N*T, 3, H, W) and the weight (C, 3, 3, 3) -> x (C, P) of `dtype`, its row sums."""
        columns = fused.stem_columns(images, frames, dtype)
        x, sums = fused.pointwise(columns, stem_matrix(weight).to(dtype), stats=True)
        ctx.save_for_backward(columns)
        ctx.mark_non_differentiable(sums)
        return x, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gx: Tensor, _):
        (columns,) = ctx.saved_tensors
        gradient = fused.pointwise_weight_grad(gx.contiguous(), columns)
        return None, None, gradient[:, :27].unflatten(1, (3, 3, 3)), None


def stem_matrix(weight: Tensor) -> Tensor:
    """(C, 3, 3, 3) -> (C, fused.STEM_ROWS)."""
    return F.pad(weight.flatten(1), (0, fused.STEM_ROWS - 27))


def _working_type(images: Tensor) -> torch.dtype:
    device = images.device.type
    lowers = torch.is_autocast_enabled(device) and images.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lowers else images.dtype
