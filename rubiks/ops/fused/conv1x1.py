"""1x1 convolutions as products of matrices, together with the norm, ReLU and mix of frames before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rubiks.ops.fused.kernels import FRAMES, compiled
from rubiks.ops.fused.mix import mix_columns
from rubiks.ops.fused.norm import normalize, rectify, row_sums
from rubiks.ops.reference import exact


class Activation(NamedTuple):
    """What comes before a 1x1 convolution: f(x) = relu(scale * x + bias), then the temporal attention shift, if any.

    Attributes:
        scale, bias: (K,), of batch norm.
        attention: (K, 3), weights of the previous, the same and the next frame.
        frames: T; for attention.
    """

    scale: Tensor
    bias: Tensor
    attention: Tensor | None = None
    frames: int = 1

    def compiled(self) -> bool:
        """Whether the compiled kernels take it."""
        return self.attention is None or self.frames in FRAMES

    def __call__(self, x: Tensor) -> Tensor:
        """f(x) in the type of x, for x (K, P)."""
        if self.attention is None:
            return rectify(x, self.scale, self.bias)
        return mix_columns(normalize(x, self.scale, self.bias).relu_(), self.attention, self.frames).to(x.dtype)


NO_ACTIVATION = (None, None, None, 1)  # as the compiled operators take it


def pointwise(
    x: Tensor,
    weight: Tensor,
    activation: Activation | None = None,
    *,
    offset: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    stats: bool = False,
    early: bool = False,
) -> tuple[Tensor, Tensor]:
    """1x1 convolution: y = [relu](weight @ f(x) + offset + residual), where f is the activation or the identity.

    Args:
        x: (K, P).
        weight: (M, K), of x's dtype.
        activation: f.
        offset: (M,).
        residual: (M, P).
        relu: of the result.
        stats: return the row sums.
        early: on a GPU, start while the previous kernel of the stream is still finishing. That kernel must not be the
            one that writes the weight.

    Returns:
        y (M, P), row sums of y and of y^2 (parts, 2, M), which are empty without `stats`.
    """
    takes = activation is None or activation.compiled()
    if compiled(x) and takes and len(x) % 2 == 0 and not (stats and offset is not None):
        before = NO_ACTIVATION if activation is None else activation
        return torch.ops.rubiks.pointwise(x, weight, *before, offset, residual, relu, stats, early)
    a = x if activation is None else activation(x)
    y = torch.mm(weight, a) if residual is None else torch.addmm(residual, weight, a)
    if offset is not None:
        y += offset[:, None]
    if relu:
        y.relu_()
    return y, row_sums(y) if stats else _empty_sums(y)


def pointwise_grad(
    g: Tensor, weight: Tensor, x: Tensor | None = None, activation: Activation | None = None
) -> tuple[Tensor, Tensor]:
    """Gradient of `pointwise`'s input, back to the norm before it.

    weight^T @ g, which with an activation is set to 0 where its ReLU was closed, scale * x + bias <= 0.

    Args:
        g: (M, P), gradient of `pointwise`'s result.
        weight: (M, K).
        x, activation: as in `pointwise`, both or neither; the activation without attention.

    Returns:
        out (K, P), row sums of out and of out * x (parts, 2, K), which are empty without an activation.
    """
    out = torch.mm(weight.t(), g)
    if x is None or activation is None:
        return out, _empty_sums(out)
    out.masked_fill_(normalize(x, activation.scale, activation.bias) <= 0, 0)
    return out, row_sums(out, x)


def pointwise_weight_grad(g: Tensor, x: Tensor, activation: Activation | None = None) -> Tensor:
    """Gradient (M, K) of `pointwise`'s weight: g @ f(x)^T, with g (M, P) and f as in `pointwise`."""
    if compiled(g) and (activation is None or activation.compiled()):
        before = NO_ACTIVATION if activation is None else activation
        return torch.ops.rubiks.pointwise_weight_grad(g, None, None, x, *before)
    return torch.mm(g, (x if activation is None else activation(x)).t()).to(exact(g))


def strided_columns(x: Tensor, geometry: Sequence[int], stride: int) -> Tensor:
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


def _empty_sums(x: Tensor) -> Tensor:
    return x.new_empty(0, dtype=exact(x))
