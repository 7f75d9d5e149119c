"""Turning a network without temporal shifts, trained on still images, into one with them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rubiks.errors import InputError
from rubiks.models.block_plan import BlockParameters, BlockPlan, read_plans
from rubiks.models.rubiksnet import RubiksNet
from rubiks.nn import FixedTimeShift
from rubiks.nn.shift import tsm_offsets

FROM = "rubiks2d"
RULES = ("tsm", "uniform", "zero")
INTO = {"rubiks3d": RULES, "rubiks3d-aq": RULES, "rubiks3d-quantized": RULES, "fixed-tsm": ("tsm",)}
UNIFORM = 0.25  # frames: the frame itself keeps at least three quarters
NOISE = 0.01  # in frames, or in units of the logits


@torch.no_grad()
def inflate(net: RubiksNet, flat: RubiksNet, rule: str, noise: float = NOISE) -> None:
    """Give a network the weights of a rubiks2d network, and set its temporal shifts by a rule.

    ======= ============================================ ===========================================
    rule    offsets in time, in frames                   logits of the temporal attention
    ======= ============================================ ===========================================
    tsm     an eighth of the channels 1, an eighth -1,   1 for the frame that the offset names, else
            the others 0 (Lin et al., ICCV 2019)         0
    uniform drawn from U(-0.25, 0.25)                    drawn from U(0, 1), as in a new network
    zero    0, with noise                                1 for the frame itself, else 0, with noise
    ======= ============================================ ===========================================

    Attention divides its logits by their standard deviation, so only their proportions matter.

    Args:
        net: a network of a variant in `INTO`, with the tier and classes of flat.
        flat: a network of variant rubiks2d.
        rule: one of the rules that `INTO` has for the variant.
        noise: standard deviation of the noise.

    Raises:
        InputError: the variant does not have this rule.
    """
    if net.variant not in INTO or flat.variant != FROM:
        raise ValueError(
            f"only {FROM} can be inflated, to one of {', '.join(INTO)}; got {flat.variant} to {net.variant}"
        )
    rules = INTO[net.variant]
    if rule not in rules:
        raise InputError(f"init_temporal must be {' or '.join(rules)} for variant={net.variant}; got {rule!r}")
    for own, given in (
        (net.backbone.conv1, flat.backbone.conv1),
        (net.backbone.bn_last, flat.backbone.bn_last),
        (net.new_fc, flat.new_fc),
    ):
        own.load_state_dict(given.state_dict())
    flat_plans = read_plans(flat.backbone.blocks())
    for plan, flat_plan in zip(read_plans(net.backbone.blocks()), flat_plans, strict=True):
        _copy(plan, flat_plan)
        _set_time(plan, rule, noise)
    net.hold_back()


def _copy(plan: BlockPlan, flat: BlockPlan) -> None:
    for name, own, given in zip(BlockParameters._fields, plan.parameters, flat.parameters, strict=True):
        if own is not None and given is not None and name != "shift":  # flat has no attention
            own.copy_(given)
    for norm, flat_norm in ((plan.norm1, flat.norm1), (plan.norm2, flat.norm2)):
        norm.mean.copy_(flat_norm.mean)
        norm.var.copy_(flat_norm.var)
        norm.batches.copy_(flat_norm.batches)
    plan.shift.shift[-2:] = flat.shift.shift  # H and W


def _set_time(plan: BlockPlan, rule: str, noise: float) -> None:
    if isinstance(plan.shift, FixedTimeShift):
        return  # the temporal shift is fixed
    spread = noise if rule == "zero" else 0.0
    if plan.attention is not None:
        logits = plan.attention.weight
        if rule == "uniform":
            logits.uniform_(0, 1)
        else:
            named = F.one_hot(_offsets(rule, len(logits)).long() + 1, 3)  # back, stay, ahead
            logits.copy_(named + spread * torch.randn(logits.shape))
    else:
        offsets = plan.shift.shift[0]
        if rule == "uniform":
            offsets.uniform_(-UNIFORM, UNIFORM)
        else:
            offsets.copy_(_offsets(rule, len(offsets)) + spread * torch.randn(offsets.shape))


def _offsets(rule: str, channels: int) -> Tensor:
    return tsm_offsets(channels) if rule == "tsm" else torch.zeros(channels)
