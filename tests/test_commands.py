"""train.py and eval.py as a user runs them: a run's whole life, other data sets, and bad input."""

from __future__ import annotations

import csv
import functools
import json
import os
import resource
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from commands import BASE, SMALL_RUNS, Commands, commands_in
from conftest import ROOT
from PIL import Image
from videos import decode_in_order, moving_square, real_clip, write_video

import rubiks.cli.main
from rubiks import RubiksNet
from rubiks.cli.entry import training
from rubiks.data import builtin, videos
from rubiks.data.augment import NOTHING
from rubiks.data.decode import VideoFile
from rubiks.evaluation.scorer import Scorer
from rubiks.files import sha256
from rubiks.models import TIERS, VARIANTS
from rubiks.training.module import VideoClassifier

SMALL = ("data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4")
QUICK = ("recipe.batch_size=8", "recipe.epochs=2", "trainer.log_every_n_steps=1")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_network"), SMALL_RUNS]


@pytest.fixture(scope="module")
def trained(builtin_data, tmp_path_factory):
    """A folder in which a run called `first` has been trained, and what the command printed."""
    folder = tmp_path_factory.mktemp("trained")
    with commands_in(folder, pictures=True) as commands:
        return folder, commands.train(builtin_data, *SMALL, *QUICK, "run=first")


def copy_of(trained, tmp_path):
    shutil.copytree(trained[0] / "outputs", tmp_path / "outputs")


def test_training_prints_and_keeps_what_a_user_needs(trained):
    folder, output = trained
    run = folder / "outputs" / "first"
    for words in ("RubiksNet(tier='tiny'", "24 training and 8 validation videos, 8 classes", "shift", "weight decay"):
        assert words in output
    assert "epoch 2/2  validation top-1" in output
    (line,) = [line for line in output.splitlines() if line.startswith("To evaluate: python eval.py protocol=two_clip")]
    assert "data.size=32" in line
    assert line.endswith("ckpt=outputs/first")
    assert "recipe" not in line
    assert yaml.safe_load((run / "config.yaml").read_text())["recipe"]["batch_size"] == 8
    assert json.loads((run / "finished.json").read_text())["epochs"] == 2
    (metrics,) = run.glob("csv/version_0/metrics.csv")
    with metrics.open() as file:
        rows = list(csv.DictReader(file))
    for column in ("train/loss_epoch", "train/top1", "train/top5", "val/loss", "val/top1", "val/top5"):
        assert len([row for row in rows if row.get(column)]) == 2, column
    assert {"train/lr", "clips/s", "data wait"} <= set(rows[0])


def test_checkpoints_are_plain_data_and_describe_themselves(trained):
    folder, _ = trained
    for name in ("best.ckpt", "last.ckpt"):
        path = folder / "outputs/first/checkpoints" / name
        content = torch.load(path, weights_only=True)
        described = content["rubiks"]
        assert (described["tier"], described["variant"], described["num_frames"]) == ("tiny", "rubiks3d", 4)
        assert described["classes"] == [name.replace("[", "").replace("]", "") for name in builtin.class_names("plain")]
        assert described["config"]["recipe"]["optimizer"] == "adamw"
        net = RubiksNet.load_pretrained(path)
        assert net.num_classes == 8
    assert content["rubiks"]["epoch"] == 2


def test_a_trained_and_evaluated_run_becomes_a_folder_that_says_so(
    trained, builtin_data, commands, rubiks_command, tmp_path
):
    copy_of(trained, tmp_path)
    commands.evaluate(builtin_data, *SMALL[:2], "run=first")
    results = json.loads((tmp_path / "outputs/first/results.json").read_text())
    assert rubiks_command("convert", "outputs/first", "mine")[0] == 0
    net = RubiksNet.load_pretrained("mine")
    assert net.source["file"] == "first/checkpoints/best.ckpt"
    assert (net.source["data"], net.source["format"], net.source["protocol"]) == (
        "builtin-plain",
        "builtin",
        "one_clip",
    )
    assert net.source["evaluation"]["top1"] == results["top1"]
    assert (net.preprocessing.num_frames, net.preprocessing.size) == (4, 32)
    assert len(net.classes) == 8
    low, high = results["intervals"]["top1"]
    card = (tmp_path / "mine/README.md").read_text(encoding="utf-8")
    assert f"{results['top1']:.1f}% ({low:.1f} to {high:.1f})" in card

    # It is evaluated as the run is.
    commands.evaluate(builtin_data, *SMALL[:2], "run=again", "ckpt=mine")
    again = json.loads((tmp_path / "outputs/again/results.json").read_text())
    for key in ("top1", "top5", "intervals", "epoch", "crop_size", "num_frames", "sampling", "num_classes", "tier"):
        assert again[key] == results[key], key
    assert (again["checkpoint"], again["checkpoint_sha256"]) == ("mine", sha256(tmp_path / "mine/model.safetensors"))


