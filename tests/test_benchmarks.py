"""The benchmarks: the network that others are compared with, and the bookkeeping."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def network() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_network", FOLDER / "network.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("frames", "channels"), [(1, 8), (3, 16), (8, 20)])
def test_the_temporal_shift_of_tsm_moves_an_eighth_each_way(network, layout, frames, channels):
    x = torch.randn(2 * frames, channels, 3, 5).contiguous(memory_format=layout)
    out = network.TemporalShift(frames)(x)
    part = channels // 8
    clips, expected = x.unflatten(0, (2, frames)), torch.zeros(2, frames, channels, 3, 5)
    for clip in range(2):
        for t in range(frames):
            if t + 1 < frames:
                expected[clip, t, :part] = clips[clip, t + 1, :part]
            if t > 0:
                expected[clip, t, part : 2 * part] = clips[clip, t - 1, part : 2 * part]
            expected[clip, t, 2 * part :] = clips[clip, t, 2 * part :]
    assert torch.equal(out, expected.flatten(0, 1))
    assert out.is_contiguous(memory_format=layout)


def test_tsm_shifts_in_all_sixteen_blocks_and_sees_the_order_of_frames(network):
    net = network.TSM(frames=4).eval()
    assert sum(isinstance(module, network.TemporalShift) for module in net.modules()) == 16
    clips = torch.randn(1, 4, 3, 32, 32)
    with torch.inference_mode():
        out, reversed_out = net(clips), net(clips.flip(1))
    assert out.shape == (1, network.CLASSES)
    assert not torch.allclose(out, reversed_out)


def test_tsm_is_measured_first_and_failures_do_not_count(network):
    words = ["--models", "rubiks-tiny", "tsm", "--device", "cpu", "--batches", "1", "2", "--modes", "eager"]
    plan = network.keys(network.parse(words))
    assert [key["model"] for key in plan] == ["tsm", "tsm", "rubiks-tiny", "rubiks-tiny"] * 2
    rows = [key | {"clips_per_second": 10.0} for key in plan[:1]] + [key | {"error": "no memory"} for key in plan[1:2]]
    assert network.ratio(rows, plan[2] | {"clips_per_second": 5.0}) == {"over_tsm": 0.5}
    assert network.ratio(rows, plan[3] | {"clips_per_second": 5.0}) == {}


def test_no_benchmark_hides_a_module_of_the_standard_library():
    # Python puts a script's folder before the standard library, and torch.compile imports cProfile and so profile.
    assert not {path.stem for path in FOLDER.glob("*.py")} & sys.stdlib_module_names
