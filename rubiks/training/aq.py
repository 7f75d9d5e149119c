"""Attention quantisation: from soft temporal attention to whole-frame shifts within a budget (RubiksNet, section 3.3).

Soft phase: the temperature falls, and a Lagrange multiplier limits the share of attention that is off "stay". Hard
phase: the choice is made and frozen, and the rest of the network continues to train.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from rubiks.models import RubiksNet
from rubiks.nn.attention import attention_weights
from rubiks.settings import Expected, Settings, Share

# Logits are divided by their standard deviation, so two that are 0 and one that is 1 end up this far apart.
ONE_HOT_GAP = math.sqrt(3)


Temperature = Annotated[float, Field(gt=0), Expected("a temperature above 0")]


class AttentionSchedule(Settings, section="aq"):
    """How temporal attention is quantised in training."""

    budget: Share = Field(
        description="largest share of the channels that are shifted in time. 0: no temporal shifts (a 2D network) from "
        "the first step; 1: no limit"
    )
    per_layer: bool = Field(False, description="true: the budget applies to each block, not to the whole network")
    soft: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.6,
        description="share of training with soft attention; after it, the choice is frozen and the rest keeps training",
    )
    start: Temperature = Field(2.0, description="temperature of the attention at the start")
    end: Temperature = Field(0.1, description="temperature at the end of the soft phase")
    shape: Literal["exponential", "linear", "cosine"] = Field("exponential", description="the curve from start to end")
    multiplier_rate: Annotated[float, Field(ge=0)] = Field(
        100.0,
        description='how fast the penalty on attention off "stay" grows: by this much in a soft phase in which its '
        "share is 1 above the limit. Higher: some of the budget stays unused; lower: the final choice cuts more",
    )

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.end > self.start:
            raise self.wrong("end", f"at most aq.start={self.start:g}")
        return self

    def soft_steps(self, steps: int) -> int:
        """How many of the optimiser steps of a training are soft; at least the last one is hard, as soft is below 1."""
        return int(self.soft * steps) if self.budget > 0 else 0

    def temperature(self, progress: float) -> float:
        """The temperature when a share `progress`, 0 to 1, of the soft phase is over."""
        if self.shape == "exponential":
            return self.start * (self.end / self.start) ** progress
        left = 1 - progress if self.shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        return self.end + (self.start - self.end) * left

    def allowed_share(self, temperature: float, causal: bool = False) -> float:
        """The largest share of attention off "stay" in the soft phase.

        It is the share in a network that has made its choice: a share `budget` of the channels has logits only for one
        frame back or ahead, the others only for "stay". As the temperature falls to 0 it becomes the budget. At higher
        temperatures softmax leaves more off "stay" whatever the logits are (46% at 2.0), so the budget itself would be
        out of reach, and its multiplier would grow until no channel looks at another frame.

        A causal network weighs the next frame as the same frame.
        """
        if self.budget == 1 or temperature == 0:
            return self.budget
        other = math.exp(-ONE_HOT_GAP / temperature)  # relative to a logit whose exponential is 1
        stays, moves = (other, 1.0) if causal else (2 * other, 1 + other)
        stays, moves = stays / (1 + 2 * other), moves / (1 + 2 * other)
        return (1 - self.budget) * stays + self.budget * moves

    def __str__(self) -> str:
        where = "of every block" if self.per_layer else "of the network"
        return (
            f"attention: soft for {self.soft:.0%} of training, temperature {self.start:g} to {self.end:g}; "
            f"after that, at most {self.budget:.2%} of the channels {where} are shifted in time"
        )


class Annealing(nn.Module):
    """Takes a network through both phases, one optimiser step at a time: `begin_step`, `penalty`, `end_step`.

    Args:
        net: the network that is trained. Its attention shifts hold the temperature and, in the end, the choice.
        schedule: the settings.

    Attributes:
        multiplier: Lagrange multipliers, one, or one for each block; a buffer, so that checkpoints have it.
        channels: share of the channels that each multiplier covers; they add up to 1.
        temperature: that of this step, 0 in the hard phase.
        share: share of attention off "stay" when `penalty` was last computed, for each multiplier.
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

    @property
    def hard(self) -> bool:
        """Whether the choice has been made."""
        return all(shift.hard for shift in self._shifts)

    def begin_step(self, step: int, steps: int) -> bool:
        """Set the temperature for one of `steps` optimiser steps, or make the choice; returns whether it was made now.

        A hard network stays as it is: the choice is never made twice.
        """
        soft_steps = self.schedule.soft_steps(steps)
        if self.hard:
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
        """What to add to the loss: each multiplier times the excess of attention off "stay".

        In the hard phase it is 0, without gradient.
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
                shift.weight.grad = None  # then not even momentum moves them

    def _excess(self, share: Tensor) -> Tensor:
        return share - self.schedule.allowed_share(self.temperature, self._net[0].causal)
