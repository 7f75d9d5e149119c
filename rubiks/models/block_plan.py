"""What a residual block computes, by role: the one reader of its parameters and statistics.

With norm1 and norm2 for batch norms, `RubiksBlock` is

    a = relu(norm1(x));  h = relu(norm2(conv2 @ attention(a)));  z = squeeze_excite(shift(h))
    y = conv3 @ z + (shortcut @ a at every stride-th pixel, or x where there is no shortcut)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rubiks.nn import AttentionShift, ChannelShift, RubiksBlock
from rubiks.nn.attention import attention_weights
from rubiks.ops.fused import RunningStatistics


class BlockParameters(NamedTuple):
    """What a block learns, in the order in which the training path takes it and returns gradients."""

    norm1_weight: Tensor  # (C_in,)
    norm1_bias: Tensor  # (C_in,)
    conv2: Tensor  # (C_out, C_in, 1, 1)
    norm2_weight: Tensor  # (C_out,)
    norm2_bias: Tensor  # (C_out,)
    shift: Tensor  # (3 or 2, C_out), the offsets
    conv3: Tensor  # (C_out, C_out, 1, 1)
    shortcut: Tensor | None  # (C_out, C_in, 1, 1)
    attention: Tensor | None  # (C_in, 3), the weights, whose logits are learned
    se_reduce: Tensor | None  # (R, C_out), of squeeze-excite
    se_expand: Tensor | None  # (C_out, R)


class BlockPlan(NamedTuple):
    """A block's parameters, the running statistics of its norms, and its shifts in space and time."""

    parameters: BlockParameters
    norm1: RunningStatistics
    norm2: RunningStatistics
    shift: ChannelShift
    attention: AttentionShift | None

    def fold(self) -> FoldedPlan:
        """The plan of evaluation mode, with tensors of its own."""
        p = self.parameters
        scale, bias = norm_affine(p.norm1_weight, p.norm1_bias, self.norm1)
        scale2, bias2 = norm_affine(p.norm2_weight, p.norm2_bias, self.norm2)
        return FoldedPlan(
            scale=scale,
            bias=bias,
            conv2=scale2[:, None] * _matrix(p.conv2),
            conv2_bias=bias2,
            shift=p.shift.detach().clone(),
            conv3=_matrix(p.conv3),
            shortcut=None if p.shortcut is None else _matrix(p.shortcut),
            attention=None if p.attention is None else p.attention.detach().clone(),
            se_reduce=None if p.se_reduce is None else p.se_reduce.detach().clone(),
            se_expand=None if p.se_expand is None else p.se_expand.detach().clone(),
        )


class FoldedPlan(NamedTuple):
    """A block in evaluation mode: norm1 as scale and bias, norm2 as part of the convolution before it.

    Norms and convolutions are float64, everything else has the block's type.
    """

    scale: Tensor  # (C_in,), none quite 0
    bias: Tensor  # (C_in,)
    conv2: Tensor  # (C_out, C_in)
    conv2_bias: Tensor  # (C_out,)
    shift: Tensor  # (3 or 2, C_out)
    conv3: Tensor  # (C_out, C_out)
    shortcut: Tensor | None  # (C_out, C_in)
    attention: Tensor | None  # (C_in, 3)
    se_reduce: Tensor | None  # (R, C_out)
    se_expand: Tensor | None  # (C_out, R)


def read_plans(blocks: Sequence[RubiksBlock]) -> list[BlockPlan]:
    """The plans of blocks, whose attention weights are computed all at once."""
    shifts = [block.attention for block in blocks]
    return [_read(*parts) for parts in zip(blocks, shifts, attention_weights(shifts), strict=True)]


def _read(block: RubiksBlock, attention: AttentionShift | None, weights: Tensor | None) -> BlockPlan:
    norm1, norm2, shift, shortcut, se = block.bn1, block.bn2, block.shift, block.shortcut, block.se
    parameters = BlockParameters(
        norm1_weight=norm1.weight,
        norm1_bias=norm1.bias,
        conv2=block.first_convolution.weight,
        norm2_weight=norm2.weight,
        norm2_bias=norm2.bias,
        shift=shift.offsets(),
        conv3=block.conv3.weight,
        shortcut=None if shortcut is None else shortcut.weight,
        attention=weights,
        se_reduce=None if se is None else se.reduce.weight,
        se_expand=None if se is None else se.expand.weight,
    )
    return BlockPlan(parameters, running_statistics(norm1), running_statistics(norm2), shift, attention)


def running_statistics(norm: nn.BatchNorm2d) -> RunningStatistics:
    """A norm's running statistics, where they lie."""
    mean, var, batches = norm.running_mean, norm.running_var, norm.num_batches_tracked
    assert mean is not None
    assert var is not None
    assert batches is not None
    return RunningStatistics(mean, var, batches, norm.momentum, norm.eps)


def norm_affine(weight: Tensor, bias: Tensor, running: RunningStatistics) -> tuple[Tensor, Tensor]:
    """Scale and bias (C,), float64, of a batch norm with its running statistics; no scale is quite 0."""
    scale = weight.double() / (running.var.double() + running.eps).sqrt()
    scale = torch.where(scale.abs() < 1e-30, 1e-30, scale)
    return scale, bias.double() - scale * running.mean.double()


def _matrix(weight: Tensor) -> Tensor:
    """(C_out, C_in), float64, of a 1x1 convolution's weight; a copy."""
    return weight.detach().flatten(1).to(torch.float64, copy=True)
