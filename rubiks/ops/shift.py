"""The public shift functions: checks, then the implementation."""

from __future__ import annotations

import torch
from torch import Tensor

from rubiks.ops import operator, reference

X_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def shift3d(
    x: Tensor,
    shift: Tensor,
    stride: int | tuple[int, int, int] = (1, 1, 1),
    padding: int | tuple[int, int, int] = (0, 0, 0),
    quantize: bool = False,
    normalize_grad: bool = False,
    normalize_t_factor: float = 1.0,
) -> Tensor:
    """Shift every channel of a clip by its own learnable offset in time and space.

    ``out[n, t, c, h, w]`` is the trilinear interpolation of channel c of x at ``(t * stride[0] - padding[0] +
    shift[0, c], h * stride[1] - padding[1] + shift[1, c], w * stride[2] - padding[2] + shift[2, c])``. Taps outside
    the clip count as zero (RubiksNet, ECCV 2020, section 3.1). At whole-number shifts, where the function has a kink,
    the gradient of shift is the mean of the two one-sided derivatives.

    Args:
        x: clip (N, T, C, H, W), float64, float32, float16 or bfloat16.
        shift: (3, C), rows T, H, W, in frames and pixels of x; any size. Floating point. Arithmetic is done in float64
            for float64 x and in float32 otherwise.
        stride: of T, H and W, at least 1; one number stands for all three.
        padding: zeros on both ends of T, H and W; one number stands for all three.
        quantize: move each channel by the nearest whole number, ``floor(shift + 0.5)``, instead of interpolating. The
            gradient of x is then the transpose of that move, and the gradient of shift is that of the interpolation
            (straight-through).
        normalize_grad: divide each channel's shift gradient by its L2 norm where that is above 0. In training this is
            done once per optimiser step instead; the flag is the official kernel's behaviour.
        normalize_t_factor: with `normalize_grad`, multiplies the T entry before the division.

    Returns:
        (N, T', C, H', W') of x's dtype, each length ``(L + 2 * padding - 1) // stride + 1``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, device or range; on the CPU also where a shift is
            NaN or infinite. On a GPU such a channel gives zeros (its offset lies outside the clip).
    """
    return _checked(x, shift, stride, padding, quantize, normalize_grad, normalize_t_factor, "N, T, C, H, W", "T, H, W")


def shift2d(
    x: Tensor,
    shift: Tensor,
    stride: int | tuple[int, int] = (1, 1),
    padding: int | tuple[int, int] = (0, 0),
    quantize: bool = False,
    normalize_grad: bool = False,
) -> Tensor:
    """Shift every channel of an image by its own learnable offset in space: `shift3d` without time.

    Args:
        x: images (N, C, H, W).
        shift: (2, C), rows H, W, in pixels of x.
        stride, padding: of H and W.
        quantize, normalize_grad: as in `shift3d`.

    Returns:
        (N, C, H', W') of x's dtype.
    """
    return _checked(x, shift, stride, padding, quantize, normalize_grad, 1.0, "N, C, H, W", "H, W")


def _checked(x, shift, stride, padding, quantize, normalize_grad, t_factor, x_axes: str, shift_rows: str) -> Tensor:
    rank, rows = len(x_axes.split(", ")), len(shift_rows.split(", "))
    name = f"shift{rows}d"
    for key, value in (("x", x), ("shift", shift)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {key} must be a tensor, got {type(value).__name__}")
    if x.dtype not in X_DTYPES:
        raise TypeError(f"{name}: x must be float64, float32, float16 or bfloat16, got {x.dtype}")
    if not shift.dtype.is_floating_point:
        raise TypeError(f"{name}: shift must be floating point, got {shift.dtype}")
    if x.dim() != rank:
        raise ValueError(f"{name}: x must be ({x_axes}), got shape {tuple(x.shape)}")
    channels = x.shape[-3]
    if shift.shape != (rows, channels):
        raise ValueError(
            f"{name}: shift must have shape ({rows}, {channels}), rows {shift_rows} for the {channels} channels of x, "
            f"got {tuple(shift.shape)}"
        )
    if x.device != shift.device:
        raise ValueError(f"{name}: x and shift must be on one device, got {x.device} and {shift.device}")
    stride = _per_axis(name, "stride", stride, rows, least=1)
    padding = _per_axis(name, "padding", padding, rows, least=0)
    clip = x if rows == 3 else x.unsqueeze(0)  # images are frames of one clip whose time is not shifted
    if 0 in x.shape[1:]:
        raise ValueError(f"{name}: x must not be empty except in N, got shape {tuple(x.shape)}")
    if normalize_grad:
        shift = _NormalizeGrad.apply(shift, float(t_factor))
    shift = shift.to(reference.exact(x))
    # A compiled graph cannot look at values; there the kernel itself refuses.
    if shift.device.type == "cpu" and not torch.compiler.is_compiling() and not shift.isfinite().all():
        raise ValueError(f"{name}: shift holds NaN or infinity; check the learning rate of the shift parameters")
    operator.prepare()
    out = torch.ops.rubiks.shift(clip, shift, (1, *stride)[-3:], (0, *padding)[-3:], bool(quantize))
    return out if rows == 3 else out.squeeze(0)


class _NormalizeGrad(torch.autograd.Function):
    """The shift itself; its gradient has each channel's column normalised."""

    @staticmethod
    def forward(ctx, shift: Tensor, t_factor: float) -> Tensor:
        ctx.t_factor = t_factor
        return shift.view_as(shift)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return normalize_shift_grad(grad, ctx.t_factor), None


def normalize_shift_grad(grad: Tensor, t_factor: float = 1.0) -> Tensor:
    """Divide each channel's column of a shift gradient (3 or 2, C) by its L2 norm where that is above zero.

    The T entry of a three-row gradient is multiplied by `t_factor` first.
    """
    if len(grad) == 3 and t_factor != 1.0:
        grad = torch.cat((grad[:1] * t_factor, grad[1:]))
    norm = torch.linalg.vector_norm(grad, dim=0, keepdim=True)
    return torch.where(norm > 0, grad / norm, grad)


def _per_axis(name: str, key: str, value, rows: int, least: int) -> tuple[int, ...]:
    values = (value,) * rows if isinstance(value, int) else tuple(value)
    if len(values) != rows or any(not isinstance(v, int) or v < least for v in values):
        raise ValueError(
            f"{name}: {key} must be {rows} whole numbers of at least {least}, or one for all, got {value!r}"
        )
    return values
