"""When CUDA graphs are recorded, with stand-ins for the graphs; on a GPU, test_recording.py has real ones."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from rubiks.models import cuda_graphs
from rubiks.models.cuda_graphs import (
    CALLS_BEFORE_RECORDING,
    CALLS_BEFORE_REPLACING,
    KEPT_GRAPHS,
    ForwardCall,
    InferenceGraphs,
    Recorder,
)


class Remembered:
    """Replaces a recording: its result is that of the first inputs."""

    made = 0

    def __init__(self, computation, inputs) -> None:
        Remembered.made += 1
        self.result, _ = computation.forward(*inputs)
        self.latest: ForwardCall | None = None

    @property
    def is_free(self) -> bool:
        return self.latest is None or self.latest.backward_done

    def forward(self, inputs) -> ForwardCall:
        self.latest = ForwardCall()
        return self.latest

    def backward(self, call, grad) -> list[Tensor]:
        call.backward_done = True
        return [torch.full_like(grad, 7.0), grad]


class Product:
    def forward(self, x, weight):
        return (x * weight).detach(), None


WEIGHT = nn.Parameter(torch.tensor([2.0]))


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch):
    monkeypatch.setattr(Remembered, "made", 0)
    monkeypatch.setattr(cuda_graphs, "Recording", Remembered)
    stream = SimpleNamespace(device="cuda:0", cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def call(recorder: Recorder, size: int = 1, constants: object = None, weight: Tensor = WEIGHT, backward: bool = True):
    x = torch.ones(size, requires_grad=True)
    result = recorder(Product(), constants, (x, weight))
    if result is not None and backward:
        result.sum().backward()
        assert (x.grad == 7).all()
    return result


def made(recorder: Recorder, calls: int, **options) -> list[bool]:
    """For each call, whether its result came from a recording."""
    return [call(recorder, **options) is not None for _ in range(calls)]


def test_the_same_is_recorded_after_some_calls():
    assert made(Recorder(), CALLS_BEFORE_RECORDING + 3) == [False] * CALLS_BEFORE_RECORDING + [True] * 3
    assert Remembered.made == 1


def test_other_batches_do_not_take_its_place():
    recorder = Recorder()
    made(recorder, CALLS_BEFORE_RECORDING + 1)
    assert made(recorder, CALLS_BEFORE_REPLACING, size=3) == [False] * CALLS_BEFORE_REPLACING
    assert made(recorder, 1) == [True]
    for _ in range(2 * CALLS_BEFORE_REPLACING):  # never many in a row
        assert made(recorder, 2, size=3) == [False, False]
        assert made(recorder, 1) == [True]
    assert Remembered.made == 1


def test_what_stays_takes_its_place():
    recorder = Recorder()
    made(recorder, CALLS_BEFORE_RECORDING + 1)
    assert made(recorder, CALLS_BEFORE_REPLACING + 2, size=3)[-2:] == [True, True]
    assert made(recorder, 1) == [False]
    assert Remembered.made == 2


@pytest.mark.parametrize("change", [{"constants": 0.5}, {"weight": nn.Parameter(torch.tensor([2.0]))}, {"size": 2}])
def test_what_it_depends_on(change):
    recorder = Recorder()
    made(recorder, CALLS_BEFORE_RECORDING + 1)
    assert made(recorder, 1, **change) == [False]


def test_one_forward_at_a_time():
    recorder = Recorder()
    made(recorder, CALLS_BEFORE_RECORDING)
    result = call(recorder, backward=False)
    assert result is not None
    assert made(recorder, 2) == [False, False]
    result.sum().backward()
    assert made(recorder, 1) == [True]


def test_without_a_gradient():
    recorder = Recorder()
    for _ in range(CALLS_BEFORE_RECORDING + 2):
        assert recorder(Product(), None, (torch.ones(1), torch.ones(1))) is None


def test_a_failure_is_told_once(monkeypatch, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(cuda_graphs, "Recording", fail)
    assert not any(made(Recorder(), CALLS_BEFORE_RECORDING + 5))
    assert caplog.text.count("Continuing without CUDA graphs, since the step cannot be recorded: no room") == 1


@pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda recorder: pickle.loads(pickle.dumps(recorder))])
def test_copies_begin_anew(again):
    recorder = Recorder()
    made(recorder, CALLS_BEFORE_RECORDING + 1)
    assert made(again(recorder), CALLS_BEFORE_RECORDING + 1) == [False] * CALLS_BEFORE_RECORDING + [True]
    assert again(Recorder(enabled=False)).enabled is False


def test_forgotten_and_switched_off():
    recorder = Recorder()
    made(recorder, CALLS_BEFORE_RECORDING + 1)
    recorder.forget()
    assert made(recorder, CALLS_BEFORE_RECORDING + 1) == [False] * CALLS_BEFORE_RECORDING + [True]
    recorder.enabled = False
    assert made(recorder, 2) == [False, False]


# ---- inference


class Graph:
    """Replaces a CUDA graph: computes its result again."""

    def __init__(self, function, source: Tensor, result: Tensor) -> None:
        self.function, self.source, self.result = function, source, result

    def replay(self) -> None:
        self.result.copy_(self.function(self.source))


@pytest.fixture
def recorded(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes for which inference graphs were recorded."""
    shapes = []

    def record(function, x):
        shapes.append(tuple(x.shape))
        source = x.clone()
        result = function(source)
        return Graph(function, source, result), source, result

    monkeypatch.setattr(cuda_graphs, "_record", record)
    return shapes


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_inference_records_each_kind_of_input_once(recorded):
    graphs = InferenceGraphs()
    results = [graphs(double, torch.full((size,), float(value))) for size in (1, 2) for value in (1, 2)]
    assert [result.tolist() for result in results] == [[2], [4], [2, 2], [4, 4]]
    assert recorded == [(1,), (2,)]
    graphs(double, torch.ones(1, dtype=torch.float64))
    assert recorded == [(1,), (2,), (1,)]


def test_inference_keeps_the_latest_graphs(recorded):
    graphs = InferenceGraphs()
    for size in range(KEPT_GRAPHS):
        graphs(double, torch.ones(size))
    graphs(double, torch.ones(0))  # now the latest
    graphs(double, torch.ones(KEPT_GRAPHS))  # replaces the one for 1
    before = len(recorded)
    for size in (0, *range(2, KEPT_GRAPHS + 1)):
        graphs(double, torch.ones(size))
    assert len(recorded) == before
    graphs(double, torch.ones(1))
    assert len(recorded) == before + 1


@pytest.mark.parametrize("again", [copy.deepcopy, lambda graphs: pickle.loads(pickle.dumps(graphs)), None])
def test_inference_records_again_after_a_copy_or_a_move(recorded, again):
    graphs = InferenceGraphs()
    graphs(double, torch.ones(1))
    if again is None:
        graphs.forget()
    else:
        graphs = again(graphs)
    graphs(double, torch.ones(1))
    assert recorded == [(1,), (1,)]
