"""A run's life: how it stops, what it saves, and that it resumes as if it had not been interrupted."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from commands import BASE, SMALL_RUNS
from conftest import ROOT
from faulty_train import insert
from forked import end, start, start_torchrun

from rubiks import RubiksNet, processes, runs
from rubiks.training.module import VideoClassifier

SMALL = ("data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4")
# Six batches, and optimiser steps, an epoch.
QUICK = (*SMALL, "recipe.batch_size=4", "recipe.epochs=2", "trainer.log_every_n_steps=1")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_network"), SMALL_RUNS]


@pytest.fixture
def fault(monkeypatch):
    """Inserts a fault of `faulty_train` for one test."""

    def put(*what: str) -> None:
        name = f"{what[0]}_step"
        monkeypatch.setattr(VideoClassifier, name, getattr(VideoClassifier, name))
        insert(*what)

    return put


def last(folder) -> dict:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)


def assert_same_state(ours: dict, reference: dict) -> None:
    """Weights, statistics, and the states of the optimiser and the schedule."""
    assert ours["rubiks"]["position"] == reference["rubiks"]["position"]
    for name, tensor in reference["state_dict"].items():
        assert torch.equal(ours["state_dict"][name], tensor), name
    for own, other in zip(ours.get("statistics", []), reference.get("statistics", []), strict=True):
        assert torch.equal(own, other)
    own, other = (state["optimizer_states"][0]["state"] for state in (ours, reference))
    for key, values in other.items():
        for name, value in values.items():
            assert torch.equal(own[key][name], value), (key, name)
    assert ours["lr_schedulers"][0]["last_epoch"] == reference["lr_schedulers"][0]["last_epoch"]


# ---- resuming exactly

CASES = {
    "plain": (),
    "accumulation": ("recipe.batch_size=2", "recipe.accumulate=5"),
    "mixing and dropout": ("augment.mixup=0.4", "augment.cutmix=1.0", "recipe.dropout=0.5"),
    "AQ": ("variant=rubiks3d-aq", "aq.budget=0.125"),
    "averages, AQ": ("variant=rubiks3d-aq", "aq.budget=0.125", "recipe.ema_decay=0.9", "recipe.accumulate=2"),
    "everything at once": (
        "augment=strong", "augment.color_jitter=0.4", "augment.temporal_jitter=true", "data.sampling=dense",
        "data.window=8", "data.balanced=true", "data.clips_per_video=2", "data.flip=auto", "recipe.accumulate=2",
    ),
    "momentum, short epochs, few validations": (
        "recipe.optimizer=sgd", "recipe.schedule=step", "recipe.milestones=[1]", "trainer.limit_train_batches=4",
        "trainer.check_val_every_n_epoch=3",
    ),
    "workers": ("data.workers=2",),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_run_in_parts_ends_as_one_in_a_piece(name, builtin_data, commands, tmp_path):
    choices = (builtin_data, *QUICK, *CASES[name])
    commands.train(*choices, "run=whole")
    total = last(tmp_path / "outputs/whole")["global_step"]
    for stop in sorted(random.sample(range(1, total), 2 if name == "AQ" else 1)):
        output = commands.train(*choices, f"trainer.max_steps={stop}", "run=parts")
        assert last(tmp_path / "outputs/parts")["global_step"] == stop
        assert f"({stop} steps) of 2 epochs (trainer.max_steps={stop})" in output
    output = commands.train(*choices, "run=parts")
    assert "epoch 2/2  validation" in output
    assert_same_state(last(tmp_path / "outputs/parts"), last(tmp_path / "outputs/whole"))
    results = [json.loads((tmp_path / "outputs" / run / "finished.json").read_text()) for run in ("parts", "whole")]
    assert results[0]["epochs"] == results[1]["epochs"] == 2


DDP = ("trainer=ddp", "trainer.devices=2", "recipe.batch_size=2", "process_timeout=20")
# When run by hand: more rounds and longer runs.
ROUNDS, EPOCHS = (int(os.environ.get(f"KILL_{name}", default)) for name, default in (("ROUNDS", "1"), ("EPOCHS", "2")))


def wait_inside(process: subprocess.Popen) -> bool:
    """Wait until it reaches its fault, if it does."""
    return any(line.startswith("inside") for line in process.stdout)


@pytest.fixture(scope="module")
def references(small_network, builtin_data, tmp_path_factory):
    """The last states of uninterrupted runs, of one process and of two."""
    states = {}
    for count, choices in ((1, ()), (2, DDP)):
        folder = tmp_path_factory.mktemp("whole")
        process = start(folder, "train", builtin_data, *QUICK, *choices, f"recipe.epochs={EPOCHS}", "run=whole")
        status, _, err = end(process, timeout=600)
        assert status == 0, err
        states[count] = last(folder / "outputs/whole")
    return states


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM] + [signal.SIGINT] * ("KILL_ROUNDS" in os.environ))
def test_runs_that_are_ended_at_random_moments_go_on(processes, number, builtin_data, references, tmp_path):
    seed = int(os.environ.get("KILL_SEED", random.randrange(10**6)))
    print(f"KILL_SEED={seed}")
    moments = random.Random(seed)
    choices = (builtin_data, *QUICK, *(DDP if processes == 2 else ()), f"recipe.epochs={EPOCHS}", "run=again")
    choices += ("checkpoint.every_n_steps=1",)
    for _ in range(ROUNDS):
        process = start(tmp_path, "train", *choices)
        began = time.monotonic()
        lock = tmp_path / "outputs/again/.lock"  # while Python still imports, signals act as usual
        while not (lock.is_file() and f"process {process.pid} " in lock.read_text()) and process.poll() is None:
            time.sleep(0.05)
        time.sleep(moments.uniform(0, 5 if processes == 2 else 2))
        process.send_signal(number)
        sent = time.monotonic()
        status, _, err = end(process, timeout=10 if number == signal.SIGKILL else 60)
        print(f"{number.name} after {sent - began:.1f} s, ended {time.monotonic() - sent:.1f} s later with {status}")
        if status == 0 or "contains a finished run" in err:
            break
        assert status == (-number if number == signal.SIGKILL else 128 + number), err
        assert "Traceback" not in err
    status, _, err = end(start(tmp_path, "train", *choices), timeout=600)
    assert status == 0 or "contains a finished run" in err, err
    assert_same_state(last(tmp_path / "outputs/again"), references[processes])


@pytest.mark.parametrize(
    ("where", "status", "words"),
    [
        ("training 1 0 3 raise", 1, ["process 1 of 2 failed", "ValueError: the fault of the test"]),
        ("training 1 0 3 input", 2, ["error: process 1 of 2: the input of the test is bad"]),
        ("training 1 0 3 SIGKILL", 2, ["error: process 1 of 2 was killed (SIGKILL)", "resumes from"]),
        ("training 1 1 2 hang", 2, ["error: process 1 of 2 hangs", "10 s (process_timeout)"]),
        ("training 1 0 3 SIGTERM", 143, ["interrupted by SIGTERM: to resume: python train.py run=two"]),
        ("validation 0 0 0 SIGUSR1", 138, ["interrupted by SIGUSR1: to resume: python train.py run=two"]),
    ],
)
def test_one_of_two_processes_fails(where, status, words, builtin_data, references, tmp_path):
    choices = (builtin_data, *QUICK, *DDP, "run=two")
    process = start(tmp_path, "train", *choices, f"process_timeout={10 if 'hang' in where else 60}", fault=where)
    found, _, err = end(process)
    assert found == status, err
    for word in words:
        assert word in err
    assert err.count("Traceback") == (status == 1)
    if "SIG" in where and "TERM" not in where:  # the rest of the run is unaffected
        status, _, err = end(start(tmp_path, "train", *choices))
        assert status == 0, err
        assert_same_state(last(tmp_path / "outputs/two"), references[2])


def test_processes_end_with_their_parent(builtin_data, tmp_path):
    process = start(tmp_path, "train", builtin_data, *QUICK, *DDP, fault="training 0 0 2 hang")
    assert wait_inside(process)
    process.kill()
    end(process, timeout=10)


@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGINT, "training 0 1 1 wait"),
        (signal.SIGTERM, "training 0 1 1 wait"),
        (signal.SIGHUP, "training 0 0 4 wait"),
        (signal.SIGUSR1, "validation 0 0 0 wait"),
    ],
)
def test_a_signal_ends_a_run_with_one_sentence(number, where, builtin_data, references, tmp_path):
    process = start(tmp_path, "train", builtin_data, *QUICK, "run=stopped", fault=where)
    assert wait_inside(process)
    process.send_signal(number)
    status, _, err = end(process)
    assert status == 128 + number
    note, sentence = err.splitlines()
    assert note.startswith("Stopping after this step")
    assert sentence.startswith(f"interrupted by {number.name}: to resume: python train.py run=stopped ")
    choices = shlex.split(sentence.partition("python train.py ")[2])
    status, out, err = end(start(tmp_path, "train", *choices))
    assert status == 0, err
    assert "Resuming outputs/stopped" in out
    assert_same_state(last(tmp_path / "outputs/stopped"), references[1])


def test_a_killed_loader_process_leaves_the_state_of_its_step(builtin_data, commands, tmp_path, monkeypatch):
    choices = (builtin_data, *QUICK, "data.workers=1")
    commands.train(*choices, "run=whole")
    original = VideoClassifier.training_step

    def step(self, batch, index):
        if (self.current_epoch, index) == (1, 1):
            os.kill(self.trainer.train_dataloader._iterator._workers[0].pid, signal.SIGKILL)
        return original(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(VideoClassifier, "training_step", step)
        status, _, err = commands.run("train", (*BASE, "logger=csv", *choices, "run=killed"))
    assert status == 2
    assert "was killed from outside (SIGKILL)" in err
    assert last(tmp_path / "outputs/killed")["global_step"] > 7  # of 12: not only the end of the first epoch
    commands.train(*choices, "run=killed")
    assert_same_state(last(tmp_path / "outputs/killed"), last(tmp_path / "outputs/whole"))


def test_a_full_disk_leaves_the_state_before(builtin_data, commands, references, tmp_path):
    """A limit on the size of files imitates a full disk."""
    commands.train(builtin_data, *QUICK, "run=full", "trainer.max_steps=3")
    before = (tmp_path / "outputs/full/checkpoints/last.ckpt").read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        status, _, err = commands.run("train", (*BASE, "logger=csv", builtin_data, *QUICK, "run=full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert status == 2
    assert "last.ckpt cannot be written: File too large" in err
    assert (tmp_path / "outputs/full/checkpoints/last.ckpt").read_bytes() == before
    commands.train(builtin_data, *QUICK, "run=full")
    assert_same_state(last(tmp_path / "outputs/full"), references[1])


# ---- what counts as finished


def pasted(output: str) -> list[str]:
    """The choices of the printed command to resume, without those that the tests add anyway."""
    start = "To resume: python train.py "
    (line,) = [line for line in output.splitlines() if line.startswith(start)]
    return [choice for choice in shlex.split(line.removeprefix(start)) if choice not in (*BASE, "logger=csv")]


@pytest.mark.parametrize("limit", ["trainer.max_steps=4", "trainer.max_time=00:00:00:01", "patience=1"])
def test_a_run_that_stopped_early_is_not_finished(limit, builtin_data, commands, tmp_path):
    more = {
        "trainer.max_steps=4": (),
        "trainer.max_time=00:00:00:01": ("recipe.epochs=50",),
        "patience=1": ("recipe.lr=0.0", "recipe.epochs=4"),  # nothing improves
    }
    output = commands.train(builtin_data, *QUICK, *more[limit], limit, "run=early")
    assert f"({limit}" in output
    assert "Stopped after" in output
    assert not (tmp_path / "outputs/early/finished.json").exists()
    before = last(tmp_path / "outputs/early")["global_step"]
    again = pasted(output)
    if "max_time" in limit:  # counted from each start
        assert limit in again
        again = [choice for choice in again if choice not in (limit, "recipe.epochs=50")]
        again.append(f"recipe.epochs={last(tmp_path / 'outputs/early')['rubiks']['position']['epoch'] + 1}")
    assert limit not in again
    assert "Resuming outputs/early" in commands.train(*again)
    assert (tmp_path / "outputs/early/finished.json").is_file()
    assert last(tmp_path / "outputs/early")["global_step"] > before


@pytest.mark.parametrize(("every", "epochs", "validated"), [(2, 1, [1]), (2, 3, [2, 3]), (5, 3, [3]), (1, 2, [1, 2])])
def test_every_epoch_is_saved_and_the_last_is_validated(
    every, epochs, validated, builtin_data, commands, tmp_path, monkeypatch
):
    saved = []
    original = VideoClassifier.on_save_checkpoint
    monkeypatch.setattr(
        VideoClassifier,
        "on_save_checkpoint",
        lambda self, checkpoint: (original(self, checkpoint), saved.append(self.position))[0],
    )
    output = commands.train(
        builtin_data, *QUICK, f"recipe.epochs={epochs}", f"trainer.check_val_every_n_epoch={every}", "run=every"
    )
    assert [int(epoch) for epoch in re.findall(r"epoch (\d+)/\d+  validation", output)] == validated
    assert {position.epoch for position in saved if not position.videos} == set(range(1, epochs + 1))
    assert (tmp_path / "outputs/every/checkpoints/best.ckpt").is_file()


def test_states_that_are_kept(builtin_data, commands, tmp_path):
    commands.train(builtin_data, *QUICK, "recipe.epochs=5", "checkpoint.every_n_epochs=2", "run=kept")
    folder = tmp_path / "outputs/kept/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.ckpt",
        "epoch-0002.ckpt",
        "epoch-0004.ckpt",
        "last.ckpt",
        "previous.ckpt",
    ]
    assert torch.load(folder / "epoch-0002.ckpt", weights_only=True)["rubiks"]["position"]["epoch"] == 2
    RubiksNet.load_pretrained(folder / "epoch-0004.ckpt")


# ---- folders


def test_a_moved_run_goes_on_and_keeps_its_best(builtin_data, commands, tmp_path, monkeypatch):
    commands.train(builtin_data, *QUICK, "recipe.lr=0.0", "run=first")  # with a rate of 0, no later score is better
    best = (tmp_path / "outputs/first/checkpoints/best.ckpt").read_bytes()
    score = json.loads((tmp_path / "outputs/first/finished.json").read_text())["best_val_top1"]
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "outputs", elsewhere / "outputs")
    (elsewhere / "outputs/first").rename(elsewhere / "outputs/other")
    monkeypatch.chdir(elsewhere)
    output = commands.train(builtin_data, *QUICK, "recipe.lr=0.0", "recipe.epochs=3", "run=other")
    assert f"Best validation top-1: {score:.1%}, in outputs/other/checkpoints/best.ckpt" in output
    assert (elsewhere / "outputs/other/checkpoints/best.ckpt").read_bytes() == best
    assert not (tmp_path / "outputs").exists()


@pytest.fixture(scope="module")
def stopped(small_network, builtin_data, tmp_path_factory):
    """The folder of a run that was stopped within its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    status, _, err = end(start(folder, "train", builtin_data, *QUICK, "trainer.max_steps=9", "run=torn"))
    assert status == 0, err
    return folder / "outputs"


