"""The operators of the fused residual block: compiled kernels, and their definition in plain PyTorch.

Activations are channel-major matrices (C, P): a row per channel, a column per pixel of every frame of every clip, in
the order N, H, W, T: the frames of a pixel adjoin, so that a shift in time stays within a few bytes and one in space
moves whole runs of them. A 1x1 convolution is a matrix product, and batch norm scales and offsets rows. So each
operator is a product or a shift with the norm, the ReLU, the mix of frames and the row sums that stand before or after
it, and what a norm puts out is never stored.

Products are made in the type of x. All other arithmetic is in float64 for float64 x and in float32 otherwise, and so
are statistics, coefficients and the gradients of parameters. Row sums come in parts (parts, 2, C) that are still to be
added, since a kernel's blocks each have their own.

The compiled kernels take bfloat16 on GPUs of compute capability 8.0 and up with shared memory enough, and clips of 8 or
16 frames. Everything else runs in PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rubiks.ops import library, operator
from rubiks.ops.reference import exact

FRAMES = (8, 16)  # of clips that the compiled kernels take
SHARED_MEMORY = 120_000  # bytes that a block needs: data centre GPUs have them, those for games do not


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the compiled kernels run on a device."""
    if device.type != "cuda" or not library.load().compiled("CUDA"):
        return False
    found: Any = torch.cuda.get_device_properties(device)  # its type lacks an attribute before PyTorch 2.15
    return (found.major, found.minor) >= (8, 0) and found.shared_memory_per_block_optin >= SHARED_MEMORY


def compiled(x: Tensor) -> bool:
    """Whether the compiled kernels take matrices (C, P) like x."""
    return x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 and x.numel() > 0 and available(x.device)


def row_sums(x: Tensor) -> Tensor:
    """(C, ...) -> (1, 2, C): each row's sum and sum of squares, what batch norm needs to know of x."""
    return _sums(x, x)


