"""The temporal attention shift: each channel as a weighted sum of the previous, the same and the next frame."""

from __future__ import annotations

import torch
from torch import Tensor

from rubiks.ops.fused.norm import normalize, row_sums


def mix_frames(x: Tensor, weights: Tensor) -> Tensor:
    """(N, T, C, ...), weights (3, C, ...) of the previous, the same and the next frame -> the same shape."""
    back, stay, ahead = weights
    out = x * stay
    out[:, 1:] += x[:, :-1] * back
    out[:, :-1] += x[:, 1:] * ahead
    return out


def mix_columns(x: Tensor, weights: Tensor, frames: int) -> Tensor:
    """`mix_frames` of matrices: x (C, P), weights (C, 3) -> (C, P) in the weights' type."""
    pixels = x.view(len(x), -1, frames).permute(2, 0, 1)  # (T, C, pixels)
    return mix_frames(pixels[None], weights.t()[..., None])[0].permute(1, 2, 0).reshape(x.shape)


def norm_mix_backward(
    gm: Tensor, x: Tensor, scale: Tensor, bias: Tensor, weights: Tensor, frames: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of batch norm, ReLU and the temporal attention shift, for x back to the norm.

    Args:
        gm, x: (C, P), with `frames` frames of each pixel: the gradient of the mix, and the norm's input.
        scale, bias: (C,).
        weights: (C, 3), of the previous, the same and the next frame; frames outside the clip count as zero.

    Returns:
        g (C, P), 0 where the ReLU was closed; the gradient of weights (C, 3); row sums of g and of g * x
        (parts, 2, C).
    """
    a = normalize(x, scale, bias).relu_()
    grads, values = (matrix.view(len(x), -1, frames) for matrix in (gm, a))
    back = (grads[..., 1:] * values[..., :-1]).sum((1, 2))
    stay = (grads * values).sum((1, 2))
    ahead = (grads[..., :-1] * values[..., 1:]).sum((1, 2))
    g = mix_columns(gm, weights.flip(1), frames)  # what came from the previous frame goes back to it
    g = g.masked_fill_(a <= 0, 0).to(x.dtype)
    return g, torch.stack((back, stay, ahead), dim=1), row_sums(g, x)
