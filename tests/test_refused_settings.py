"""Values of settings that are refused, each with one message that names the key and the value; and the limits that are
accepted."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from configurations import configuration, leaves, training
from conftest import assert_rejected
from layouts import make_frames
from made import Made
from omegaconf import OmegaConf

from rubiks import assemble, trainers
from rubiks.cli.entry import plain
from rubiks.data import videos
from rubiks.data.catalog import SOURCES
from rubiks.data.datamodule import Loading
from rubiks.data.manifest import Entry, Manifest
from rubiks.data.records import VideoRecord
from rubiks.data.sampling import AsTrained, Sampling
from rubiks.data.sources import HMDB51, CsvLists, FrameLists
from rubiks.errors import InputError
from rubiks.experiment import Evaluation, Training
from rubiks.models.checkpoint import SavedNetwork
from rubiks.models.preprocessing import Preprocessing
from rubiks.trainers import TrainerSettings
from rubiks.training.patience import Patience

NO_WHOLE_NUMBERS = (True, 2.5, "3", "many")
MOST = 2**32 - 1  # the limit of seeds and sizes

# Key: values that are refused, and the outermost values that are accepted.
VALUES = {
    "data.num_frames": ([0, -1, MOST + 1, None, *NO_WHOLE_NUMBERS], [1, 64]),
    "data.size": ([15, MOST + 1, None, *NO_WHOLE_NUMBERS], [16, MOST]),
    "data.clips_per_video": ([0, None, *NO_WHOLE_NUMBERS], [1, MOST]),
    "data.window": ([4, 1_000_001, None, *NO_WHOLE_NUMBERS], [5, 1_000_000]),
    "data.sampling": (["random", None], ["uniform", "dense"]),
    "data.flip": (["maybe", None, 2], [True, False, "auto"]),
    "data.workers": ([-1, None, *NO_WHOLE_NUMBERS], [0, 64, "auto"]),
    "data.on_error": (["ignore", None, True], ["raise", "skip"]),
    "data.max_bad": ([-0.01, 1.01, True, "few", None], [0, 1, 0.5]),
    "data.reader": (["opencv", None], ["auto", "pyav"]),
    "data.timeout": ([0, -1, 1_000_001, True, "long"], [0.5, 1, 1_000_000, None]),
    "data.num_classes": ([0, -1, 1_000_001, *NO_WHOLE_NUMBERS], [3, None]),
    "data.manifest": ([None, 5, True], ["none.jsonl"]),
    "data.train_list": ([5, True], ["a list.csv"]),
    "data.val_list": ([5, True], ["another.csv"]),
    "data.labels": ([5, True], ["words.txt"]),
    "data.root": ([5, None], []),
    "protocol.clips": ([0, None, *NO_WHOLE_NUMBERS], [1, 2, 30]),
    "protocol.crops": ([0, 2, 4, None, "3", True], [1, 3]),
    "recipe.epochs": ([0, "few"], [1]),
    "recipe.milestones": ([5, None, "5"], [[], [5]]),
    "recipe.freeze": (["layer9", 3, True], ["stem", "layer4", "backbone", None]),
    "recipe.ema_decay": ([0, 1, "slow", True], [0.5, None]),
    "recipe.crop_scales": ([0.5, None, [], [0], [1.1]], [[0.5], [1]]),
    "augment.random_resized_crop": ([0.5, [0.5]], [[0.5, 1], None]),
    "augment.mixup": ([-1, "much"], [0, 0.001]),
    "causal": (["perhaps", 1, None], [True, False]),
    "aq.budget": ([-0.1, 1.1], [0, 1]),
    "device": (["tpu", None], ["auto", "cpu"]),
    "process_timeout": ([0, -1, 1_000_001, True, "long", None], [0.5, 1_000_000]),
    "connect_timeout": ([0, -1, 1_000_001, True, "long", None], [0.5, 1_000_000]),
    "patience": ([0, *NO_WHOLE_NUMBERS], [1, None]),
    "checkpoint.every_n_steps": ([0, *NO_WHOLE_NUMBERS], [1, None]),
    "checkpoint.every_n_epochs": ([0, *NO_WHOLE_NUMBERS], [1, None]),
    "trainer.max_steps": ([0, -2, *NO_WHOLE_NUMBERS], [1, -1, None]),
    "trainer.check_val_every_n_epoch": ([0, None, *NO_WHOLE_NUMBERS], [1, 9]),
    "trainer.val_check_interval": ([0, 0.0, 1.5, -1, True, None, "often"], [1, 40, 0.01, 1.0]),
    "trainer.profiler": (["fast", True, 1], ["simple", "advanced", "pytorch", None]),
    "trainer.num_nodes": ([0, -1, True, "3"], [1]),
    "checkpoint": ([None, 5, "last"], []),
    "trainer": ([None, 5], []),
    "recipe": ([None, "ssv2"], []),
    "augment": ([None, False], []),
    "logger": ([None, False], []),
    "logger.wandb": ([False], [None]),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "x.mp4").touch()
    (folder / "a list.csv").write_text("x.mp4,2\n")
    (folder / "another.csv").write_text("x.mp4,1\n")
    (folder / "words.txt").write_text("a\nb\nc\n")
    return folder


def made(root: Path, key: str, value: object) -> Made:
    choices = {
        "data.root": str(root),
        "data.train_list": "a list.csv",
        "data.val_list": "another.csv",
        "data.labels": "words.txt",
        "data.sampling": "dense",
        "data.num_frames": 5,
        "data.workers": 0,
        key: value,
    }
    if value == "uniform":
        choices["protocol.clips"] = 1
    changes = {name.replace(".", "__"): choices[name] for name in choices}
    return Made(configuration("device=cpu", "data=csv", "variant=rubiks3d-aq", **changes))


def refusal(action: Callable[[], object]) -> str:
    """The message of the InputError that it raises, one line."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in VALUES for value in VALUES[key][0]])
