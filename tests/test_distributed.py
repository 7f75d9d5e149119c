"""The mean of gradients over processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rubiks import RubiksNet
from rubiks.models import VARIANTS
from rubiks.training.distributed import average_gradients, groups


@pytest.fixture
def reduced(monkeypatch) -> list[torch.Tensor]:
    """What is reduced, as by two processes of which the other one has gradients three times as large."""
    pieces = []

    class Done:
        def wait(self) -> None: ...

    def all_reduce(tensor, async_op):
        pieces.append(tensor.mul_(4))
        return Done()

    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    return pieces


SHAPES = (2, 3), (4, 1, 2, 2), (5,), (3, 7)


def parameters(gradients) -> list[nn.Parameter]:
    made = []
    for gradient in gradients:
        made.append(nn.Parameter(torch.zeros(gradient.shape, dtype=gradient.dtype)))
        made[-1].grad = gradient
    return made


def views(shapes, spare: int = 0) -> list[torch.Tensor]:
    """Random gradients in one piece of memory, which has some numbers more."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    parts = torch.randn(sum(sizes) + spare).split([*sizes, spare])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=False)]


# How the gradients of a group lie in memory, which may differ between processes.
LAYOUTS = {
    "one piece": lambda: views(SHAPES),
    "another order": lambda: views(SHAPES[::-1])[::-1],
    "separate": lambda: [torch.randn(shape) for shape in SHAPES],
    "two pieces": lambda: [*views(SHAPES[:2]), *views(SHAPES[2:])],
    "part of a piece": lambda: views(SHAPES, spare=4),
    "a hole": lambda: [views(SHAPES)[0], *views(SHAPES)[1:]],
    "transposed": lambda: [gradient.transpose(0, -1).contiguous().transpose(0, -1) for gradient in views(SHAPES)],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_mean(layout, reduced):
    gradients = LAYOUTS[layout]()
    owners = parameters(gradients)
    frozen = nn.Parameter(torch.zeros(2))
    expected = [gradient * 2 for gradient in gradients]
    average_gradients([[frozen, *owners], [frozen], parameters([torch.ones(3)])])
    assert frozen.grad is None
    for owner, gradient, mean in zip(owners, gradients, expected, strict=True):
        assert owner.grad is gradient
        torch.testing.assert_close(gradient, mean)
    # All processes reduce the same numbers in the same order.
    assert [len(tensor) for tensor in reduced] == [sum(gradient.numel() for gradient in gradients), 3]
    torch.testing.assert_close(reduced[0], torch.cat([mean.flatten() for mean in expected]))


def test_memory_that_is_not_all_gradients_is_left_alone(reduced):
    memory = torch.ones(10)
    average_gradients([parameters([memory[:4].view(2, 2), memory[4:7]])])
    assert memory.tolist() == [2.0] * 7 + [1.0] * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_trained_parameter_is_in_one_group(variant):
    net = RubiksNet("tiny", 3, variant)
    for last in (None, "stem", "layer1"):
        if last is not None:
            net.backbone.freeze(last)
        found = [id(parameter) for group in groups(net) for parameter in group]
        assert len(found) == len(set(found))
        assert set(found) == {id(parameter) for parameter in net.parameters() if parameter.requires_grad}
