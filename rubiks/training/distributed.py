"""Several processes that train one network: each on its share of a batch, with the same step."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class AveragedGradients(DDPStrategy):
    """Averages the gradients of all processes once per optimiser step, after the backward pass.

    PyTorch's DistributedDataParallel copies every gradient into its buckets and out again; the gradients of a recorded
    backward pass lie in one piece already. Batch statistics stay separate (`VideoClassifier` validates with those of
    the first process).
    """

    _accumulating = False

    def configure_ddp(self) -> None:
        """Start from the first process's network."""
        assert self.lightning_module is not None
        for tensor in (*self.lightning_module.parameters(), *self.lightning_module.buffers()):
            dist.broadcast(tensor.detach(), src=0)

    @contextlib.contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Only add up gradients: a batch that does not end an optimiser step."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def post_backward(self, closure_loss: Tensor) -> None:
        if not self._accumulating:
            assert self.lightning_module is not None
            average_gradients(self.lightning_module.parameters())


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace gradients by their mean over all processes, which must have gradients for the same parameters.

    Nothing waits for the GPU. Gradients that fill a piece of memory are averaged there, others in a copy.
    """
    whole, scattered = pieces([parameter.grad for parameter in parameters if parameter.grad is not None])
    copy = _flatten_dense_tensors(scattered) if scattered else None
    reduced = whole if copy is None else [*whole, copy]
    for piece in reduced:
        piece /= dist.get_world_size()
    for work in [dist.all_reduce(piece, async_op=True) for piece in reduced]:
        work.wait()
    if copy is not None:
        torch._foreach_copy_(scattered, list(_unflatten_dense_tensors(copy, scattered)))


def pieces(gradients: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The pieces of memory that several gradients fill, as flat tensors; and all other gradients."""
    sharing = defaultdict(list)
    for gradient in gradients:
        sharing[gradient.untyped_storage().data_ptr(), gradient.dtype].append(gradient)
    whole, scattered = [], []
    for group in sharing.values():
        memory = group[0].untyped_storage()
        if len(group) > 1 and sum(gradient.nbytes for gradient in group) == memory.nbytes():
            whole.append(group[0].new_empty(0).set_(memory))
        else:
            scattered += group
    return whole, scattered
