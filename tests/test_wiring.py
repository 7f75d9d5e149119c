"""Every setting of a configuration reaches the object that uses it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from configurations import command_line, configuration, leaves, training
from conftest import ROOT
from layouts import SOURCES
from made import Made
from omegaconf import OmegaConf
from pytorch_lightning.callbacks import EarlyStopping, Timer

from rubiks import assemble, weights
from rubiks.cli.entry import plain
from rubiks.data.augment import Augment
from rubiks.data.manifest import Entry, Manifest
from rubiks.data.records import VideoRecord
from rubiks.data.sampling import Sampling
from rubiks.data.views import TrainingViews
from rubiks.evaluation.protocols import Protocol
from rubiks.experiment import Evaluation
from rubiks.nn import AttentionShift
from rubiks.training.checkpointing import Checkpoints
from rubiks.training.distributed import AveragedGradients
from rubiks.training.mixing import Mixing

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# For each key, a value that is not the default, distinct where two could be confused, and the object that has it in the
# end. `made` is what train.py makes of the configuration.
TABLE = {
    "recipe.epochs": (7, lambda made: made.settings.recipe.epochs),
    "recipe.batch_size": (3, lambda made: same(made.settings.recipe.batch_size, made.data.batch_size)),
    "recipe.accumulate": (2, lambda made: made.settings.recipe.accumulate),
    "recipe.optimizer": ("adamw", lambda made: made.settings.recipe.optimizer),
    "recipe.lr": (0.003, lambda made: made.settings.recipe.lr),
    "recipe.lr_batch": (48, lambda made: made.settings.recipe.lr_batch),
    "recipe.momentum": (0.8, lambda made: made.settings.recipe.momentum),
    "recipe.weight_decay": (0.004, lambda made: made.settings.recipe.weight_decay),
    "recipe.shift_lr_scale": (0.2, lambda made: made.settings.recipe.shift_lr_scale),
    "recipe.attention_lr_scale": (0.3, lambda made: made.settings.recipe.attention_lr_scale),
    "recipe.classifier_lr_scale": (0.4, lambda made: made.settings.recipe.classifier_lr_scale),
    "recipe.schedule": ("constant", lambda made: made.settings.recipe.schedule),
    "recipe.milestones": ([3, 5], lambda made: list(made.settings.recipe.milestones)),
    "recipe.warmup_epochs": (1.5, lambda made: made.settings.recipe.warmup_epochs),
    "recipe.label_smoothing": (0.15, lambda made: made.settings.recipe.label_smoothing),
    "recipe.dropout": (0.35, lambda made: same(made.settings.recipe.dropout, made.net.dropout.p)),
    "recipe.clip_grad_norm": (11, lambda made: made.settings.recipe.clip_grad_norm),
    "recipe.ema_decay": (0.995, lambda made: made.settings.recipe.ema_decay),
    "recipe.crop_scales": ([0.9, 0.7], lambda made: list(made.views.crop_scales)),
    "aq.budget": (0.25, lambda made: made.settings.aq.budget),
    "aq.per_layer": (True, lambda made: made.settings.aq.per_layer),
    "aq.soft": (0.55, lambda made: made.settings.aq.soft),
    "aq.start": (3.0, lambda made: made.settings.aq.start),
    "aq.end": (0.2, lambda made: made.settings.aq.end),
    "aq.shape": ("linear", lambda made: made.settings.aq.shape),
    "aq.multiplier_rate": (60, lambda made: made.settings.aq.multiplier_rate),
    "augment.random_resized_crop": ([0.3, 0.8], lambda made: list(made.settings.augment.random_resized_crop)),
    "augment.color_jitter": (0.45, lambda made: made.settings.augment.color_jitter),
    "augment.rand_augment": (4, lambda made: made.settings.augment.rand_augment),
    "augment.rand_augment_magnitude": (13, lambda made: made.settings.augment.rand_augment_magnitude),
    "augment.random_erasing": (0.65, lambda made: made.settings.augment.random_erasing),
    "augment.temporal_jitter": (True, lambda made: made.views.temporal_jitter),
    "augment.mixup": (0.75, lambda made: made.settings.augment.mixup),
    "augment.cutmix": (1.25, lambda made: made.settings.augment.cutmix),
    "tier.name": ("small", lambda made: made.net.tier),
    "variant.name": ("rubiks3d-aq", lambda made: made.net.variant),
    "causal": (True, lambda made: made.net.causal),
    "data.format": ("csv", lambda made: type(made.source).__name__.removesuffix("Lists").lower()),
    "data.root": ("ROOT", lambda made: os.path.basename(os.path.dirname(made.train[0].path))),
    "data.train_list": ("a list.csv", lambda made: os.path.basename(made.source.annotation_files()["data.train_list"])),
    "data.val_list": ("another.csv", lambda made: os.path.basename(made.source.annotation_files()["data.val_list"])),
    "data.labels": ("words.txt", lambda made: os.path.basename(made.source.classes_path)),
    "data.num_frames": (5, lambda made: same(made.views.num_frames, made.protocol.num_frames, made.net.num_frames)),
    "data.size": (48, lambda made: made.views.size),
    "data.sampling": ("dense", lambda made: "uniform" if made.views.window is None else "dense"),
    "data.window": (11, lambda made: same(made.views.window, made.protocol.window)),
    "data.clips_per_video": (2, lambda made: made.views.clips),
    "data.flip": (True, lambda made: made.views.flip == [1, 0, 2]),
    "data.num_classes": (3, lambda made: same(len(made.classes), made.net.num_classes)),
    "data.manifest": ("known.jsonl", lambda made: made.manifest.path.name),
    "data.workers": (3, lambda made: made.data.workers),
    "data.reader": ("pyav", lambda made: made.data.loading.reader),
    "data.timeout": (77, lambda made: made.data.loading.timeout),
    "data.max_bad": (0.25, lambda made: made.data.loading.max_bad),
    "data.balanced": (True, lambda made: made.data.balanced),
    "data.on_error": ("raise", lambda made: made.data.loading.on_error),
    "protocol.name": ("other", lambda made: made.protocol.name),
    "protocol.clips": (2, lambda made: made.protocol.clips),
    "protocol.crops": (3, lambda made: made.protocol.crops),
    "protocol.crop_size": (50, lambda made: made.protocol.size),
    "protocol.short_side": (60, lambda made: made.protocol.resized),
    "protocol.sampling": ("dense", lambda made: "uniform" if made.protocol.window is None else "dense"),
    "protocol.mean": ("probabilities", lambda made: made.protocol.mean),
    "seed": (5, lambda made: made.data.seed),
    "checkpoint.every_n_steps": (70, lambda made: made.callback(Checkpoints).every_n_steps),
    "checkpoint.every_n_epochs": (6, lambda made: made.callback(Checkpoints).every_n_epochs),
    "patience": (9, lambda made: made.callback(EarlyStopping).patience),
    "trainer.devices": (2, lambda made: made.trainer.num_devices),
    "trainer.num_nodes": (4, lambda made: made.trainer.num_nodes),
    "trainer.strategy": ("ddp", lambda made: {AveragedGradients: "ddp"}[type(made.trainer.strategy)]),
    "trainer.log_every_n_steps": (12, lambda made: made.trainer.log_every_n_steps),
    "trainer.limit_train_batches": (0.6, lambda made: made.trainer.limit_train_batches),
    "trainer.limit_val_batches": (0.7, lambda made: made.trainer.limit_val_batches),
    "trainer.check_val_every_n_epoch": (8, lambda made: made.trainer.check_val_every_n_epoch),
    "trainer.val_check_interval": (0.35, lambda made: made.callback(Checkpoints).val_check_interval),
    "trainer.max_steps": (90, lambda made: made.callback(Checkpoints).max_steps),
    "trainer.max_time": ("00:01:00:30", lambda made: clock(made.callback(Timer).time_remaining())),
    "precision": ("bf16-mixed", lambda made: made.trainer.precision),
    "process_timeout": (50, lambda made: made.trainer.strategy._timeout.total_seconds()),
}
GROUPS = ("data=csv", "variant=rubiks3d-aq")

# Keys of some data sets are in SOURCES. The others:
ELSEWHERE = {
    "data.name": "names the runs that ckpt=latest looks for: test_starting_weights.py",
    "data.level": "test_source_keys.py",
    "data.train_videos": "test_source_keys.py",
    "data.val_videos": "test_source_keys.py",
    "data.seed": "test_source_keys.py",
    "device": "test_trainers.py",
    "trainer.sync_batchnorm": "test_trainers.py",
    "trainer.deterministic": "test_trainers.py",
    "trainer.fast_dev_run": "test_trainers.py",
    "trainer.profiler": "test_training_options.py",
    "connect_timeout": "test_preflight.py",
    "cuda_graphs": "handed on by train.py",
    "init": "test_starting_weights.py",
    "init_temporal": "test_starting_weights.py",
    "recipe.freeze": "test_training_options.py",
    "run": "test_run_choices.py",
    "logger.csv": "test_trainers.py",
    "logger.tensorboard": "test_trainers.py",
    "logger.wandb.project": "test_tracking.py",
    "logger.wandb.entity": "test_tracking.py",
    "logger.wandb.tags": "test_tracking.py",
    "logger.wandb.mode": "test_tracking.py",
    # Of eval.py.
    "ckpt": "test_starting_weights.py",
    "save_predictions": "test_refused_settings.py",
    "report": "test_report_page.py",
    "batch_size": "of the data module of an evaluation, below",
    "frame_order": "handed on by eval.py: test_results.py",
    "temporal": "handed on by eval.py: test_results.py",
}


def same(*values: object) -> object:
    """The value that they all have."""
    (value,) = set(values)
    return value


def clock(seconds: float) -> str:
    """In the format of trainer.max_time."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24:02}:{hours % 24:02}:{minutes:02}:{seconds:02}"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """With several nodes, something else starts the processes."""
    for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "NODE_RANK": "0"}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder of three classes, two training videos and one for validation; nothing reads the videos."""
    folder = tmp_path_factory.mktemp("parent") / "ROOT"
    folder.mkdir()
    for name in ("x.mp4", "y.mp4", "z.mp4"):
        (folder / name).write_text("no video")
    (folder / "a list.csv").write_text("x.mp4,2\ny.mp4,0\n")
    (folder / "another.csv").write_text("z.mp4,1\n")
    (folder / "words.txt").write_text("turn left\nturn right\njump\n")
    manifest = Manifest(folder, "known.jsonl")
    manifest.append(Entry("y.mp4", 8, 0, "aa", 31))
    return folder


@pytest.fixture(scope="module")
def made(root) -> Made:
    changes = {key.replace(".", "__"): value for key, (value, _) in TABLE.items()}
    return Made(configuration("device=cpu", *GROUPS, **changes | {"data__root": str(root)}))


@pytest.mark.parametrize("key", TABLE)
def test_a_setting_reaches_its_object(key, made):
    value, look = TABLE[key]
    by_group = key in ("data.format", "variant.name")
    default = OmegaConf.select(configuration(*() if by_group else GROUPS), key)
    assert default != value, "a default tells nothing"
    assert look(made) == value


def test_every_key_has_its_place_here():
    data_sets = [path.stem for path in (ROOT / "conf/data").glob("*.yaml")]
    keys = {key for name in data_sets for key in leaves(configuration(f"data={name}"))}
    keys |= {*leaves(configuration(*GROUPS)), *leaves(command_line("eval"))}
    here = {*TABLE, *ELSEWHERE} | {f"data.{key}" for _, keys, *_ in SOURCES for key in keys}
    assert keys == here


# ---- what is passed on from one object to the next


def test_the_data_module_gets_lists_views_and_batch_sizes(made):
    data = made.data
    assert (data.batch_size, data.eval_batch_size, data.balanced) == (3, 3, True)
    assert data.records == {"train": made.train, "val": made.val}
    assert data.views["train"] is made.views
    assert vars(data.views["val"]) == vars(made.protocol)
    assert [os.path.basename(record.path) for record in (*made.train, *made.val)] == ["x.mp4", "y.mp4", "z.mp4"]
    assert [record.label for record in (*made.train, *made.val)] == [2, 0, 1]


def test_the_data_module_of_an_evaluation_gets_its_list_views_and_batch_size(made, monkeypatch):
    cfg = command_line("eval", "batch_size=4", "seed=6", "data.workers=2", "data.timeout=78")
    settings = Evaluation(**plain(cfg))
    data = assemble.evaluation_data(settings, made.val, made.protocol)
    assert (data.batch_size, data.eval_batch_size, data.balanced) == (4, 4, False)
    assert (data.records["val"], data.views["val"]) == (made.val, made.protocol)
    assert (data.seed, data.workers, data.loading.timeout, data.loading.on_error) == (6, 2, 78, "raise")


def test_what_the_manifest_knows_is_in_the_records(made, root):
    assert [record.checked and record.checked.frames for record in (*made.train, *made.val)] == [None, 31, None]
    assert made.manifest.path == root / "known.jsonl"


def test_the_network_has_the_dropout_that_it_is_given(made):
    shares = (0.45, 0.15)
    nets = [weights.network(training(recipe__dropout=share), made.classes) for share in shares]
    assert tuple(net.dropout.p for net in nets) == shares
    assert len(made.net.attention_shifts()) == 17
    assert isinstance(made.net.attention_shifts()[0], AttentionShift)
    assert (made.classes, made.net.num_classes) == (["turn left", "turn right", "jump"], 3)


def test_a_setting_may_be_that_of_another_key():
    settings = training(recipe__batch_size=24, recipe__lr_batch="${recipe.batch_size}")
    assert settings.recipe.lr_batch == 24


def test_other_variants_have_no_attention_schedule():
    assert training().aq is None


def test_seeds_give_other_orders():
    orders = []
    for seed in (0, 1, 1):
        settings = training("data=csv", seed=seed, data__workers=0, data__root="none")
        videos = [VideoRecord(f"{number}.mp4", 0) for number in range(30)]
        views = assemble.training_views(settings, ["a"])
        orders.append(list(assemble.training_data(settings, videos, [], views).train_dataloader().sampler))
    assert orders[1] == orders[2] != orders[0]


def test_the_protocol_is_the_one_described():
    settings = training("protocol=two_clip")
    assert settings.protocol_for(Sampling(num_frames=6, size=40)) == Protocol("two_clip", 2, 3, 6, 40)
    dense = training("protocol=dense_10x3")
    sampling = Sampling(num_frames=4, size=16, window=30)  # uniform
    assert dense.protocol_for(sampling) == Protocol("dense_10x3", 10, 3, 4, 256, 30, 256)
    named = training("protocol=two_clip", protocol__crops=1)
    assert named.protocol_for(sampling) == Protocol("custom", 2, 1, 4, 16)
    named = training("protocol=two_clip", protocol__crops=1, protocol__name="mine")
    assert named.protocol_for(sampling).name == "mine"


# ---- augmentation and mixing


@pytest.mark.parametrize(
    ("key", "value", "flip"),
    [
        ("random_resized_crop", [0.1, 0.2], False),
        ("color_jitter", 0.9, False),
        ("rand_augment", 3, False),
        ("random_erasing", 1.0, False),
        ("random_erasing", 1.0, True),
    ],
)
def test_augmentation_changes_what_is_seen_as_described(key, value, flip):
    clip = torch.randint(0, 256, (1, 4, 3, 40, 60), dtype=torch.uint8)

    def seen(views):
        return [views(clip, 0, np.random.default_rng(seed))[0] for seed in range(4)]

    sizes = {"data__num_frames": 4, "data__size": 32, "data__flip": flip, "recipe__crop_scales": [1.0, 0.75]}
    own = seen(assemble.training_views(training(**sizes, **{f"augment__{key}": value}), ["a"]))
    without = seen(assemble.training_views(training(**sizes), ["a"]))
    given = tuple(value) if isinstance(value, list) else value
    wanted = seen(TrainingViews(4, 32, (1.0, 0.75), [0] if flip else None, augment=Augment(**{key: given})))
    assert all(torch.equal(a, b) for a, b in zip(own, wanted, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(own, without, strict=True))


def test_the_magnitude_of_rand_augment_counts():
    assert training("augment=strong").augment.rand_augment == 2
    made = [
        training("augment=strong", augment__rand_augment_magnitude=magnitude).augment.transforms()[0]
        for magnitude in (9, 20)
    ]
    assert [transform.magnitude for transform in made] == [9, 20]


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.5), (0.8, 1.5)])
def test_batches_are_mixed_as_described(mixup, cutmix):
    settings = training(augment__mixup=mixup, augment__cutmix=cutmix, seed=3)
    clips, labels = torch.rand(4, 2, 3, 8, 8), torch.tensor([0, 1, 2, 4])
    other_seed = Mixing(mixup, cutmix, 5, 4)
    own, wanted = assemble.mixing(settings, 5), Mixing(mixup, cutmix, 5, 3)
    for key in range(4):
        ours = own(clips, labels, (key,))
        for got, expected, other in zip(
            ours, wanted(clips, labels, (key,)), other_seed(clips, labels, (key,)), strict=True
        ):
            assert torch.equal(got, expected)
            assert not torch.equal(got, other)
        assert ours[1].shape == (4, 5)


def test_nothing_is_mixed_unless_asked_for():
    assert assemble.mixing(training(), 5) is None


# ---- workers


@pytest.mark.parametrize(
    ("devices", "gpus", "workers"),
    [(1, 0, 11), (3, 0, 3), ("auto", 0, 11), ("auto", 2, 5), ("auto", 1, 11), (12, 0, 1), (0, 0, 11)],
)
def test_loader_processes_share_the_cores_that_are_left(devices, gpus, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(12))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    settings = training(trainer__devices=devices)
    views = assemble.training_views(settings, ["a"])
    assert assemble.training_data(settings, [], [], views).workers == workers
