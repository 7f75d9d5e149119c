"""The learnable shift, together with the norm and ReLU before it."""

from __future__ import annotations

import torch
from torch import Tensor

from rubiks.ops import operator
from rubiks.ops.fused.norm import rectify, row_sums
from rubiks.ops.reference import exact

NO_PADDING = (0, 0, 0)


def norm_shift(x: Tensor, scale: Tensor, bias: Tensor, shift: Tensor, stride: int) -> Tensor:
    """Batch norm, ReLU and the learnable shift.

    Args:
        x: (N, T, C, H, W).
        scale, bias: (C,).
        shift: (3, C), rows T, H, W, or (2, C), rows H, W, where time is not shifted.
        stride: of H and W.

    Returns:
        (N, T, C, H', W'), channel-major if x is.
    """
    operator.prepare()
    a, strides = _rectified_volume(x, scale, bias), (1, stride, stride)
    return torch.ops.rubiks.shift(a, shift.to(exact(x)), strides, NO_PADDING, False)


def norm_shift_backward(
    grad: Tensor, x: Tensor, scale: Tensor, bias: Tensor, shift: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `norm_shift`, for x back to the norm.

    Returns:
        g like x, 0 where the ReLU was closed; the gradient of shift; each channel's sums of g and of
        g * x (parts, 2, C).
    """
    operator.prepare()
    a, strides = _rectified_volume(x, scale, bias), (1, stride, stride)
    g, grad_shift = torch.ops.rubiks.shift_backward(
        grad, a, shift.to(exact(x)), strides, NO_PADDING, False, need_x=True, need_shift=True
    )
    g.masked_fill_(a <= 0, 0)
    return g, grad_shift, row_sums(_channels_first(g), _channels_first(x))


def _rectified_volume(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return rectify(x.movedim(2, 0), scale, bias).movedim(0, 2)


def _channels_first(x: Tensor) -> Tensor:
    """(N, T, C, H, W) -> (C, P)."""
    return x.movedim(2, 0).flatten(1)
