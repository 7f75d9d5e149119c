"""Training of the residual blocks with few passes over memory: a backward written by hand, on channel-major matrices.

Activations stay (C, P) from the stem to the last norm. A block hands on the row sums of its result, from which the next
one has its first batch norm without reading the matrix again. Batch norms and ReLUs are computed where their result is
used, forward and backward, so that of a block only the input and the results of the first convolution and of the shift
are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rubiks.nn.attention import AttentionShift, attention
from rubiks.nn.block import RubiksBlock, SqueezeExcite
from rubiks.nn.shift import FixedTimeShift, GroupedShift, LearnableShift
from rubiks.ops.fused import (
    FRAMES,
    compiled,
    every,
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
)

MODULES = {RubiksBlock, nn.BatchNorm2d, nn.Conv2d, nn.Sequential, AttentionShift, LearnableShift}
MODULES |= {SqueezeExcite, nn.Linear, nn.ReLU, nn.Sigmoid, FixedTimeShift, GroupedShift}


class Geometry(NamedTuple):
    """Which pixels the columns of a matrix (C, P) are: in the order N, H, W, T, as `rubiks.ops.fused` has them."""

    clips: int
    frames: int
    height: int
    width: int

    def volume(self, x: Tensor) -> Tensor:
        """(C, P) -> view (N, T, C, H, W)."""
        return x.view(len(x), self.clips, self.height, self.width, self.frames).permute(1, 4, 0, 2, 3)

    def columns(self) -> int:
        return self.clips * self.frames * self.height * self.width

    def strided(self, stride: int) -> Geometry:
        return self._replace(height=-(-self.height // stride), width=-(-self.width // stride))


def matrix(volume: Tensor) -> Tensor:
    """(N, T, C, H, W) -> (C, P), contiguous."""
    return volume.permute(2, 0, 3, 4, 1).flatten(1).contiguous()


class Parameters(NamedTuple):
    """What a block learns, in the order in which `FusedBlocks` takes it and returns gradients."""

    gamma1: Tensor  # (C_in,)
    beta1: Tensor  # (C_in,)
    conv2: Tensor  # (C_out, C_in, 1, 1)
    gamma2: Tensor  # (C_out,)
    beta2: Tensor  # (C_out,)
    shift: Tensor  # (3 or 2, C_out), the offsets
    conv3: Tensor  # (C_out, C_out, 1, 1)
    shortcut: Tensor | None  # (C_out, C_in, 1, 1)
    attention: Tensor | None  # (C_in, 3), the weights, of which the logits are learned
    down: Tensor | None  # (R, C_out), of squeeze-excite
    up: Tensor | None  # (C_out, R)

    @classmethod
    def of(cls, block: RubiksBlock, attention: Tensor | None) -> Parameters:
        return cls(
            gamma1=block.bn1.weight,
            beta1=block.bn1.bias,
            conv2=weight(block.first_convolution),
            gamma2=block.bn2.weight,
            beta2=block.bn2.bias,
            shift=block.shift.offsets(),
            conv3=weight(block.conv3),
            shortcut=None if block.shortcut is None else weight(block.shortcut),
            attention=attention,
            down=None if block.se is None else weight(block.se.fc[0]),
            up=None if block.se is None else weight(block.se.fc[2]),
        )

    def cast(self, dtype: torch.dtype) -> Parameters:
        """Convolutions as matrices in `dtype`, as autocast would have them; small weights in the type of arithmetic."""

        def matrix(weight: Tensor) -> Tensor:
            return weight.to(dtype).flatten(1)

        def exact(weight: Tensor | None) -> Tensor | None:
            return None if weight is None else weight.to(torch.promote_types(dtype, torch.float32))

        return self._replace(
            conv2=matrix(self.conv2),
            conv3=matrix(self.conv3),
            shortcut=None if self.shortcut is None else matrix(self.shortcut),
            attention=exact(self.attention),
            down=exact(self.down),
            up=exact(self.up),
        )

    def all_float32(self) -> bool:
        return all(parameter is None or parameter.dtype == torch.float32 for parameter in self)


FIELDS = len(Parameters._fields)


def weight(layer: nn.Module) -> Tensor:
    """(C_out, C_in, 1, 1) of a 1x1 convolution, or (C_out, C_in) of a linear layer."""
    assert isinstance(layer, nn.Conv2d | nn.Linear)
    return layer.weight.contiguous()


def supports(block: nn.Module) -> bool:
    """Whether `train_blocks` does what the block's modules would do now.

    It does for the modules that `RubiksBlock` makes, in training mode: batch norms with scale, offset and running
    statistics averaged by a fixed momentum. Not for modules of other types put in their place (such
    as `nn.SyncBatchNorm`), nor with hooks, which would not be called.
    """
    return isinstance(block, RubiksBlock) and unchanged(block)


def unchanged(module: nn.Module) -> bool:
    """Whether a module and those in it are of the types that `RubiksBlock` makes, without hooks, in training mode."""
    kind = type(module)
    if kind not in MODULES or has_hooks(module) or "forward" in vars(module):
        return False
    if isinstance(module, nn.BatchNorm2d):
        return averages(module)
    if isinstance(module, nn.Linear):
        return module.bias is None and not module._modules
    if isinstance(module, nn.Conv2d):
        return plain(module, kernel=1, stride=module.stride[0], padding=0)
    return all(child is None or unchanged(child) for child in module._modules.values())


def plain(conv: nn.Conv2d, kernel: int, stride: int, padding: int) -> bool:
    """Whether a convolution is one that the network makes: square, with zeros around, without bias and groups."""
    return (
        conv.kernel_size == (kernel, kernel)
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.padding_mode == "zeros"
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.bias is None
        and not conv._modules
    )


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def averages(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm uses the batch's statistics and adds them to the running ones by a fixed momentum."""
    tracks = norm.training and norm.track_running_stats and norm.running_mean is not None
    return (
        tracks
        and norm.num_batches_tracked is not None
        and norm.momentum is not None
        and norm.weight is not None
        and norm.bias is not None
    )


