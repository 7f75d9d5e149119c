"""What train.py passes on: each setting reaches its object. Lightning's fit is replaced: nothing is trained."""

from __future__ import annotations

import datetime
import hashlib
import json
import os

import pytest
import torch
import yaml
from conftest import watch_flushes
from omegaconf import OmegaConf
from torchvision.transforms import v2

from rubiks import RubiksNet
from rubiks.cli.entry import compose
from rubiks.data.manifest import Entry, Manifest
from rubiks.training.position import Position

SMALL = ("data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4")

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def lists(builtin_data: str) -> tuple[list[str], dict[str, list[tuple[str, int]]]]:
    """Class names, and the names and labels of each split's videos, read from the data set's own files."""
    folder = f"{builtin_data.partition('=')[2]}/plain-24+8-seed0"

    def content(name: str):
        with open(f"{folder}/{name}.json") as file:
            return json.load(file)

    labels = {name: int(label) for name, label in content("labels").items()}
    videos = {
        split: [(entry["id"], labels[entry["template"].replace("[", "").replace("]", "")]) for entry in content(file)]
        for split, file in (("train", "train"), ("val", "validation"))
    }
    return sorted(labels, key=labels.__getitem__), videos


def list_digest(videos: list[tuple[str, int]]) -> str:
    return hashlib.sha256("".join(f"{name}\t{label}\n" for name, label in videos).encode()).hexdigest()


RECIPE = {
    "epochs": 7, "batch_size": 6, "accumulate": 3, "optimizer": "sgd", "lr": 0.25, "lr_batch": 36, "momentum": 0.75,
    "weight_decay": 0.125, "shift_lr_scale": 0.5, "attention_lr_scale": 2.0, "classifier_lr_scale": 4.0,
    "schedule": "step", "milestones": [2, 5], "warmup_epochs": 1.5, "label_smoothing": 0.0625, "dropout": 0.375,
    "clip_grad_norm": 3.0, "ema_decay": 0.75, "crop_scales": [1.0, 0.5],
}  # fmt: skip
ATTENTION = {
    "budget": 0.25, "per_layer": True, "soft": 0.75, "start": 3.0, "end": 0.5, "shape": "cosine",
    "multiplier_rate": 50,
}  # fmt: skip
EVERYTHING = (
    "data.train_videos=24", "data.val_videos=8", "data.size=48", "data.num_frames=3", "data.workers=2",
    "data.sampling=dense", "data.window=12", "data.clips_per_video=2", "data.balanced=true", "data.flip=auto",
    "data.on_error=raise", "data.max_bad=0.25", "data.reader=pyav", "data.timeout=33", "data.manifest=known.jsonl",
    "variant=rubiks3d-aq", "protocol=dense_10x3", "protocol.clips=5", "protocol.mean=probabilities", "seed=7",
    "device=cpu", "precision=bf16-mixed", "process_timeout=17", "cuda_graphs=false", "patience=5",
    "checkpoint.every_n_steps=4", "checkpoint.every_n_epochs=2", "trainer.max_steps=9", "trainer.log_every_n_steps=3",
    "trainer.max_time=00:01:00:00",
    "trainer.limit_train_batches=5", "trainer.limit_val_batches=0.5", "trainer.check_val_every_n_epoch=2",
    "trainer.val_check_interval=0.5",
    "augment.random_resized_crop=[0.25,0.75]", "augment.color_jitter=0.5", "augment.rand_augment=2",
    "augment.rand_augment_magnitude=5", "augment.random_erasing=0.125", "augment.temporal_jitter=true",
    "augment.mixup=0.5", "augment.cutmix=2.0", "logger=csv", "logger.tensorboard=true", "run=all",
    *(f"recipe.{key}={value}".replace(" ", "") for key, value in RECIPE.items()),
    *(f"aq.{key}={str(value).lower()}" for key, value in ATTENTION.items()),
)  # fmt: skip


def attributes(thing, *names: str) -> dict:
    return {name: getattr(thing, name) for name in names}


