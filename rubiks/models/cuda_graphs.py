"""CUDA graphs: of a forward and its hand-written backward, for training, and of a function, for inference.

Launching the many small kernels of a step takes the CPU longer than it takes the GPU to run them. A graph is launched
at once, but always works on the same memory. Everything that follows from this is handled here, so that callers use
results from graphs like any others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._utils import _unflatten_dense_tensors
from torch.autograd.function import once_differentiable

log = logging.getLogger(__name__)

# Of equal calls in a row. Recording costs several steps, so what is recorded is not replaced at once.
CALLS_BEFORE_RECORDING = 2
CALLS_BEFORE_REPLACING = 20
KEPT_GRAPHS = 4  # of inference, one for each kind of input


class Computation(Protocol):
    """What is recorded. It uses no autograd and does not look at values on the CPU."""

    def forward(self, *inputs: Any) -> tuple[Tensor, Any]:
        """The result and what `backward` needs of it."""

    def backward(self, grad: Tensor, kept: Any) -> Sequence[Tensor | None]:
        """The inputs' gradients from that of the result, in float32. Frees what is kept as it runs."""


class Recorder:
    """Decides when a computation that is called repeatedly is recorded, and holds at most one recording.

    Copies and pickles start without a recording. Disable it for code that needs the activations of a forward for more
    than one backward, or that repeats a forward as `torch.utils.checkpoint` does.

    Args:
        enabled: false: record nothing.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.forget()

    def __reduce__(self) -> tuple:
        return Recorder, (self.enabled,)

    def forget(self) -> None:
        """Free the recording's memory, which holds the activations of a step even between steps."""
        self._recording: Recording | None = None
        self._recorded: Hashable = None
        self._count(None)

    def __call__(self, computation: Computation, constants: Hashable, inputs: Sequence[Tensor | None]) -> Tensor | None:
        """The result from a recording, with a gradient; None if there is no recording to use now.

        There is none until the same computation has been called `CALLS_BEFORE_RECORDING` times in a row
        (`CALLS_BEFORE_REPLACING` times if another one is recorded); while the backward of the previous call is pending;
        if no input needs a gradient; and ever after recording has failed, for example because memory ran out.

        Args:
            computation: to record; equal for equal constants and inputs.
            constants: what it depends on besides the inputs.
            inputs: of its forward, on the current device. Parameters are read in place, others are copied.
        """
        if not self.enabled or torch.cuda.is_current_stream_capturing():
            return None
        if not any(t is not None and t.requires_grad for t in inputs):
            return None
        stream = torch.cuda.current_stream()
        key = constants, stream.device, stream.cuda_stream, tuple(map(_identity, inputs))
        if self._recording is None or key != self._recorded:
            self._count(key)
            if self._calls <= (CALLS_BEFORE_RECORDING if self._recording is None else CALLS_BEFORE_REPLACING):
                return None
            self._recording = None  # its memory may be needed now
            try:
                self._recording = Recording(computation, inputs)
            except RuntimeError as error:  # mostly too little memory
                log.warning("Continuing without CUDA graphs, since the step cannot be recorded: %s", error)
                self.enabled = False
                return None
            self._recorded = key
        self._count(None)
        return Recorded.apply(self._recording, *inputs) if self._recording.is_free else None

    def _count(self, key: Hashable) -> None:
        """Count equal calls in a row of what is not recorded."""
        self._calls: int = self._calls + 1 if key is not None and key == self._last else 1
        self._last: Hashable = key


class ForwardCall:
    """One forward of a recording; it needs the recording's memory until its backward is done."""

    backward_done = False