@pytest.mark.parametrize("damage", ["empty", "torn", "noise"])
def test_a_damaged_state_gives_way_to_the_one_before(damage, builtin_data, commands, references, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "outputs")
    path = tmp_path / "outputs/torn/checkpoints/last.ckpt"
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "torn": content[: len(content) // 2], "noise": os.urandom(1000)}[damage])
    output = commands.train(builtin_data, *QUICK, "run=torn")
    assert "outputs/torn/checkpoints/last.ckpt" in output
    assert "resuming from outputs/torn/checkpoints/previous.ckpt" in output
    assert_same_state(last(tmp_path / "outputs/torn"), references[1])
    (tmp_path / "outputs/torn/finished.json").unlink()
    for name in ("last", "previous"):
        (tmp_path / f"outputs/torn/checkpoints/{name}.ckpt").write_bytes(b"")
    assert "remove outputs/torn to train from scratch" in commands.refused("train", builtin_data, *QUICK, "run=torn")


def test_names_that_are_taken_at_the_same_moment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = []
    barrier = threading.Barrier(8)

    def make() -> None:
        barrier.wait()
        found.append(runs.new("name").folder.name)

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["name", *(f"name-{number}" for number in range(2, 9))]
    (tmp_path / "outputs/name").rmdir()
    (tmp_path / "outputs/name").touch()
    assert runs.new("name").folder.name == "name-9"


def test_a_run_in_use_is_refused(builtin_data, commands, tmp_path):
    commands.train(builtin_data, *QUICK, "recipe.epochs=1", "run=used")
    hold = """
import time
from pathlib import Path
from rubiks.runs import Run
with Run(Path("outputs/used")).locked():
    print("held", flush=True)
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        message = commands.refused("train", builtin_data, *QUICK, "run=used")
        assert f"outputs/used is in use by process {process.pid} on {socket.gethostname()}" in message
    finally:
        process.kill()
        process.communicate()
    commands.train(builtin_data, *QUICK, "run=used")


# ---- gradients that are not finite


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "variant", ["rubiks3d", "rubiks3d-aq", "rubiks3d-quantized", "rubiks2d", "fixed-tsm", "grouped"]
)
def test_a_step_that_is_not_finite_is_left_out(
    variant, precision, builtin_data, commands, tmp_path, fault, monkeypatch
):
    optimizer = random.choice(["sgd", "adamw"])
    step = random.randrange(6)
    before = {}
    original = VideoClassifier.training_step

    def training_step(self, batch, index):
        if index == step:
            before.update({name: tensor.clone() for name, tensor in self.state_dict().items()})
        return original(self, batch, index)

    monkeypatch.setattr(VideoClassifier, "training_step", training_step)
    fault("training", "0", "0", str(step), "nan")
    output = commands.train(
        builtin_data, *QUICK, f"variant={variant}", f"precision={precision}", f"recipe.optimizer={optimizer}",
        f"trainer.max_steps={step + 1}", "run=broken",
    )  # fmt: skip
    assert f"the gradient of step {step + 1} is not finite (learning rate" in output
    assert output.count("is not finite") == 1
    assert re.search(r"videos: \S+webm", output)
    after = last(tmp_path / "outputs/broken")["state_dict"]
    assert all(tensor.isfinite().all() for tensor in after.values())
    for name, tensor in before.items():
        if name.startswith("net.") and not name.endswith(("num_batches_tracked", ".T")):
            assert torch.equal(after[name], tensor), name


def test_training_that_diverges_ends_with_its_last_state(builtin_data, commands, tmp_path, monkeypatch):
    choices = (builtin_data, *SMALL, "recipe.batch_size=1", "recipe.epochs=3", "run=diverged")
    commands.train(*choices, "recipe.epochs=1")
    before = last(tmp_path / "outputs/diverged")
    original = VideoClassifier.training_step
    with monkeypatch.context() as patch:
        patch.setattr(VideoClassifier, "training_step", lambda self, *a: original(self, *a) * float("inf"))
        status, _, err = commands.run("train", (*BASE, "logger=csv", *choices))
    assert status == 2
    assert "20 steps in a row were skipped: the gradient of step 44 is not finite (learning rate" in err
    assert "lower learning rate (recipe.lr)" in err
    after = last(tmp_path / "outputs/diverged")
    for name, tensor in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name], tensor) or name.endswith("num_batches_tracked"), name
    output = commands.train(*choices, "recipe.lr=0.001")
    assert "recipe.lr: 0.002 -> 0.001" in output


def test_weights_that_are_not_finite_are_never_saved(builtin_data, commands, tmp_path, monkeypatch):
    choices = (builtin_data, *QUICK, "run=broken")
    commands.train(*choices, "recipe.epochs=1")
    files = {path: path.read_bytes() for path in (tmp_path / "outputs/broken/checkpoints").iterdir()}
    original = VideoClassifier.on_train_epoch_start

    def breaking(self) -> None:
        original(self)
        self.net.new_fc.weight.data[0, 0] = float("inf")

    monkeypatch.setattr(VideoClassifier, "on_train_epoch_start", breaking)
    status, _, err = commands.run("train", (*BASE, "logger=csv", *choices))
    assert status == 2
    assert "weights are no longer finite" in err
    assert {path: path.read_bytes() for path in files} == files


# ---- who starts the processes


def test_torchrun(builtin_data, references, tmp_path):
    ddp = [choice for choice in DDP if choice != "trainer.devices=2"]  # torchrun has been told
    status, _, errors = end(start_torchrun(tmp_path, 2, builtin_data, *QUICK, *ddp, "run=elastic"))
    assert status == 0, errors
    assert last(tmp_path / "outputs/elastic")["rubiks"]["position"] == references[2]["rubiks"]["position"]


def test_torchrun_with_other_processes_than_configured_is_refused(builtin_data, commands, monkeypatch):
    environment = {
        "TORCHELASTIC_RUN_ID": "x",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes, "join", lambda *_: None)  # there are no others
    message = commands.refused("train", builtin_data, *QUICK, "trainer=ddp", "trainer.devices=1", "run=elastic")
    assert "torchrun has started 2 processes, but" in message
