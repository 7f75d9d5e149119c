"""Resuming a run: each pair of original and current settings either trains as printed, or is refused with commands that
work."""

from __future__ import annotations

import csv
import json
import math
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from commands import BASE, SMALL_RUNS, Commands
from forked import end, start

from rubiks import RubiksNet, continuing
from rubiks.data import builtin
from rubiks.training.recipe import Recipe

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_network"), SMALL_RUNS]

VIDEOS, DONE, STEPS = 24, 16, 4  # of the list, and where the run stopped: in batches of 4, within its first epoch
START = (
    "data.train_videos=24",
    "data.val_videos=8",
    "data.size=32",
    "data.num_frames=4",
    "recipe.batch_size=4",
    "recipe.epochs=2",
    "recipe.warmup_epochs=0",
    "trainer.log_every_n_steps=1",
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("builtin")
    for count in (24, 32):
        builtin.generate(root, "plain", count, 8, 0, progress=False)
    builtin.generate(root, "textured", 24, 14, 0, progress=False)
    return root


@pytest.fixture(scope="module")
def started(small_network, data, tmp_path_factory):
    """The folder of a run that was stopped within its first epoch."""
    folder = tmp_path_factory.mktemp("started")
    choices = (f"data.root={data}", *START, "run=first", f"trainer.max_steps={STEPS}")
    status, _, err = end(start(folder, "train", *choices))
    assert status == 0, err
    return folder / "outputs"


@pytest.fixture
def commands(monkeypatch, capsys, tmp_path, started):
    shutil.copytree(started, tmp_path / "outputs")
    return Commands(monkeypatch, capsys, tmp_path)


def now(data, changes: tuple[str, ...]) -> list[str]:
    """The original choices, with these replaced."""
    keys = {change.partition("=")[0] for change in changes}
    return [choice for choice in (f"data.root={data}", *START) if choice.partition("=")[0] not in keys] + [*changes]


def cosine(progress: float, epochs: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress / epochs))


# The current choices, what must be printed, and the factor of the first learning rate at a progress in epochs.
TRAINED = {
    "nothing else": ((), (), cosine),
    "lower rate": (("recipe.lr=0.001",), ("recipe.lr: 0.002 -> 0.001",), cosine),
    "smaller batches": (("recipe.batch_size=2",), ("recipe.batch_size: 4 -> 2",), cosine),
    "batches that do not divide": (("recipe.batch_size=5",), ("recipe.batch_size: 4 -> 5",), cosine),
    "one batch an epoch": (("recipe.batch_size=24",), ("recipe.batch_size: 4 -> 24",), cosine),
    "accumulation": (("recipe.accumulate=2",), ("recipe.accumulate: 1 -> 2",), cosine),
    "accumulation that does not divide": (("recipe.accumulate=4",), ("recipe.accumulate: 1 -> 4",), cosine),
    "the same steps in parts": (("recipe.batch_size=2", "recipe.accumulate=2"), ("recipe.batch_size: 4 -> 2",), cosine),
    "more epochs": (("recipe.epochs=4",), ("recipe.epochs: 2 -> 4",), cosine),
    "fewer epochs": (("recipe.epochs=1",), ("recipe.epochs: 2 -> 1",), cosine),
    "constant": (("recipe.schedule=constant",), ("recipe.schedule: cosine -> constant",), lambda p, e: 1.0),
    "steps": (
        ("recipe.schedule=step", "recipe.milestones=[0.5]"),
        ("recipe.milestones: [] -> [0.5]",),
        lambda progress, epochs: 0.1 if progress >= 0.5 else 1.0,
    ),
    "warm-up": (
        ("recipe.warmup_epochs=1", "recipe.schedule=constant"),
        ("recipe.warmup_epochs: 0 -> 1",),
        lambda progress, epochs: (6 * progress + 1) / 7 if progress < 1 else 1.0,
    ),
    "everything that leaves the steps as they are": (
        (
            "recipe.weight_decay=0.5",
            "recipe.shift_lr_scale=0.01",
            "recipe.label_smoothing=0.1",
            "recipe.dropout=0.3",
            "recipe.clip_grad_norm=1.0",
            "augment.mixup=0.5",
            "data.clips_per_video=2",
        ),
        (
            "recipe.weight_decay: 0.05 -> 0.5",
            "recipe.shift_lr_scale: 1.0 -> 0.01",
            "recipe.label_smoothing: 0.0 -> 0.1",
            "recipe.dropout: 0.0 -> 0.3",
            "recipe.clip_grad_norm: 0.0 -> 1.0",
            "augment.mixup: 0.0 -> 0.5",
            "data.clips_per_video: 1 -> 2",
        ),
        cosine,
    ),
    "short epochs": (("trainer.limit_train_batches=5",), ("trainer.limit_train_batches: 1.0 -> 5",), cosine),
    "short epochs that are over": (("trainer.limit_train_batches=3",), ("trainer.limit_train_batches",), cosine),
    "larger views": (("data.size=48",), ("the best checkpoint is chosen from now on",), cosine),
    "another protocol": (("protocol=two_clip",), ("the best checkpoint is chosen from now on",), cosine),
    "bfloat16": (("precision=bf16-mixed",), ("precision: auto -> bf16-mixed",), cosine),
    "loading": (("data.workers=1", "data.timeout=60"), (), cosine),
}


