"""What the shifts of a network have learned, as numbers by stage."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rubiks.models.rubiksnet import RubiksNet
from rubiks.nn import LearnableShift, RubiksBlock

UNITS = {"T": "frames", "H": "pixels", "W": "pixels"}


class Moves(NamedTuple):
    """Numbers of channels, by the frame with their largest temporal attention."""

    back: int
    stay: int
    ahead: int


def blocks_by_stage(net: RubiksNet) -> dict[str, list[RubiksBlock]]:
    return {
        f"layer{stage}": [block for block in layer if isinstance(block, RubiksBlock)]
        for stage, layer in enumerate(net.backbone.layers())
    }


def moves(net: RubiksNet) -> dict[str, Moves]:
    """For each stage with temporal attention, how many channels look back, stay and look ahead."""
    found = {}
    for stage, blocks in blocks_by_stage(net).items():
        chosen = [block.attention.moves() for block in blocks if block.attention is not None]
        if chosen:
            found[stage] = Moves(*(torch.cat(chosen) + 1).bincount(minlength=3).tolist())
    return found


def offsets(net: RubiksNet) -> dict[str, Tensor]:
    """For each stage, a CPU copy of the learned offsets of its blocks' channels.

    (3, channels), rows T, H, W, in frames and pixels; or (2, channels), rows H, W.
    """
    found = {}
    for stage, blocks in blocks_by_stage(net).items():
        learned = [m.shift.detach().cpu() for block in blocks for m in block.modules() if isinstance(m, LearnableShift)]
        if learned:
            found[stage] = torch.cat(learned, dim=1)
    return found


def axes_of(offsets: Tensor) -> str:
    return "THW"[-len(offsets) :]


def describe_moves(net: RubiksNet) -> str:
    """The temporal shifts that a hard network has chosen, as one line for the screen."""
    total = Moves(*map(sum, zip(*moves(net).values(), strict=True)))
    channels = sum(total)
    return (
        f"The temporal shifts are chosen: {total.back + total.ahead:,} of {channels:,} channels "
        f"({1 - total.stay / channels:.2%}), {total.back:,} look back and {total.ahead:,} ahead"
    )