def test_a_bad_value_is_refused_by_key_and_value(key, value, root):
    message = refusal(lambda: made(root, key, value).everything())
    assert message.startswith(f"{key} must be ")
    assert repr(value) in message


def test_what_to_do_about_a_section_that_is_null(root):
    remedy = "; set its keys, for example checkpoint.every_n_steps=VALUE, or leave checkpoint out"
    assert refusal(lambda: made(root, "checkpoint", None).settings).endswith(remedy)


def test_a_list_that_must_not_be_empty(root):
    message = refusal(lambda: made(root, "recipe.crop_scales", []).settings)
    assert message == "recipe.crop_scales must be a list of at least one number, each above 0 and at most 1; got []"


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in VALUES for value in VALUES[key][1]])
def test_the_last_good_values_are_taken(key, value, root):
    made(root, key, value).everything()


DATA_SETS = sorted(SOURCES)
KEYS = sorted({key for name in DATA_SETS for key in leaves(configuration(f"data={name}", "variant=rubiks3d-aq"))})
# Of any type: other code checks them, and `run` becomes a name.
ANY_TYPE = {"run", "precision"} | {f"trainer.{name}" for name, field in TrainerSettings.model_fields.items()
                                   if field.annotation is Any}  # fmt: skip


@pytest.mark.parametrize("key", [key for key in KEYS if key not in ANY_TYPE])
@pytest.mark.parametrize("value", [[{"x": 1}], {"x": 1}])
def test_every_setting_refuses_what_it_cannot_be_in_one_line(key, value):
    for name in DATA_SETS:
        cfg = configuration(f"data={name}", "variant=rubiks3d-aq", data__root="x")
        if OmegaConf.select(cfg, key, throw_on_missing=False) is not None or key in leaves(cfg):
            OmegaConf.update(cfg, key, value, force_add=True, merge=False)
            message = refusal(lambda cfg=cfg: Training(**plain(cfg)))
            assert message.startswith(f"{key} must be ")
            assert message.count(str(value)) == 1
            return
    raise AssertionError(f"no data set has {key}")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.size", MOST + 1, "data.size must be a whole number from 16 to 4,294,967,295, got"),
        ("data.size", 15, "data.size must be a whole number of at least 16, got 15"),
        ("data.size", "large", "data.size must be a whole number of at least 16, got 'large'"),
        ("data.num_classes", 1_000_001, "from 1 to 1,000,000, or null; got 1000001"),
        ("data.on_error", "ignore", "data.on_error must be one of raise, skip; got 'ignore'"),
        ("data.max_bad", 2, "data.max_bad must be a number from 0 to 1, got 2"),
        ("data.window", 4, "at least data.num_frames=5"),
        ("data.timeout", 0, "at most 1,000,000, or null"),
        ("data.labels", 5, "'data.labels=\"5\"'"),
        ("recipe.milestones", 5, "recipe.milestones must be a list of epochs, each a number above 0; got 5"),
    ],
)
def test_a_message_says_what_may_be_there(key, value, words, root):
    assert_rejected(lambda: made(root, key, value).everything(), words)