def test_evaluation_finds_the_newest_run_and_writes_results(trained, builtin_data, commands, tmp_path):
    copy_of(trained, tmp_path)
    output = commands.evaluate(
        builtin_data, *SMALL[:2], "protocol=two_clip", "run=scores", "save_predictions=deep/scores.npz"
    )
    assert "two_clip" in output
    assert "2 clips x 3 crops" in output
    results = json.loads((tmp_path / "outputs/scores/results.json").read_text())
    assert results["checkpoint"] == "outputs/first/checkpoints/best.ckpt"
    assert (results["videos"], results["left_out"], results["crop_size"], results["num_frames"]) == (8, 0, 32, 4)
    saved = np.load(tmp_path / "deep/scores.npz")
    assert saved["logits"].shape == (8, 8)
    assert len(set(saved["names"])) == 8
    assert 100 * (saved["logits"].argmax(1) == saved["labels"]).mean() == pytest.approx(results["top1"])
    ranks = (-saved["logits"]).argsort(1)[:, :5]
    assert 100 * (ranks == saved["labels"][:, None]).any(1).mean() == pytest.approx(results["top5"])

    # The same scores, from the network alone.
    net = RubiksNet.load_pretrained(tmp_path / "outputs/first/checkpoints/best.ckpt")
    root = builtin_data.partition("=")[2]
    video = decode_in_order(f"{root}/plain-24+8-seed0/20bn-something-something-v2/{saved['names'][0]}.webm")
    views = []
    for indices in (
        [int(len(video) / 8 + len(video) / 4 * i) for i in range(4)],
        [int(len(video) / 4 * i) for i in range(4)],
    ):
        frames = torch.from_numpy(video[indices]).permute(0, 3, 1, 2)
        short = round(32 * 256 / 224)
        frames = torch.nn.functional.interpolate(
            frames.float(),
            (short, int(short * frames.shape[3] / frames.shape[2]))
            if frames.shape[2] <= frames.shape[3]
            else (int(short * frames.shape[2] / frames.shape[3]), short),
            mode="bilinear",
            antialias=True,
        ).round()
        step_y, step_x = (frames.shape[2] - 32) // 4, (frames.shape[3] - 32) // 4
        for left in (0, 4 * step_x, 2 * step_x):
            views.append(frames[:, :, 2 * step_y : 2 * step_y + 32, left : left + 32] / 255)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = net((torch.stack(views) - mean) / std).mean(0)
    np.testing.assert_allclose(saved["logits"][0], expected.numpy(), atol=0.02 * expected.abs().max().item())


def test_shuffled_frames_are_marked_as_no_score(trained, builtin_data, commands, tmp_path):
    copy_of(trained, tmp_path)
    output = commands.evaluate(builtin_data, *SMALL[:2], "frame_order=shuffled", "ckpt=outputs/first")
    assert "not a score under the protocol" in output


def test_a_run_can_be_evaluated_by_its_name(trained, builtin_data, commands, tmp_path):
    copy_of(trained, tmp_path)
    shutil.copytree(tmp_path / "outputs/first", tmp_path / "outputs/second")
    output = commands.evaluate(builtin_data, *SMALL[:2], "run=first")
    assert "Evaluating outputs/first/checkpoints/best.ckpt" in output
    assert (tmp_path / "outputs/first/results.json").is_file()


