"""eval.py as a user runs it: what comes from the checkpoint, what is written, what is refused, how it is stopped."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import time
from itertools import product

import forked
import numpy as np
import pytest
import torch
import yaml
from commands import BASE, SMALL_RUNS
from configurations import training
from videos import moving_square, write_video

from rubiks import RubiksNet
from rubiks.data import builtin
from rubiks.errors import InputError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("small_network"),
    SMALL_RUNS,
]

SMALL = ("data.size=32", "data.num_frames=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The choices of a small built-in data set."""
    root = tmp_path_factory.mktemp("builtin")
    builtin.generate(root, "plain", 9, 8, 0, progress=False)
    return (f"data.root={root}", "data.train_videos=9", "data.val_videos=8")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of networks, by tier and variant."""
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for tier, variant in (("tiny", "rubiks3d"), ("small", "rubiks3d"), ("tiny", "rubiks3d-aq")):
        paths[tier, variant] = folder / f"{tier}-{variant}.pth.tar"
        RubiksNet(tier, 8, variant, num_frames=2).save_pretrained(paths[tier, variant])
    return paths


@pytest.fixture
def runs(files, tmp_path):
    """The folders of four runs with the files that an evaluation reads, from the oldest to the newest."""
    for age, (name, data, tier, variant) in enumerate(
        (
            ("first", "builtin-plain", "tiny", "rubiks3d"),
            ("second", "builtin-plain", "small", "rubiks3d"),
            ("third", "builtin-plain", "tiny", "rubiks3d-aq"),
            ("other", "ssv2", "tiny", "rubiks3d"),
        )
    ):
        folder = tmp_path / "outputs" / name
        path = folder / "checkpoints/best.ckpt"
        path.parent.mkdir(parents=True)
        shutil.copy(files[tier, variant], path)
        os.utime(path, (age, age))
        names = {"data": data, "tier": tier, "variant": variant}
        (folder / "config.yaml").write_text(yaml.safe_dump({key: {"name": value} for key, value in names.items()}))


# ---- tier and variant


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        (["ckpt=FILE", "tier=small"], ("small", "rubiks3d")),
        (["ckpt=outputs/third", "variant=rubiks3d-aq", "aq.budget=0.5"], ("tiny", "rubiks3d-aq")),
        (["run=third"], ("tiny", "rubiks3d-aq")),
        ([], ("tiny", "rubiks3d-aq")),
        (["ckpt=latest", "tier=small"], ("small", "rubiks3d")),
    ],
)
def test_tier_and_variant_come_from_the_checkpoint(choices, expected, data, files, runs, commands, tmp_path):
    shutil.copy(files["small", "rubiks3d"], tmp_path / "FILE")
    output = commands.evaluate(*data, *SMALL, *choices)
    (path,) = tmp_path.glob("outputs/*/results.json")
    results = json.loads(path.read_text())
    assert (results["tier"], results["variant"]) == expected
    for name in expected:
        assert name in output
    if not any(choice.startswith("run=") for choice in choices):
        assert path.parent.name.startswith("eval-builtin-plain-one_clip-2")


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        (["ckpt=outputs/second", "tier=tiny"], ["has tier=small variant=rubiks3d", "but tier=tiny is chosen"]),
        (["tier=large"], ["no run with data=builtin-plain tier=large and a checkpoint"]),
        (["teir=small"], ["teir", "Did you mean tier?", "variant"]),
    ],
)
def test_another_tier_or_variant_than_the_checkpoints_is_refused(choices, words, data, runs, commands):
    message = commands.refused("eval", *data, *SMALL, *choices)
    for word in words:
        assert word in message
    assert message.count("\n") == 1


# ---- keys that do not exist


@pytest.mark.parametrize(
    ("name", "choice", "words"),
    [
        ("train", "+epochs=3", ["epochs is not a key", "Did you mean recipe.epochs?", "recipe, run, seed"]),
        ("train", "++epochs=3", ["epochs is not a key", "Did you mean recipe.epochs?"]),
        ("train", "+data.rot=x", ["data.rot is not a key", "Did you mean data.root?", "data.num_frames"]),
        ("train", "+eval.foo=1", ["eval.foo is not a key", "recipe"]),
        ("train", "+eval={foo: 1}", ["eval is not a key", "recipe"]),
        ("train", "+tier.x=1", ["tier.x is not a key", "tier.name"]),
        ("train", "+variant.x=1", ["variant.x is not a key", "variant.name"]),
        ("train", "+protocol.clip=1", ["protocol.clip is not a key", "Did you mean protocol.clips?"]),
        ("train", "+logger.csvs=1", ["logger.csvs is not a key", "Did you mean logger.csv?"]),
        ("train", "++logger.wandb={projekt: x}", ["logger.wandb.projekt is not a key", "logger.wandb.project?"]),
        ("train", "+recipe.lrs=1", ["recipe.lrs is not a key", "Did you mean recipe.lr?"]),
        ("train", "+aq.budget=0.5", ["aq.budget is not a key"]),
        ("train", "+run.x=1", ["run.x is not a key"]),
        ("train", "+csv/x=1", ["csv/x is not a key"]),
        ("train", "+data@extra=csv", ["data@extra is not a key", "recipe"]),
        ("train", "+logger=csv", ["+logger=csv", "write logger=csv, without +"]),
        ("train", "++tier=large", ["++tier=large", "write tier=large, without ++"]),
        ("train", "+tier=null", ["+tier=null", "without +"]),
        ("train", "+=3", ["+=3 is not a key"]),
        ("train", "+seed=3", ["+seed", "without +"]),
        ("train", "tier=3", ["tier=3", "tier must be one of large, medium, small, tiny, the files in "]),
        ("train", "tier=null", ["tier=null", "tier must be one of large, medium, small, tiny"]),
        ("train", "recipe=null", ["recipe=null", "recipe must be one of builtin, csv, "]),
        ("train", "recipe={lr: 1}", ["recipe={lr: 1}", "recipe must be one of builtin, csv, "]),
        ("train", "trainer=", ["trainer=", "trainer must be one of ddp, default"]),
        ("eval", "protocol=[1]", ["protocol=[1]", "protocol must be one of dense_10x3, one_clip, two_clip"]),
        ("train", "~seed", ["~seed", "set seed to another value"]),
        ("train", "~recipe.lr", ["~recipe.lr", "set recipe.lr to another value"]),
        ("train", "~tier", ["~tier", "set tier to another value"]),
        ("train", "~epochs", ["~epochs"]),
        ("eval", "+epochs=3", ["epochs is not a key", "batch_size, ckpt, connect_timeout, data"]),
        ("eval", "+data.rot=x", ["data.rot is not a key", "Did you mean data.root?"]),
        ("eval", "+recipe.lr=1", ["recipe.lr is not a key", "batch_size"]),
        ("eval", "+tier.name=tiny", ["tier.name is not a key", "tier, trainer, variant"]),
        ("eval", "+logger=csv", ["logger has no presets here", "logger.wandb.mode"]),
        ("eval", "logger=csv", ["logger has no presets here", "logger.wandb.mode"]),
        ("eval", "+tier=tiny", ["+tier=tiny", "write tier=tiny, without +"]),
        ("eval", "~data.root", ["~data.root", "set data.root to another value"]),
        ("eval", "~protocol", ["~protocol"]),
    ],
)
def test_keys_cannot_be_added_or_removed(name, choice, words, data, commands):
    message = commands.refused(name, *data, choice)
    for word in words:
        assert word in message
    assert message.count("\n") == 1


def test_an_added_key_ends_each_of_several_runs(data, commands):
    status, _, err = commands.run("train", (*BASE, *data, "seed=1,2", "+epochs=1,2", "--multirun"))
    assert (status, err.count("epochs is not a key")) == (2, 1)


@pytest.mark.parametrize(
    "choice",
    [
        "++seed=3",
        "++protocol.crops=3",
        "+trainer.max_time=00:01:00:00",
        "+hydra.job.env_set.UNUSED=1",
        "++hydra.verbose=false",
    ],
)
def test_what_may_be_added(choice, data, files, commands):
    commands.evaluate(*data, *SMALL, f"ckpt={files['tiny', 'rubiks3d']}", choice)


def test_the_other_commands_refuse_added_keys_too(rubiks_command):
    status, _, err = rubiks_command("check", "data=csv", "+data.rot=x")
    assert status == 2
    assert "data.rot is not a key of the configuration. Did you mean data.root?" in err
    status, _, err = rubiks_command("check", "data=null")
    assert (status, "data must be one of builtin, csv, " in err) == (2, True)
    status, _, err = rubiks_command("check", "data=csv", "~data.root")
    assert (status, "set data.root to another value" in err) == (2, True)


# ---- clips too small for batch norm in training


def test_batches_too_small_for_batch_norm_are_told_from_those_that_train():
    net = RubiksNet("tiny", 2).train()

    @functools.cache
    @torch.no_grad()
    def trains(clips: int, frames: int, size: int) -> bool:
        try:
            net(torch.randn(clips, frames, 3, size, size))
        except ValueError as error:
            return "more than 1 value per channel" not in str(error)
        return True

    refused = 0
    for batch_size, videos, clips, frames, size in product((1, 2), (1, 3), (1, 2), (1, 2), (16, 32, 33)):
        shape = {"data__size": size, "data__num_frames": frames, "data__clips_per_video": clips}
        settings = training(**shape, recipe__batch_size=batch_size)
        message = ""
        try:
            settings.check_batch_statistics(videos)
        except InputError as error:
            message = str(error)
        case = f"{batch_size=} {videos=} {clips=} {frames=} {size=}: {message}"
        assert (message == "") == trains(min(batch_size, videos) * clips, frames, size), case
        if message:
            refused += 1
            short = " (of 1 videos, on 1 processes)" if videos < batch_size else ""
            for word in (f"data.size={size}", f"recipe.batch_size={batch_size}{short} leave", "above 32"):
                assert word in message
    assert refused == 6


@pytest.mark.parametrize(
    ("videos", "devices", "nodes", "synchronised", "trains"),
    [
        (3, 2, 1, False, False),  # one video per process
        (4, 2, 1, False, True),
        (3, 1, 2, False, False),
        (3, 2, 1, True, True),
        (1, 1, 1, True, False),
    ],
)
def test_batches_too_small_for_batch_norm_on_several_processes(videos, devices, nodes, synchronised, trains):
    trainer = {"trainer__devices": devices, "trainer__num_nodes": nodes, "trainer__sync_batchnorm": synchronised}
    settings = training(**trainer, data__size=16, data__num_frames=1, recipe__batch_size=8)
    if trains:
        settings.check_batch_statistics(videos)
    else:
        with pytest.raises(InputError, match=f"recipe.batch_size=8 .of {videos} videos, on {devices * nodes} process"):
            settings.check_batch_statistics(videos)


def test_the_smallest_clips_are_trained_validated_and_evaluated(data, files, commands, tmp_path):
    tiny = (*data, "data.size=16", "data.num_frames=1")
    message = commands.refused("train", *tiny, "recipe.batch_size=1")
    assert "data.size=16, data.num_frames=1, data.clips_per_video=1 and recipe.batch_size=1 leave batch norm" in message
    commands.train(*tiny, "recipe.batch_size=7", "recipe.epochs=1", "run=small")  # one video is left for a last batch
    for checkpoint in ("outputs/small", files["small", "rubiks3d"], files["tiny", "rubiks3d-aq"]):
        commands.evaluate(*tiny, "batch_size=7", f"ckpt={checkpoint}", "run=scores")
        results = json.loads((tmp_path / "outputs/scores/results.json").read_text())
        assert (results["crop_size"], results["num_frames"], results["videos"]) == (16, 1, 8)


# ---- what is written


def test_predictions_name_videos_as_the_list_does(commands, tmp_path):
    names = ["a/1.mp4", "b/1.mp4", "b/1.webm", str(tmp_path / "elsewhere/1.mp4")]
    for name in names:
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, moving_square(4, height=32, width=32), "libvpx-vp9" if name.endswith("webm") else "libx264")
    (tmp_path / "list.csv").write_text("".join(f"{name},{label % 2}\n" for label, name in enumerate(names)))
    RubiksNet("tiny", 2).save_pretrained(tmp_path / "net.pth.tar")
    options = ("data=csv", "data.root=videos", "data.val_list=list.csv", *SMALL, "ckpt=net.pth.tar")
    commands.evaluate(*options, "save_predictions=new/scores.npz", "batch_size=3")
    saved = np.load(tmp_path / "new/scores.npz")
    assert saved["names"].tolist() == names
    assert saved["labels"].tolist() == [0, 1, 0, 1]
    assert saved["logits"].shape == (4, 2)


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("save_predictions=scores.npy", ["save_predictions", "'scores.npy'", ".npz"]),
        ("save_predictions=taken.npz", ["taken.npz cannot be written: Is a directory"]),
        ("save_predictions=file/new/scores.npz", ["file/new/scores.npz cannot be written: Not a directory"]),
        ("run=taken", ["outputs/taken/results.json cannot be written: Is a directory"]),
    ],
)
def test_what_cannot_be_written_is_told_before_the_evaluation(choice, words, data, files, commands, tmp_path):
    for name in ("taken.npz", "outputs/taken/results.json"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    status, out, err = commands.run("eval", (*BASE, *data, *SMALL, f"ckpt={files['tiny', 'rubiks3d']}", choice))
    assert status == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert "Evaluating" not in out
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_told_before_the_evaluation(data, files, commands, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    choices = (*data, *SMALL, f"ckpt={files['tiny', 'rubiks3d']}", "save_predictions=closed/scores.npz")
    assert "closed/scores.npz cannot be written: Permission denied" in commands.refused("eval", *choices)


# ---- how it is stopped


@pytest.mark.parametrize(
    ("number", "place", "workers", "status", "name"),
    [
        (signal.SIGINT, "rubiks.evaluation.scorer.Scorer.predict_step", 2, 130, "SIGINT"),
        (signal.SIGTERM, "rubiks.evaluation.scorer.Scorer.predict_step", 2, 143, "SIGTERM"),
        (signal.SIGINT, "rubiks.data.videos.manifest_of", 0, 130, "SIGINT"),
        (signal.SIGTERM, "rubiks.data.videos.manifest_of", 0, 143, "SIGTERM"),
    ],
)
def test_an_evaluation_that_is_stopped_says_so(
    number, place, workers, status, name, data, files, tmp_path, monkeypatch
):
    def wait(*_) -> None:
        print("inside", flush=True)
        time.sleep(60)

    monkeypatch.setattr(place, wait)
    choices = (f"data.workers={workers}", *data, *SMALL, f"ckpt={files['tiny', 'rubiks3d']}")
    process = forked.start(tmp_path, "eval", *choices)
    for line in process.stdout:
        if line.startswith("inside"):
            break
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)  # like a terminal
    found, _, err = forked.end(process, timeout=60)
    assert found == status, err
    assert err == f"interrupted by {name}: there are no results yet\n"
    assert not list(tmp_path.glob("outputs/*"))