@pytest.mark.parametrize(
    ("section", "settings"),
    [("recipe", "epochs, batch_size, lr"), ("augment", "mixup, cutmix"), ("aq", "budget, per_layer, soft")],
)
def test_a_key_that_a_file_of_ones_own_has_too_much_is_named(section, settings, root):
    cfg = made(root, "data.workers", 0).cfg
    OmegaConf.update(cfg, f"{section}.nonsense", 1, force_add=True)
    assert_rejected(lambda: Made(cfg).everything(), f"{section}.nonsense is unknown", f"{section} has ", settings)


def test_uniform_sampling_has_two_clips_and_no_jitter():
    uniform = Sampling(num_frames=8, size=32)
    for clips in (1, 2):
        assert training(protocol__clips=clips).protocol_for(uniform).clips == clips
    words = "protocol.clips must be 1 or 2 with uniform sampling, got 3"
    assert_rejected(lambda: training(protocol__clips=3), words)
    dense = training(protocol__clips=3, data__sampling="dense")
    assert_rejected(lambda: dense.protocol_for(uniform), words)  # as for a network trained like this
    assert training(protocol__clips=3, protocol__sampling="dense").protocol_for(uniform).window == 64
    assert_rejected(lambda: training(augment__temporal_jitter=True), "augment.temporal_jitter=true", "dense")


def test_crops_fit_into_the_resized_frames():
    assert_rejected(
        lambda: training(protocol__crop_size=100, protocol__short_side=99),
        "protocol.short_side must be at least protocol.crop_size=100, got 99",
    )
    assert_rejected(
        lambda: training(protocol__short_side=40, data__size=48),
        "protocol.short_side must be at least data.size=48, the side of the crops, got 40",
    )
    whole = training(protocol__crop_size=40, protocol__short_side=40).protocol_for(Sampling(num_frames=8, size=32))
    assert (whole.size, whole.resized) == (40, 40)


@pytest.mark.parametrize("value", [0, MOST + 1, *NO_WHOLE_NUMBERS])
def test_an_evaluation_too_has_whole_numbers_of_frames_and_pixels(value):
    for key, least in (("num_frames", "1"), ("size", "16"), ("window", "1")):
        message = refusal(lambda key=key: AsTrained(**{key: value}))
        assert re.match(rf"data.{key} must be a whole number (from|of at least) {least}\b.*, or null; got ", message)
        assert repr(value) in message
    assert "got 15" in refusal(lambda: AsTrained(size=15))
    smallest = AsTrained(num_frames=1, size=16).resolve(asdict(Preprocessing(8)))
    assert (smallest.num_frames, smallest.size) == (1, 16)


def test_a_reader_that_is_not_installed(monkeypatch, root):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_rejected(lambda: made(root, "data.reader", "decord").everything(), "data.reader=decord", "pip install")


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = training(device="gpu")
    message = refusal(lambda: settings.on_gpu)
    assert message.startswith("device=gpu, but PyTorch finds no GPU; use device=cpu or install")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"precision": "half"}, ["precision", "half"]),
        ({"trainer__devices": "many"}, ["trainer", "devices"]),
        ({"trainer__limit_val_batches": 1.5}, ["limit_val_batches", "1.5"]),
        ({"trainer__max_time": "soon"}, ["trainer", "soon"]),
        ({"trainer__nonsense": 1}, ["trainer.nonsense is unknown", "barebones"]),
        ({"trainer__max_epochs": 9}, ["trainer.max_epochs is unknown", "max_steps"]),
        ({"trainer__accelerator": "cpu"}, ["trainer.accelerator is unknown", "devices"]),
    ],
)
def test_what_lightning_refuses_is_told(changes, words):
    cfg = configuration("device=cpu")
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    assert_rejected(lambda: Made(cfg).trainer, *words)


# ---- data sets


@pytest.mark.parametrize(
    "name", ["ssv1", "ssv2", "jester", "ucf101", "hmdb51", "kinetics", "images", "shards", "frames"]
)
def test_a_data_set_needs_its_root(name):
    assert_rejected(lambda: training(f"data={name}"), f"data.root is not set; data={name} needs it")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("ssv1", "videos"), ("ssv2", "videos"), ("ucf101", "videos"), ("hmdb51", "videos"), ("hmdb51", "lists"),
        ("jester", "release"), ("frames", "pattern"), ("images", "train_folder"), ("images", "val_folder"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [5, None])
