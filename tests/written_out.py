"""Training as formulas, in float64: losses, gradients of whole steps, and the optimisers' updates.

The network is the package's own, and so is autograd; everything else a step consists of is written out here.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from conftest import SMALL_TIER
from pytorch_lightning.loggers import Logger
from torch import Tensor

from rubiks import RubiksNet
from rubiks.models import TIERS
from rubiks.nn import Normalize

MEAN, STD = (torch.tensor(values).double().view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))

NORMALIZE = Normalize().double()  # its constants are float32, and many steps would amplify their rounding


def small(classes: int, variant: str = "rubiks3d", **options: Any) -> RubiksNet:
    """A network of one block per stage, under the name tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TIERS, "tiny", SMALL_TIER)
        return RubiksNet("tiny", classes, variant, **options)


def pixels(views: Tensor) -> Tensor:
    """uint8 -> normalised by the mean and deviation of ImageNet."""
    exact = (views.double() / 255 - MEAN) / STD
    normal = NORMALIZE(views)
    assert (normal - exact).abs().max() < 1e-6
    return normal


def one_hot(labels: Tensor, classes: int) -> Tensor:
    return (labels[:, None] == torch.arange(classes)).double()


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    smooth = (1 - smoothing) * targets + smoothing / logits.shape[1]
    return (smooth * (logits.exp().sum(1, keepdim=True).log() - logits)).sum(1).mean()


def hits(logits: Tensor, labels: Tensor, k: int) -> list[bool]:
    """For each clip, whether fewer than k classes score higher than its own."""
    return [bool((row > row[label]).sum() < k) for row, label in zip(logits, labels, strict=True)]


class Training:
    """Steps of SGD or AdamW on a copy of a network.

    Args:
        net: to start from.
        rates, decays: of each kind of parameter, before the schedule: weights, norms, shift, attention, classifier,
            classifier bias. If missing, there is no decay.
        momentum: of SGD; None for AdamW.
        clip: largest norm of the gradient of everything but the shifts.
    """

    def __init__(
        self,
        net: RubiksNet,
        rates: dict[str, float],
        decays: dict[str, float],
        momentum: float | None = 0.0,
        clip: float = float("inf"),
        smoothing: float = 0.0,
    ) -> None:
        self.net = copy.deepcopy(net).double().train()
        self.rates, self.decays = rates, decays
        self.momentum, self.clip, self.smoothing = momentum, clip, smoothing
        self.steps = 0
        self.norms: list[float] = []
        self.memory = {name: [torch.zeros_like(p) for _ in range(2)] for name, p in self.net.named_parameters()}

    def batch(self, clips: Tensor, targets: Tensor, parts: int = 1, penalty: Callable[[], Tensor] | None = None) -> Any:
        """Add the gradient of a batch, one of several in a step; logits and loss."""
        logits = self.net(clips)
        loss = cross_entropy(logits, targets, self.smoothing)
        ((loss if penalty is None else loss + penalty()) / parts).backward()
        return logits.detach(), loss.item()

    @torch.no_grad()
    def step(self, factor: float, still: Sequence[str] = ()) -> None:
        """A step with the gradient so far and rates times `factor`, without parameters whose names end in `still`."""
        self.steps += 1
        parameters = {n: p for n, p in self.net.named_parameters() if not n.endswith(tuple(still) or ("\0",))}
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        for name, gradient in gradients.items():
            if name.endswith("shift"):
                lengths = gradient.square().sum(0).sqrt()
                gradient /= torch.where(lengths > 0, lengths, 1)
        norm = sum(g.square().sum().item() for n, g in gradients.items() if not n.endswith("shift")) ** 0.5
        self.norms.append(norm)
        for name, parameter in parameters.items():
            gradient, (first, second) = gradients[name], self.memory[name]
            if not name.endswith("shift"):
                gradient *= min(1.0, self.clip / (norm + 1e-6))
            rate, decay = factor * self.rates[kind(name)], self.decays.get(kind(name), 0.0)
            if self.momentum is None:
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                mean, square = first / (1 - 0.9**self.steps), second / (1 - 0.999**self.steps)
                parameter -= rate * decay * parameter + rate * mean / (square.sqrt() + 1e-8)
            else:
                first.mul_(self.momentum).add_(gradient + decay * parameter)
                parameter -= rate * first
        self.net.zero_grad()


def kind(name: str) -> str:
    """Of a parameter, by its official name."""
    if name.startswith("new_fc"):
        return "classifier" if name.endswith("weight") else "classifier bias"
    if name.endswith("shift"):
        return "shift"
    if name.endswith("conv2.0.weight"):
        return "attention"
    return "norms" if ".bn" in name else "weights"


@contextlib.contextmanager
def exact_losses() -> Iterator[None]:
    """The package computes its loss in float32, whose rounding many steps amplify. Within this it is float64 too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        yield


def assert_same(actual: torch.nn.Module, expected: torch.nn.Module, before: dict[str, Tensor]) -> None:
    """Every parameter and running statistic has changed from `before` as expected."""
    wanted = expected.state_dict()
    assert list(wanted) == list(actual.state_dict())
    for name, value in actual.state_dict().items():
        way = (wanted[name].double() - before[name].double()).norm().item()
        assert (value.double() - wanted[name].double()).norm().item() <= 1e-4 * way + 1e-12, name


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def values(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]
