"""The learnable shift in plain PyTorch: the definition that every faster implementation is compared with.

The shift is multilinear interpolation, so it factors into one linear map per axis. With x of shape (N, T, C, H, W) and
a shift s per channel and axis, the map of one axis is

    out[j] = (1 - f) * x[j * stride - padding + k] + f * x[j * stride - padding + k + 1],    k = floor(s), f = s - k,

where x is zero outside. Forward applies the maps of W, H and T in turn; backward applies their transposes in the
opposite order and, for the gradient of the shift, the derivative of each map (RubiksNet, ECCV 2020, section 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

T_AXIS, H_AXIS, W_AXIS = 1, 3, 4


class _Axis(NamedTuple):
    """The linear maps of one axis. Output j reads x at j * stride + offset for each offset; weights are per channel."""

    dim: int
    length: int  # of x along dim
    out_length: int
    stride: int
    offsets: list[int]
    forward: Tensor  # (offsets, 1, 1, C, 1, 1), on x's device
    interpolation: Tensor  # the same unless quantised
    derivative: Tensor  # d out / d shift


def _axis(
    dim: int, shift: Tensor, stride: int, padding: int, quantize: bool, length: int, device: torch.device
) -> _Axis:
    out_length = (length + 2 * padding - 1) // stride + 1
    # Beyond this distance every tap is outside; the limit also keeps infinite and NaN shifts within int64.
    limit = float(length + 2 * padding + 3)
    shift = shift.nan_to_num(nan=limit).clamp(-limit, limit)
    base = shift.floor()
    fraction = shift - base
    zero, one = torch.zeros_like(shift), torch.ones_like(shift)
    # Taps at base - 1, base, base + 1. At a whole number the interpolation has a kink: the derivative there is the mean
    # of the two one-sided ones, which reaches back to base - 1.
    kink = fraction == 0
    interpolation = torch.stack((zero, 1 - fraction, fraction))
    derivative = torch.stack(
        (torch.where(kink, -0.5, zero), torch.where(kink, zero, -one), torch.where(kink, 0.5, one))
    )
    up = ((shift + 0.5).floor() > base).to(shift.dtype)
    forward = torch.stack((zero, 1 - up, up)) if quantize else interpolation

    # Few offsets are in use, so each is one slice of x for all channels, with weight zero for channels that skip it.
    taps = base.to(torch.int64) - padding + torch.tensor([[-1], [0], [1]])
    used = torch.unique(taps[(interpolation != 0) | (derivative != 0) | (forward != 0)])
    matches = (taps == used.view(-1, 1, 1)).to(shift.dtype)  # (offsets, 3, C)
    tables = torch.stack([(matches * weights).sum(1) for weights in (forward, interpolation, derivative)])
    tables = tables.view(3, len(used), 1, 1, shift.numel(), 1, 1).to(device)
    return _Axis(dim, length, out_length, stride, used.tolist(), *tables)


def _slices(axis: _Axis, offset: int) -> tuple[tuple, tuple] | None:
    """For one offset, the slices of the output and of x for outputs that read inside x; None if there are none."""
    start = max(0, -(offset // axis.stride))
    stop = min(axis.out_length, (axis.length - 1 - offset) // axis.stride + 1)
    if start >= stop:
        return None
    before = (slice(None),) * axis.dim
    first = start * axis.stride + offset
    last = (stop - 1) * axis.stride + offset
    return (*before, slice(start, stop)), (*before, slice(first, last + 1, axis.stride))


def _apply(x: Tensor, axis: _Axis, weights: Tensor) -> Tensor:
    shape = list(x.shape)
    shape[axis.dim] = axis.out_length
    out = x.new_zeros(shape)
    for offset, weight in zip(axis.offsets, weights, strict=True):
        if slices := _slices(axis, offset):
            out[slices[0]].addcmul_(x[slices[1]], weight)
    return out


def _transpose(grad: Tensor, axis: _Axis, weights: Tensor) -> Tensor:
    shape = list(grad.shape)
    shape[axis.dim] = axis.length
    out = grad.new_zeros(shape)
    for offset, weight in zip(axis.offsets, weights, strict=True):
        if slices := _slices(axis, offset):
            out[slices[1]].addcmul_(grad[slices[0]], weight)
    return out


def _axes(x: Tensor, shift: Tensor, stride: Sequence[int], padding: Sequence[int], quantize: bool) -> list[_Axis]:
    """The maps to apply in turn, W first. shift has rows T, H, W, or H, W if time is not shifted."""
    # The tables are small and need Python integers: making them on the CPU waits for a GPU only once.
    rows = shift.detach().to("cpu", exact(x))
    first = 3 - len(rows)
    settings = zip((T_AXIS, H_AXIS, W_AXIS)[first:], rows, stride[first:], padding[first:], strict=True)
    return [_axis(d, s, st, p, quantize, x.shape[d], x.device) for d, s, st, p in settings][::-1]


def exact(x: Tensor) -> torch.dtype:
    """The type in which every implementation computes on x."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_volume(x: Tensor, t: int, h: int, w: int) -> Tensor:
    """New tensor (N, t, C, h, w) like x: channel-major, (C, N, T, H, W) in memory, if x is, otherwise contiguous.

    Every implementation lays out its results like this (empty_volume in ext/shift/shift.cpp).
    """
    n, c = x.shape[0], x.shape[2]
    if x.stride(2) > x.stride(1) and x.stride(2) >= x.stride(0):
        return x.new_empty(c, n, t, h, w).permute(1, 2, 0, 3, 4)
    return x.new_empty(n, t, c, h, w)


