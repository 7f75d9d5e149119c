"""Networks for tests, and checkpoints as training writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from rubiks import RubiksNet


def like_trained_norms(net: RubiksNet) -> None:
    """Give all norms scales of both signs, and running statistics other than those of a new network."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 0.6, 0.4)
            nn.init.normal_(module.bias, 0, 0.5)
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)


def decisive(seed: int, classes: int, num_frames: int = 4) -> RubiksNet:
    """A new network of tier tiny whose scores for different videos differ."""
    torch.manual_seed(seed)
    net = RubiksNet("tiny", classes, num_frames=num_frames)
    net.new_fc.weight.data.mul_(30)
    return net


def save_checkpoint(net: RubiksNet, path: Path, classes: Sequence[str], size: int) -> None:
    """Write a checkpoint that knows its class names and the size of its frames."""
    described = {
        "tier": net.tier,
        "variant": net.variant,
        "num_classes": net.num_classes,
        "num_frames": net.num_frames,
        "classes": list(classes),
        "config": {"data": {"size": size, "sampling": "uniform", "window": 64}},
        "epoch": 3,
    }
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "rubiks": described}, path)
