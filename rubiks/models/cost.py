"""What a network costs: multiply-adds and memory for one clip, by layer, and the size of its weights.

The numbers are read off the network's modules, run once on PyTorch's meta device, which computes nothing. The kernels
for whole blocks (`training_path`, `optimize_for_inference`) do the same arithmetic and hold other tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rubiks.models.rubiksnet import RubiksNet
from rubiks.nn import AttentionShift, ChannelShift
from rubiks.nn.block import SqueezeExcite

# The release does not say how it counts, and its numbers are rounded, so other rules may give them too. This one gives
# all five: 3.9, 6.8, 11.2 and 15.8 G, and 15.7 G for large AQ. With 2 per value of a batch norm, as thop counts, it
# also gives the 32.9 G that the paper states for TSM-ResNet-50.
RULE = (
    "multiply-adds of convolutions and linear layers; 2 per value of a batch norm; 2 per value and axis that a shift "
    "interpolates, 0 if it moves whole frames and pixels; 3 per value of soft temporal attention; 1 per value that "
    "squeeze-excite scales"
)


@dataclass(frozen=True)
class StageCost:
    """One part of the network, for one clip.

    Attributes:
        name: stem, layer0 to layer4, or head (last norm and classifier).
        parameters: how many are learned.
        multiply_adds: by `RULE`.
        output: shape of what it hands on, (T, C, H, W); (T, classes) for the head, before the mean over frames.
    """

    name: str
    parameters: int
    multiply_adds: int
    output: tuple[int, ...]


def stages(net: RubiksNet, frames: int, size: int) -> list[StageCost]:
    """The cost of each part in evaluation mode, for a clip of so many frames of size x size pixels."""
    net = _without_data(net).eval()
    counts: dict[str, int] = {}
    outputs: dict[str, tuple[int, ...]] = {}

    def hook(stage: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def add(module: nn.Module, inputs: Any, output: Tensor) -> None:
            counts[stage] = counts.get(stage, 0) + multiply_adds(module, output)
            outputs[stage] = tuple(output.shape)

        return add

    parameters: dict[str, int] = {}
    for name, module in net.named_modules():
        stage = _stage(name)
        module.register_forward_hook(hook(stage))
        own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        parameters[stage] = parameters.get(stage, 0) + own
    with torch.no_grad():
        net(_clip(frames, size))
    return [StageCost(name, parameters[name], counts[name], outputs[name]) for name in outputs if name]


def multiply_adds(module: nn.Module, output: Tensor) -> int:
    """The multiply-adds of one layer by `RULE`, without those of the layers in it."""
    values = output.numel()
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return values * module.weight[0].numel()
    if isinstance(module, nn.BatchNorm2d):
        return 2 * values
    if isinstance(module, ChannelShift):
        return 0 if module.quantize else 2 * len(module.shift) * values
    if isinstance(module, AttentionShift):
        return 0 if module.hard else 3 * values
    return values if isinstance(module, SqueezeExcite) else 0


def counted_flops(net: RubiksNet, frames: int, size: int) -> int:
    """What PyTorch's FlopCounterMode counts for a clip: two for each multiply-add of convolutions and linear layers."""
    net = _without_data(net).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(_clip(frames, size))
    return counter.get_total_flops()


def saved_bytes(net: RubiksNet, frames: int, size: int) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of a clip, float32, without the parameters."""
    net = _without_data(net).train()
    clip = _clip(frames, size)
    known = _storages([*net.parameters(), *net.buffers()])
    kept: dict[StorageWeakRef, Tensor] = {}  # the tensors, so that no storage is freed and its address used again

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(StorageWeakRef(tensor.untyped_storage()), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(clip)
    return sum(tensor.untyped_storage().nbytes() for storage, tensor in kept.items() if storage not in known)


def peak_bytes(net: RubiksNet, frames: int, size: int) -> int:
    """Most bytes of activations that are held at the same time in inference on a clip, float32.

    Without the weights, the clip itself, and the temporary memory inside PyTorch's operators.
    """
    net = _without_data(net).eval()
    clip = _clip(frames, size)
    with torch.no_grad(), _LiveMemory([clip, *net.parameters(), *net.buffers()]) as memory:
        net(clip)
    return memory.peak


def weight_bytes(net: RubiksNet, dtype: torch.dtype) -> int:
    """Bytes of the state dict with its floating-point tensors in this type; a file also holds names and shapes."""
    return sum(
        value.numel() * (dtype.itemsize if value.is_floating_point() else value.itemsize)
        for value in net.state_dict().values()
    )


class _LiveMemory(TorchDispatchMode):
    """Sums the bytes of all storages that operators have made and that still exist; `peak` is the largest sum."""

    def __init__(self, others: list[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        self._others = _storages(others)
        self._live: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self._live = {storage: size for storage, size in self._live.items() if not storage.expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in self._others:
                    self._live[storage] = tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, sum(self._live.values()))
        return result


def _storages(tensors: list[Tensor]) -> set[StorageWeakRef]:
    return {StorageWeakRef(tensor.untyped_storage()) for tensor in tensors}


def _without_data(net: RubiksNet) -> RubiksNet:
    return copy.deepcopy(net).float().to("meta")


def _clip(frames: int, size: int) -> Tensor:
    return torch.empty(1, frames, 3, size, size, device="meta")


def _stage(name: str) -> str:
    """The part of the network that a module belongs to; empty for those that hold the parts."""
    if name in ("", "backbone"):
        return ""
    part = name.removeprefix("backbone.").partition(".")[0]
    return {"conv1": "stem", "bn_last": "head", "dropout": "head", "new_fc": "head"}.get(part, part)