def row(output: str, group: str) -> list[float]:
    """Learning rate and weight decay of a group in the printed table."""
    (line,) = [line for line in output.splitlines() if line.startswith(f"  {group:<16}")]
    return [float(word) for word in line.split()[-2:]]


@pytest.mark.parametrize("name", TRAINED)
def test_what_a_run_takes_up_is_trained_as_printed(name, data, commands, tmp_path):
    changes, printed, factor = TRAINED[name]
    choices = now(data, changes)
    asked = dict(choice.split("=", 1) for choice in choices)
    output = commands.train(*choices, "run=first")
    assert all(text in output for text in printed)
    assert ("Changed since" in output) == bool(printed)

    # The schedule, computed only from numbers of videos.
    batch, accumulate = int(asked["recipe.batch_size"]), int(asked.get("recipe.accumulate", 1))
    epochs = int(asked["recipe.epochs"])
    batches = min(VIDEOS // batch, int(asked.get("trainer.limit_train_batches", 10**6)))
    per_epoch = math.ceil(batches / accumulate)
    done = min(per_epoch, math.ceil(DONE / (batch * accumulate)))
    state = torch.load(tmp_path / "outputs/first/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == STEPS + epochs * per_epoch - done
    assert state["rubiks"]["position"] == {
        "epoch": epochs, "videos": 0, "steps": state["global_step"], "validation_due": False,
        "validation_due_within": False,
    }  # fmt: skip

    rate, decay = row(output, "weights")
    assert decay == float(asked.get("recipe.weight_decay", 0.05))
    assert rate == pytest.approx(float(asked.get("recipe.lr", 0.002)) * batch * accumulate / 16, rel=0.01)
    assert row(output, "shift")[0] == pytest.approx(rate * float(asked.get("recipe.shift_lr_scale", 1)), rel=0.01)
    groups = {group["name"]: group for group in state["optimizer_states"][0]["param_groups"]}
    for group in ("weights", "shift", "classifier"):
        assert [groups[group]["initial_lr"], groups[group]["weight_decay"]] == pytest.approx(
            row(output, group), rel=0.01
        )
    if done < epochs * per_epoch:
        with max((tmp_path / "outputs/first/csv").glob("version_*/metrics.csv")).open() as file:
            rates = [float(line["train/lr"]) for line in csv.DictReader(file) if line["train/lr"]]
        assert rates[0] == pytest.approx(rate * factor(done / per_epoch, epochs), rel=0.01)
    assert json.loads((tmp_path / "outputs/first/finished.json").read_text())["epochs"] == epochs


def test_a_run_goes_on_where_its_data_has_moved(data, commands, tmp_path):
    shutil.copytree(data / "plain-24+8-seed0", tmp_path / "moved/plain-24+8-seed0")
    output = commands.train(*now("moved", ()), "run=first")
    assert "Resuming outputs/first" in output
    assert "Changed" not in output


REFUSED = {
    "tier": (("tier=small",), "tier.name: tiny -> small"),
    "variant": (("variant=rubiks3d-aq",), "variant.name: rubiks3d -> rubiks3d-aq"),
    "causal": (("causal=true",), "causal: false -> true"),
    "seed": (("seed=1",), "seed: 0 -> 1"),
    "frames": (("data.num_frames=8",), "data.num_frames: 4 -> 8"),
    "optimiser": (("recipe.optimizer=sgd", "recipe.lr=0.001"), "recipe.optimizer: adamw -> sgd"),
    "order": (("data.balanced=true",), "data.balanced: false -> true"),
    "weights": (("init=other.pth.tar",), "init: null -> other.pth.tar"),
    "list": (("data.train_videos=32",), "data.train_videos: 24 -> 32"),
    "classes": (("data.level=textured", "data.val_videos=14"), "data.level: plain -> textured"),
    "two at once": (("seed=2", "tier=small", "recipe.lr=0.001"), "seed: 0 -> 2; tier.name: tiny -> small"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_cannot_take_up_is_refused_with_commands_that_work(name, data, commands, tmp_path, monkeypatch):
    monkeypatch.setattr(pl.Trainer, "fit", lambda *_, **__: None)  # that they train is tested above
    changes, words = REFUSED[name]
    RubiksNet("tiny", 8).save_pretrained(tmp_path / "other.pth.tar")
    message = commands.refused("train", "logger=csv", *now(data, changes), "run=first")
    assert words in message
    assert "Traceback" not in message
    (_, going_on, anew) = message.splitlines()
    assert going_on.startswith("To resume: python train.py run=first ")
    again = shlex.split(going_on.partition("python train.py ")[2])
    # What can be kept is kept.
    assert ("recipe.lr=0.001" in again) == ("recipe.lr=0.001" in changes)
    output = commands.train(*[choice for choice in again if choice not in (*BASE, "logger=csv")])
    assert "Resuming outputs/first after 0 epochs and 16 videos of the next" in output

    assert re.match(r"To start a new run( from its weights)?: python train.py ", anew)
    fresh = shlex.split(anew.partition("python train.py ")[2])
    assert set(changes) <= set(fresh)
    output = commands.train(*[choice for choice in fresh if choice not in (*BASE, "logger=csv")], "recipe.epochs=1")
    assert "Run in outputs/builtin-" in output


def test_lists_that_have_changed_on_the_disk(data, commands, tmp_path):
    moved = tmp_path / "moved/plain-24+8-seed0"
    shutil.copytree(data / "plain-24+8-seed0", moved)
    (listed,) = moved.rglob("*train.json")
    listed.write_text(json.dumps(json.loads(listed.read_text())[::-1]))
    message = commands.refused("train", "logger=csv", *now("moved", ()), "run=first")
    assert "the training list (videos, labels or their order)" in message


def test_a_run_of_before_there_were_causal_networks_goes_on(data, commands, tmp_path):
    last = tmp_path / "outputs/first/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    del content["rubiks"]["causal"], content["rubiks"]["config"]["causal"]
    torch.save(content, last)
    output = commands.train(*now(data, ()), "run=first", "trainer.max_steps=5")
    assert "Resuming outputs/first" in output
    assert "Changed" not in output


def test_a_run_cannot_go_back(data, commands):
    commands.train(*now(data, ()), "run=first", "trainer.max_steps=8")
    assert "after 1 epoch and 8 videos of the next (8 steps), more than recipe.epochs=1" in commands.refused(
        "train", "logger=csv", *now(data, ("recipe.epochs=1",)), "run=first"
    )
    message = commands.refused("train", "logger=csv", *now(data, ("trainer.max_steps=8",)), "run=first")
    assert "trainer.max_steps=8 has been reached" in message


def test_a_run_goes_on_with_another_number_of_processes(data, started, tmp_path):
    """From one process to two, and within the next epoch back to one: the same number of steps, at the same rate."""
    shutil.copytree(started, tmp_path / "outputs")
    two = ("recipe.batch_size=2", "trainer=ddp", "trainer.devices=2", "trainer.max_steps=9")
    for changes in (two, ()):
        status, out, err = end(start(tmp_path, "train", *now(data, changes), "run=first"))
        assert status == 0, err
        assert "total batch 4 " in out
        assert f"recipe.batch_size: {'4 -> 2' if changes else '2 -> 4'}" in out
    assert "Resuming outputs/first after 1 epoch and 12 videos of the next (9 steps)" in out
    state = torch.load(tmp_path / "outputs/first/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 12
    assert state["rubiks"]["position"]["epoch"] == 2
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_the_total_batch_stays_with_another_number_of_processes_where_it_can(data, commands, tmp_path):
    """From one process to two, whose batches are twice as large together, and back to one with two batches a step."""
    two = (*now(data, ()), "run=first", "trainer=ddp", "trainer.devices=2", "trainer.max_steps=6")
    status, out, err = end(start(tmp_path, "train", *two))
    assert status == 0, err
    assert "2 processes instead of 1: the total batch is 8 instead of 4, and learning rates change in proportion" in out
    assert row(out, "weights")[0] == pytest.approx(0.002 * 8 / 16, rel=0.01)
    for steps in (7, 8):  # and it stays at the next start
        out = commands.train(*now(data, ()), "run=first", f"trainer.max_steps={steps}")
        told = "1 process instead of 2: the total batch is 8 as before (recipe.batch_size=4, recipe.accumulate=2)"
        assert (told in out) == (steps == 7)
        assert "Changed since" not in out
        assert "total batch 8 " in out
        assert row(out, "weights")[0] == pytest.approx(0.002 * 8 / 16, rel=0.01)
    state = torch.load(tmp_path / "outputs/first/checkpoints/last.ckpt", weights_only=True)
    # Four steps of 4 videos and one of 8 are the first epoch, and three of 8 the second one.
    assert state["rubiks"]["position"]["epoch"] == 2
    output = commands.train(*now(data, ("recipe.batch_size=2",)), "run=first", "recipe.epochs=3")
    assert "total batch 2 " in output  # asked for
    assert "recipe.batch_size: 4 -> 2" in output


SAVED = {"processes": 16, "total_batch": 1024, "recipe": {"batch_size": 64, "accumulate": 1}}


@pytest.mark.parametrize(
    ("processes", "batch_size", "accumulate", "total"),
    [
        (16, 64, 1, 1024),
        (8, 64, 2, 1024),
        (4, 64, 4, 1024),
        (12, 64, 1, 768),
        (6, 64, 3, 1152),  # nearer than 768
        (32, 64, 1, 2048),
        (32, 32, 1, 1024),  # another batch size is used as it is
        (8, 32, 1, 256),
    ],
)
def test_accumulation_follows_the_number_of_processes(processes, batch_size, accumulate, total):
    recipe = Recipe(epochs=1, batch_size=batch_size, lr=0.1, lr_batch=64)
    saved = SimpleNamespace(config=SAVED)
    found, told = continuing.recipe_for(saved, recipe, processes)
    assert (found.batch_size, found.accumulate) == (batch_size, accumulate)
    assert found.total_batch(processes) == total
    assert (told == "") == (processes == 16)
    if told:
        assert f"{processes} processes instead of 16: the total batch is {total} " in told
        assert ("as before" in told) == (total == 1024)
