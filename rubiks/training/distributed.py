"""Several processes that train one network: each on its share of a batch, with the same step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from rubiks.models import RubiksNet, training_path


class AveragedGradients(DDPStrategy):
    """Averages the gradients of all processes once per optimiser step, after the backward pass.

    PyTorch's DistributedDataParallel copies every gradient into its buckets and out again; the gradients of a recorded
    backward pass lie in one piece already. Batch statistics stay separate (`VideoClassifier` validates with those of
    the first process).
    """

    _accumulating = False
    _groups: Sequence[Sequence[nn.Parameter]] = ()

    def configure_ddp(self) -> None:
        """Start from the first process's network."""
        module = self.lightning_module
        assert module is not None
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)
        self._groups = groups(module.net)  # type: ignore[arg-type]

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
            average_gradients(self._groups)


def groups(net: RubiksNet) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trained parameters whose gradients come in one piece from a recorded backward pass, and all others.

    The order is the same in all processes, whether or not their steps are recorded.
    """
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    together = [parameter for parameter in training_path.parameters(net.backbone) if parameter.requires_grad]
    known = set(map(id, together))
    return together, [parameter for parameter in trained if id(parameter) not in known]


@torch.no_grad()
def average_gradients(of: Sequence[Sequence[nn.Parameter]]) -> None:
    """Replace gradients by their mean over all processes, each group's at once. Nothing waits for the GPU.

    Args:
        of: groups of parameters, the same in all processes. Where the gradients of a group fill a piece of memory, they
            are averaged there, otherwise in a copy.
    """
    pending = []
    for parameters in of:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients:
            piece = in_one_piece(gradients)
            copied = gradients if piece is None else []
            flat = _flatten_dense_tensors(gradients) if piece is None else piece
            flat /= dist.get_world_size()
            pending.append((dist.all_reduce(flat, async_op=True), flat, copied))
    for work, flat, copied in pending:
        work.wait()
        if copied:
            torch._foreach_copy_(copied, list(_unflatten_dense_tensors(flat, copied)))


def in_one_piece(gradients: Sequence[Tensor]) -> Tensor | None:
    """The memory that gradients fill, one after the other and nothing else, as a flat tensor; None if they do not."""
    memory = gradients[0].untyped_storage()
    start = end = memory.data_ptr()
    for gradient in gradients:
        if gradient.data_ptr() != end or not gradient.is_contiguous():
            return None
        end += gradient.numel() * gradient.element_size()
    return gradients[0].new_empty(0).set_(memory) if end - start == memory.nbytes() else None
