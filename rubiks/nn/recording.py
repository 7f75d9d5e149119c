"""A forward and its hand-written backward as two CUDA graphs, for training.

A step of many small kernels takes the CPU longer to launch than the GPU to run. A graph is launched at once, but it
always works on the same memory: what that asks for is kept here, so that a step by graphs is used like any other.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

CALLS = 2  # of one kind, one after the other, before the next one is recorded
CALLS_OF_ANOTHER = 20  # before it takes the place of what is recorded, since recording costs several steps


class Computation(Protocol):
    """What is recorded: without autograd, and without looking at values on the CPU."""

    def forward(self, *inputs: Any) -> tuple[Tensor, Any]:
        """The result and what `backward` needs of it."""

    def backward(self, grad: Tensor, kept: Any) -> Sequence[Tensor | None]:
        """The inputs' gradients from that of the result, in float32. Lets go of what is kept while it runs."""


class Recorder:
    """Decides when a computation that is called again and again is recorded, and holds at most one recording.

    Copies and pickles of it begin anew. What needs the activations of a forward for more than one backward, or runs a
    forward anew as `torch.utils.checkpoint` does, needs it disabled.

    Args:
        enabled: false keeps it from recording anything.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.forget()

    def __reduce__(self) -> tuple:
        return Recorder, (self.enabled,)

    def forget(self) -> None:
        """Free the memory of the recording, which holds the activations of a step, also between the steps."""
        self._recording: Recording | None = None
        self._recorded: Hashable = None
        self._count(None)

    def __call__(self, computation: Computation, constants: Hashable, inputs: Sequence[Tensor | None]) -> Tensor | None:
        """The result by a recording, with a gradient; None where there is none to use now.

        There is none before the same has been computed `CALLS` times in turn, or `CALLS_OF_ANOTHER` times where
        something else is recorded; while the backward of the call before is still to come; where nothing wants a
        gradient; and, from then on, where recording has failed, for example for want of memory.

        Args:
            computation: to record; equal for equal constants and inputs.
            constants: what it depends on besides the inputs.
            inputs: of its forward, on the current device. Parameters are read where they lie, others are copied.
        """
        if not self.enabled or torch.cuda.is_current_stream_capturing():
            return None
        if not any(t is not None and t.requires_grad for t in inputs):
            return None
        stream = torch.cuda.current_stream()
        key = constants, stream.device, stream.cuda_stream, tuple(map(_identity, inputs))
        if self._recording is None or key != self._recorded:
            self._count(key)
            if self._calls <= (CALLS if self._recording is None else CALLS_OF_ANOTHER):
                return None
            self._recording = None  # its memory may be needed now
            try:
                self._recording = Recording(computation, inputs)
            except RuntimeError as error:  # too little memory above all
                log.warning("Going on without CUDA graphs, since the step cannot be recorded: %s", error)
                self.enabled = False
                return None
            self._recorded = key
        self._count(None)
        return Recorded.apply(self._recording, *inputs) if self._recording.free else None

    def _count(self, key: Hashable) -> None:
        """Calls in turn of what is not recorded."""
        self._calls: int = self._calls + 1 if key is not None and key == self._last else 1
        self._last: Hashable = key


class Turn:
    """One forward of a recording, whose backward is over or not."""

    over = False


class Recording:
    """The graphs of a computation and their memory.

    Args:
        computation: to record; it should have run before, since not all that is prepared at first use can be recorded.
        inputs: of its forward, for their sizes; parameters for their place in memory.

    Attributes:
        result: of the latest forward.

    Raises:
        RuntimeError: it cannot be recorded; torch.OutOfMemoryError where the GPU has too little memory left.
    """

    result: Tensor

    def __init__(self, computation: Computation, inputs: Sequence[Tensor | None]) -> None:
        self._turn: Callable[[], Turn | None] = lambda: None
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        own = [_own(t) for t in inputs]
        self._copies = _moving(own, inputs)
        stream = _stream(torch.cuda.current_device())
        with torch.no_grad():
            with capture(self._forward, stream):
                self.result, kept = computation.forward(*own)
            self._grad = torch.empty_like(self.result)
            with capture(self._backward, stream, self._forward.pool()):
                gradients = computation.backward(self._grad, kept)
                self._gradients = torch.cat([g.flatten() for g in gradients if g is not None])
        self._like = [None if g is None else t for t, g in zip(own, gradients, strict=True)]

    @property
    def free(self) -> bool:
        """Whether what the latest forward has left in memory is of no more use."""
        turn = self._turn()
        return turn is None or turn.over

    def forward(self, inputs: Sequence[Tensor | None]) -> Turn:
        """Compute the result; what it returns stands for this call, and holds the memory."""
        turn = Turn()
        self._turn = weakref.ref(turn)
        torch._foreach_copy_(self._copies, _moving(inputs, inputs))
        self._forward.replay()
        torch.autograd.graph.increment_version(self.result)  # who has kept it shall not take it for what it was
        return turn

    def backward(self, turn: Turn, grad: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, in new memory."""
        if turn.over or self._turn() is not turn:
            raise RuntimeError(
                "the memory of this forward, which is a CUDA graph's, has been used again by a backward or by another "
                "forward. To go backward twice, switch the graphs off: net.backbone.recorder.enabled = False"
            )
        self._grad.copy_(grad)
        self._backward.replay()
        turn.over = True
        found = iter(_unflatten_dense_tensors(self._gradients.clone(), [t for t in self._like if t is not None]))
        return [None if t is None else next(found) for t in self._like]


class Recorded(torch.autograd.Function):
    """A recording's result, and its gradients."""

    @staticmethod
    def forward(ctx, recording: Recording, *inputs: Tensor | None) -> Tensor:
        ctx.recording, ctx.turn = recording, recording.forward(inputs)
        ctx.save_for_backward(*(t for t in inputs if isinstance(t, nn.Parameter)))
        return recording.result.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        _ = ctx.saved_tensors  # raises where one has been changed since
        gradients = ctx.recording.backward(ctx.turn, grad)
        wanted = (
            gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad[1:], strict=True)
        )
        return None, *wanted


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Record into `graph` what is launched inside, on `stream`, with memory of `pool`, another graph's.

    `torch.cuda.graph` would free all pinned memory that is not in use, and a loader of data would have to pin its
    batches anew, which takes some 30 ms for each.
    """
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    with torch.cuda.stream(stream):
        # Other threads, which load data, may call CUDA at the same time.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


def _moving(values: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """Those of the values that belong to inputs which lie elsewhere in each call."""
    pairs = zip(values, inputs, strict=True)
    return [value for value, t in pairs if value is not None and not isinstance(t, nn.Parameter)]


def _own(t: Tensor | None) -> Tensor | None:
    """What a graph reads for an input."""
    if t is None or isinstance(t, nn.Parameter):
        return None if t is None else t.detach()
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _identity(t: Tensor | None) -> Hashable:
    """What a graph depends on of an input."""
    if t is None:
        return None
    return t.shape, t.dtype, t.data_ptr() if isinstance(t, nn.Parameter) else None


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps memory for every stream that it has seen.

    That memory is then in all graphs, so two networks must not be trained on two streams at the same time.
    """
    return torch.cuda.Stream(device)
