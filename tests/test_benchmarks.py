"""The benchmarks: the network used for comparison, what the temporal probe measures, and the bookkeeping."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from configurations import training

from rubiks import Predictor, RubiksNet
from rubiks.data import builtin, scenes
from rubiks.data.builtin import Plan
from rubiks.models import Preprocessing

FOLDER = Path(__file__).parents[1] / "benchmarks"


def benchmark(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def network() -> ModuleType:
    return benchmark("network")


@pytest.fixture(scope="module")
def probe() -> ModuleType:
    return benchmark("temporal_probe")


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


@pytest.mark.parametrize(("model", "blocks"), [("tsm", 16), ("tsm-mobilenetv2", 10)])
def test_tsm_shifts_in_its_blocks_and_sees_the_order_of_frames(network, model, blocks):
    net = network.build(model, 4).eval()
    assert sum(isinstance(module, network.TemporalShift) for module in net.modules()) == blocks
    clips = torch.randn(1, 4, 3, 32, 32)
    with torch.inference_mode():
        out, reversed_out = net(clips), net(clips.flip(1))
    assert out.shape == (1, network.CLASSES)
    assert (out - reversed_out).norm() > 1e-3 * out.norm()


@pytest.mark.parametrize("model", ["tsm", "tsm-mobilenetv2"])
def test_folding_norms_leaves_the_logits(network, model):
    net = network.build(model, 2).double().eval()
    for norm in net.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            torch.nn.init.normal_(norm.bias)
    clips = torch.randn(1, 2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = net(clips)
        folded = network.fold_norms(net)
        torch.testing.assert_close(folded(clips), expected, rtol=1e-9, atol=1e-9)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_tsm_is_measured_first_and_failures_do_not_count(network):
    words = ["--models", "rubiks-tiny", "tsm", "--device", "cpu", "--batches", "1", "2", "--modes", "eager"]
    plan = network.keys(network.parse(words))
    assert [key["model"] for key in plan] == ["tsm", "tsm", "rubiks-tiny", "rubiks-tiny"] * 2
    rows = [key | {"clips_per_second": 10.0} for key in plan[:1]] + [key | {"error": "no memory"} for key in plan[1:2]]
    assert network.ratios(rows, plan[2] | {"clips_per_second": 5.0}) == {"over_tsm": 0.5}
    assert network.ratios(rows, plan[3] | {"clips_per_second": 5.0}) == {}


class Oracle(torch.nn.Module):
    """Classifies by the brightness of frames: 0 if it rises, 1 if it falls, 2 if it is constant."""

    def forward(self, clips: torch.Tensor) -> torch.Tensor:
        slope = clips.mean((2, 3, 4)).diff(dim=1).sum(1)
        return torch.stack((slope, -slope, torch.full_like(slope, 0.01), torch.zeros_like(slope)), dim=1)


def test_the_probe_scores_what_it_says(probe):
    ramp = torch.linspace(0, 250, 6).round().to(torch.uint8)[:, None, None, None].expand(6, 3, 9, 9)
    frames = torch.stack((ramp, ramp.flip(0), ramp[:1].expand_as(ramp), ramp))
    clips = probe.Clips(frames, torch.tensor([0, 1, 2, 1]))
    scores = probe.score(Oracle(), clips, 8)
    assert scores["top1"] == 75  # the last has the wrong label
    assert scores["pair"] == 75
    assert scores["reversed"] == 50  # the flat one, and the last
    assert set(scores) == set(probe.SCORES)


def test_the_probe_draws_the_built_in_clips(probe):
    plan = Plan("plain", 0, 16, 8)
    training = probe.draw(plan, 0, 12, 20, workers=0, device="cpu")
    validation = probe.draw(plan, 1, 4, 20, workers=0, device="cpu")
    assert (training.frames.shape, training.frames.dtype) == ((16, 12, 3, 20, 20), torch.uint8)
    assert validation.frames.shape == (8, 4, 3, 20, 20)
    assert training.labels.bincount().tolist() == [2] * 8
    drawn = scenes.draw(plan.rng(plan.clips()[3]), "plain", plan.clips()[3].label)
    assert abs(training.frames[3].float().mean() - np.float32(drawn).mean()) < 12  # the central square of it

    # Views are crops of the kept frames, with one crop and one order per clip.
    views = probe.training_views(training, torch.tensor([3, 0]), frames=4, size=16)
    for view, number in zip(views, (3, 0), strict=True):
        found = [
            [
                {t for t in range(12) if torch.equal(training.frames[number, t, :, y : y + 16, x : x + 16], frame)}
                for frame in view
            ]
            for y in range(5)
            for x in range(5)
        ]
        # Two frames between which nothing moves are equal.
        segments = [{3 * t, 3 * t + 1, 3 * t + 2} for t in range(4)]
        assert any(all(own & segment for own, segment in zip(place, segments, strict=True)) for place in found)


def test_the_probe_trains_each_variant_and_reports(probe, tmp_path, capsys):
    words = ["--variants", "rubiks2d", "rubiks3d-aq", "--seeds", "0", "1", "--steps", "2", "--batch", "2"]
    setting = ["--size", "32", "--frames", "2", "--clips", "8", "8", "--workers", "0", "--device", "cpu"]
    rows = probe.run(probe.parse([*words, *setting, "--json", str(tmp_path / "probe.json")]))
    assert [(row["variant"], row["seed"]) for row in rows] == [(v, s) for v in words[1:3] for s in (0, 1)]
    for row in rows:
        assert row["parameters"] == sum(p.numel() for p in RubiksNet("tiny", 8, row["variant"]).parameters())
        assert row["gflops"] > 0.01
        assert row["steps_per_second"] > 0
        assert (row["budget"] is not None) == (row["variant"] == "rubiks3d-aq")
    assert all(row["top1"] == row["shuffled"] == row["reversed"] for row in rows[:2])  # it cannot tell
    assert json.loads((tmp_path / "probe.json").read_text())["rows"] == rows
    table = capsys.readouterr().out.splitlines()
    assert len([text for text in table if text.startswith("tiny")]) == 2
    assert "±" in table[-1]


@pytest.fixture
def scaling(monkeypatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(FOLDER))
    yield benchmark("scaling")
    for name in ("data", "network"):  # its own imports
        sys.modules.pop(name, None)


def test_who_waits_and_what_communication_takes(scaling):
    """Two processes, of which the second computes a second longer in the second of three steps."""
    step = [500.0, 20.0, 30.0, 7.0]  # compute, averaging, compute, data before the next step
    first = [*step, 500.0, 1020.0, 30.0, 7.0, *step[:3]]
    second = [*step, 1500.0, 20.0, 30.0, 7.0, *step[:3]]
    times = scaling.parts([first, second], warmup=1)
    assert times == {"data": 7, "compute": 780, "communication": 20, "waiting": 250}
    assert scaling.parts([first, second], warmup=2) == {"data": 7, "compute": 530, "communication": 20, "waiting": 0}


def test_efficiency_is_that_of_the_same_scaling_and_input(scaling):
    words = ["--processes", "4", "2", "--batch", "8", "--device", "cpu"]
    plan = scaling.settings(scaling.parse(words))
    assert [(row["processes"], row["batch"]) for row in plan] == [(2, 8), (4, 8)] * 2 + [(2, 4), (4, 2)] * 2
    rates = [100.0, 180.0, 50.0, None, None, 30.0, 10.0, 20.0]
    rows = [
        row | ({"error": "no"} if rate is None else {"clips_per_second": rate})
        for row, rate in zip(plan, rates, strict=True)
    ]
    found = [row.get("efficiency") for row in scaling.with_efficiency(rows)]
    assert found == [1, 0.9, 1, None, None, 1, 1, 1]
    with pytest.raises(SystemExit):
        scaling.parse(["--processes", "3", "--batch", "8"])


@pytest.mark.slow
def test_two_processes_are_measured(scaling, small_network, monkeypatch, tmp_path, capsys):
    def run(command, env, **_) -> None:
        """As torchrun, with processes forked from this one."""
        (count,) = [int(word.partition("=")[2]) for word in command if word.startswith("--nproc-per-node=")] or [1]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "x", "GROUP_RANK": "0"}
        shared |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}

        def work(rank: int) -> None:
            if count > 1:
                os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank))
            scaling.train(*json.loads(command[-1]))

        fork = multiprocessing.get_context("fork")
        workers = [fork.Process(target=work, args=(rank,)) for rank in range(count)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        if any(worker.exitcode for worker in workers):
            raise subprocess.CalledProcessError(1, command, stderr="a process failed")

    monkeypatch.setattr(
        scaling, "subprocess", SimpleNamespace(run=run, CalledProcessError=subprocess.CalledProcessError)
    )
    monkeypatch.setattr(scaling, "VIDEOS", 8)
    files = {"json": tmp_path / "scaling.json", "plot": tmp_path / "scaling.png"}
    words = [f"--{name}={path}" for name, path in files.items()]
    setting = ["--size=32", "--frames=2", "--batch=2", "--steps=3", "--warmup=1", "--workers=0", "--device=cpu"]
    rows = scaling.run(scaling.parse([*words, *setting, "--scalings", "weak", "--tier", "tiny"]))
    assert [(row["input"], row["processes"]) for row in rows] == [
        (s, n) for s in ("memory", "prepared") for n in (1, 2)
    ]
    for row in rows:
        assert row["step_ms"] == pytest.approx(sum(row[f"{part}_ms"] for part in scaling.PARTS))
        assert row["clips_per_second"] == pytest.approx(1000 * 2 * row["processes"] / row["step_ms"])
        assert row["compute_ms"] > 0
        assert (row["waiting_ms"] > 0) == (row["processes"] == 2)
    assert rows[3]["efficiency"] == pytest.approx(rows[3]["clips_per_second"] / rows[2]["clips_per_second"] / 2)
    report = json.loads(files["json"].read_text())
    assert (report["rows"], report["device"] != "", report["torch"]) == (rows, True, torch.__version__)
    assert files["plot"].read_bytes().startswith(b"\x89PNG")
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("weak")]) == 4


def test_streaming_measures_speed_and_the_accuracy_after_each_frame(tmp_path, capsys):
    torch.manual_seed(3)
    net = RubiksNet("tiny", 8, num_frames=3, causal=True)
    torch.nn.init.normal_(net.new_fc.weight)
    net.preprocessing = Preprocessing(3, size=32)
    net.save_pretrained(tmp_path / "net")
    builtin.generate(tmp_path, "plain", 8, 16, 0, progress=False)
    data = [f"data.root={tmp_path}", "data.train_videos=8", "data.val_videos=16"]
    words = [f"ckpt={tmp_path / 'net'}", *data, "--tiers", "tiny", "--size", "32", "--repeats", "2", "--device", "cpu"]
    streaming = benchmark("streaming")
    report = streaming.run(streaming.parse([*words, "--json", str(tmp_path / "streaming.json")]))
    assert json.loads((tmp_path / "streaming.json").read_text()) == report
    assert [row["tier"] for row in report["rows"]] == ["tiny"]
    assert report["rows"][0]["state_bytes"] == streaming.RubiksNet("tiny", 174, causal=True).stream().state_bytes(
        32, 32
    )
    top1 = report["accuracy"]["top1"]
    assert len(top1) == 3

    predictor = Predictor(tmp_path / "net")
    videos, _ = training(*data).data.source.ready().records("val")
    right = [predictor(video.path).predictions[0].index == video.label for video in videos]
    assert top1[-1] == 100 * sum(right) / len(videos)
    assert f"after 3 of 3 frames: top-1 {top1[-1]:.1f}%" in capsys.readouterr().out


def test_no_benchmark_hides_a_module_of_the_standard_library():
    # Python puts a script's folder before the standard library, and torch.compile imports cProfile and so profile.
    assert not {path.stem for path in FOLDER.glob("*.py")} & sys.stdlib_module_names
