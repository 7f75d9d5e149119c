"""Batch norm in training, as a scale and a bias of each row of a matrix (C, P)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rubiks.ops.reference import exact


class RunningStatistics(NamedTuple):
    """The running statistics of a batch norm, which training updates in place, and how."""

    mean: Tensor  # (C,)
    var: Tensor  # (C,)
    batches: Tensor  # number of updates, a scalar
    momentum: float | None  # None, which training here does not support: the mean of all batches
    eps: float


def norm_coefficients(sums: Tensor, count: int, weight: Tensor, bias: Tensor, running: RunningStatistics) -> Tensor:
    """Batch norm in training as a scale and a bias of each row; updates the running statistics.

    Args:
        sums: row sums (parts, 2, C) of the norm's input and its square, over `count` columns.
        weight, bias: the norm's own, (C,).
        running: updated in place; the variance by the unbiased one.

    Returns:
        (4, C): mean, 1 / standard deviation, scale and bias.

    Raises:
        ValueError: there are fewer than two columns, so no variance.
    """
    if count < 2:
        raise ValueError(f"batch norm needs more than one value per channel in training, got {count}")
    assert running.momentum is not None
    mean, square = sums.sum(0) / count
    var = (square - mean * mean).clamp_(min=0)
    rstd = (var + running.eps).rsqrt()
    scale = weight * rstd
    running.mean.lerp_(mean.to(running.mean.dtype), running.momentum)
    running.var.lerp_((var * (count / (count - 1))).to(running.var.dtype), running.momentum)
    running.batches.add_(1)
    return torch.stack((mean, rstd, scale, bias - mean * scale))


def norm_gradients(sums: Tensor, count: int, stats: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of batch norm in training.

    Args:
        sums: row sums (parts, 2, C) of g and of g * x, where g is the gradient of the norm's result and x its input.
        count: columns.
        stats: from `norm_coefficients`.

    Returns:
        mix (3, C), with which dx = mix[0] * g + mix[1] * x + mix[2]; the gradients of weight and of bias (C,).
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


def row_sums(x: Tensor, other: Tensor | None = None) -> Tensor:
    """(C, P) -> (1, 2, C): each row's sums of x and of x * other, or of x^2, which are the statistics of x."""
    exact_x = x.to(exact(x))
    return torch.stack((exact_x.sum(1), (exact_x * (exact_x if other is None else other)).sum(1)))[None]


def normalize(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """scale * x + bias of each row, in the type of arithmetic; x (C, ...)."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    return torch.addcmul(bias.view(shape), x, scale.view(shape))


def rectify(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """relu(scale * x + bias) of each row, in the type of x; x (C, ...)."""
    return normalize(x, scale, bias).relu_().to(x.dtype)