def test_names_of_files_and_folders_are_words(name, key, value):
    changes = {"data__root": "x", f"data__{key}": value}
    assert_rejected(lambda: training(f"data={name}", **changes), f"data.{key} must be ", f"got {value}")


@pytest.mark.parametrize("name", ["ucf101", "hmdb51"])
@pytest.mark.parametrize("split", [0, 4, True, "1", None])
def test_there_are_three_official_splits(name, split):
    message = refusal(lambda: training(f"data={name}", data__root="x", data__split=split))
    assert message.startswith("data.split must be ")
    assert repr(split) in message


def test_a_format_of_ones_own_is_refused():
    assert_rejected(lambda: training(data__format="own"), "data.format must be one of", "'own'", "data=")


# ---- classes


def saved(classes: list[str] | None, count: int) -> SavedNetwork:
    return SavedNetwork("FILE", "tiny", "rubiks3d", count, Preprocessing(8), {}, classes=classes)


@pytest.mark.parametrize(
    ("labels", "count", "checkpoint", "names"),
    [
        (True, None, None, ["a", "b"]),
        (True, 2, None, ["a", "b"]),
        (True, None, saved(["x", "y", "z"], 3), ["a", "b"]),
        (None, 3, None, ["0", "1", "2"]),
        (None, 2, saved(["x", "y", "z"], 3), ["0", "1"]),
        (None, None, saved(["x", "y", "z"], 3), ["x", "y", "z"]),
        (None, None, saved(None, 3), ["0", "1", "2"]),
    ],
)
def test_class_names_come_from_the_data_set_or_a_number_or_the_checkpoint(labels, count, checkpoint, names, tmp_path):
    make_frames(tmp_path)
    changes = {"data__labels": "l" if labels else None, "data__num_classes": count}
    source = training("data=frames", data__root=str(tmp_path), data__val_list="v", **changes).data.source
    known = () if checkpoint is None else (checkpoint.classes, checkpoint.num_classes)
    assert videos.class_names(source, *known) == names


def test_a_number_of_classes_that_the_names_contradict(tmp_path):
    make_frames(tmp_path)
    source = FrameLists(root=str(tmp_path), labels="l", num_classes=3)
    place = str(tmp_path / "l")
    assert_rejected(
        lambda: videos.class_names(source),
        f"{place}: expected data.num_classes=3 classes, got 2", "data=frames", "set data.num_classes=2",
    )  # fmt: skip


def test_classes_that_nothing_names_are_asked_for(tmp_path):
    source = FrameLists(root=str(tmp_path))
    assert_rejected(lambda: videos.class_names(source), "data=frames", "data.num_classes=", "data.labels=")
    assert len(videos.class_names(FrameLists(root=str(tmp_path), num_classes=1_000_000))) == 1_000_000


# ---- videos that are missing


class Listed(CsvLists):
    """A data set of these videos."""

    present: Any = ()
    gone: Any = ()

    def records(self, split):
        return list(self.present), list(self.gone)


@pytest.mark.parametrize(
    ("name", "on_error", "max_bad", "present", "missing", "words"),
    [
        ("csv", "raise", 0.0, 4, 0, None),
        ("csv", "raise", 0.5, 3, 1, "1 of the 4 val videos are missing; the first is gone0.mp4. data.on_error=skip"),
        ("csv", "skip", 0.25, 3, 1, None),
        (
            "csv",
            "skip",
            0.2499,
            3,
            1,
            "1 of the 4 val videos are missing; the first is gone0.mp4. That is more than data.m",
        ),
        ("csv", "skip", 1.0, 0, 1200, "1,200 of the 1,200 val videos are missing"),
        ("kinetics", "raise", 0.0, 1, 9, None),
        ("kinetics", "skip", 0.0, 0, 9, "9 of the 9 val videos are missing"),
        ("shards", "raise", 0.0, 1, 9, None),
        ("shards", "raise", 1.0, 0, 9, "9 of the 9 val videos are missing"),
    ],
)
def test_missing_videos_end_a_run_or_are_told(name, on_error, max_bad, present, missing, words, caplog, monkeypatch):
    loading = Loading(on_error=on_error, max_bad=max_bad)
    records = [VideoRecord(f"{number}.mp4", 0) for number in range(present)]
    gone = [f"gone{number}.mp4" for number in range(missing)]
    source = Listed(root="", present=records, gone=gone)
    monkeypatch.setattr(Listed, "missing_is_normal", SOURCES[name].missing_is_normal)
    if words is not None:
        assert_rejected(lambda: videos.records(source, loading, "val", 1, Manifest("nowhere")), words)
        return
    assert videos.records(source, loading, "val", 1, Manifest("nowhere")) == (records, gone)
    told = f"{missing} of the {missing + present} val videos are missing; the first is gone0.mp4"
    assert caplog.messages == ([told] if missing else [])