def test_every_setting_reaches_what_it_is_for(builtin_data, commands, fits, tmp_path, monkeypatch):
    flushed = watch_flushes(monkeypatch)
    classes, videos = lists(builtin_data)
    manifest = Manifest(f"{builtin_data.partition('=')[2]}/plain-24+8-seed0", str(tmp_path / "known.jsonl"))
    choices = [builtin_data, *EVERYTHING, f"data.manifest={manifest.path}"]
    choices.remove("data.manifest=known.jsonl")
    name = os.path.relpath(f"{manifest.root}/20bn-something-something-v2/1.webm", builtin_data.partition("=")[2])
    manifest.append(Entry(name, 5, 0, sha256="ab", frames=11, key_frames=1, seek="any"))
    status, output, err = commands.run("train", tuple(choices))
    assert status == 0, err
    ((trainer, module, data, options, seed),) = [
        (call.trainer, call.module, call.data, call.options, call.seed) for call in fits
    ]
    config = OmegaConf.to_container(compose(choices), resolve=True)

    assert options == {"ckpt_path": None, "weights_only": True}
    assert (seed, os.environ["PL_GLOBAL_SEED"]) == (7, "7")

    # What is learned, and how.
    recipe = module.recipe.model_dump()
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.items()} == RECIPE | {
        "freeze": None
    }
    assert module.annealing.schedule.model_dump() == ATTENTION
    torch.manual_seed(7)
    fresh = RubiksNet("tiny", 8, "rubiks3d-aq", 3)
    assert attributes(module.net, "tier", "variant", "num_frames") == attributes(fresh, "tier", "variant", "num_frames")
    for parameter, tensor in fresh.state_dict().items():
        assert torch.equal(module.net.state_dict()[parameter], tensor), parameter
    assert module.net.dropout.p == 0.375
    assert module.net.recorder.enabled is False
    assert (module.seed, module.start, module.classes) == (7, Position(), classes)
    mixes = [
        (type(mix), mix._dist.concentration1.item(), mix.num_classes) for mix in module.mixing._transform.transforms
    ]
    assert mixes == [(v2.MixUp, 0.5, 8), (v2.CutMix, 2.0, 8)]
    assert module.mixing._seed == 7
    assert module.config == config | {
        "manifest_sha256": hashlib.sha256(f"{name}\t5\tab\t11\n".encode()).hexdigest(),
        "train_sha256": list_digest(videos["train"]),
        "val_sha256": list_digest(videos["val"]),
        "processes": 1,
        "total_batch": 18,
    }

    # The videos, and how they are used.
    for split in ("train", "val"):
        assert [(record.name, record.label) for record in data.records[split]] == videos[split]
        known = [record.name for record in data.records[split] if record.checked is not None]
        assert known == (["1"] if split == "train" else [])
    assert vars(data).items() >= {
        "batch_size": 6, "eval_batch_size": 6, "workers": 2, "seed": 7, "balanced": True, "_start": (0, 0),
    }.items()  # fmt: skip
    assert attributes(data.loading, "workers", "on_error", "max_bad", "reader", "timeout") == {
        "workers": 2, "on_error": "raise", "max_bad": 0.25, "reader": "pyav", "timeout": 33,
    }  # fmt: skip
    views, protocol = data.views["train"], data.views["val"]
    assert attributes(views, "num_frames", "size", "crop_scales", "clips", "window", "temporal_jitter") == {
        "num_frames": 3, "size": 48, "crop_scales": (1.0, 0.5), "clips": 2, "window": 12, "temporal_jitter": True,
    }  # fmt: skip
    mirrored = {"left to right": "right to left", "clockwise": "counter-clockwise"}
    mirrored |= {other: name for name, other in mirrored.items()}
    ends = [name.removeprefix("Moving something from ").removeprefix("Moving something ") for name in classes]
    assert views.flip == [ends.index(mirrored.get(end, end)) for end in ends]
    assert views._random_resized_crop.scale == [0.25, 0.75] or views._random_resized_crop.scale == (0.25, 0.75)
    assert [type(step) for step in views._transforms] == [v2.ColorJitter, v2.RandAugment, v2.RandomErasing]
    assert vars(protocol) == {
        "name": "custom", "clips": 5, "crops": 3, "num_frames": 3, "size": 256, "window": 12, "short_side": 256,
        "mean": "probabilities",
    }  # fmt: skip
    assert module.mean == "probabilities"

    # Lightning's trainer and its other tasks.
    assert attributes(
        trainer, "max_epochs", "accumulate_grad_batches", "precision", "log_every_n_steps", "limit_train_batches",
        "limit_val_batches", "check_val_every_n_epoch", "fast_dev_run", "max_steps",
    ) == {
        "max_epochs": 7, "accumulate_grad_batches": 3, "precision": "bf16-mixed", "log_every_n_steps": 3,
        "limit_train_batches": 5, "limit_val_batches": 0.5, "check_val_every_n_epoch": 2, "fast_dev_run": False,
        "max_steps": -1,  # by `Checkpoints`
    }  # fmt: skip
    kept = trainer.checkpoint_callback
    assert attributes(kept, "every_n_steps", "every_n_epochs", "max_steps", "keep_best", "val_check_interval") == {
        "every_n_steps": 4, "every_n_epochs": 2, "max_steps": 9, "keep_best": True, "val_check_interval": 0.5,
    }  # fmt: skip
    assert str(kept.run.folder) == "outputs/all"
    assert (kept.stop._quiet, kept.stop._timeout, kept.stop._beat) == (False, datetime.timedelta(seconds=17), None)
    patience = trainer.early_stopping_callback
    assert attributes(patience, "monitor", "mode", "patience") == {"monitor": "val/top1", "mode": "max", "patience": 5}
    assert [(type(logger).__name__, logger.save_dir) for logger in trainer.loggers] == [
        ("CSVLogger", "outputs/all"),
        ("TensorBoardLogger", "outputs/all"),
    ]

    # What the run's folder records of this.
    assert yaml.safe_load((tmp_path / "outputs/all/config.yaml").read_text()) == config
    assert (tmp_path / "outputs/all/choices.txt").read_text().splitlines() == choices
    assert str(module.net) in output
    assert "builtin-plain: 24 training and 8 validation videos, 8 classes, 3 frames of 48 pixels\n" in output
    assert "sgd, step schedule, 7 epochs, total batch 18 (recipe.lr=0.25 is for 36)\n" in output
    assert str(module.annealing.schedule) in output
    assert "Run in outputs/all\n" in output
    assert any(text.endswith("Run in outputs/all\n") for text in flushed)  # before the training, which is slow


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("seed=-1", "seed must be a whole number of at least 0, got -1"),
        ("data.balanced=some", "data.balanced must be true or false, got 'some'"),
        ("cuda_graphs=some", "cuda_graphs must be true or false, got 'some'"),
    ],
)
def test_a_wrong_value_is_told_by_the_name_of_its_key(choice, message, builtin_data, commands):
    assert commands.refused("train", builtin_data, *SMALL, choice) == f"error: {message}\n"
