"""The folder of a run, and what is remembered of its choices and lists."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
from configurations import command_line
from conftest import assert_rejected

from rubiks import naming, runs
from rubiks.choices import CommandLine
from rubiks.cli.entry import launch, plain
from rubiks.data.records import VideoRecord
from rubiks.data.videos import digest
from rubiks.experiment import Evaluation, Training
from rubiks.runs import Run


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def told():
    """The settings and command line of train.py or eval.py."""

    def tell(name: str, *choices: str, job: int | None = None) -> tuple[Training | Evaluation, CommandLine]:
        kind = {"train": Training, "eval": Evaluation}[name]
        return kind(**plain(command_line(name, *choices))), CommandLine(list(choices), job)

    return tell


def run_of(settings: Training | Evaluation, command: CommandLine) -> Run:
    """As train.py and eval.py ask for it."""
    return naming.run_of(settings.run, command, bool(settings.trainer.fast_dev_run))


@pytest.mark.parametrize(
    ("choices", "job", "name", "made"),
    [
        (["run=mine"], None, "mine", False),
        (["run=a.b,c=d+e-f_1"], None, "a.b,c=d+e-f_1", False),
        (["run=5"], None, "5", False),
        (["run=mine"], 2, "mine-2", False),
        (["seed=1", "run=mine", "seed=1"], 0, "mine-0", False),
        (["trainer.fast_dev_run=true", "run=mine"], None, "mine", False),
    ],
)
def test_a_run_that_is_named_has_that_folder(choices, job, name, made, told):
    choices = [choice.replace("run=a.b,c=d+e-f_1", "run='a.b,c=d+e-f_1'") for choice in choices]
    settings, command = told("train", *choices, job=job)
    assert run_of(settings, command) == naming.named_run(settings.run, command) == Run(Path("outputs") / name)
    assert Path("outputs").exists() == made


def test_a_run_without_a_name_has_a_new_folder(told):
    settings, command = told("train", "seed=3", "tier=small")
    assert naming.named_run(settings.run, command) is None
    first, second = run_of(settings, command), run_of(settings, command)
    assert first.folder.name.startswith("builtin-plain-rubiks3d-small-2")
    assert second.folder.name == f"{first.folder.name}-2"
    assert first.folder.is_dir()
    assert second.folder.is_dir()
    sweep = told("train", "data.level=textured", job=4)
    assert run_of(*sweep).folder.name.startswith("builtin-textured-rubiks3d-tiny-2")
    assert run_of(*sweep).folder.name.endswith("-4-2")


@pytest.mark.parametrize("name", ["train", "eval"])
def test_where_nothing_is_written_no_folder_is_made(name, told, monkeypatch):
    choices = ["trainer.fast_dev_run=true"] if name == "train" else []
    if name == "eval":
        monkeypatch.setenv("LOCAL_RANK", "1")
    settings, command = told(name, *choices)
    assert run_of(settings, command).folder == Path("outputs") / settings.run
    assert not Path("outputs").exists()


def test_a_process_that_another_has_started_takes_its_folder(told, monkeypatch):
    monkeypatch.setenv("RUBIKS_RUN", "outputs/given")
    for choices in ([], ["run=mine"]):
        assert run_of(*told("train", *choices)) == Run(Path("outputs/given"))


@pytest.mark.parametrize("name", ["../elsewhere", "a b", ".", "..", "", "a/b", "x;y"])
def test_names_that_are_no_folders_are_refused(name, told):
    settings, command = told("train", f"run='{name}'")
    assert_rejected(lambda: run_of(settings, command), "run must be a folder name", f"got {name!r}")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ([], [CommandLine(["seed=3", "data.root=a b", "tier=small"])]),
        (["--multirun"], [CommandLine(["seed=3", r"data.root=a\ b", "tier=small"], 0)]),
        (
            ["patience=1,2", "--multirun"],
            [CommandLine(["seed=3", r"data.root=a\ b", "tier=small", f"patience={job + 1}"], job) for job in (0, 1)],
        ),
    ],
)
def test_the_choices_are_those_of_the_command_line(extra, expected, monkeypatch):
    given = []
    monkeypatch.setattr(sys, "argv", ["train.py", "seed=3", "data.root=a b", "tier=small", *extra])
    launch(lambda *arguments: given.append(arguments), Training)
    assert [command for _, _, command in given] == expected
    for settings, config, command in given:
        assert settings == Training(**config)
        assert (settings.seed, settings.data.source.root, settings.tier.name) == (3, "a b", "small")
        assert settings.patience == (command.job + 1 if command.sets("patience") else None)


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        ("data=csv", True),
        ("data.size=32", True),
        ("++data.size=32", True),
        ("+data.size=32", True),
        ('data.root="a=b.c"', True),
        ("data@extra=csv", False),
        ("device=cpu", True),
        ("precision=32-true", True),
        ("experiment=ssv2_tiny", True),
        ("data.clips_per_video=2", False),
        ("++data.clips_per_video=2", False),
        ("data.balanced=true", False),
        ("tier=small", False),
        ("variant=grouped", False),
        ("recipe.lr=0.1", False),
        ("trainer.devices=2", False),
        ("run=data.x", False),
        ("seed=1", False),
        ("augment=strong", False),
        ("protocol=two_clip", False),
    ],
)
def test_an_evaluation_needs_the_choices_of_data_and_device(choice, wanted):
    assert CommandLine(["device=gpu", choice]).for_evaluation() == ["device=gpu", *([choice] if wanted else [])]


@pytest.mark.parametrize(("done", "epochs", "refused"), [(3, 3, True), (4, 3, True), (2, 3, False), (None, 3, False)])
def test_a_finished_run_goes_on_for_more_epochs_alone(done, epochs, refused, monkeypatch):
    run = Run(Path("outputs/x"))
    run.folder.mkdir(parents=True)
    if done is not None:
        run.finished.write_text(json.dumps({"epochs": done}))
    saved = object()
    monkeypatch.setattr(runs.Run, "read_last", lambda self: saved)
    if refused:
        assert_rejected(
            lambda: naming.unfinished(run, epochs), f"outputs/x contains a finished run of {done} epochs", "epochs"
        )
    else:
        assert naming.unfinished(run, epochs) is saved


def test_the_digest_of_a_list_is_that_of_names_and_labels_in_order():
    videos = [VideoRecord("/a/x.mp4", 1, listed="x"), VideoRecord("y\udcff.mp4", 0), VideoRecord("z", 12)]
    expected = hashlib.sha256(b"x\t1\ny\xff.mp4\t0\nz\t12\n").hexdigest()
    assert digest(videos) == expected
    assert digest(videos[::-1]) != expected
    assert digest([]) == hashlib.sha256().hexdigest()
