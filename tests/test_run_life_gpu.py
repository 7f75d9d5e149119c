"""The tests of `test_run_life` on GPUs: mixed precision, recorded steps, NCCL."""

from __future__ import annotations

import math
import os
import random
import signal
import subprocess
import sys

import pytest
import torch
from commands import Commands
from conftest import ROOT

from rubiks.data import builtin
from rubiks.training.module import VideoClassifier

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*number of training batches.*"),
]

CHOICES = (
    "logger=csv",
    "data.workers=0",
    "data.train_videos=48",
    "data.val_videos=8",
    "data.size=64",
    "recipe.batch_size=4",
    "recipe.epochs=2",
    "trainer.log_every_n_steps=1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("builtin")
    builtin.generate(root, "plain", 48, 8, 0, progress=False)
    return f"data.root={root}"


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    commands = Commands(monkeypatch, capsys, tmp_path)

    def run(*choices: str) -> str:
        status, out, err = commands.run("train", (*CHOICES, *choices))
        assert status == 0, err
        return out

    return run


def last(folder) -> dict:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
@pytest.mark.parametrize("options", [(), ("recipe.ema_decay=0.9", "trainer.val_check_interval=5")])
def test_a_run_in_parts_ends_as_one_in_a_piece(options, precision, variant, data, train, tmp_path):
    choices = (data, f"precision={precision}", f"variant={variant}", "augment.mixup=0.2", "recipe.dropout=0.3")
    choices += options
    train(*choices, "run=whole")
    for stop in (random.randrange(3, 12), random.randrange(13, 23)):
        train(*choices, f"trainer.max_steps={stop}", "run=parts")
    train(*choices, "run=parts")
    ours, reference = (last(tmp_path / f"outputs/{name}") for name in ("parts", "whole"))
    assert ours["rubiks"]["position"] == reference["rubiks"]["position"]
    assert ours.get("MixedPrecision") == reference.get("MixedPrecision")
    # Not to the bit: cuDNN may choose other kernels in another process.
    for name, tensor in reference["state_dict"].items():
        found = ours["state_dict"][name]
        if name.endswith("conv2.0.weight"):  # attention, 0 or 1 after the choice, which rounding decides for near ties
            same = found.argmax(1) == tensor.argmax(1)
            assert same.float().mean() > 0.9, name
            found, tensor = found[same], tensor[same]
        rtol = 0.3 if name.endswith("running_var") else 0.1
        torch.testing.assert_close(found, tensor, rtol=rtol, atol=0.1, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "32-true"])
@pytest.mark.parametrize(
    "variant", ["rubiks3d", "rubiks3d-aq", "rubiks3d-quantized", "rubiks2d", "fixed-tsm", "grouped"]
)
def test_a_step_that_is_not_finite_is_left_out(variant, precision, optimizer, data, train, monkeypatch):
    bad = random.randrange(11)
    states = []
    original = VideoClassifier.training_step

    def step(self, batch, index):
        if index in (bad, bad + 1) and self.current_epoch == 0:
            states.append({name: value.clone() for name, value in self.net.state_dict().items()})
        loss = original(self, batch, index)
        return loss * math.nan if index == bad and self.current_epoch == 0 else loss

    monkeypatch.setattr(VideoClassifier, "training_step", step)
    output = train(data, f"precision={precision}", f"variant={variant}", f"recipe.optimizer={optimizer}", "run=nan")
    before, after = states
    for name, value in before.items():
        if not name.endswith(("num_batches_tracked", ".T")):
            assert torch.equal(after[name], value), name
    if precision != "16-mixed":  # its scale may have been too large before
        assert f"the gradient of step {bad + 1} is not finite" in output
    assert "webm" in output


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("", 0, []),
        ("training 1 0 3 raise", 1, ["process 1 of 2 failed", "ValueError: the fault of the test"]),
        ("training 1 0 3 input", 2, ["error: process 1 of 2: the input of the test is bad"]),
        ("training 1 0 3 SIGKILL", 2, ["process 1 of 2"]),
        ("training 1 1 2 hang", 2, ["error: process 1 of 2 hangs", "20 s (process_timeout)"]),
        ("training 1 0 3 SIGTERM", 143, ["interrupted by SIGTERM: to resume: python train.py run=two"]),
        ("validation 0 0 0 SIGUSR1", 138, ["interrupted by SIGUSR1: to resume: python train.py run=two"]),
    ],
)
def test_one_of_two_processes_fails(where, status, words, data, tmp_path):
    def run(fault: str) -> tuple[int, str]:
        choices = (*CHOICES, data, "trainer=ddp", "trainer.devices=2", "recipe.batch_size=2", "process_timeout=20")
        process = subprocess.Popen(
            [sys.executable, ROOT / "tests/faulty_train.py", *choices, "run=two"],
            cwd=tmp_path,
            env=os.environ | ({"FAULT": fault} if fault else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, err = process.communicate(timeout=90)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return process.returncode, err

    found, err = run(where)
    assert found == status, err
    for word in words:
        assert word in err
    if where:
        found, err = run("")
        assert found == 0, err
    assert last(tmp_path / "outputs/two")["rubiks"]["position"]["epoch"] == 2
