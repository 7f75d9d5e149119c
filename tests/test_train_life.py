"""What train.py does around the training itself: trial runs, resuming, several processes, sweeps, and the last lines.

Lightning's fit is replaced; nothing is trained.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from commands import BASE

from rubiks import parent, processes, rendezvous, tracking
from rubiks.data.manifest import Entry, Manifest
from rubiks.stopping import Interrupted
from rubiks.training.position import Position

SMALL = ("data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4", "recipe.batch_size=4")

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture
def ends(monkeypatch) -> list[tuple[str, int]]:
    """The runs whose loggers were ended, with what status."""
    ended = []
    monkeypatch.setattr(tracking, "end", lambda run, exit_code=0: ended.append((str(run.folder), exit_code)))
    return ended


def save(call, folder, name: str = "last", **position) -> bytes:
    """Write the parts of a training state at this position that train.py itself reads."""
    module = call.module
    described = {
        "tier": module.net.tier,
        "variant": module.net.variant,
        "num_classes": module.net.num_classes,
        "num_frames": module.net.num_frames,
        "classes": module.classes,
        "config": module.config,
        "epoch": position["epoch"],
        "position": position,
    }
    path = folder / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(exist_ok=True)
    weights = {f"net.{key}": value for key, value in module.net.state_dict().items()}
    torch.save({"state_dict": weights, "rubiks": described}, path)
    return path.read_bytes()


def contents(folder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def over(call, best: float | None = None) -> None:
    """Let the training finish."""
    call.module.position = Position(call.trainer.max_epochs, 0, 12)
    call.trainer.checkpoint_callback.best = best


def line_of(output: str, beginning: str) -> str:
    (line,) = [line for line in output.splitlines() if line.startswith(beginning)]
    return line.removeprefix(beginning)


# ---- trial runs


def test_a_rehearsal_takes_everything_anew_and_leaves_everything_as_it_was(
    builtin_data, commands, fits, ends, tmp_path
):
    choices = (builtin_data, *SMALL, "run=first")
    commands.train(*choices)
    folder = tmp_path / "outputs/first"
    save(fits[0], folder, epoch=1, videos=0, steps=6, validation_due=False)
    (folder / "finished.json").write_text('{"epochs": 2}\n')
    (folder / ".lock").unlink()
    before = contents(tmp_path)
    ends.clear()
    output = commands.train(*choices, "trainer.fast_dev_run=true", "patience=1", "recipe.lr=0.5", "seed=3")
    trainer, module = fits[1].trainer, fits[1].module
    assert (trainer.fast_dev_run, trainer.checkpoint_callback, trainer.early_stopping_callback) == (1, None, None)
    assert fits[1].options["ckpt_path"] is None
    assert (module.start, fits[1].data._start, module.recipe.lr) == (Position(), (0, 0), 0.5)
    assert output.splitlines()[-1] == "Trial run, nothing is saved"
    assert "Changed" not in output
    assert ends == []
    assert contents(tmp_path) == before

    fits.during = lambda call: signal.raise_signal(signal.SIGTERM)
    status, _, err = commands.run("train", (*BASE, *choices, "trainer.fast_dev_run=true"))
    assert (status, err) == (143, "interrupted by SIGTERM\n")
    assert ends == []
    assert contents(tmp_path) == before


# ---- resuming


def test_a_run_goes_on_from_its_last_state(builtin_data, commands, fits, tmp_path):
    choices = (builtin_data, *SMALL, "init=begin.ckpt", "run=first")
    other = (builtin_data, *SMALL, "run=begin", "seed=5")
    commands.train(*other)
    save(fits.pop(), tmp_path / "outputs/begin", epoch=2, videos=0, steps=6, validation_due=False)
    (tmp_path / "outputs/begin/checkpoints/last.ckpt").rename(tmp_path / "begin.ckpt")

    commands.train(*choices)
    assert fits[0].options["ckpt_path"] is None
    begun = torch.load(tmp_path / "begin.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(fits[0].module.net.new_fc.weight, begun["net.new_fc.weight"])

    folder = tmp_path / "outputs/first"
    state = save(fits[0], folder, epoch=1, videos=8, steps=8, validation_due=False)
    (folder / "finished.json").write_text('{"epochs": 1}\n')
    (tmp_path / "begin.ckpt").unlink()  # the run's own weights are taken
    fits.during = lambda call: unfinished.append(not (folder / "finished.json").exists())
    unfinished: list[bool] = []
    output = commands.train(*choices, "recipe.lr=0.5", "recipe.epochs=3", "data.workers=2", "trainer.max_steps=20")
    call = fits[1]
    assert call.options == {"ckpt_path": "outputs/first/checkpoints/last.ckpt", "weights_only": True}
    assert (call.module.start, call.data._start) == (Position(1, 8, 8), (1, 8))
    assert unfinished == [True]
    assert (folder / "checkpoints/last.ckpt").read_bytes() == state
    assert [line for line in output.splitlines() if line.startswith("Changed")] == [
        "Changed since the run was last started: recipe.epochs: 2 -> 3",
        "Changed since the run was last started: recipe.lr: 0.002 -> 0.5",
    ]
    assert "Resuming outputs/first after 1 epoch and 8 videos of the next (8 steps)\n" in output
    assert "Run in" not in output
    assert "Validation" not in output
    assert call.trainer.checkpoint_callback.keep_best
    assert yaml.safe_load((folder / "config.yaml").read_text())["recipe"]["lr"] == 0.5
    assert "recipe.lr=0.5" in (folder / "choices.txt").read_text().splitlines()

    # At the current limits.
    wrong = (builtin_data, *SMALL, "run=first")
    assert "trainer.max_steps=8 has been reached" in commands.refused("train", *wrong, "trainer.max_steps=8")
    assert "more than recipe.epochs=1" in commands.refused("train", *wrong, "recipe.epochs=1")
    (folder / "finished.json").write_text('{"epochs": 3}\n')
    assert "finished run of 3 epochs" in commands.refused("train", *wrong, "recipe.epochs=3")
    (folder / "finished.json").unlink()
    # Settings that a run cannot resume with are refused before its lists are read, which may have changed.
    message = commands.refused("train", "data=csv", "data.train_list=none.csv", "data.num_classes=8", "run=first")
    assert "data.format: builtin -> csv" in message
    # Other classes of the same number, in a list of the same videos.
    described = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    described["rubiks"]["classes"][3] = "Resting something"
    torch.save(described, folder / "checkpoints/last.ckpt")
    assert "class 3 is 'Resting something' there" in commands.refused("train", *wrong)
    assert len(fits) == 2


def test_a_state_that_has_no_best_score_any_more_says_so(builtin_data, commands, fits, tmp_path):
    commands.train(builtin_data, *SMALL, "run=first")
    save(fits[0], tmp_path / "outputs/first", epoch=1, videos=0, steps=6, validation_due=False)
    output = commands.train(builtin_data, *SMALL, "run=first", "protocol=two_clip")
    assert not fits[1].trainer.checkpoint_callback.keep_best
    assert (
        "Validation scores cannot be compared with earlier ones: the best checkpoint is chosen from now on\n" in output
    )
    assert "Resuming outputs/first after 1 epoch (6 steps)\n" in output


@pytest.mark.parametrize("damaged", [True, False])
def test_a_damaged_or_missing_state_does_not_take_the_place_of_the_one_before(
    damaged, builtin_data, commands, fits, tmp_path
):
    commands.train(builtin_data, *SMALL, "run=first")
    folder = tmp_path / "outputs/first"
    state = save(fits[0], folder, "previous", epoch=1, videos=0, steps=6, validation_due=False)
    if damaged:
        (folder / "checkpoints/last.ckpt").write_bytes(state[:1000])
    there = []
    fits.during = lambda call: there.extend(path.name for path in (folder / "checkpoints").iterdir())
    commands.train(builtin_data, *SMALL, "run=first")
    assert fits[1].options["ckpt_path"] == "outputs/first/checkpoints/previous.ckpt"
    assert there == ["previous.ckpt"]


# ---- several processes


@pytest.mark.parametrize("came", [None, signal.SIGTERM])
def test_a_parent_starts_its_processes_and_trains_nothing(came, builtin_data, commands, fits, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(parent, "run", lambda *arguments: (started.append(arguments), came)[1])
    choices = (*BASE, "logger=csv", builtin_data, *SMALL, "run=two", "trainer.devices=2", "process_timeout=21")
    assert commands.run("train", choices) == (0, "", "")
    assert started == [("train", 2, 1, Path("outputs/two"), list(choices), 21)]
    status, _, err = commands.run("train", (*choices, "seed=1,2", "--multirun"))
    if came:  # too late to stop the first run of the sweep
        assert (status, err) == (
            143,
            "interrupted by SIGTERM: outputs/two-0 is finished, but the runs after it were not started\n",
        )
    else:
        assert (status, err) == (0, "")
    assert [arguments[3].name for arguments in started[1:]] == ["two-0", "two-1"][: 1 if came else 2]
    assert fits == []
    assert [path.name for path in tmp_path.glob("outputs/*")] == ["multirun.yaml"]  # Hydra's


@pytest.fixture
def one_of_two(monkeypatch, tmp_path):
    """Makes this process one of two of a training, started by our parent or from outside."""

    def become(rank: int, by_us: bool) -> list[rendezvous.Place]:
        monkeypatch.setattr(processes, "follow_parent", lambda: None)
        monkeypatch.setattr(os, "_exit", sys.exit)  # it would also end the tests
        monkeypatch.setattr(processes, "join", lambda place, *_: joined.append(place))
        joined: list[rendezvous.Place] = []
        values = {"LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
        if by_us:
            values |= {"RUBIKS_PARENT": os.getppid(), "RUBIKS_RUN": "outputs/chosen"}
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))
        return joined

    return become


@pytest.mark.parametrize("by_us", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_two_speaks_and_writes(rank, by_us, builtin_data, commands, fits, ends, one_of_two, tmp_path):
    Manifest(tmp_path, "other.jsonl").append(Entry("unknown", 1, 1))  # the first process warns about this
    choices = (
        builtin_data,
        *SMALL,
        "trainer=ddp",
        "trainer.devices=2",
        "run=named",
        f"data.manifest={tmp_path}/other.jsonl",
    )
    joined = one_of_two(rank, by_us)
    folder = tmp_path / "outputs" / ("chosen" if by_us else "named")
    locked = []
    fits.during = lambda call: (over(call), locked.append((folder / ".lock").is_file()))
    status, out, err = commands.run("train", (*BASE, "logger=csv", *choices))
    assert status == 0, err
    (call,) = fits
    assert (call.trainer.global_rank, call.trainer.world_size) == (rank, 2)
    stop = call.trainer.checkpoint_callback.stop
    first = rank == 0 and not by_us
    assert stop._quiet is not first
    assert joined == [rendezvous.Place(rank, 2, rank, "127.0.0.1", 29500)]
    assert locked == [first]  # otherwise the parent holds it
    assert ("has no entries for the train videos" in out) == first
    assert call.log_levels == (logging.INFO if rank == 0 else logging.WARNING, logging.INFO)
    written = {"config.yaml", "choices.txt", "finished.json"} | ({".lock"} if first else set())
    assert {path.name for path in folder.glob("*")} == (written if rank == 0 else set())
    if rank == 0:
        assert f"Run in {folder.relative_to(tmp_path)}\n" in out
        assert "total batch 8 " in out
        assert ends == [(str(folder.relative_to(tmp_path)), 0)]
    else:
        assert (out, ends) == ("", [])


@pytest.mark.parametrize(("rank", "batch_size", "left_out"), [(0, 4, 0), (0, 5, 4), (1, 5, 4)])
def test_the_first_process_says_how_many_videos_an_epoch_leaves_out(
    rank, batch_size, left_out, builtin_data, commands, fits, ends, one_of_two
):
    one_of_two(rank, by_us=False)
    fits.during = over
    several = ("trainer=ddp", "trainer.devices=2", "run=two")
    output = commands.train(builtin_data, *SMALL, f"recipe.batch_size={batch_size}", *several)
    told = f"{left_out} of the 24 training videos are left out of each epoch, others each time"
    assert (told in output) == ("left out" in output) == (left_out > 0 and rank == 0)


# ---- sweeps


def test_a_sweep_that_is_started_again_goes_on_where_it_ended(builtin_data, commands, fits, tmp_path):
    def seeds(*choices: str) -> tuple[list[int], str]:
        """The seeds of the trained runs, of which only the first finishes, and the output."""
        fits.clear()
        fits.during = lambda call: over(call) if call.module.seed == 1 else None
        options = (builtin_data, *SMALL, "run=sweep", "seed=1,2", *choices, "--multirun")
        status, out, err = commands.run("train", (*BASE, "logger=csv", *options))
        assert (status, err) == (0, "")
        return [call.module.seed for call in fits], out

    assert seeds()[0] == [1, 2]
    again, output = seeds()
    assert again == [2]
    assert "outputs/sweep-0 is finished\n" in output
    assert seeds("recipe.epochs=3")[0] == [1, 2]


@pytest.mark.parametrize("sweep", [True, False])
def test_a_signal_that_came_too_late_for_a_run_ends_its_sweep(sweep, builtin_data, commands, fits):
    def late(call) -> None:
        call.trainer.checkpoint_callback.stop.patient = True
        signal.raise_signal(signal.SIGTERM)
        over(call)

    fits.during = late
    several = ("seed=1,2", "--multirun") if sweep else ()
    status, _, err = commands.run("train", (*BASE, "logger=csv", builtin_data, *SMALL, "run=late", *several))
    assert len(fits) == 1
    if sweep:
        assert status == 143
        assert err.endswith(
            "interrupted by SIGTERM: outputs/late-0 is finished, but the runs after it were not started\n"
        )
    else:
        assert (status, "interrupted" in err) == (0, False)


# ---- the end


@pytest.mark.parametrize(
    ("message", "saved", "words"),
    [
        ("", False, ""),
        ("", True, ": to resume: python train.py run=first COMMAND"),
        ("process 1 is stuck", False, ": process 1 is stuck"),
        ("process 1 is stuck", True, ": process 1 is stuck; to resume: python train.py run=first COMMAND"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(message, saved, words, builtin_data, commands, fits, ends, tmp_path):
    def during(call) -> None:
        assert commands.gc == ["collect", "freeze"]
        if saved:
            save(call, tmp_path / "outputs/first", epoch=1, videos=0, steps=6, validation_due=False)
        raise Interrupted(signal.SIGUSR1, message)

    fits.during = during
    choices = (*BASE, "logger=csv", builtin_data, *SMALL)
    status, out, err = commands.run("train", (*choices, "run=first"))
    assert (status, err) == (138, f"interrupted by SIGUSR1{words}\n".replace("COMMAND", shlex.join(choices)))
    assert ends == [("outputs/first", 1)]
    assert "To evaluate" not in out
    assert commands.gc == ["collect", "freeze", "unfreeze"]


@pytest.mark.parametrize(
    ("position", "best", "extra", "expected"),
    [
        (Position(2, 0, 12), 0.123456789, (), ["Best validation top-1: 12.3%, in outputs/first/checkpoints/best.ckpt"]),
        (Position(2, 0, 12), 0.0, (), ["Best validation top-1: 0.0%, in outputs/first/checkpoints/best.ckpt"]),
        (Position(2, 0, 12), None, (), []),
        (
            Position(1, 8, 8),
            None,
            ("trainer.max_time=00:00:00:09", "trainer.max_steps=99", "patience=4"),
            [
                "Stopped after 1 epoch and 8 videos of the next (8 steps) of 2 epochs (trainer.max_time=00:00:00:09)",
                "To resume: python train.py run=first CHOICES trainer.max_time=00:00:00:09",
            ],
        ),
        (
            None,  # nothing was trained
            0.5,
            (),
            [
                "Stopped after 0 epochs (0 steps) of 2 epochs",
                "To resume: python train.py run=first CHOICES",
                "Best validation top-1: 50.0%, in outputs/first/checkpoints/best.ckpt",
            ],
        ),
    ],
)
def test_the_last_lines_say_what_came_out(
    position, best, extra, expected, builtin_data, commands, fits, ends, tmp_path
):
    def during(call) -> None:
        call.module.position = position
        call.trainer.checkpoint_callback.best = best

    fits.during = during
    output = commands.train(builtin_data, *SMALL, *extra, "run=first")
    choices = shlex.join([*BASE, "logger=csv", builtin_data, *SMALL])
    shared = shlex.join([*BASE, builtin_data, *SMALL[:-1]])
    last = output[output.index("Run in outputs/first\n") :].splitlines()[1:]
    assert last == [
        *(line.replace("CHOICES", choices) for line in expected),
        f"To evaluate: python eval.py protocol=two_clip {shared} ckpt=outputs/first",
    ]
    assert ends == [("outputs/first", 0)]
    finished = tmp_path / "outputs/first/finished.json"
    if position == Position(2, 0, 12):
        assert json.loads(finished.read_text()) == {
            "epochs": 2,
            "best_val_top1": None if best is None else round(best, 6),
        }
        assert finished.read_text().endswith("}\n")
    else:
        assert not finished.exists()
    assert commands.gc == ["collect", "freeze", "unfreeze"]