def forward(x: Tensor, shift: Tensor, stride: Sequence[int], padding: Sequence[int], quantize: bool) -> Tensor:
    """Shift x (N, T, C, H, W) by shift (3, C), rows T, H, W, or (2, C), rows H, W, if time is not shifted.

    `stride` and `padding` are for T, H and W. Computes in float64 for float64 x, else in float32. The caller checks the
    arguments.
    """
    if x.device.type == "cpu" and not shift.isfinite().all():
        raise ValueError("shift holds NaN or infinity")
    out = x.to(exact(x))
    for axis in _axes(x, shift, stride, padding, quantize):
        out = _apply(out, axis, axis.forward)
    return empty_volume(x, out.shape[T_AXIS], *out.shape[H_AXIS:]).copy_(out)


def backward(
    grad: Tensor,
    x: Tensor,
    shift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    quantize: bool,
    need_x: bool,
    need_shift: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of shift for the gradient of `forward`'s result; an empty tensor for one not needed."""
    axes = _axes(x, shift, stride, padding, quantize)
    upstream = grad.to(exact(x))
    grad_x = grad_shift = None
    if need_shift:
        grad_x, grad_shift = _interpolation_backward(upstream, x.to(exact(x)), axes)
    if need_x and (quantize or grad_x is None):  # exact for x; shift's passes straight through the rounding
        grad_x = upstream
        for axis in reversed(axes):
            grad_x = _transpose(grad_x, axis, axis.forward)
    if need_x and grad_x is not None:
        grad_x = empty_volume(x, x.shape[T_AXIS], *x.shape[H_AXIS:]).copy_(grad_x)
    else:
        grad_x = x.new_empty(0)
    return grad_x, shift.new_empty(0) if grad_shift is None else grad_shift.to(shift.dtype)


def _interpolation_backward(grad: Tensor, x: Tensor, axes: list[_Axis]) -> tuple[Tensor, Tensor]:
    inputs = []  # of each axis's map
    for axis in axes:
        inputs.append(x)
        if axis is not axes[-1]:
            x = _apply(x, axis, axis.interpolation)
    rows = []
    for axis, x in zip(reversed(axes), reversed(inputs), strict=True):
        rows.append((grad * _apply(x, axis, axis.derivative)).sum((0, 1, 3, 4)))
        grad = _transpose(grad, axis, axis.interpolation)
    return grad, torch.stack(rows)
