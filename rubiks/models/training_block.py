"""A block in training, forward and backward, on channel-major matrices: in PyTorch, and by compiled operators.

The PyTorch implementation is the reference: it defines what the compiled operators compute.

A block passes on the row sums of its result, from which the next one has the statistics of its first batch norm without
reading the matrix again. Batch norms and ReLUs are computed where their result is used, forward and backward, so of a
block only the input and the results of the first convolution and of the shift are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rubiks.models.block_plan import BlockParameters, BlockPlan
from rubiks.models.geometry import Geometry, matrix
from rubiks.ops.fused import (
    FRAMES,
    Activation,
    Gate,
    compiled,
    excite,
    excite_backward,
    norm_coefficients,
    norm_gradients,
    norm_input_grad,
    norm_mix_backward,
    norm_shift,
    norm_shift_backward,
    pointwise,
    pointwise_grad,
    pointwise_weight_grad,
    strided_columns,
)


class Implementation(NamedTuple):
    """A forward of a block and the backward that belongs to it.

    Attributes:
        forward: x (C_in, P), its row sums, the plan, the geometry -> y (C_out, P'), its row sums, the tensors to save.
        backward: the gradient of y, the saved tensors, the geometry, the stride -> the gradients of x and of the
            parameters.
    """

    forward: Callable[[Tensor, Tensor, BlockPlan, Geometry], tuple[Tensor, Tensor, Sequence[Tensor | None]]]
    backward: Callable[[Tensor, Sequence[Tensor | None], Geometry, int], tuple[Tensor, BlockParameters]]


def implementation(x: Tensor, plan: BlockPlan, geometry: Geometry) -> Implementation:
    """The compiled operators where they take this input, else the reference."""
    takes = (
        compiled(x)
        and all(p is None or p.dtype == torch.float32 for p in plan.parameters)
        and geometry.frames in FRAMES
        and plan.shift.stride <= 2
    )
    return COMPILED if takes else REFERENCE


class Saved(NamedTuple):
    """What the backward of the reference needs."""

    x: Tensor  # (C_in, P)
    h: Tensor  # (C_out, P), after the first convolution
    z: Tensor  # (C_out, P'), after the shift
    stats1: Tensor  # (4, C_in), from `norm_coefficients`
    stats2: Tensor  # (4, C_out)
    gate: Gate | None  # of squeeze-excite
    parameters: BlockParameters  # after `cast`

    def flatten(self) -> tuple[Tensor | None, ...]:
        gate = (None, None, None) if self.gate is None else self.gate
        return (*self[:5], *gate, *self.parameters)

    @classmethod
    def unflatten(cls, tensors: Sequence) -> Saved:
        x, h, z, stats1, stats2, means, hidden, logits, *parameters = tensors
        gate = None if means is None else Gate(means, hidden, logits)
        return cls(x, h, z, stats1, stats2, gate, BlockParameters(*parameters))


def cast(p: BlockParameters, dtype: torch.dtype) -> BlockParameters:
    """Convolutions as matrices in `dtype`, as autocast would have them; small weights in the type of arithmetic."""

    def product(weight: Tensor) -> Tensor:
        return weight.to(dtype).flatten(1)

    def exact(weight: Tensor | None) -> Tensor | None:
        return None if weight is None else weight.to(torch.promote_types(dtype, torch.float32))

    return p._replace(
        conv2=product(p.conv2),
        conv3=product(p.conv3),
        shortcut=None if p.shortcut is None else product(p.shortcut),
        attention=exact(p.attention),
        se_reduce=exact(p.se_reduce),
        se_expand=exact(p.se_expand),
    )


def _reference_forward(
    x: Tensor, sums: Tensor, plan: BlockPlan, geometry: Geometry
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    p, stride = cast(plan.parameters, x.dtype), plan.shift.stride
    stats1 = norm_coefficients(sums, x.shape[1], p.norm1_weight, p.norm1_bias, plan.norm1)
    _, _, scale1, bias1 = stats1
    h, sums = pointwise(x, p.conv2, Activation(scale1, bias1, p.attention, geometry.frames), stats=True)
    stats2 = norm_coefficients(sums, h.shape[1], p.norm2_weight, p.norm2_bias, plan.norm2)
    _, _, scale2, bias2 = stats2
    z = matrix(norm_shift(geometry.volume(h), scale2, bias2, p.shift, stride))
    residual = x
    if p.shortcut is not None:
        residual, _ = pointwise(strided_columns(x, geometry, stride), p.shortcut, Activation(scale1, bias1))
    excited, gate = z, None
    if p.se_reduce is not None and p.se_expand is not None:
        excited, gate = excite(z, p.se_reduce, p.se_expand, geometry.strided(stride))
    y, sums = pointwise(excited, p.conv3, residual=residual, stats=True)
    return y, sums, Saved(x, h, z, stats1, stats2, gate, p).flatten()


def _reference_backward(
    gy: Tensor, tensors: Sequence[Tensor | None], geometry: Geometry, stride: int
) -> tuple[Tensor, BlockParameters]:
    x, h, z, stats1, stats2, gate, p = Saved.unflatten(tensors)
    strided = geometry.strided(stride)
    _, _, scale1, bias1 = stats1
    _, _, scale2, bias2 = stats2

    gz, _ = pointwise_grad(gy, p.conv3)
    excited, g_reduce, g_expand = z, None, None
    if gate is not None and p.se_reduce is not None and p.se_expand is not None:
        excited, gz, g_reduce, g_expand = excite_backward(gz, z, gate, p.se_reduce, p.se_expand, strided)
    g_conv3 = pointwise_weight_grad(gy, excited)
    del excited
    g2, g_shift, sums2 = norm_shift_backward(strided.volume(gz), geometry.volume(h), scale2, bias2, p.shift, stride)
    del gz  # here and below: memory for what comes next
    mix2, g_norm2_weight, g_norm2_bias = norm_gradients(sums2, h.shape[1], stats2)
    gh = norm_input_grad(matrix(g2), h, mix2)
    del g2

    g_attention = g_shortcut = None
    g_conv2 = pointwise_weight_grad(gh, x, Activation(scale1, bias1, p.attention, geometry.frames))
    if p.attention is None:
        g1, sums1 = pointwise_grad(gh, p.conv2, x, Activation(scale1, bias1))
    else:
        gm, _ = pointwise_grad(gh, p.conv2)
        g1, g_attention, sums1 = norm_mix_backward(gm, x, scale1, bias1, p.attention, geometry.frames)
        del gm
    del gh
    residual: Tensor | None = gy
    if p.shortcut is not None:
        # Masks and sums are linear in the gradient: the shortcut's part only needs a pass over its own columns.
        residual = None
        columns = strided_columns(x, geometry, stride)
        g_shortcut = pointwise_weight_grad(gy, columns, Activation(scale1, bias1))
        part, sums = pointwise_grad(gy, p.shortcut, columns, Activation(scale1, bias1))
        geometry.volume(g1)[..., ::stride, ::stride] += strided.volume(part)
        sums1 = torch.cat((sums1, sums))
    mix1, g_norm1_weight, g_norm1_bias = norm_gradients(sums1, x.shape[1], stats1)
    gx = norm_input_grad(g1, x, mix1, residual)
    return gx, BlockParameters(
        norm1_weight=g_norm1_weight,
        norm1_bias=g_norm1_bias,
        conv2=g_conv2[..., None, None],
        norm2_weight=g_norm2_weight,
        norm2_bias=g_norm2_bias,
        shift=g_shift,
        conv3=g_conv3[..., None, None],
        shortcut=None if g_shortcut is None else g_shortcut[..., None, None],
        attention=g_attention,
        se_reduce=g_reduce,
        se_expand=g_expand,
    )


class CompiledSaved(NamedTuple):
    """What the compiled backward needs."""

    x: Tensor
    h: Tensor
    z: Tensor
    stats1: Tensor
    stats2: Tensor
    weights: Tensor  # of the convolutions, in bfloat16
    means: Tensor | None  # of squeeze-excite, as in `Gate`
    hidden: Tensor | None
    logits: Tensor | None
    shift: Tensor
    shortcut: Tensor | None
    attention: Tensor | None
    se_reduce: Tensor | None
    se_expand: Tensor | None


def _compiled_forward(
    x: Tensor, sums: Tensor, plan: BlockPlan, geometry: Geometry
) -> tuple[Tensor, Tensor, Sequence[Tensor | None]]:
    p = plan.parameters
    y, sums, h, z, stats1, stats2, weights, means, hidden, logits = torch.ops.rubiks.block_forward(
        x,
        sums,
        geometry,
        plan.shift.stride,
        p.norm1_weight,
        p.norm1_bias,
        *plan.norm1,
        p.norm2_weight,
        p.norm2_bias,
        *plan.norm2,
        p.conv2,
        p.shift,
        p.conv3,
        p.shortcut,
        p.attention,
        p.se_reduce,
        p.se_expand,
    )
    if p.se_reduce is None:  # without squeeze-excite there is no gate to keep, which costs less than empty tensors
        means = hidden = logits = None
    return (
        y,
        sums,
        CompiledSaved(
            x=x,
            h=h,
            z=z,
            stats1=stats1,
            stats2=stats2,
            weights=weights,
            means=means,
            hidden=hidden,
            logits=logits,
            shift=p.shift,
            shortcut=p.shortcut,
            attention=p.attention,
            se_reduce=p.se_reduce,
            se_expand=p.se_expand,
        ),
    )


def _compiled_backward(
    gy: Tensor, tensors: Sequence[Tensor | None], geometry: Geometry, stride: int
) -> tuple[Tensor, BlockParameters]:
    s = CompiledSaved(*tensors)  # type: ignore[arg-type]
    gx, *of_parameters = torch.ops.rubiks.block_backward(
        gy,
        s.x,
        s.h,
        s.z,
        s.stats1,
        s.stats2,
        s.weights,
        s.means,
        s.hidden,
        s.logits,
        geometry,
        stride,
        s.shift,
        s.attention,
        s.se_reduce,
        s.se_expand,
        s.shortcut is not None,
    )
    # In the order of the fields, with empty tensors for what the block does not have.
    gradients = BlockParameters(*of_parameters)
    return gx, gradients._replace(
        shortcut=None if s.shortcut is None else gradients.shortcut,
        attention=None if s.attention is None else gradients.attention,
        se_reduce=None if s.se_reduce is None else gradients.se_reduce,
        se_expand=None if s.se_expand is None else gradients.se_expand,
    )


REFERENCE = Implementation(_reference_forward, _reference_backward)
COMPILED = Implementation(_compiled_forward, _compiled_backward)