def pointwise(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    attention: Tensor | None = None,
    frames: int = 1,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    stats: bool = False,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """1x1 convolution of a matrix, after batch norm and ReLU where there is a scale, and the temporal attention shift.

    y = [relu](weight @ f(x) + offset + residual), with f(x) = relu(scale * x + bias), or x without scale; with
    attention, f(x) is mixed with its neighbouring frames.

    Args:
        x: (K, P).
        weight: (M, K), of x's dtype.
        scale, bias: (K,), both or none.
        attention: (K, 3), weights of the previous, the same and the next frame; needs scale and bias.
        frames: T; for attention.
        offset: (M,).
        residual: (M, P).
        relu: of the result.
        stats: return the row sums.
        early: on a GPU, begin while the kernel before in the stream ends, which then must not be the one that writes
            the weight.

    Returns:
        y (M, P), row sums of y and of y^2 (parts, 2, M); these empty without `stats`.
    """
    takes = attention is None or frames in FRAMES
    if compiled(x) and takes and len(x) % 2 == 0 and not (stats and offset is not None):
        return torch.ops.rubiks.pointwise(
            x, weight, scale, bias, attention, frames, offset, residual, relu, stats, early
        )
    a = _input(x, scale, bias, attention, frames)
    y = torch.mm(weight, a) if residual is None else torch.addmm(residual, weight, a)
    if offset is not None:
        y += offset[:, None]
    if relu:
        y.relu_()
    return y, row_sums(y) if stats else _nothing(y)


def pointwise_grad(
    g: Tensor, weight: Tensor, x: Tensor | None = None, scale: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of `pointwise`'s input, down to the norm before it.

    weight^T @ g, which with a scale is set to 0 where the ReLU was closed, scale * x + bias <= 0.

    Args:
        g: (M, P), gradient of `pointwise`'s result.
        weight: (M, K).
        x, scale, bias: of `pointwise`, where it had a scale.

    Returns:
        out (K, P), row sums of out and of out * x (parts, 2, K); these empty without scale.
    """
    out = torch.mm(weight.t(), g)
    if x is None or scale is None or bias is None:
        return out, _nothing(out)
    out.masked_fill_(_normalize(x, scale, bias) <= 0, 0)
    return out, _sums(out, x)


def pointwise_weight_grad(
    g: Tensor,
    x: Tensor,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    attention: Tensor | None = None,
    frames: int = 1,
) -> Tensor:
    """Gradient (M, K) of `pointwise`'s weight: g @ f(x)^T, with g (M, P) and f as in `pointwise`."""
    if compiled(g) and (attention is None or frames in FRAMES):
        return torch.ops.rubiks.pointwise_weight_grad(g, None, None, x, scale, bias, attention, frames)
    return torch.mm(g, _input(x, scale, bias, attention, frames).t()).to(exact(g))


def norm_shift(
    x: Tensor, scale: Tensor, bias: Tensor, shift: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Tensor:
    """Batch norm, ReLU and the learnable shift.

    Args:
        x: (N, T, C, H, W).
        scale, bias: (C,).
        shift: (3, C), rows T, H, W, or (2, C), rows H, W, where time is not shifted.
        stride, padding: of T, H and W.

    Returns:
        (N, T', C, H', W'), channel-major if x is.
    """
    operator.prepare()
    return torch.ops.rubiks.shift(_rectified_volume(x, scale, bias), shift.to(exact(x)), stride, padding, False)


def norm_shift_backward(
    grad: Tensor,
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    shift: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `norm_shift`, for x down to the norm.

    Returns:
        g like x, 0 where the ReLU was closed; the gradient of shift; each channel's sums of g and of
        g * x (parts, 2, C).
    """
    operator.prepare()
    a = _rectified_volume(x, scale, bias)
    g, grad_shift = torch.ops.rubiks.shift_backward(
        grad, a, shift.to(exact(x)), stride, padding, False, need_x=True, need_shift=True
    )
    g.masked_fill_(a <= 0, 0)
    return g, grad_shift, _sums(_channels_first(g), _channels_first(x))


def mix_frames(x: Tensor, weights: Tensor) -> Tensor:
    """(N, T, C, ...), weights (3, C, ...) of the previous, the same and the next frame -> the same shape."""
    back, stay, ahead = weights
    out = x * stay
    out[:, 1:] += x[:, :-1] * back
    out[:, :-1] += x[:, 1:] * ahead
    return out


def norm_mix_backward(
    gm: Tensor, x: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of batch norm, ReLU and the temporal attention shift, for x down to the norm.

    Args:
        gm, x: (C, P), with `frames` frames of each pixel: the gradient of the mix, and the norm's input.
        scale, bias: (C,).
        weights: (C, 3), of the previous, the same and the next frame; frames outside the clip count as zero.

    Returns:
        g (C, P), 0 where the ReLU was closed; the gradient of weights (C, 3); row sums of g and of g * x
        (parts, 2, C).
    """
    a = _normalize(x, scale, bias).relu_()
    grads, values = (matrix.view(len(x), -1, frames) for matrix in (gm, a))
    back = (grads[..., 1:] * values[..., :-1]).sum((1, 2))
    stay = (grads * values).sum((1, 2))
    ahead = (grads[..., :-1] * values[..., 1:]).sum((1, 2))
    g = _mix(gm, weights.flip(1), frames)  # what came from the previous frame goes back to it
    g = g.masked_fill_(a <= 0, 0).to(x.dtype)
    return g, torch.stack((back, stay, ahead), dim=1), _sums(g, x)


def every(x: Tensor, geometry: Sequence[int], stride: int) -> Tensor:
    """The columns that a strided convolution reads: rows and columns 0, stride, 2 * stride, ... of every frame.

    Args:
        x: (C, P).
        geometry: N, T, H, W.

    Returns:
        (C, P').
    """
    clips, frames, height, width = geometry
    if compiled(x) and frames in FRAMES:
        return torch.ops.rubiks.every(x, geometry, stride)
    return x.view(len(x), clips, height, width, frames)[:, :, ::stride, ::stride].flatten(1)


def excite(x: Tensor, down: Tensor, up: Tensor, geometry: Sequence[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Squeeze-excite (Hu et al., CVPR 2018): each channel of a frame times sigmoid(up @ relu(down @ its means)).

    Args:
        x: (C, P).
        down, up: (R, C), (C, R).
        geometry: N, T, H, W.

    Returns:
        (C, P); for the backward the means (C, N*T), the hidden values (R, N*T) and the logits (C, N*T).
    """
    planes = _planes(x, geometry)
    means = planes.mean(2, dtype=exact(x)).flatten(1)
    hidden = (down @ means).relu_()
    logits = up @ hidden
    return _gated(planes, logits).view(x.shape), means, hidden, logits


def excite_backward(
    grad: Tensor,
    x: Tensor,
    means: Tensor,
    hidden: Tensor,
    logits: Tensor,
    down: Tensor,
    up: Tensor,
    geometry: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of its result (C, P): the result of `excite` again, the gradients of x, `down` and `up`."""
    planes, grads, gates = _planes(x, geometry), _planes(grad, geometry), logits.sigmoid()
    grad_logits = (grads.to(exact(x)) * planes).sum(2).flatten(1) * gates * (1 - gates)
    grad_hidden = (up.t() @ grad_logits).masked_fill_(hidden <= 0, 0)
    of_means = _per_frame(down.t() @ grad_hidden, planes) / planes.shape[2]
    grad_x = (grads * _per_frame(gates, planes) + of_means).to(x.dtype).view(x.shape)
    return _gated(planes, logits).view(x.shape), grad_x, grad_hidden @ means.t(), grad_logits @ hidden.t()


STEM_ROWS = 28  # 3 x 3 x 3 values of a window, and zeros: the kernels take even numbers


def stem_columns(images: Tensor, frames: int, dtype: torch.dtype) -> Tensor:
    """The windows of a 3x3 convolution with stride 2 and padding 1: (N*T, 3, H, W) -> (STEM_ROWS, P) of `dtype`."""
    takes = images.dtype in (torch.float32, torch.bfloat16) and dtype == torch.bfloat16 and frames in FRAMES
    if takes and available(images.device):
        return torch.ops.rubiks.stem_columns(images.contiguous(), frames)
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)  # (N*T, 3, H', W', 3, 3)
    windows = windows.unflatten(0, (-1, frames)).permute(2, 5, 6, 0, 3, 4, 1)
    columns = images.new_zeros(STEM_ROWS, windows[0, 0, 0].numel(), dtype=dtype)
    columns[:27].view(windows.shape).copy_(windows)
    return columns


def norm_coefficients(
    sums: Tensor,
    count: int,
    weight: Tensor,
    beta: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
) -> Tensor:
    """Batch norm in training as a scale and a bias of each row; updates the running statistics.

    Args:
        sums: row sums (parts, 2, C) of the norm's input and its square, over `count` columns.
        weight, beta: (C,).
        running_mean, running_var: (C,), updated in place; the variance by the unbiased one.

    Returns:
        (4, C): mean, 1 / standard deviation, scale and bias.

    Raises:
        ValueError: there are fewer than two columns, so no variance.
    """
    if count < 2:
        raise ValueError(f"batch norm needs more than one value per channel in training, got {count}")
    mean, square = sums.sum(0) / count
    var = (square - mean * mean).clamp_(min=0)
    rstd = (var + eps).rsqrt()
    scale = weight * rstd
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
    return torch.stack((mean, rstd, scale, beta - mean * scale))


def norm_gradients(sums: Tensor, count: int, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of batch norm in training.

    Args:
        sums: row sums (parts, 2, C) of g and of g * x, g being the gradient of the norm's result and x its input.
        count: columns.
        stats: of `norm_coefficients`.

    Returns:
        mix (3, C), with which dx = mix[0] * g + mix[1] * x + mix[2]; the gradients of weight and of beta (C,).
    """
    mean, rstd, scale, _ = stats
    total, product = sums.sum(0)
    grad_weight = rstd * (product - mean * total)
    slope = -scale * rstd * grad_weight / count
    return torch.stack((scale, slope, -scale * total / count - slope * mean)), grad_weight, total


def norm_input_grad(g: Tensor, x: Tensor, mix: Tensor, residual: Tensor | None = None) -> Tensor:
    """Gradient of batch norm's input: mix[0] * g + mix[1] * x + mix[2] + residual, all (C, P) but mix (3, C)."""
    slope, of_x, constant = mix[:, :, None]
    out = torch.addcmul(constant, g, slope).addcmul_(x, of_x)
    if residual is not None:
        out += residual
    return out.to(g.dtype)


def _normalize(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """scale * x + bias of each row, in the type of arithmetic; x (C, ...)."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    return torch.addcmul(bias.view(shape), x, scale.view(shape))


def _rectify(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return _normalize(x, scale, bias).relu_().to(x.dtype)


def _input(x: Tensor, scale: Tensor | None, bias: Tensor | None, attention: Tensor | None, frames: int) -> Tensor:
    if scale is None or bias is None:
        return x
    if attention is None:
        return _rectify(x, scale, bias)
    return _mix(_normalize(x, scale, bias).relu_(), attention, frames).to(x.dtype)


def _rectified_volume(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return _rectify(x.movedim(2, 0), scale, bias).movedim(0, 2)


def _planes(x: Tensor, geometry: Sequence[int]) -> Tensor:
    """(C, P) -> (C, N, H*W, T)."""
    clips, frames, height, width = geometry
    return x.view(len(x), clips, height * width, frames)


def _per_frame(values: Tensor, planes: Tensor) -> Tensor:
    """(C, N*T) -> (C, N, 1, T)."""
    return values.view(len(planes), planes.shape[1], 1, -1)


def _gated(planes: Tensor, logits: Tensor) -> Tensor:
    return (planes * _per_frame(logits.sigmoid(), planes)).to(planes.dtype)


def _channels_first(x: Tensor) -> Tensor:
    """(N, T, C, H, W) -> (C, P)."""
    return x.movedim(2, 0).flatten(1)


def _mix(x: Tensor, weights: Tensor, frames: int) -> Tensor:
    """`mix_frames` of matrices: x (C, P), weights (C, 3) -> (C, P) in the weights' type."""
    pixels = x.view(len(x), -1, frames).permute(2, 0, 1)  # (T, C, pixels)
    return mix_frames(pixels[None], weights.t()[..., None])[0].permute(1, 2, 0).reshape(x.shape)


def _sums(g: Tensor, x: Tensor) -> Tensor:
    """Row sums of g and of g * x (1, 2, C)."""
    g = g.to(exact(g))
    return torch.stack((g.sum(1), (g * x).sum(1)))[None]


def _nothing(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=exact(x))