@pytest.mark.parametrize(("step", "epoch", "batch"), [("training_step", 1, 1), ("validation_step", 0, 0)])
def test_interrupted_training_goes_on_as_if_it_had_not_been(
    trained, builtin_data, tmp_path, monkeypatch, capfd, step, epoch, batch
):
    """After Ctrl-C and the same command again, the result equals that of an uninterrupted run."""
    commands = Commands(monkeypatch, capfd, tmp_path)
    original = getattr(VideoClassifier, step)

    def interrupted(self, clips, index):
        loss = original(self, clips, index)  # the batch is in the running statistics
        if not self.trainer.sanity_checking and (self.trainer.current_epoch, index) == (epoch, batch):
            signal.raise_signal(signal.SIGINT)
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(VideoClassifier, step, interrupted)
        status, _, err = commands.run("train", (*BASE, "logger=csv", builtin_data, *SMALL, *QUICK, "run=again"))
    assert status == 130
    assert "Stopping after this step" in err
    assert "run=again" in err
    output = commands.train(builtin_data, *SMALL, *QUICK, "run=again")
    assert "Resuming outputs/again" in output
    ours, reference = (
        torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
        for folder in (tmp_path / "outputs/again", trained[0] / "outputs/first")
    )
    assert ours["global_step"] == reference["global_step"] == 6
    for name, tensor in reference["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def test_a_finished_run_is_not_overwritten(trained, builtin_data, commands, tmp_path):
    copy_of(trained, tmp_path)
    assert "finished run of 2 epochs" in commands.refused("train", builtin_data, *SMALL, *QUICK, "run=first")
    output = commands.train(builtin_data, *SMALL, QUICK[0], "recipe.epochs=3", "run=first")
    assert "Resuming outputs/first" in output
    assert json.loads((tmp_path / "outputs/first/finished.json").read_text())["epochs"] == 3


def test_fine_tuning_says_what_becomes_of_the_classifier(trained, builtin_data, commands, tmp_path):
    copy_of(trained, tmp_path)
    RubiksNet("tiny", 174).save_pretrained(tmp_path / "official.pth.tar")
    options = (builtin_data, *SMALL, "recipe=finetune", "trainer.fast_dev_run=true")
    assert "a new classifier for 8 classes" in commands.train(*options, "init=official.pth.tar")
    assert "with its classifier" in commands.train(*options, "init=outputs/first/checkpoints/best.ckpt")


PUBLISHED = [(tier, variant) for tier in TIERS for variant in ("rubiks3d", "rubiks3d-aq")]


def test_every_variant_has_its_file():
    assert {path.stem for path in (ROOT / "conf/variant").iterdir()} == set(VARIANTS)


@pytest.mark.parametrize(
    ("tier", "variant"), PUBLISHED + [("tiny", name) for name in VARIANTS if ("tiny", name) not in PUBLISHED]
)
def test_every_tier_and_variant_trains(tier, variant, builtin_data, commands, tmp_path):
    output = commands.train(
        builtin_data, *SMALL[:3], "data.num_frames=16", "recipe.batch_size=2", f"tier={tier}", f"variant={variant}",
        "trainer.fast_dev_run=true",
    )  # fmt: skip
    assert f"tier='{tier}', num_classes=8, variant='{variant}', num_frames=16" in output
    assert not list(tmp_path.glob("outputs/*"))


@pytest.mark.parametrize("variant", ["fixed-tsm", "grouped"])
def test_an_ablation_is_trained_and_evaluated_like_the_rest(variant, builtin_data, commands, tmp_path):
    choice = f"variant={variant}"
    commands.train(builtin_data, *SMALL, choice, "recipe.batch_size=8", "recipe.epochs=1", "run=ablation")
    commands.evaluate(builtin_data, *SMALL[:2], choice, "run=scores")
    results = json.loads((tmp_path / "outputs/scores/results.json").read_text())
    assert (results["variant"], results["checkpoint"]) == (variant, "outputs/ablation/checkpoints/best.ckpt")


def test_attention_is_quantised_within_its_budget(builtin_data, commands, tmp_path):
    options = (builtin_data, *SMALL, "variant=rubiks3d-aq")
    output = commands.train(*options, *QUICK, "aq.budget=0.125", "run=aq")
    assert "20 of 162 channels (12.35%)" in output
    run = tmp_path / "outputs/aq"
    with (run / "csv/version_0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for column in ("aq/temperature", "aq/expected_share", "aq/multiplier"):
        assert len([row for row in rows if row[column]]) == 6, column
    stages = [float(rows[-1][f"aq/shifted/layer{stage}"]) for stage in range(5)]
    assert np.average(stages, weights=[18, 18, 18, 36, 72]) == pytest.approx(20 / 162, abs=1e-6)

    output = commands.evaluate(*options, "run=aq")
    assert "12.35% of the channels are shifted in time" in output
    assert json.loads((run / "results.json").read_text())["temporal_share"] == pytest.approx(20 / 162)
    RubiksNet("tiny", 8, "rubiks3d-aq").save_pretrained(tmp_path / "soft.pth.tar")
    assert "soft" in commands.evaluate(*options, "ckpt=soft.pth.tar", "run=soft")
    assert json.loads((tmp_path / "outputs/soft/results.json").read_text())["temporal_share"] is None


def test_the_best_checkpoint_is_within_the_budget(builtin_data, commands, tmp_path, monkeypatch):
    """The best network overall is a soft one; among those within the budget, the one with the best top-1 is kept."""
    scores = [  # of each epoch
        {"val/top1": 0.9, "val/top5": 0.9, "val/loss": 1.0},
        {"val/top1": 1.0, "val/top5": 1.0, "val/loss": 0.5},
        {"val/top1": 0.6, "val/top5": 1.0, "val/loss": 2.0},
        {"val/top1": 0.8, "val/top5": 0.9, "val/loss": 1.5},
        {"val/top1": 0.7, "val/top5": 0.8, "val/loss": 1.0},
    ]

    def scored(self, batch, index) -> None:
        self.log_dict(scores[self.current_epoch], batch_size=len(batch["label"]))

    monkeypatch.setattr(VideoClassifier, "validation_step", scored)
    choices = (builtin_data, *SMALL, "variant=rubiks3d-aq", "aq.budget=0.125", "aq.soft=0.4", "recipe.epochs=5")
    output = commands.train(*choices, "recipe.batch_size=8", "trainer.limit_train_batches=1", "run=aq")
    best = tmp_path / "outputs/aq/checkpoints/best.ckpt"
    assert RubiksNet.load_pretrained(best).temporal_share() <= 0.125
    assert torch.load(best, weights_only=True)["rubiks"]["epoch"] == 4
    assert json.loads((tmp_path / "outputs/aq/finished.json").read_text())["best_val_top1"] == 0.8
    assert "Best validation top-1: 80.0%" in output


@pytest.fixture
def seen(monkeypatch):
    """What the commands feed a network: for each video read, its frame numbers and length; for each batch, the stage
    and the shape of its views."""
    seen = SimpleNamespace(frames=[], batches=[])
    frames = VideoFile.frames

    def read(self, indices):
        seen.frames.append((len(self), np.array(indices).reshape(-1, 4)))
        return frames(self, indices)

    monkeypatch.setattr(VideoFile, "frames", read)

    def noting(owner, step):
        function = getattr(owner, step)

        def note(self, batch, *others):
            seen.batches.append((step, tuple(batch["views"].shape)))
            return function(self, batch, *others)

        return functools.wraps(function)(note)

    steps = ((VideoClassifier, "training_step"), (VideoClassifier, "validation_step"), (Scorer, "predict_step"))
    for owner, step in steps:
        monkeypatch.setattr(owner, step, noting(owner, step))
    return seen


def test_dense_clips_with_everything_on_are_trained_and_evaluated_as_trained(builtin_data, commands, tmp_path, seen):
    clips = ("data.sampling=dense", "data.window=13", "data.clips_per_video=2", "data.balanced=true", "data.flip=auto")
    augment = ("augment=strong", "augment.color_jitter=0.4", "augment.temporal_jitter=true")
    output = commands.train(builtin_data, *SMALL, *clips, *augment, QUICK[0], "recipe.epochs=1", "run=dense")
    assert output.count("mirroring swaps") == 2
    assert "'Moving something from left to right' and 'Moving something from right to left'" in output
    assert "'Moving something clockwise' and 'Moving something counter-clockwise'" in output
    training = [(length, numbers) for length, numbers in seen.frames if len(numbers) == 2]
    validation = [(length, numbers) for length, numbers in seen.frames if len(numbers) == 1]
    assert (len(training), len(validation)) == (24, 16)  # validation is tried first
    assert min(length for length, _ in seen.frames) >= 13
    steps = np.concatenate([np.diff(numbers) for _, numbers in training])
    assert set(steps.flatten().tolist()) == set(range(1, 6))  # 13 // 4, give or take two frames
    assert any((first != second).any() for _, (first, second) in training)
    for length, (numbers,) in validation:
        assert numbers.tolist() == [(length - 13) // 2 + 3 * step for step in range(4)]
    validated = ("validation_step", (8, 1, 4, 3, 32, 32))
    assert seen.batches == [validated, *[("training_step", (8, 2, 4, 3, 32, 32))] * 3, validated]

    ten = ("protocol=dense_10x3", "protocol.crop_size=null", "protocol.short_side=null")

    def evaluated(*arguments):
        seen.frames.clear()
        seen.batches.clear()
        commands.evaluate(*arguments)
        return json.loads((tmp_path / "outputs/dense/results.json").read_text())

    (line,) = [line for line in output.splitlines() if line.startswith("To evaluate: python eval.py ")]
    for arguments in ((builtin_data, *SMALL[:2]), line.split()[5:]):
        results = evaluated(*arguments, *ten, "run=dense", "report=false")
        told = {
            "sampling": "dense",
            "window": 13,
            "clips": 10,
            "crops": 3,
            "num_frames": 4,
            "crop_size": 32,
            "videos": 8,
        }
        assert told.items() <= results.items()
        assert len(seen.frames) == 8
        for length, numbers in seen.frames:
            starts = [int((length - 13) * clip / 9) for clip in range(10)]
            assert numbers.tolist() == [[start + 3 * step for step in range(4)] for start in starts]
        assert seen.batches == [("predict_step", (8, 30, 4, 3, 32, 32))]
    results = evaluated(builtin_data, *SMALL[:2], "data.sampling=uniform", "run=dense")
    assert (results["sampling"], results["window"]) == ("uniform", None)
    for length, (numbers,) in seen.frames:
        assert numbers.tolist() == [int(length / 8 + length / 4 * segment) for segment in range(4)]
    assert seen.batches == [("predict_step", (8, 1, 4, 3, 32, 32))]


@pytest.mark.parametrize(
    ("names", "flip", "mirrored", "words"),
    [
        (["turn left", "turn right"], "auto", [1, 0], "'turn left' and 'turn right'"),
        (["run", "jump"], "auto", [0, 1], ""),
        (["turn left", "jump"], "auto", None, "class 'turn left' has no mirror image"),
        (["0", "1"], "auto", None, "'0' contains no words"),
        (["0", "1"], "true", [0, 1], ""),
        (["turn left", "jump"], "true", [0, 1], ""),
        (["turn left", "turn right"], "false", None, ""),
        (["turn left", "turn right"], "0", None, ""),
    ],
)
def test_mirroring_where_the_class_names_allow_it(names, flip, mirrored, words, caplog):
    caplog.set_level("INFO")
    assert videos.mirrored(training([f"data.flip={flip}"]).data.sampling.flip, names) == mirrored
    assert words in caplog.text
    assert bool(words) == bool(caplog.records)


def test_kinetics_is_mirrored_and_no_recipe_augments_more():
    assert training(["data=kinetics", "data.root=x"]).data.sampling.flip is True
    for name in ("builtin", "ssv2", "kinetics", "csv", "frames", "images", "shards"):
        settings = training([f"data={name}", "data.root=x"])
        data = settings.data
        assert settings.augment == NOTHING
        assert (data.sampling.sampling, data.sampling.clips_per_video, data.loading.balanced) == ("uniform", 1, False)


def picture(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"))


def test_pictures_and_table_of_shifts(trained, monkeypatch, capsys, tmp_path):
    run = trained[0] / "outputs/first"
    assert sorted(path.name for path in run.glob("shifts/*")) == ["changes.png", "offsets.png"]
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    values = torch.cat(
        [value for name, value in saved["state_dict"].items() if "layer3" in name and "shift" in name], 1
    )
    torch.manual_seed(0)  # the run's seed: its network at the start
    initial = torch.cat([block.shift.shift for block in RubiksNet("tiny", 8).backbone.layer3], dim=1)

    def info(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["rubiks", "info", "--shifts", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "100")
        rubiks.cli.main.main()
        return capsys.readouterr().out

    table = info(run / "checkpoints/last.ckpt", "--out", tmp_path / "own")
    rows = [line.replace("\u2502", " ").split() for line in table.splitlines()]
    (index,) = [index for index, row in enumerate(rows) if row[:1] == ["layer3"]]
    for row, own, start in zip(rows[index : index + 3], values, initial, strict=True):
        numbers = own.mean(), own.std(), own.min(), own.max(), (own - start).abs().mean()
        assert [float(word) for word in row[-5:]] == pytest.approx([n.item() for n in numbers], abs=6e-4)
    for name in ("changes.png", "offsets.png"):
        assert np.array_equal(picture(tmp_path / "own" / name), picture(run / "shifts" / name))
        assert picture(tmp_path / "own" / name).std() > 10

    net = RubiksNet("tiny", 8, "rubiks3d-aq").harden(0.125)
    net.save_pretrained(tmp_path / "net.pth.tar")
    table = info(tmp_path / "net.pth.tar", "--out", tmp_path / "aq")
    assert "20 of 162 channels (12.35%)" in table
    assert sorted(path.name for path in tmp_path.glob("aq/*")) == ["offsets.png", "temporal_moves.png"]
    RubiksNet("tiny", 8, "grouped").save_pretrained(tmp_path / "grouped.pth.tar")
    assert info(tmp_path / "grouped.pth.tar", "--out", tmp_path / "grouped").count("\n") == 1
    assert not (tmp_path / "grouped").exists()
    with pytest.raises(SystemExit):
        info(tmp_path / "nothing.ckpt")
    assert "no checkpoint at" in capsys.readouterr().err


def test_multirun(builtin_data, commands, tmp_path):
    # Hydra accepts --multirun before the first or after the last choice.
    options = (
        *BASE,
        "logger=csv",
        builtin_data,
        *SMALL,
        "recipe.epochs=1",
        "recipe.batch_size=8",
        "run=sweep",
        "seed=1,2",
    )
    status, _, err = commands.run("train", (*options, "--multirun"))
    assert status == 0, err
    assert sorted(path.name for path in tmp_path.glob("outputs/*/")) == ["sweep-0", "sweep-1"]
    assert len(list(tmp_path.glob("outputs/*/checkpoints/best.ckpt"))) == 2


# ---- other data sets


@pytest.fixture
def real_videos(tmp_path):
    """The real clips in the layouts of Something-Something-V2, Kinetics, frames and csv; arguments by name."""
    ssv2, kinetics, frames = tmp_path / "ssv2", tmp_path / "kinetics", tmp_path / "frames"
    (ssv2 / "20bn-something-something-v2").mkdir(parents=True)
    entries = []
    for number, name in enumerate(("ssv2_like.webm", "ssv2_like_2.webm")):
        shutil.copy(real_clip(name), ssv2 / "20bn-something-something-v2" / f"{number}.webm")
        entries.append({"id": str(number), "template": ("Pushing [something]", "Pulling [something]")[number]})
    (ssv2 / "labels.json").write_text(json.dumps({"Pushing something": "0", "Pulling something": "1"}))
    for split in ("train", "validation"):
        (ssv2 / f"{split}.json").write_text(json.dumps(entries))

    rows = []
    for number, name in enumerate(("kinetics_demo.mp4", "short_32frames.mp4")):
        label = ("arm wrestling", "clapping")[number]
        (kinetics / label).mkdir(parents=True)
        shutil.copy(real_clip(name), kinetics / label / f"id_{number}-x_{number:06d}_{number + 10:06d}.mp4")
        rows.append(f"{label},id_{number}-x,{number},{number + 10},train,0")
    rows.append("clapping,vanished123,5,15,train,0")
    for split in ("train", "val"):
        (kinetics / f"{split}.csv").write_text("\n".join(["label,youtube_id,time_start,time_end,split,is_cc", *rows]))

    for number, name in enumerate(("ssv2_like.webm", "mpeg4_test.avi")):
        folder = frames / f"video {number}"
        folder.mkdir(parents=True)
        for index, image in enumerate(decode_in_order(real_clip(name))[:20], start=1):
            Image.fromarray(image).save(folder / f"{index:06d}.jpg")
    (frames / "list.txt").write_text("video 0 20 0\nvideo 1 20 1\n")
    videos = [real_clip(name) for name in ("mpeg4_test.avi", "kinetics_demo.mp4")]
    (tmp_path / "list.csv").write_text(f"path,label\n{videos[0]},walking\n{videos[1]},wrestling\n")
    return {
        "ssv2": (f"data.root={ssv2}", "data.num_classes=2"),
        "kinetics": (f"data.root={kinetics}", "data.num_classes=null"),
        "frames": (
            f"data.root={frames}", "data.train_list=list.txt", "data.val_list=list.txt", "data.num_classes=2",
        ),
        "csv": ("data.train_list=list.csv", "data.val_list=list.csv"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["ssv2", "kinetics", "frames", "csv"])
def test_training_and_evaluation_on_real_clips(name, real_videos, commands, tmp_path):
    options = (f"data={name}", *real_videos[name], "data.size=32", "protocol=two_clip")
    commands.train(*options, "recipe.epochs=1", "recipe.batch_size=2", "recipe.dropout=0", "run=real")
    output = commands.evaluate(*options, "run=scores")
    results = json.loads((tmp_path / "outputs/scores/results.json").read_text())
    missing = int(name == "kinetics")
    assert (results["videos"], results["left_out"], results["num_classes"]) == (2, missing, 2)
    if missing:
        assert "vanished123_000005_000015.mp4" in output
        assert "Not scored: 1 of the 3" in output


def test_from_images_to_video(builtin_data, commands, tmp_path):
    for number, (split, name) in enumerate([(s, c) for s in ("training", "val") for c in ("cat", "ant")] * 2):
        (tmp_path / "images" / split / name).mkdir(parents=True, exist_ok=True)
        image = Image.effect_noise((40 + number, 36), 50)
        image.save(tmp_path / "images" / split / name / f"{number}.jpeg")
    options = ("data=images", "data.root=images", "data.train_folder=training", "data.size=32", "variant=rubiks2d")
    output = commands.train(*options, "recipe.batch_size=2", "recipe.epochs=1", "run=still")
    assert "4 training and 4 validation videos, 2 classes, 1 frames of 32 pixels" in output
    commands.evaluate(*options, "protocol=two_clip", "run=scores")
    results = json.loads((tmp_path / "outputs/scores/results.json").read_text())
    assert (results["videos"], results["num_classes"], results["num_frames"]) == (4, 2, 1)
    assert torch.load(tmp_path / "outputs/still/checkpoints/best.ckpt", weights_only=True)["rubiks"]["classes"] == [
        "ant",
        "cat",
    ]

    video = (builtin_data, *SMALL, "init=outputs/still/checkpoints/best.ckpt")
    for variant in ("rubiks3d", "rubiks3d-aq"):
        output = commands.train(*video, f"variant={variant}", "init_temporal=zero", "trainer.fast_dev_run=true")
        assert f"inflated from rubiks2d (2D shift), to {variant} (" in output
        assert "init_temporal=zero" in output
        assert "a new classifier for 8 classes" in output
    assert "inflated" not in commands.train(*video, "variant=rubiks2d", "trainer.fast_dev_run=true")
    for wrong, words in (
        (("variant=rubiks3d", "init_temporal=one"), "tsm, uniform, zero"),
        (("variant=fixed-tsm", "init_temporal=zero"), "must be tsm"),
        (("variant=grouped",), "variant=grouped is chosen"),
        (("variant=rubiks3d", "tier=small"), "tier=small variant=rubiks3d is chosen"),
    ):
        assert words in commands.refused("train", *video, *wrong)
    RubiksNet("tiny", 8).save_pretrained(tmp_path / "net.pth.tar")
    message = commands.refused("train", builtin_data, *SMALL, "init=net.pth.tar", "variant=rubiks2d")
    assert "has tier=tiny variant=rubiks3d" in message
    assert "can also start from rubiks2d" in message


def test_classes_of_a_number_list_can_come_from_the_checkpoint(real_videos, commands, tmp_path):
    options = ("data=frames", *real_videos["frames"][:3], "data.size=32")
    assert "data.num_classes" in commands.refused("train", *options)
    RubiksNet("tiny", 2).save_pretrained(tmp_path / "net.pth.tar")
    assert "2" in commands.evaluate(*options, "ckpt=net.pth.tar")


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tier=huge"], ["tier=huge", "large", "medium", "small", "tiny"]),
        (["variant=rubiks4d"], ["variant=rubiks4d", "Did you mean rubiks3d?", "rubiks3d-aq"]),
        (["data=imagenet"], ["builtin", "csv", "hmdb51", "images", "jester", "kinetics", "ssv1", "ssv2", "ucf101"]),
        (["data=images", "data.root=nowhere"], ["nowhere/train", "data.root"]),
        (["recipe.learning_rate=1"], ["recipe.learning_rate", "recipe.lr", "recipe.momentum"]),
        (["epochs=3"], ["epochs", "recipe", "seed"]),
        (["+recipe.nonsense=1"], ["recipe.nonsense", "batch_size"]),
        (["+trainer.nonsense=1"], ["trainer.nonsense is unknown", "profiler"]),
        (["aq.budget=0.5"], ["aq.budget"]),
        (["variant=rubiks3d-aq", "+aq.nonsense=1"], ["aq.nonsense", "per_layer"]),
        (["augment=weak"], ["default", "strong"]),
        (["augment.mix=1"], ["augment.mix", "augment.mixup", "augment.cutmix"]),
        (["recipe.lr=fast"], ["recipe.lr", "fast"]),
        (["data.balanced=some"], ["data.balanced", "true or false"]),
        ([f"seed={10**11}"], ["seed", "to 4,294,967,295"]),
        (["run=../elsewhere"], ["run", "../elsewhere"]),
        (["precision=7"], ["precision"]),
        (["seed=abc"], ["seed", "abc"]),
        (["init=nowhere.ckpt"], ["nowhere.ckpt"]),
        (["data=ssv2"], ["data.root"]),
        (["data=ssv2", "data.root=nowhere"], ["nowhere", "data.root"]),
        (["data=kinetics", "data.root=."], ["data.val_list", "val.csv"]),
        (["data=csv"], ["data.train_list"]),
    ],
)
def test_bad_arguments_of_train(arguments, words, builtin_data, commands):
    """One of each kind; test_refused_settings.py has the values of every key."""
    data = [] if any(argument.startswith("data=") for argument in arguments) else [builtin_data, *SMALL]
    overridden = {argument.partition("=")[0] for argument in arguments}
    message = commands.refused("train", *(a for a in data if a.partition("=")[0] not in overridden), *arguments)
    for word in words:
        assert word in message


def test_a_folder_that_cannot_be_made(builtin_data, commands, tmp_path):
    (tmp_path / "outputs").touch()
    assert "outputs is not a folder" in commands.refused("train", builtin_data, *SMALL)


def csv_of(tmp_path, *rows):
    (tmp_path / "train.csv").write_text("\n".join(rows))
    return ("data=csv", "data.train_list=train.csv", "data.val_list=train.csv", "data.size=32", "data.num_classes=2")


@pytest.mark.parametrize("problem", ["missing", "corrupt", "empty", "label", "no rows"])
def test_bad_videos_and_lists(problem, commands, tmp_path):
    write_video(tmp_path / "good.mp4", moving_square(12, height=48, width=48))
    (tmp_path / "corrupt.mp4").write_bytes(os.urandom(3000))
    (tmp_path / "empty.mp4").touch()
    rows = {
        "missing": ["good.mp4,0", "gone.mp4,1"],
        "corrupt": ["good.mp4,0", "corrupt.mp4,1"],
        "empty": ["good.mp4,0", "empty.mp4,1"],
        "label": ["good.mp4,0", "good.mp4,2"],
        "no rows": [""],
    }[problem]
    words = {"missing": "gone.mp4", "label": "label 2", "no rows": "lists no videos"}.get(problem, f"{problem}.mp4")
    options = csv_of(tmp_path, *rows)
    RubiksNet("tiny", 2).save_pretrained(tmp_path / "net.pth.tar")
    assert words in commands.refused("eval", *options, "ckpt=net.pth.tar")
    if problem not in ("corrupt", "empty"):
        assert words in commands.refused("train", *options)
    else:  # known only when training has begun
        status, _, err = commands.run("train", (*BASE, *options, "logger=csv", "recipe.epochs=1"))
        assert (status, words in err) == (2, True)


def test_evaluation_leaves_out_bad_videos_on_request(commands, tmp_path):
    write_video(tmp_path / "good.mp4", moving_square(12, height=48, width=48))
    (tmp_path / "bad.mp4").write_text("no video")
    options = csv_of(tmp_path, "good.mp4,0", "bad.mp4,1", "gone.mp4,1")
    RubiksNet("tiny", 2).save_pretrained(tmp_path / "net.pth.tar")
    output = commands.evaluate(*options, "ckpt=net.pth.tar", "data.on_error=skip", "data.max_bad=0.9", "run=scores")
    assert "Not scored: 2 of the 3" in output
    assert json.loads((tmp_path / "outputs/scores/results.json").read_text())["videos"] == 1


def test_bad_checkpoints_of_eval(builtin_data, commands, tmp_path):
    options = (builtin_data, *SMALL)
    message = commands.refused("eval", *options)
    for words in ("no run with data=builtin-plain and", str(tmp_path / "outputs"), "train.py"):
        assert words in message
    (tmp_path / "text.ckpt").write_text("nothing")
    assert "text.ckpt is not a RubiksNet checkpoint" in commands.refused("eval", *options, "ckpt=text.ckpt")
    RubiksNet("tiny", 5).save_pretrained(tmp_path / "five.pth.tar")
    assert "has 5 classes, but the data set has 8" in commands.refused("eval", *options, "ckpt=five.pth.tar")
    (tmp_path / "folder").mkdir()
    assert "checkpoints/best.ckpt" in commands.refused("eval", *options, "ckpt=folder")
    RubiksNet("tiny", 8).save_pretrained(tmp_path / "net.pth.tar")
    assert "natural, reversed, shuffled" in commands.refused("eval", *options, "ckpt=net.pth.tar", "frame_order=odd")


def test_checkpoints_that_cannot_be_written_are_one_clear_error(builtin_data, commands, tmp_path):
    """A limit on the size of files imitates a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        status, _, err = commands.run("train", (*BASE, "logger=csv", builtin_data, *SMALL, *QUICK, "run=full"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 2
    assert "last.ckpt cannot be written: File too large" in err
    assert not list(tmp_path.glob("outputs/full/checkpoints/*"))


def test_help_names_groups_and_keys(commands):
    for name in ("train", "eval"):
        status, out, _ = commands.run(name, ("--help",))
        assert status == 0
        for words in ("tier", "rubiks3d-aq", "two_clip", "data.root", "python"):
            assert words in out, words
