"""From a network without time, trained on still images, to one with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rubiks.errors import InputError
from rubiks.models.rubiksnet import RubiksNet
from rubiks.nn import FixedTimeShift, RubiksBlock
from rubiks.nn.shift import tsm_offsets

FROM = "rubiks2d"
RULES = ("tsm", "uniform", "zero")
INTO = {"rubiks3d": RULES, "rubiks3d-aq": RULES, "rubiks3d-quantized": RULES, "fixed-tsm": ("tsm",)}
UNIFORM = 0.25  # frames: the frame itself keeps at least three quarters
NOISE = 0.01  # frames, or of logits


@torch.no_grad()
def inflate(net: RubiksNet, flat: RubiksNet, rule: str, noise: float = NOISE) -> None:
    """Give a network the weights of one of variant rubiks2d, and set what it does in time by a rule.

    ======= ============================================ ===========================================
    rule    offsets in time, in frames                   logits of the temporal attention
    ======= ============================================ ===========================================
    tsm     an eighth of the channels 1, an eighth -1,   1 for the frame that the offset names, else
            the others 0 (Lin et al., ICCV 2019)         0
    uniform drawn from U(-0.25, 0.25)                    drawn from U(0, 1), as in a new network
    zero    0, with noise                                1 for the frame itself, else 0, with noise
    ======= ============================================ ===========================================

    Attention divides its logits by their deviation, so that only their proportions count.

    Args:
        net: of a variant of `INTO`, with the tier and the classes of flat.
        flat: of variant rubiks2d.
        rule: of those that `INTO` names for the variant; of what is fixed, tsm alone.
        noise: standard deviation of the noise.

    Raises:
        InputError: the rule is none of them.
    """
    if net.variant not in INTO or flat.variant != FROM:
        raise ValueError(f"expected {FROM} into one of {', '.join(INTO)}, got {flat.variant} into {net.variant}")
    rules = INTO[net.variant]
    if rule not in rules:
        raise InputError(f"init_temporal must be {' or '.join(rules)} for variant={net.variant}; got {rule!r}")
    for own, given in (
        (net.backbone.conv1, flat.backbone.conv1),
        (net.backbone.bn_last, flat.backbone.bn_last),
        (net.new_fc, flat.new_fc),
    ):
        own.load_state_dict(given.state_dict())
    for layer, flat_layer in zip(net.backbone.layers(), flat.backbone.layers(), strict=True):
        for block, flat_block in zip(layer, flat_layer, strict=True):
            assert isinstance(block, RubiksBlock)
            assert isinstance(flat_block, RubiksBlock)
            _copy(block, flat_block)
            _set_time(block, rule, noise)


def _copy(block: RubiksBlock, flat: RubiksBlock) -> None:
    for own, given in (
        (block.bn1, flat.bn1),
        (block.first_convolution, flat.first_convolution),
        (block.bn2, flat.bn2),
        (block.se, flat.se),
        (block.conv3, flat.conv3),
        (block.shortcut, flat.shortcut),
    ):
        if own is not None and given is not None:
            own.load_state_dict(given.state_dict())
    block.shift.shift[-2:] = flat.shift.shift  # H and W


def _set_time(block: RubiksBlock, rule: str, noise: float) -> None:
    if isinstance(block.shift, FixedTimeShift):
        return  # by the one rule that it knows
    spread = noise if rule == "zero" else 0.0
    if block.attention is not None:
        logits = block.attention.weight
        if rule == "uniform":
            logits.uniform_(0, 1)
        else:
            named = F.one_hot(_offsets(rule, len(logits)).long() + 1, 3)  # back, stay, ahead
            logits.copy_(named + spread * torch.randn(logits.shape))
    else:
        offsets = block.shift.shift[0]
        if rule == "uniform":
            offsets.uniform_(-UNIFORM, UNIFORM)
        else:
            offsets.copy_(_offsets(rule, len(offsets)) + spread * torch.randn(offsets.shape))


def _offsets(rule: str, channels: int) -> Tensor:
    return tsm_offsets(channels) if rule == "tsm" else torch.zeros(channels)