@pytest.mark.parametrize(
    ("kind", "keys", "split", "place"),
    [
        (CsvLists, {"val_list": "v.csv"}, "val", "v.csv: "),
        (CsvLists, {"train_list": "t.csv"}, "train", "t.csv: "),
        (CsvLists, {}, "val", "the val list: "),
        (HMDB51, {}, "train", "the train list: "),
    ],
)
def test_labels_beyond_the_classes_name_the_list(kind, keys, split, place, monkeypatch):
    monkeypatch.setattr(kind, "records", lambda self, asked: ([VideoRecord(f"{asked}.mp4", 3)], []))
    message = refusal(lambda: videos.records(kind(root="", **keys), Loading(), split, 3, Manifest("nowhere")))
    assert message.startswith(f"{place}1 of 1 labels are not in 0 to 2")
    assert f"{split}.mp4" in message


@pytest.mark.parametrize("known", ["0.mp4", "other.mp4"])
def test_a_manifest_that_knows_none_of_the_videos_is_told(known, caplog, tmp_path):
    manifest = Manifest(tmp_path)
    manifest.append(Entry(known, 1, 1, "a", 7))
    records = [VideoRecord(str(tmp_path / name), 0) for name in ("0.mp4", "1.mp4")]
    found, _ = videos.records(Listed(root="", present=records), Loading(), "train", 1, manifest)
    assert [record.checked and record.checked.frames for record in found] == [7 if known == "0.mp4" else None, None]
    assert [f"{manifest.path} has no entries for the train videos" in text for text in caplog.messages] == (
        [] if known == "0.mp4" else [True]
    )


def test_entries_of_another_version_are_told(caplog, tmp_path):
    for version in (1, 1, 2):
        Manifest(tmp_path, "own.jsonl").append(Entry(f"{version}.mp4", 1, 1, version=version))
    found = videos.manifest_of(CsvLists(root=str(tmp_path), manifest="own.jsonl"))
    assert list(found.entries) == ["2.mp4"]
    assert len(caplog.messages) == 1
    assert f"{tmp_path / 'own.jsonl'}: 2 entries are from another version" in caplog.text


# ---- predictions


def predictions_file(name):
    data = {"format": "csv", "root": "."}
    protocol = {"name": "one_clip", "clips": 1, "crops": 1}
    return assemble.predictions_file(Evaluation(run="x", data=data, protocol=protocol, save_predictions=name))


@pytest.mark.parametrize("name", ["scores", "scores.npy", ".npz", 5, True, ["a.npz"]])
def test_predictions_go_to_an_npz_file(name):
    assert_rejected(lambda: predictions_file(name), "save_predictions must be", ".npz", f"got {name!r}")


def test_predictions_go_where_they_can_be_written(tmp_path):
    assert predictions_file(None) is None
    path = str(tmp_path / "new/scores.npz")
    assert predictions_file(path) == Path(path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "taken.npz").mkdir()
    (tmp_path / "file").touch()
    for name, reason in (
        ("taken.npz", "Is a directory"),
        ("file/scores.npz", "Not a directory"),
        ("file/new/scores.npz", "Not a directory"),
        ("/proc/new/scores.npz", ""),
        (f"{'x' * 250}.npz", "File name too long"),
    ):
        assert_rejected(lambda name=name: predictions_file(str(tmp_path / name)), f"{name} cannot be written: {reason}")


def test_why_training_has_stopped_is_told_as_a_key():
    settings = training(trainer__max_steps=5, trainer__max_time="00:00:01:00", patience=2).trainer
    early = Patience(2)
    for steps, waited, words in ((5, 0, "trainer.max_steps=5"), (6, 2, "max_steps=5"), (4, 2, "patience=2")):
        early.wait_count = waited
        trainer = SimpleNamespace(global_step=steps, early_stopping_callback=early)
        assert words in trainers.reason(settings, trainer)
    for early in (None, Patience(2)):
        trainer = SimpleNamespace(global_step=4, early_stopping_callback=early)
        assert trainers.reason(settings, trainer) == " (trainer.max_time=00:00:01:00)"
    assert trainers.reason(TrainerSettings(), trainer) == ""
