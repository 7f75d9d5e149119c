"""The backbone in training on a GPU, with few passes over memory: a backward written by hand, on matrices (C, P).

Activations stay channel-major from the stem to the last norm. Frozen stages are run by their modules, without gradient.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rubiks.models.backbone import Backbone
from rubiks.models.block_plan import BlockParameters, BlockPlan, read_plans
from rubiks.models.cuda_graphs import Recorder
from rubiks.models.geometry import Geometry, matrix
from rubiks.models.training_block import Implementation, implementation
from rubiks.models.training_support import has_hooks, supports
from rubiks.ops import fused
from rubiks.ops.fused import pointwise, row_sums, stem_columns, stem_matrix, stem_weight_grad

FIELDS = len(BlockParameters._fields)


def serves(backbone: Backbone, images: Tensor, frames: int) -> bool:
    """Whether `features` is faster than the modules and computes what they would compute now."""
    return (
        images.is_cuda
        and not images.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and _working_type(images) == torch.bfloat16
        and fused.available(images.device)
        and images.numel() > 0
        and frames in fused.FRAMES
        and supports(backbone)
    )


def features(backbone: Backbone, images: Tensor, frames: int, recorder: Recorder | None = None) -> Tensor:
    """The backbone's features, equal to those of its modules except for rounding.

    Args:
        backbone: one that `supports` accepts.
        images: (N*T, 3, H, W), clip after clip.
        frames: T.
        recorder: of CUDA graphs; None: do without.

    Returns:
        (N*T, C).
    """
    dtype = _working_type(images)
    frozen = backbone.frozen_stages
    source, weight = images, None if frozen else backbone.conv1.weight
    height, width = (-(-side // 2) for side in images.shape[2:])
    if frozen:
        with torch.no_grad():
            source = backbone.run_stages(images, frames, frozen).to(dtype)
        height, width = source.shape[2:]
        source = matrix(source.unflatten(0, (-1, frames)))
    geometry = Geometry(len(images) // frames, frames, height, width)
    with torch.autocast(images.device.type, enabled=False):
        stages = backbone.stages(frozen)
        plans = read_plans([block for stage in stages for block in stage])
        parameters = [p if p is None else p.contiguous() for plan in plans for p in plan.parameters]
        x = None
        if recorder is not None and images.is_cuda and not has_hooks(backbone.bn_last):  # a hook could keep the result
            trunk = Trunk(plans, geometry, dtype)
            with torch.cuda.device(images.device):
                x = recorder(trunk, trunk.constants(), (source, weight, *parameters))
        if x is None:
            x, sums = (source, row_sums(source)) if weight is None else Stem.apply(images, frames, weight, dtype)
            start, stage_geometry = 0, geometry
            for stage in stages:
                end = start + len(stage)
                own = plans[start:end], parameters[start * FIELDS : end * FIELDS]
                x, sums, stage_geometry = train_blocks(*own, x, sums, stage_geometry)
                start = end
        last = backbone.bn_last(geometry_after(plans, geometry).volume(x).flatten(0, 1))
        return F.relu(last, inplace=True).mean((2, 3))


def parameters(backbone: Backbone) -> list[nn.Parameter]:
    """The parameters among the inputs of a recording (`Trunk`), in their order."""
    frozen = backbone.frozen_stages
    plans = read_plans([block for stage in backbone.stages(frozen) for block in stage])
    inputs = [None if frozen else backbone.conv1.weight, *(p for plan in plans for p in plan.parameters)]
    return [parameter for parameter in inputs if isinstance(parameter, nn.Parameter)]


class Trunk:
    """The stem and all blocks as a `Computation` for the recorder.

    Its inputs are the images, the stem's weight and the blocks' parameters; after frozen stages, their result (C, P),
    None and the parameters of the other blocks.
    """

    def __init__(self, plans: Sequence[BlockPlan], geometry: Geometry, dtype: torch.dtype) -> None:
        self.plans = plans
        self.geometry = geometry
        self.dtype = dtype

    def constants(self) -> Hashable:
        """What the result depends on besides the inputs."""
        norms = tuple(
            (norm.momentum, norm.eps, norm.mean.data_ptr(), norm.var.data_ptr(), norm.batches.data_ptr())
            for plan in self.plans
            for norm in (plan.norm1, plan.norm2)
        )
        return self.geometry, self.dtype, norms

    def forward(self, *inputs: Any) -> tuple[Tensor, tuple]:
        source, weight, *parameters = inputs
        if weight is None:
            x, sums, columns = source, row_sums(source), None
        else:
            x, sums, columns = _stem(source, self.geometry.frames, weight, self.dtype)
        y, _, steps, saved = _forward_blocks(x, sums, self.plans, self.geometry, parameters)
        return y, (columns, steps, saved)

    def backward(self, grad: Tensor, kept: tuple) -> Sequence[Tensor | None]:
        columns, steps, saved = kept
        gx, gradients = _backward_blocks(grad, steps, saved)
        return None, None if columns is None else stem_weight_grad(gx, columns), *gradients


class Stem(torch.autograd.Function):
    """The first convolution, for autograd: x (C, P) and its row sums. Its images have no gradient."""

    @staticmethod
    def forward(ctx, images: Tensor, frames: int, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x, sums, columns = _stem(images, frames, weight, dtype)
        ctx.save_for_backward(columns)
        ctx.mark_non_differentiable(sums)
        return x, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gx: Tensor, _):
        (columns,) = ctx.saved_tensors
        return None, None, stem_weight_grad(gx.contiguous(), columns), None


def _stem(images: Tensor, frames: int, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(N*T, 3, H, W), weight (C, 3, 3, 3) -> x (C, P) of `dtype`, its row sums, and the columns it was made of."""
    columns = stem_columns(images, frames, dtype)
    x, sums = pointwise(columns, stem_matrix(weight).to(dtype), stats=True)
    return x, sums, columns