class Recording:
    """The graphs of a computation and their memory.

    Args:
        computation: to record; it should have run before, since some first-use setup cannot be recorded.
        inputs: of its forward, for their sizes, and for the addresses of parameters.

    Attributes:
        result: of the latest forward.

    Raises:
        RuntimeError: it cannot be recorded; torch.OutOfMemoryError where the GPU has too little memory left.
    """

    result: Tensor

    def __init__(self, computation: Computation, inputs: Sequence[Tensor | None]) -> None:
        self._latest: Callable[[], ForwardCall | None] = lambda: None
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        own = [_own(t) for t in inputs]
        self._copies = _copied(own, inputs)
        stream = _stream(torch.cuda.current_device())
        with torch.no_grad():
            with capture(self._forward, stream):
                self.result, kept = computation.forward(*own)
            self._grad = torch.empty_like(self.result)
            with capture(self._backward, stream, self._forward.pool()):
                gradients = computation.backward(self._grad, kept)
                given = {place: g.flatten() for place, g in enumerate(gradients) if g is not None}
                # Those of parameters fill one piece of memory, which several processes average as a whole.
                owned = [place for place in given if isinstance(inputs[place], nn.Parameter)]
                groups = owned, [place for place in given if place not in owned]
                self._pieces = [(torch.cat([given[place] for place in group]), group) for group in groups if group]
        self._like = own

    @property
    def is_free(self) -> bool:
        """Whether the activations of the latest forward are no longer needed."""
        latest = self._latest()
        return latest is None or latest.backward_done

    def forward(self, inputs: Sequence[Tensor | None]) -> ForwardCall:
        """Compute the result. The memory belongs to the returned call until its backward, or until it is dropped."""
        call = ForwardCall()
        self._latest = weakref.ref(call)
        torch._foreach_copy_(self._copies, _copied(inputs, inputs))
        self._forward.replay()
        torch.autograd.graph.increment_version(self.result)  # so that autograd notices uses of the overwritten result
        return call

    def backward(self, call: ForwardCall, grad: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs, in new memory."""
        if call.backward_done or self._latest() is not call:
            raise RuntimeError(
                "the memory of this forward pass belongs to a CUDA graph and has been reused by a backward pass or "
                "another forward pass. To run backward twice, turn the graphs off: net.recorder.enabled = False"
            )
        self._grad.copy_(grad)
        self._backward.replay()
        call.backward_done = True
        found: list[Tensor | None] = [None] * len(self._like)
        for piece, places in self._pieces:
            like = [self._like[place] for place in places]
            for place, gradient in zip(places, _unflatten_dense_tensors(piece.clone(), like), strict=True):
                found[place] = gradient
        return found


class Recorded(torch.autograd.Function):
    """A recording's result, and its gradients."""

    @staticmethod
    def forward(ctx, recording: Recording, *inputs: Tensor | None) -> Tensor:
        ctx.recording, ctx.call = recording, recording.forward(inputs)
        ctx.save_for_backward(*(t for t in inputs if isinstance(t, nn.Parameter)))
        return recording.result.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        _ = ctx.saved_tensors  # raises if one has been changed since
        gradients = ctx.recording.backward(ctx.call, grad)
        wanted = (
            gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad[1:], strict=True)
        )
        return None, *wanted


@contextlib.contextmanager
def capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream, pool: Any = None) -> Iterator[None]:
    """Record into `graph` what is launched inside, on `stream`, with memory of `pool`, another graph's.

    `torch.cuda.graph` would free all pinned memory that is not in use, and data loaders would have to pin their batches
    again, at some 30 ms each.
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


class InferenceGraphs:
    """Graphs of a function of one tensor, recorded at the first call with each kind of input; the latest are kept.

    What the function reads besides its input must stay in place: otherwise call `forget`. Copies and pickles start
    without graphs.
    """

    def __init__(self) -> None:
        self._graphs: OrderedDict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return InferenceGraphs, ()

    def forget(self) -> None:
        """Drop the graphs and free their memory."""
        with self._lock:
            self._graphs.clear()

    def __call__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """function(x), in new memory. The function is the same in all calls, on the GPU of x, and without autograd."""
        key = x.shape, x.dtype, x.device, torch.cuda.current_stream(x.device).cuda_stream
        with self._lock:  # a graph's input and result are always the same memory
            if key not in self._graphs:
                self._graphs[key] = _record(function, x)
                if len(self._graphs) > KEPT_GRAPHS:
                    self._graphs.popitem(last=False)
            self._graphs.move_to_end(key)
            graph, source, result = self._graphs[key]
            source.copy_(x)
            graph.replay()
            return result.clone()


def _record(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    """A graph of the function, its input and its result."""
    # In inference mode, tensors would be made that cannot be written outside of it.
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(x.device):
        source = x.contiguous().clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function(source)  # what is prepared at first use must not be recorded
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with capture(graph, torch.cuda.Stream()):
            result = function(source)
    return graph, source, result


def _copied(values: Sequence[Tensor | None], inputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The values that belong to inputs which are copied for each call: all but parameters."""
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

    All graphs then use that memory, so two networks must not be trained on two streams at the same time.
    """
    return torch.cuda.Stream(device)