def statistics(norm: nn.BatchNorm2d, sums: Tensor, count: int) -> Tensor:
    """Mean, 1 / standard deviation, scale and bias (4, C) of a norm, whose running statistics are updated."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    stats = norm_coefficients(
        sums, count, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps
    )
    norm.num_batches_tracked.add_(1)
    return stats


class FusedBlocks(torch.autograd.Function):
    """Some `RubiksBlock`s in training mode, one after the other.

    One function for several blocks costs less than one each. Its memory is freed at the end of its backward.

    The row sums that come with the input and go with the result have no gradient of their own: the backward of the
    block that uses them as the statistics of its norm gives the whole gradient of its input.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, sums: Tensor, blocks: Sequence[RubiksBlock], geometry: Geometry, *parameters: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """x (C_in, P), its row sums, `Parameters` of all blocks -> y (C_out, P'), its row sums."""
        y, sums, ctx.steps, kept = forward_blocks(x, sums, blocks, geometry, parameters)
        ctx.save_for_backward(*kept)
        ctx.mark_non_differentiable(sums)
        return y, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, gy: Tensor, _):
        need_x, _, _, _, *needs = ctx.needs_input_grad
        gx, gradients = backward_blocks(gy.contiguous(), list(ctx.steps), list(ctx.saved_tensors))
        wanted = (gradient if need else None for gradient, need in zip(gradients, needs, strict=True))
        return gx if need_x else None, None, None, None, *wanted


class Step(NamedTuple):
    """What the backward of a block is, besides its tensors."""

    backward: Callable
    geometry: Geometry
    stride: int
    kept: int  # tensors that it takes


def forward_blocks(
    x: Tensor, sums: Tensor, blocks: Sequence[RubiksBlock], geometry: Geometry, parameters: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, list[Step], list[Tensor | None]]:
    """x (C_in, P), its row sums, `Parameters` of all blocks -> y (C_out, P'), its row sums; for `backward_blocks` steps
    and tensors.
    """
    steps: list[Step] = []
    kept_by_all: list[Tensor | None] = []
    for index, block in enumerate(blocks):
        p = Parameters(*parameters[index * FIELDS : (index + 1) * FIELDS])  # type: ignore[arg-type]
        stride = block.shift.stride
        forward: Callable = forward_reference
        backward: Callable = backward_reference
        if compiled(x) and p.all_float32() and geometry.frames in FRAMES and stride <= 2:
            forward, backward = forward_compiled, backward_compiled
        y, sums, kept = forward(x, sums, block, p, geometry, stride)
        steps.append(Step(backward, geometry, stride, 1 + len(kept)))
        kept_by_all += [x, *kept]
        x, geometry = y, geometry.strided(stride)
    return x, sums, steps, kept_by_all