def train_blocks(
    plans: Sequence[BlockPlan], parameters: Sequence[Tensor | None], x: Tensor, sums: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Geometry]:
    """Some blocks in turn: x (C_in, P) and its row sums -> y (C_out, P'), its row sums and its geometry.

    `parameters` are those of the plans, one plan after the other, each contiguous.
    """
    x, sums = Blocks.apply(x, sums, plans, geometry, *parameters)
    return x, sums, geometry_after(plans, geometry)


def geometry_after(plans: Sequence[BlockPlan], geometry: Geometry) -> Geometry:
    """The geometry of the blocks' result."""
    for plan in plans:
        geometry = geometry.strided(plan.shift.stride)
    return geometry


class Blocks(torch.autograd.Function):
    """Some blocks in training mode, one after the other, for autograd.

    One function for several blocks costs less than one each. Its memory is freed at the end of its backward.

    The row sums that come with the input and go with the result have no gradient of their own: the backward of the
    block that uses them as the statistics of its norm gives the whole gradient of its input.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, sums: Tensor, plans: Sequence[BlockPlan], geometry: Geometry, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        y, sums, ctx.steps, saved = _forward_blocks(x, sums, plans, geometry, parameters)
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(sums)
        return y, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gy: Tensor, _):
        need_x, _, _, _, *needs = ctx.needs_input_grad
        gx, gradients = _backward_blocks(gy.contiguous(), list(ctx.steps), list(ctx.saved_tensors))
        wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return gx if need_x else None, None, None, None, *wanted


class Step(NamedTuple):
    """What the backward of a block needs besides its saved tensors."""

    implementation: Implementation
    geometry: Geometry
    stride: int
    saved: int  # number of tensors


def _forward_blocks(
    x: Tensor, sums: Tensor, plans: Sequence[BlockPlan], geometry: Geometry, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Step], list[Tensor | None]]:
    """The blocks with these parameters: y, its row sums, and what `_backward_blocks` takes."""
    steps: list[Step] = []
    saved_by_all: list[Tensor | None] = []
    for plan, own in zip(plans, _in_groups(parameters), strict=True):
        plan = plan._replace(parameters=own)
        chosen = implementation(x, plan, geometry)
        x, sums, saved = chosen.forward(x, sums, plan, geometry)
        steps.append(Step(chosen, geometry, plan.shift.stride, len(saved)))
        saved_by_all += saved
        geometry = geometry.strided(plan.shift.stride)
    return x, sums, steps, saved_by_all


def _backward_blocks(
    gy: Tensor, steps: list[Step], saved: list[Tensor | None]
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The gradients of x and of all parameters. Empties both lists, so that memory is freed as soon as it was used."""
    gradients: list[Tensor | None] = []
    while steps:
        chosen, geometry, stride, count = steps.pop()
        gy, of_block = chosen.backward(gy, saved[-count:], geometry, stride)
        del saved[-count:]
        gradients[:0] = of_block
    return gy, gradients


def _in_groups(parameters: Sequence[Tensor | None]) -> Iterator[BlockParameters]:
    for start in range(0, len(parameters), FIELDS):
        yield BlockParameters(*parameters[start : start + FIELDS])  # type: ignore[arg-type]


def _working_type(images: Tensor) -> torch.dtype:
    """The type that convolutions compute in: autocast's where it is on."""
    device = images.device.type
    lowers = torch.is_autocast_enabled(device) and images.dtype != torch.float64
    return torch.get_autocast_dtype(device) if lowers else images.dtype
