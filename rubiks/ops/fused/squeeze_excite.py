"""Squeeze-excite (Hu et al., CVPR 2018): of matrices in training, in place in inference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rubiks.ops.fused.kernels import FRAMES, compiled
from rubiks.ops.reference import exact


class Gate(NamedTuple):
    """What the backward of squeeze-excite needs of its forward."""

    means: Tensor  # (C, N*T)
    hidden: Tensor  # (R, N*T), after the ReLU
    logits: Tensor  # (C, N*T)


def excite(x: Tensor, reduce: Tensor, expand: Tensor, geometry: Sequence[int]) -> tuple[Tensor, Gate]:
    """Multiply each channel of a frame by sigmoid(expand @ relu(reduce @ the frame's channel means)).

    Args:
        x: (C, P).
        reduce, expand: (R, C), (C, R), float32 if x is bfloat16.
        geometry: N, T, H, W.

    Returns:
        (C, P), and what the backward needs.
    """
    if compiled(x) and geometry[1] in FRAMES:
        out, *gate = torch.ops.rubiks.excite(x, reduce, expand, geometry)
        return out, Gate(*gate)
    planes = _planes(x, geometry)
    means = planes.mean(2, dtype=exact(x)).flatten(1)
    hidden = (reduce @ means).relu_()
    logits = expand @ hidden
    return _gated(planes, logits).view(x.shape), Gate(means, hidden, logits)


def excite_backward(
    grad: Tensor, x: Tensor, gate: Gate, reduce: Tensor, expand: Tensor, geometry: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the gradient of the result (C, P): the result again, the gradients of x, `reduce` and `expand`."""
    means, hidden, logits = gate
    planes, grads, gates = _planes(x, geometry), _planes(grad, geometry), logits.sigmoid()
    grad_logits = (grads.to(exact(x)) * planes).sum(2).flatten(1) * gates * (1 - gates)
    grad_hidden = (expand.t() @ grad_logits).masked_fill_(hidden <= 0, 0)
    of_means = _per_frame(reduce.t() @ grad_hidden, planes) / planes.shape[2]
    grad_x = (grads * _per_frame(gates, planes) + of_means).to(x.dtype).view(x.shape)
    return _gated(planes, logits).view(x.shape), grad_x, grad_hidden @ means.t(), grad_logits @ hidden.t()


def excite_(x: Tensor, reduce: Tensor, expand: Tensor) -> Tensor:
    """Squeeze-excite in place, of x (N, T, C, H, W), with weights of its type."""
    gates = F.linear(F.linear(x.mean((3, 4)), reduce).relu_(), expand).sigmoid()
    return x.mul_(gates[..., None, None])


def _planes(x: Tensor, geometry: Sequence[int]) -> Tensor:
    """(C, P) -> (C, N, H*W, T)."""
    clips, frames, height, width = geometry
    return x.view(len(x), clips, height * width, frames)


def _per_frame(values: Tensor, planes: Tensor) -> Tensor:
    """(C, N*T) -> (C, N, 1, T)."""
    return values.view(len(planes), planes.shape[1], 1, -1)


def _gated(planes: Tensor, logits: Tensor) -> Tensor:
    return (planes * _per_frame(logits.sigmoid(), planes)).to(planes.dtype)
