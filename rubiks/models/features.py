"""The backbone in training on a GPU: channel-major matrices from the stem to the last norm (`rubiks.nn.fused`)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rubiks.nn import RubiksBlock
from rubiks.nn.fused import (
    FIELDS,
    Geometry,
    after,
    all_parameters,
    backward_blocks,
    forward_blocks,
    has_hooks,
    plain,
    supports,
    train_blocks,
)
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
        layers = [[block for block in layer if isinstance(block, RubiksBlock)] for layer in backbone.layers()]
        blocks = [block for layer in layers for block in layer]
        parameters = all_parameters(blocks)
        weight = backbone.conv1.weight
        x = None
        if images.is_cuda and recordable(backbone):
            trunk = Trunk(blocks, geometry, dtype)
            with torch.cuda.device(images.device):
                x = backbone.recorder(trunk, trunk.constants(), (images, weight, *parameters))
        if x is not None:
            geometry = after(blocks, geometry)
        else:
            x, sums = Stem.apply(images, frames, weight, dtype)
            for layer in layers:
                own, parameters = parameters[: len(layer) * FIELDS], parameters[len(layer) * FIELDS :]
                x, sums, geometry = train_blocks(layer, own, x, sums, geometry)
        last = backbone.bn_last(geometry.volume(x).flatten(0, 1))
        return F.relu(last, inplace=True).mean((2, 3))


def recordable(backbone: Backbone) -> bool:
    """Whether the recorder is this backbone's alone, and no hook can keep what it makes."""
    replica = getattr(backbone, "_is_replica", False)  # of DataParallel, whose threads share all attributes
    return not replica and not has_hooks(backbone.bn_last)


class Trunk:
    """The stem and all blocks as a `Computation` for the recorder: of the images, the stem's weight and the blocks'
    parameters.
    """

    def __init__(self, blocks: Sequence[RubiksBlock], geometry: Geometry, dtype: torch.dtype) -> None:
        self.blocks = blocks
        self.geometry = geometry
        self.dtype = dtype

    def constants(self) -> Hashable:
        norms = tuple(
            (norm.momentum, norm.eps, *(t.data_ptr() for t in norm.buffers(recurse=False)))
            for block in self.blocks
            for norm in (block.bn1, block.bn2)
        )
        return self.geometry, self.dtype, norms

    def forward(self, *inputs: Any) -> tuple[Tensor, tuple]:
        images, weight, *parameters = inputs
        x, sums, columns = stem(images, self.geometry.frames, weight, self.dtype)
        y, _, steps, kept = forward_blocks(x, sums, self.blocks, self.geometry, parameters)
        return y, (columns, steps, kept)

    def backward(self, grad: Tensor, kept: tuple) -> Sequence[Tensor | None]:
        columns, steps, of_blocks = kept
        gx, gradients = backward_blocks(grad, steps, of_blocks)
        return None, stem_weight_grad(gx, columns), *gradients


class Stem(torch.autograd.Function):
    """`stem`, for autograd. Its images have no gradient."""

    @staticmethod
    def forward(ctx, images: Tensor, frames: int, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, sums, columns = stem(images, frames, weight, dtype)
        ctx.save_for_backward(columns)
        ctx.mark_non_differentiable(sums)
        return x, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gx: Tensor, _):
        (columns,) = ctx.saved_tensors
        return None, None, stem_weight_grad(gx.contiguous(), columns), None


def stem(images: Tensor, frames: int, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The first convolution as a matrix product.

    (N*T, 3, H, W) and the weight (C, 3, 3, 3) -> x (C, P) of `dtype`, its row sums, and what the weight was multiplied
    with.
    """
    columns = fused.stem_columns(images, frames, dtype)
    x, sums = fused.pointwise(columns, stem_matrix(weight).to(dtype), stats=True)
    return x, sums, columns


def stem_weight_grad(gx: Tensor, columns: Tensor) -> Tensor:
    """The gradient (C, 3, 3, 3) of the weight."""
    return fused.pointwise_weight_grad(gx, columns)[:, :27].unflatten(1, (3, 3, 3))


def stem_matrix(weight: Tensor) -> Tensor:
    """(C, 3, 3, 3) -> (C, fused.STEM_ROWS)."""
    return F.pad(weight.flatten(1), (0, fused.STEM_ROWS - 27))


def _working_type(images: Tensor) -> torch.dtype:
    device = images.device.type
    lowers = torch.is_autocast_enabled(device) and images.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lowers else images.dtype
