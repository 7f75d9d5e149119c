"""The exponential moving average of a network, which validation scores and checkpoints offer in place of the network.

It is a network of its own, part of the LightningModule, so that moving, saving and resuming treat it like any weights,
and the trained weights stay where CUDA graphs read them. Lightning's EMAWeightAveraging does not fit: it also averages
the attention's temperature, pairs buffers by position, which changes when the attention hardens, and makes its copy
before the network is on the GPU.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from rubiks.models import RubiksNet
from rubiks.models.checkpoint import AVERAGE_PREFIX, NET_PREFIX
from rubiks.training.optim import running_statistics

COPIED = ("num_batches_tracked", "T")  # buffers that an average of several values would falsify


def begin(net: RubiksNet) -> RubiksNet:
    """The average before the first step: a copy that is not trained."""
    return copy.deepcopy(net).requires_grad_(False)


def update(average: RubiksNet, net: RubiksNet, decay: float, step: int) -> None:
    """Move the average towards the network after an optimiser step: average += (1 - d) * (network - average).

    The running statistics of batch norms are averaged like the weights. They then belong to the average: those of the
    network follow its latest weights only.

    Args:
        average, net: from `begin`, and the network that is trained.
        decay: the limit of d. Over the first steps, d is smaller, so that the average soon forgets where it began:
            d = min(decay, (1 + step) / (10 + step)), as in TensorFlow's ExponentialMovingAverage.
        step: optimiser steps before this one.
    """
    own, trained = ([*each.parameters(), *running_statistics(each)] for each in (average, net))
    get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(own, trained, step)
    torch._foreach_copy_(_copied(average), _copied(net))


def take_choice(average: RubiksNet, net: RubiksNet) -> None:
    """Give the average the attention of a network that has just become hard; it is the same from then on."""
    for own, chosen in zip(average.attention_shifts(), net.attention_shifts(), strict=True):
        own.load_state_dict(chosen.state_dict())


def fit_state(state: dict[str, Tensor], wanted: bool) -> None:
    """Make a saved state dict one with or without an average; where it has none, the average begins at its weights."""
    saved = [name for name in state if name.startswith(AVERAGE_PREFIX)]
    if wanted and not saved:
        weights = {name: value for name, value in state.items() if name.startswith(NET_PREFIX)}
        state.update({AVERAGE_PREFIX + name.removeprefix(NET_PREFIX): value for name, value in weights.items()})
    for name in [] if wanted else saved:
        del state[name]


def _copied(net: RubiksNet) -> list[Tensor]:
    return [buffer for name, buffer in net.named_buffers() if name.rpartition(".")[2] in COPIED]
