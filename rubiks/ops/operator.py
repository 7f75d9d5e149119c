"""Registers the operator in PyTorch: kernels of the compiled library or the reference, fake kernels and autograd."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rubiks.ops import library, reference

# As in ext/shift/shift.cpp; defined here if there is no compiled library.
SCHEMAS = (
    "shift(Tensor x, Tensor shift, int[] stride, int[] padding, bool quantize) -> Tensor",
    "shift_backward(Tensor grad, Tensor x, Tensor shift, int[] stride, int[] padding, bool quantize, "
    "bool need_x, bool need_shift) -> (Tensor, Tensor)",
)
DEVICES = ("CPU", "CUDA")
_registrations = torch.library.Library("rubiks", "FRAGMENT")


def prepare() -> None:
    """Make torch.ops.rubiks ready for use: load the compiled library, and the reference for what it lacks."""
    _prepare_once()


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes two seconds.
prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _prepare_once() -> None:
    library.load()
    if not hasattr(torch.ops.rubiks, "shift"):
        for schema in SCHEMAS:
            _registrations.define(schema)
    for device in DEVICES:
        if not torch._C._dispatch_has_kernel_for_dispatch_key("rubiks::shift", device):
            _registrations.impl("shift", reference.forward, device)
            _registrations.impl("shift_backward", reference.backward, device)
    torch.library.register_fake("rubiks::shift", _fake_shift, lib=_registrations)
    torch.library.register_fake("rubiks::shift_backward", _fake_shift_backward, lib=_registrations)
    torch.library.register_autograd("rubiks::shift", _backward, setup_context=_save, lib=_registrations)
    torch.library.register_autograd("rubiks::shift_backward", _refuse, lib=_registrations)


def _fake_shift(x: Tensor, shift: Tensor, stride: Sequence[int], padding: Sequence[int], quantize: bool) -> Tensor:
    lengths = (x.shape[d] for d in (reference.T_AXIS, reference.H_AXIS, reference.W_AXIS))
    settings = zip(lengths, stride, padding, strict=True)
    return reference.empty_volume(x, *((n + 2 * p - 1) // s + 1 for n, s, p in settings))


def _fake_shift_backward(grad, x, shift, stride, padding, quantize, need_x, need_shift) -> tuple[Tensor, Tensor]:
    _, t, _, h, w = x.shape
    return (
        reference.empty_volume(x, t, h, w) if need_x else x.new_empty(0),
        torch.empty_like(shift, memory_format=torch.contiguous_format) if need_shift else shift.new_empty(0),
    )


def _save(ctx, inputs, output) -> None:
    x, shift, ctx.stride, ctx.padding, ctx.quantize = inputs
    ctx.save_for_backward(x, shift)


def _backward(ctx, grad: Tensor):
    x, shift = ctx.saved_tensors
    need_x, need_shift = ctx.needs_input_grad[:2]
    grad_x, grad_shift = torch.ops.rubiks.shift_backward(
        grad, x, shift, ctx.stride, ctx.padding, ctx.quantize, need_x, need_shift
    )
    return grad_x if need_x else None, grad_shift if need_shift else None, None, None, None


def _refuse(ctx, *grads):
    raise RuntimeError("the shift operator has no second derivative; take its gradient without create_graph=True")
