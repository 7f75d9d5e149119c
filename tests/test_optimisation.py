"""Several optimiser steps, over more than one epoch, against the formulas written out in float64."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader
from written_out import Rows, Training, assert_same, cross_entropy, exact_losses, hits, one_hot, pixels, small

from rubiks import RubiksNet
from rubiks.training.module import VideoClassifier
from rubiks.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

CLASSES = 7


class Video(dict):
    """A video as the loader gives it; the name is for messages."""

    path = "video.mp4"


def videos(count: int, views: int = 1, seed: int = 1) -> list[Video]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Video(
            views=torch.randint(0, 256, (views, 2, 3, 32, 32), dtype=torch.uint8, generator=generator),
            label=torch.randint(0, CLASSES, (1,), generator=generator).expand(views),
            index=index,
        )
        for index in range(count)
    ]


class Data(pl.LightningDataModule):
    """Batches in order, as if from a list of videos; the first epoch starts after this many of them."""

    def __init__(self, train: list[Video], batch_size: int, start: int = 0) -> None:
        super().__init__()
        self.records = {"train": train}
        self.batch_size = batch_size
        self.start = start

    def train_dataloader(self) -> DataLoader:
        start, train = self, self.records["train"]

        class Order(torch.utils.data.Sampler):
            def __len__(self) -> int:
                return len(train)

            def __iter__(self):
                first, start.start = start.start, 0
                return iter(range(first, len(train)))

        return DataLoader(train, batch_size=self.batch_size, sampler=Order())

    def val_dataloader(self) -> DataLoader:
        return DataLoader(videos(5, seed=2), batch_size=3)


def make_trainer(recipe: Recipe, **options) -> pl.Trainer:
    defaults = {
        "max_epochs": recipe.epochs,
        "precision": "64-true",
        "accelerator": "cpu",
        "accumulate_grad_batches": recipe.accumulate,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return pl.Trainer(**(defaults | options))


def network(variant: str = "rubiks3d", **options) -> RubiksNet:
    """A network with larger classifier weights: initial ones make the gradients of everything before them tiny."""
    net = small(CLASSES, variant, **options)
    torch.nn.init.normal_(net.new_fc.weight, std=0.1)
    return net


def rates(weights: float, shift: float, attention: float = 0.0, classifier: float | None = None) -> dict[str, float]:
    last = weights if classifier is None else classifier
    return {
        "weights": weights, "norms": weights, "shift": shift, "attention": attention, "classifier": last,
        "classifier bias": last,
    }  # fmt: skip


# For each: the network's variant, the recipe, what it means for `Training`, and the factor of every learning rate at
# each step. Eight videos in batches of three are three batches in an epoch, of which the last has two.
BOTH = {"weights": 0.1, "classifier": 0.1}
CASES = {
    "momentum, milestones, clipping, smoothing": (
        "rubiks3d",
        {
            "epochs": 3, "accumulate": 2, "lr": 0.006, "lr_batch": 24, "momentum": 0.8, "weight_decay": 0.1,
            "shift_lr_scale": 5.0, "classifier_lr_scale": 3.0, "schedule": "step", "milestones": (1, 2.5),
            "label_smoothing": 0.2, "clip_grad_norm": 30,
        },
        {
            "rates": rates(0.0015, 0.0075, classifier=0.0045), "decays": BOTH, "momentum": 0.8, "clip": 30,
            "smoothing": 0.2,
        },
        [1, 1, 0.1, 0.1, 0.1, 0.01],
    ),
    "no momentum, warm-up and cosine": (
        "rubiks3d",
        {
            "epochs": 3, "accumulate": 2, "lr": 0.02, "lr_batch": 12, "momentum": 0.0, "shift_lr_scale": 0.1,
            "schedule": "cosine", "warmup_epochs": 1.5,
        },
        {"rates": rates(0.01, 0.001), "decays": {}, "momentum": 0.0},
        [1 / 4, 2 / 4, 3 / 4, 1, 0.75, 0.25],
    ),
    "AdamW and attention, warm-up, a batch a step": (
        "rubiks3d-aq",
        {
            "epochs": 2, "lr": 0.0002, "lr_batch": 3, "optimizer": "adamw", "weight_decay": 0.1, "shift_lr_scale": 2.0,
            "attention_lr_scale": 5.0, "schedule": "constant", "warmup_epochs": 1, "clip_grad_norm": 0.5,
        },
        {"rates": rates(0.0002, 0.0004, 0.001), "decays": BOTH, "momentum": None, "clip": 0.5},
        [1 / 4, 2 / 4, 3 / 4, 1, 1, 1],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_steps_and_what_is_logged_of_them_are_the_formulas(name):
    variant, changes, meaning, factors = CASES[name]
    recipe = Recipe(batch_size=3, **changes)
    net = network(variant)
    expected, before = Training(net, **meaning), copy.deepcopy(net.state_dict())
    rows, data = Rows(), Data(videos(8), 3)
    with exact_losses():
        make_trainer(recipe, logger=rows).fit(VideoClassifier(net, recipe), data)

    batches, checks = list(data.train_dataloader()), list(data.val_dataloader())
    accumulate, left = recipe.accumulate, list(factors)
    logged = {key: [] for key in ("train/lr", "train/loss_step", "train/grad_norm")}
    for epoch in range(recipe.epochs):
        losses, scores = [], {"train": [], "val": []}
        for number, batch in enumerate(batches, start=1):
            labels = batch["label"][:, 0]
            logits, loss = expected.batch(pixels(batch["views"][:, 0]), one_hot(labels, CLASSES), accumulate)
            losses += [loss] * len(labels)
            scores["train"].append((logits, labels))
            if number % accumulate == 0 or number == len(batches):  # Lightning writes one row per step
                logged["train/lr"].append(left[0] * meaning["rates"]["weights"])
                logged["train/loss_step"].append(loss)
                expected.step(left.pop(0))
        twin = expected.net.eval()
        with torch.no_grad():
            scores["val"] = [(twin(pixels(batch["views"][:, 0])), batch["label"][:, 0]) for batch in checks]
        twin.train()
        for part, found in scores.items():
            logits, labels = (torch.cat(values) for values in zip(*found, strict=True))
            for k in (1, 5):
                share = sum(hits(logits, labels, k)) / len(labels)
                assert rows.values(f"{part}/top{k}")[epoch] == pytest.approx(share), f"{part}/top{k}"
        assert rows.values("val/loss")[epoch] == pytest.approx(
            cross_entropy(logits, one_hot(labels, CLASSES)).item(), rel=1e-5
        )
        assert rows.values("train/loss_epoch")[epoch] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert not left
    if recipe.clip_grad_norm:
        logged["train/grad_norm"] = expected.norms
    for key, values in logged.items():
        assert rows.values(key) == pytest.approx(values, rel=1e-5), key
    assert_same(net, expected.net, before)
