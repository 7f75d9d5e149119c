"""Attention quantisation: from soft temporal attention to whole-frame shifts within a budget (RubiksNet, section 3.3).

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
from rubiks.nn.attention import attention_weights

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
        """How many of the optimiser steps of a training are soft; at least the last one is hard, as soft is below 1."""
        return int(self.soft * steps) if self.budget > 0 else 0

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
        if self.budget == 1 or temperature == 0:
            return self.budget
        other = math.exp(-ONE_HOT_GAP / temperature)  # beside a logit whose exponential is 1
        stays, moves = 2 * other / (1 + 2 * other), (1 + other) / (1 + 2 * other)
        return (1 - self.budget) * stays + self.budget * moves

    def __str__(self) -> str:
        where = "of every block" if self.per_layer else "of the network"
        return (
            f"attention: soft for {self.soft:.0%} of training, temperature {self.start:g} to {self.end:g}; "
            f"then at most {self.budget:.2%} of the channels {where} are shifted in time"
        )


class Annealing(nn.Module):
    """Takes a network through both phases, an optimiser step at a time: `begin_step`, `penalty`, `end_step`.

    Args:
        net: the network that is trained. Its attention shifts hold the temperature, and in the end the choice.
        schedule: the settings.

    Attributes:
        multiplier: Lagrange multipliers, one, or one for each block; a buffer, so that checkpoints have it.
        channels: share of the channels that each multiplier is for; they add up to 1.
        temperature: of this step, 0 in the hard phase.
        share: of attention off "stay" when `penalty` was last computed, for each multiplier.
    """

    multiplier: Tensor
    channels: Tensor

    def __init__(self, net: RubiksNet, schedule: AttentionSchedule) -> None:
        super().__init__()
        self.schedule = schedule
        self._net = (net,)  # in a tuple: its weights are not part of this module
        self._shifts = net.attention_shifts()
        counts = torch.tensor([float(len(shift.weight)) for shift in self._shifts])
        channels = counts / counts.sum() if schedule.per_layer else torch.ones(1)
        self.register_buffer("channels", channels, persistent=False)
        self.register_buffer("multiplier", torch.zeros_like(channels))
        self.temperature = schedule.start

    def begin_step(self, step: int, steps: int) -> bool:
        """Set the temperature for an optimiser step of a training of `steps`, or make the choice; whether it was made.

        A hard network stays as it is: the choice is never made twice.
        """
        soft_steps = self.schedule.soft_steps(steps)
        if all(shift.hard for shift in self._shifts):
            self.temperature = 0.0
        elif step < soft_steps:
            self.temperature = self.schedule.temperature(step / soft_steps)
            for shift in self._shifts:
                shift.T.fill_(self.temperature)
        else:
            self._net[0].harden(self.schedule.budget, self.schedule.per_layer)
            self.multiplier.zero_()
            self.temperature = 0.0
            return True
        return False

    def penalty(self) -> Tensor:
        """What to add to the loss: each multiplier times how much attention off "stay" is too much.

        In the hard phase it is 0, without gradient: it keeps the logits in the graph, as DDP demands of parameters.
        """
        stay = [weights[:, 1] for weights in attention_weights(self._shifts) if weights is not None]
        groups = stay if self.schedule.per_layer else [torch.cat(stay)]
        share = 1 - torch.stack([group.mean() for group in groups])
        self.share = share.detach()
        return (self.multiplier * self.channels * self._excess(share)).sum()

    def end_step(self, steps: int) -> None:
        """Before the optimiser's step: dual ascent. In the hard phase, leave the logits out of the step."""
        if self.temperature > 0:
            rate = self.schedule.multiplier_rate / self.schedule.soft_steps(steps)
            self.multiplier.add_(rate * self._excess(self.share)).clamp_(min=0)
        else:
            for shift in self._shifts:
                shift.weight.grad = None  # not even momentum moves them then

    def _excess(self, share: Tensor) -> Tensor:
        return share - self.schedule.allowed_share(self.temperature)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _bad(key: str, expected: str, value: object) -> InputError:
    return InputError(f"aq.{key} must be {expected}, got {value!r}")
