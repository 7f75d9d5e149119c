"""Attention quantisation: from a soft temporal attention to whole-frame shifts within a budget (RubiksNet, section 3.3).

Soft phase: the temperature falls, and a Lagrange multiplier holds the share of attention that is off "stay". Hard
phase: the choice is made and frozen, and the rest of the network trains on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rubiks.errors import InputError
from rubiks.models import RubiksNet
from rubiks.nn import RubiksBlock
from rubiks.nn.fused import attention_weights

SHAPES = ("exponential", "linear", "cosine")
# Logits are divided by their deviation, so two that are 0 and one that is 1 end up this far apart.
ONE_HOT_GAP = math.sqrt(3)


@dataclass(frozen=True)
class AttentionSchedule:
    """How temporal attention is quantised in training; the section `aq` of the configuration.

    Attributes:
        budget: largest share of the channels that are shifted in time, 0 to 1. At 0 the network is hard, without
            temporal shifts, from the first step; at 1 the attention is free.
        per_layer: the budget holds for every block by itself, not for the whole network.
        soft: share of training after which the choice is made and frozen, 0 to below 1.
        start, end: the temperature at the beginning and at the end of the soft phase.
        shape: of its way between the two: exponential, linear or cosine.
        multiplier_rate: how much the multiplier grows over a soft phase in which the share of attention off "stay" is 1
            above what it may be.
    """

    budget: float
    per_layer: bool = False
    soft: float = 0.6
    start: float = 2.0
    end: float = 0.1
    shape: str = "exponential"
    multiplier_rate: float = 100.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise _bad("shape", f"one of {', '.join(SHAPES)}", self.shape)
        if not isinstance(self.per_layer, bool):
            raise _bad("per_layer", "true or false", self.per_layer)
        if not (_is_number(self.budget) and 0 <= self.budget <= 1):
            raise _bad("budget", "a number from 0 to 1", self.budget)
        if not (_is_number(self.soft) and 0 <= self.soft < 1):
            raise _bad("soft", "a number from 0 to below 1", self.soft)
        for key in ("start", "end"):
            if not (_is_number(getattr(self, key)) and 0 < getattr(self, key) < math.inf):
                raise _bad(key, "a temperature above 0", getattr(self, key))
        if self.end > self.start:
            raise _bad("end", f"at most aq.start={self.start:g}", self.end)
        if not (_is_number(self.multiplier_rate) and 0 <= self.multiplier_rate < math.inf):
            raise _bad("multiplier_rate", "a number of at least 0", self.multiplier_rate)

    def soft_steps(self, steps: int) -> int:
        """How many of the optimiser steps of a training are soft; at least the last one is hard."""
        return min(int(self.soft * steps), steps - 1) if self.budget > 0 else 0

    def temperature(self, progress: float) -> float:
        """The temperature when a share `progress`, 0 to 1, of the soft phase is over."""
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** progress
        left = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.end + (self.start - self.end) * left

    def allowed_share(self, temperature: float) -> float:
        """The largest share of attention off "stay" in the soft phase.

        It is that of a network whose choice is made, a share `budget` of the channels with logits for one frame back or
        ahead alone and the others with logits for "stay" alone. As the temperature falls to 0 it becomes the budget.
        At a higher one softmax leaves more off "stay" whatever the logits are (46% at 2.0), so that the budget itself
        would be out of reach and its multiplier would grow until no channel looks at another frame.
        """
        if self.budget == 1:
            return 1.0
        other = math.exp(-ONE_HOT_GAP / temperature)  # beside a logit whose exponential is 1
        stays, moves = 2 * other / (1 + 2 * other), (1 + other) / (1 + 2 * other)
        return (1 - self.budget) * stays + self.budget * moves

    def __str__(self) -> str:
        where = "of every block" if self.per_layer else "of the network"
        return (
            f"attention: soft for {self.soft:.0%} of training, temperature {self.start:g} to {self.end:g}; then at most "
            f"{self.budget:.1%} of the channels {where} are shifted in time"
        )


def off_stay(net: RubiksNet, per_layer: bool) -> Tensor:
    """The share of attention off "stay", mean(1 - w_stay): (1,), or (blocks,) for each block's channels by themselves."""
    weights = [each for each in attention_weights([m for m in net.modules() if isinstance(m, RubiksBlock)]) if each is not None]
    if per_layer:
        return torch.stack([1 - each[:, 1].mean() for each in weights])
    return (1 - torch.cat(weights)[:, 1].mean())[None]


class Annealing(nn.Module):
    """Takes a network through both phases. The network is given to each call; it and the multipliers hold the state.

    Args:
        schedule: the settings.
        net: the network that is trained.

    Attributes:
        multiplier: Lagrange multipliers, one, or one for each block; a buffer, so that checkpoints have it.
    """

    multiplier: Tensor

    def __init__(self, schedule: AttentionSchedule, net: RubiksNet) -> None:
        super().__init__()
        self.schedule = schedule
        self.register_buffer("multiplier", torch.zeros(len(net.attention_shifts()) if schedule.per_layer else 1))

    def begin_step(self, net: RubiksNet, step: int, steps: int) -> bool:
        """Set the temperature for an optimiser step of a training of `steps`, or make the choice; whether it was made.

        Hard networks stay as they are: the choice is never made twice.
        """
        if net.temporal_share() is not None:
            return False
        soft_steps = self.schedule.soft_steps(steps)
        if step < soft_steps:
            temperature = self.schedule.temperature(step / soft_steps)
            for shift in net.attention_shifts():
                shift.T.fill_(temperature)
            return False
        net.harden(self.schedule.budget, self.schedule.per_layer)
        self.multiplier.zero_()
        return True

    def penalty(self, net: RubiksNet) -> Tensor:
        """What to add to the loss: each multiplier times how far its share of attention is above what is allowed.

        In the hard phase it is 0, without gradient, and only keeps the logits in the graph, as DDP asks of parameters.
        """
        return (self.multiplier * self._excess(net)).mean()

    @torch.no_grad()
    def end_step(self, net: RubiksNet, steps: int) -> None:
        """Dual ascent, before the optimiser step; and in the hard phase, no step for the logits."""
        if net.temporal_share() is not None:
            for shift in net.attention_shifts():
                shift.weight.grad = None  # optimisers leave these out: neither momentum nor decay moves them
            return
        rate = self.schedule.multiplier_rate / max(1, self.schedule.soft_steps(steps))
        self.multiplier.add_(rate * self._excess(net)).clamp_(min=0)

    def _excess(self, net: RubiksNet) -> Tensor:
        temperature = net.attention_shifts()[0].T.item()
        allowed = self.schedule.allowed_share(temperature) if temperature > 0 else self.schedule.budget
        return off_stay(net, self.schedule.per_layer) - allowed


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bad(key: str, expected: str, value: object) -> InputError:
    return InputError(f"aq.{key} must be {expected}, got {value!r}")