def backward_blocks(gy: Tensor, steps: list[Step], kept: list[Tensor | None]) -> tuple[Tensor, Sequence[Tensor | None]]:
    """The gradients of x and of all parameters. Empties both lists, so that memory is free once it has served."""
    gradients: list[Tensor | None] = []
    while steps:
        backward, geometry, stride, count = steps.pop()
        gy, of_block = backward(geometry, stride, gy, *kept[-count:])
        del kept[-count:]
        gradients[:0] = of_block
    return gy, gradients


def forward_reference(
    x: Tensor, sums: Tensor, block: RubiksBlock, parameters: Parameters, geometry: Geometry, stride: int
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """What `FusedBlocks` computes of each: the result, its row sums, and what `backward_reference` takes besides x."""
    p = parameters.cast(x.dtype)
    stats1 = statistics(block.bn1, sums, x.shape[1])
    _, _, scale1, bias1 = stats1
    h, sums = pointwise(x, p.conv2, scale1, bias1, p.attention, geometry.frames, stats=True)
    stats2 = statistics(block.bn2, sums, h.shape[1])
    _, _, scale2, bias2 = stats2
    z = matrix(norm_shift(geometry.volume(h), scale2, bias2, p.shift, (1, stride, stride), (0, 0, 0)))
    residual = x
    if p.shortcut is not None:
        residual, _ = pointwise(every(x, geometry, stride), p.shortcut, scale1, bias1)
    excited, means, hidden, logits = z, None, None, None
    if p.down is not None and p.up is not None:
        excited, means, hidden, logits = excite(z, p.down, p.up, geometry.strided(stride))
    y, sums = pointwise(excited, p.conv3, residual=residual, stats=True)
    return y, sums, (h, z, stats1, stats2, means, hidden, logits, *p)


def backward_reference(
    geometry: Geometry,
    stride: int,
    gy: Tensor,
    x: Tensor,
    h: Tensor,
    z: Tensor,
    stats1: Tensor,
    stats2: Tensor,
    means: Tensor | None,
    hidden: Tensor | None,
    logits: Tensor | None,
    *parameters: Tensor,
) -> tuple[Tensor, Parameters]:
    """The gradients of x and of the parameters."""
    p = Parameters(*parameters)
    strided = geometry.strided(stride)
    _, _, scale1, bias1 = stats1
    _, _, scale2, bias2 = stats2

    gz, _ = pointwise_grad(gy, p.conv3)
    excited, g_down, g_up = z, None, None
    if p.down is not None and p.up is not None:
        assert means is not None
        assert hidden is not None
        assert logits is not None
        excited, gz, g_down, g_up = excite_backward(gz, z, means, hidden, logits, p.down, p.up, strided)
    g_conv3 = pointwise_weight_grad(gy, excited)
    del excited
    g2, g_shift, sums2 = norm_shift_backward(
        strided.volume(gz), geometry.volume(h), scale2, bias2, p.shift, (1, stride, stride), (0, 0, 0)
    )
    del gz  # here and below: memory for what comes next
    mix2, g_gamma2, g_beta2 = norm_gradients(sums2, h.shape[1], stats2)
    gh = norm_input_grad(matrix(g2), h, mix2)
    del g2

    g_attention = g_shortcut = None
    g_conv2 = pointwise_weight_grad(gh, x, scale1, bias1, p.attention, geometry.frames)
    if p.attention is None:
        g1, sums1 = pointwise_grad(gh, p.conv2, x, scale1, bias1)
    else:
        gm, _ = pointwise_grad(gh, p.conv2)
        g1, g_attention, sums1 = norm_mix_backward(gm, x, scale1, bias1, p.attention, geometry.frames)
        del gm
    del gh
    residual: Tensor | None = gy
    if p.shortcut is not None:
        # Masks and sums are linear in the gradient: the shortcut's part is worth a pass over its own columns only.
        residual = None
        columns = every(x, geometry, stride)
        g_shortcut = pointwise_weight_grad(gy, columns, scale1, bias1)
        part, sums = pointwise_grad(gy, p.shortcut, columns, scale1, bias1)
        geometry.volume(g1)[..., ::stride, ::stride] += strided.volume(part)
        sums1 = torch.cat((sums1, sums))
    mix1, g_gamma1, g_beta1 = norm_gradients(sums1, x.shape[1], stats1)
    gx = norm_input_grad(g1, x, mix1, residual)
    return gx, Parameters(
        g_gamma1,
        g_beta1,
        g_conv2[..., None, None],
        g_gamma2,
        g_beta2,
        g_shift,
        g_conv3[..., None, None],
        None if g_shortcut is None else g_shortcut[..., None, None],
        g_attention,
        g_down,
        g_up,
    )


def forward_compiled(
    x: Tensor, sums: Tensor, block: RubiksBlock, parameters: Parameters, geometry: Geometry, stride: int
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """`forward_reference` by the compiled operator; with what `backward_compiled` takes."""
    p = parameters
    y, sums, *kept = torch.ops.rubiks.block_forward(
        x,
        sums,
        geometry,
        stride,
        *norm(block.bn1),
        *norm(block.bn2),
        p.conv2,
        p.shift,
        p.conv3,
        p.shortcut,
        p.attention,
        p.down,
        p.up,
    )
    if p.down is None:  # of squeeze-excite there is nothing to keep, which costs less than empty tensors
        kept[-3:] = None, None, None
    return y, sums, (*kept, p.shift, p.shortcut, p.attention, p.down, p.up)


def backward_compiled(
    geometry: Geometry,
    stride: int,
    gy: Tensor,
    x: Tensor,
    h: Tensor,
    z: Tensor,
    stats1: Tensor,
    stats2: Tensor,
    weights: Tensor,
    means: Tensor | None,
    hidden: Tensor | None,
    logits: Tensor | None,
    shift: Tensor,
    shortcut: Tensor | None,
    attention: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
) -> tuple[Tensor, Parameters]:
    """`backward_reference` by the compiled operator."""
    kept = x, h, z, stats1, stats2, weights, means, hidden, logits
    settings = geometry, stride, shift, attention, down, up, shortcut is not None
    gx, gamma1, beta1, conv2, gamma2, beta2, g_shift, conv3, g_shortcut, g_attention, g_down, g_up = (
        torch.ops.rubiks.block_backward(gy, *kept, *settings)
    )
    return gx, Parameters(
        gamma1,
        beta1,
        conv2,
        gamma2,
        beta2,
        g_shift,
        conv3,
        shortcut=None if shortcut is None else g_shortcut,
        attention=None if attention is None else g_attention,
        down=None if down is None else g_down,
        up=None if up is None else g_up,
    )


def norm(module: nn.BatchNorm2d) -> tuple:
    """What the compiled operator takes of a batch norm."""
    m = module
    return m.weight, m.bias, m.running_mean, m.running_var, m.num_batches_tracked, m.momentum, m.eps


def train_blocks(
    blocks: Sequence[RubiksBlock],
    parameters: Sequence[Tensor | None],
    x: Tensor,
    sums: Tensor,
    geometry: Geometry,
) -> tuple[Tensor, Tensor, Geometry]:
    """Blocks that `supports` accepts, in turn: x (C_in, P) and its row sums -> result (C_out, P'), row sums, geometry.

    `parameters` are of `all_parameters`.
    """
    x, sums = FusedBlocks.apply(x, sums, blocks, geometry, *parameters)
    return x, sums, after(blocks, geometry)


def after(blocks: Sequence[RubiksBlock], geometry: Geometry) -> Geometry:
    """The geometry of the blocks' result."""
    for block in blocks:
        geometry = geometry.strided(block.shift.stride)
    return geometry


def all_parameters(blocks: Sequence[RubiksBlock]) -> list[Tensor | None]:
    """`Parameters` of each block, one after the other."""
    pairs = zip(blocks, attention_weights(blocks), strict=True)
    return list(itertools.chain.from_iterable(Parameters.of(block, weights) for block, weights in pairs))


def attention_weights(blocks: Sequence[RubiksBlock]) -> Sequence[Tensor | None]:
    """The weights (C_in, 3) of each block's attention shift, all computed at once; None for blocks without."""
    shifts = [block.attention for block in blocks]
    found = [shift for shift in shifts if shift is not None]
    if not found:
        return [None] * len(blocks)
    lengths = [len(shift.weight) for shift in found]
    logits = torch.cat([shift.weight for shift in found])
    temperature = torch.cat([shift.T.expand(length) for shift, length in zip(found, lengths, strict=True)])[:, None]
    weights = iter(attention(logits, temperature).split(lengths))
    return [None if shift is None else next(weights) for shift in shifts]
