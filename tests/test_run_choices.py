"""The folder of a run, and what is remembered of its choices and lists."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from configurations import command_line
from conftest import assert_rejected

from rubiks import assemble, runs
from rubiks.data.records import VideoRecord
from rubiks.runs import Run


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


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
def test_a_run_that_is_named_has_that_folder(choices, job, name, made, monkeypatch):
    choices = [choice.replace("run=a.b,c=d+e-f_1", "run='a.b,c=d+e-f_1'") for choice in choices]
    cfg = command_line(monkeypatch, "train", *choices, job=job)
    assert assemble.run(cfg) == assemble.named_run(cfg) == Run(Path("outputs") / name)
    assert assemble.is_sweep() == (job is not None)
    assert Path("outputs").exists() == made


def test_a_run_without_a_name_has_a_new_folder(monkeypatch):
    cfg = command_line(monkeypatch, "train", "seed=3", "tier=small")
    assert assemble.named_run(cfg) is None
    first, second = assemble.run(cfg), assemble.run(cfg)
    assert first.folder.name.startswith("builtin-plain-rubiks3d-small-2")
    assert second.folder.name == f"{first.folder.name}-2"
    assert first.folder.is_dir()
    assert second.folder.is_dir()
    sweep = command_line(monkeypatch, "train", "data.level=textured", job=4)
    assert assemble.run(sweep).folder.name.startswith("builtin-textured-rubiks3d-tiny-2")
    assert assemble.run(sweep).folder.name.endswith("-4-2")


@pytest.mark.parametrize("name", ["train", "eval"])
def test_where_nothing_is_written_no_folder_is_made(name, monkeypatch):
    choices = ["trainer.fast_dev_run=true"] if name == "train" else []
    if name == "eval":
        monkeypatch.setenv("LOCAL_RANK", "1")
    cfg = command_line(monkeypatch, name, *choices)
    assert assemble.run(cfg).folder == Path("outputs") / cfg.run
    assert not Path("outputs").exists()


def test_a_process_that_another_has_started_takes_its_folder(monkeypatch):
    monkeypatch.setenv("RUBIKS_RUN", "outputs/given")
    for choices in ([], ["run=mine"]):
        assert assemble.run(command_line(monkeypatch, "train", *choices)) == Run(Path("outputs/given"))


@pytest.mark.parametrize("name", ["../elsewhere", "a b", ".", "..", "", "a/b", "x;y"])
def test_names_that_are_no_folders_are_refused(name, monkeypatch):
    cfg = command_line(monkeypatch, "train", f"run='{name}'")
    assert_rejected(lambda: assemble.run(cfg), "run must be a name", f"got {name!r}")


def test_the_choices_are_those_of_the_command_line(monkeypatch):
    choices = ["seed=3", "data.root=a b", "tier=small"]
    command_line(monkeypatch, "train", *choices)
    assert assemble.choices() == choices


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
def test_an_evaluation_needs_the_choices_of_data_and_device(choice, wanted, monkeypatch):
    monkeypatch.setattr(assemble, "choices", lambda: ["device=gpu", choice])
    assert assemble.choices_for_evaluation() == ["device=gpu", *([choice] if wanted else [])]


@pytest.mark.parametrize(("done", "epochs", "refused"), [(3, 3, True), (4, 3, True), (2, 3, False), (None, 3, False)])
def test_a_finished_run_goes_on_for_more_epochs_alone(done, epochs, refused, monkeypatch):
    run = Run(Path("outputs/x"))
    run.folder.mkdir(parents=True)
    if done is not None:
        run.finished.write_text(json.dumps({"epochs": done}))
    saved = object()
    monkeypatch.setattr(runs.Run, "read_last", lambda self: saved)
    cfg = command_line(monkeypatch, "train")
    if refused:
        assert_rejected(
            lambda: assemble.unfinished(cfg, run, epochs), f"outputs/x holds a finished run of {done} epochs", "epochs"
        )
    else:
        assert assemble.unfinished(cfg, run, epochs) is saved


def test_the_digest_of_a_list_is_that_of_names_and_labels_in_order():
    videos = [VideoRecord("/a/x.mp4", 1, listed="x"), VideoRecord("y\udcff.mp4", 0), VideoRecord("z", 12)]
    expected = hashlib.sha256(b"x\t1\ny\xff.mp4\t0\nz\t12\n").hexdigest()
    assert assemble.digest(videos) == expected
    assert assemble.digest(videos[::-1]) != expected
    assert assemble.digest([]) == hashlib.sha256().hexdigest()
