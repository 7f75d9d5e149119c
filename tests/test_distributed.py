"""The mean of gradients over processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rubiks.training.distributed import average_gradients


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


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("one piece", 1), ("separate", 1), ("both", 2), ("part of a piece", 1), ("two pieces", 2), ("none", 0)],
)
def test_the_mean(kind, pieces, reduced):
    gradients = {
        "one piece": lambda: views(SHAPES),
        "separate": lambda: [torch.randn(shape) for shape in SHAPES],
        "both": lambda: [*views(SHAPES[:2]), torch.randn(SHAPES[2]), torch.randn(SHAPES[3])],
        "part of a piece": lambda: views(SHAPES, spare=4),
        "two pieces": lambda: [*views(SHAPES[:2]), *views(SHAPES[2:])],
        "none": list,
    }[kind]()
    owners = parameters(gradients)
    frozen = nn.Parameter(torch.zeros(2))
    expected = [gradient * 2 for gradient in gradients]
    average_gradients([frozen, *owners])
    assert frozen.grad is None
    for owner, gradient, mean in zip(owners, gradients, expected, strict=True):
        assert owner.grad is gradient
        torch.testing.assert_close(gradient, mean)
    assert len(reduced) == pieces


def test_memory_that_is_not_all_gradients_is_left_alone(reduced):
    memory = torch.ones(10)
    average_gradients(parameters([memory[:4].view(2, 2), memory[4:7]]))
    assert memory.tolist() == [2.0] * 7 + [1.0] * 3
