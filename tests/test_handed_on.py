"""The settings of train.py reach the objects that use them."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from rubiks.data.builtin import class_names
from rubiks.training.aq import AttentionSchedule
from rubiks.training.mixing import Mixing
from rubiks.training.optim import parameter_groups
from rubiks.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

# All different, and none from a preset or a default.
RECIPE = {
    "epochs": 3, "batch_size": 5, "accumulate": 7, "optimizer": "sgd", "lr": 0.011, "lr_batch": 13, "momentum": 0.17,
    "weight_decay": 0.019, "shift_lr_scale": 0.23, "attention_lr_scale": 0.29, "classifier_lr_scale": 0.31,
    "schedule": "step", "milestones": (1.5, 2.5), "warmup_epochs": 0.37, "label_smoothing": 0.41, "dropout": 0.43,
    "clip_grad_norm": 0.47, "crop_scales": (0.9, 0.8),
}  # fmt: skip
ATTENTION = {
    "budget": 0.53, "per_layer": True, "soft": 0.59, "start": 6.1, "end": 0.67, "shape": "linear",
    "multiplier_rate": 71.0,
}  # fmt: skip


def choices(section: str, values: dict) -> list[str]:
    words = {key: str([*value] if isinstance(value, tuple) else value) for key, value in values.items()}
    return [f"{section}.{key}={value.replace(' ', '')}" for key, value in words.items()]


def test_every_setting_of_training_is_handed_on(builtin_data, commands, monkeypatch):
    fitted = []
    monkeypatch.setattr(pl.Trainer, "fit", lambda trainer, module, data, **_: fitted.append((trainer, module, data)))
    commands.train(
        builtin_data, "data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4", "seed=73",
        "variant=rubiks3d-aq", "tier=small", *choices("recipe", RECIPE), *choices("aq", ATTENTION),
        "augment.mixup=0.79", "augment.cutmix=0.83", "data.clips_per_video=2", "trainer.fast_dev_run=true",
    )  # fmt: skip
    ((trainer, module, data),) = fitted
    recipe, net = module.recipe, module.net
    assert recipe == Recipe(**RECIPE)
    assert net.dropout.p == 0.43
    assert (net.tier, net.variant, net.num_frames, net.num_classes) == ("small", "rubiks3d-aq", 4, 8)
    assert module.classes == [name.replace("[something]", "something") for name in class_names("plain")]
    assert module.annealing.schedule == AttentionSchedule(**ATTENTION)
    assert (module.seed, data.seed) == (73, 73)
    assert (trainer.accumulate_grad_batches, data.batch_size) == (7, 5)
    assert (data.views["train"].crop_scales, data.views["train"].clips) == ((0.9, 0.8), 2)
    clips, labels = torch.rand(4, 2, 3, 16, 16), torch.arange(4)
    for key in ((0, 0, 0), (1, 0, 0), (2, 0, 0)):
        mixed, targets = Mixing(0.79, 0.83, 8, 73)(clips, labels, key)
        assert torch.equal(module.mixing(clips, labels, key)[0], mixed)
        assert torch.equal(module.mixing(clips, labels, key)[1], targets)
    groups = {group["name"]: group["lr"] / 0.011 for group in parameter_groups(net, recipe, recipe.lr)}
    scales = {"shift": 0.23, "attention": 0.29, "classifier": 0.31, "classifier bias": 0.31}
    assert groups == pytest.approx({"weights": 1, "bias and norm": 1} | scales)
    assert module.config["recipe"]["momentum"] == 0.17
