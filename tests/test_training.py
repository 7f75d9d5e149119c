"""Parameter groups, schedules and the optimiser step."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.plugins import MixedPrecision
from torch.utils.data import DataLoader

from rubiks import RubiksNet
from rubiks.errors import InputError
from rubiks.ops import normalize_shift_grad
from rubiks.training.callbacks import Throughput
from rubiks.training.module import VideoClassifier
from rubiks.training.optim import describe_groups, lr_factor, normalize_shifts, parameter_groups, shift_parameters
from rubiks.training.recipe import Recipe


def recipe(**changes) -> Recipe:
    return Recipe(**({"epochs": 10, "batch_size": 4, "lr": 0.1, "lr_batch": 8} | changes))


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
@pytest.mark.parametrize("tier", ["tiny", "small"])
def test_every_parameter_is_in_one_group(tier, variant):
    net = RubiksNet(tier, 9, variant)
    scales = {"shift_lr_scale": 0.01, "attention_lr_scale": 3.0, "classifier_lr_scale": 5.0, "weight_decay": 5e-4}
    groups = {group["name"]: group for group in parameter_groups(net, recipe(**scales), lr=0.1)}
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in net.parameters())

    def names(group):
        own = {id(p): name for name, p in net.named_parameters()}
        return [own[id(p)] for p in groups[group]["params"]]

    assert all(name.endswith("shift") for name in names("shift"))
    assert names("classifier") == ["new_fc.weight"]
    assert all("bn" in name for name in names("bias and norm"))
    assert ("attention" in groups) == (variant == "rubiks3d-aq")
    rates = {name: (round(g["lr"], 9), g["weight_decay"]) for name, g in groups.items()}
    expected = {
        "weights": (0.1, 5e-4),
        "bias and norm": (0.1, 0),
        "shift": (0.001, 0),
        "attention": (0.3, 0),
        "classifier": (0.5, 5e-4),
        "classifier bias": (0.5, 0),
    }
    assert rates == {name: expected[name] for name in groups}
    assert all(f"{sum(p.numel() for p in g['params']):,}" in describe_groups(net, recipe(), 1) for g in groups.values())


def test_learning_rate_follows_the_total_batch():
    assert recipe(accumulate=3).total_batch(2) == 24
    assert recipe(accumulate=3).scaled_lr(2) == pytest.approx(0.3)
    assert recipe(batch_size=2).scaled_lr(1) == pytest.approx(0.025)


def test_step_schedule():
    factor = lr_factor(recipe(schedule="step", milestones=(4, 8)), steps_per_epoch=10)
    assert [factor(step) for step in (0, 39, 40, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_schedule_with_warmup():
    factor = lr_factor(recipe(schedule="cosine", warmup_epochs=2), steps_per_epoch=10)
    warm = [factor(step) for step in range(20)]
    assert warm == sorted(warm)
    assert 0 < warm[0] <= 0.05
    assert warm[-1] < factor(20) == pytest.approx(1)
    assert factor(60) == pytest.approx(0.5)
    assert factor(100) == pytest.approx(0)
    assert factor(99) == pytest.approx(0.5 * (1 + math.cos(math.pi * 79 / 80)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adam"}, "sgd, adamw"),
        ({"schedule": "linear"}, "constant, step, cosine"),
        ({"epochs": 0}, "recipe.epochs"),
        ({"epochs": 1.5}, "recipe.epochs"),
        ({"lr": "fast"}, "recipe.lr"),
        ({"dropout": 1.0}, "recipe.dropout"),
        ({"label_smoothing": -0.1}, "recipe.label_smoothing"),
        ({"crop_scales": ()}, "recipe.crop_scales"),
        ({"crop_scales": (1.2,)}, "recipe.crop_scales"),
        ({"milestones": ("a",)}, "recipe.milestones"),
    ],
)
def test_bad_recipes_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        recipe(**changes)


def clips(count: int) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "views": torch.randint(0, 256, (1, 2, 3, 32, 32), dtype=torch.uint8, generator=generator),
            "label": index % 3,
        }
        for index in range(count)
    ]


def fit(net, batch_size, accumulate, count=8, precision="32-true", mixing=None, **changes):
    settings = recipe(
        batch_size=batch_size, accumulate=accumulate, lr_batch=batch_size * accumulate, epochs=1, **changes
    )
    module = VideoClassifier(net, settings, mixing=mixing)
    # Lightning has 16-mixed for GPUs alone, but it can be handed in.
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    trainer = pl.Trainer(
        **({"plugins": [scaled]} if precision == "16-mixed" else {"precision": precision}),
        max_epochs=1,
        accelerator="cpu",
        num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(clips(count), batch_size=batch_size), DataLoader(clips(2), batch_size=2))
    return net


quiet = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*number of training batches.*")


def frozen_statistics(net):
    """Batch norm by running statistics, so that a batch in parts gives the same gradient as the whole."""
    for module in net.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True: None
    return net


@quiet
@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")
def test_accumulated_batches_take_the_step_of_one_large_batch():
    nets = []
    for batch_size, accumulate in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        net = frozen_statistics(RubiksNet("tiny", 3, "rubiks3d"))
        nets.append(fit(net, batch_size, accumulate, shift_lr_scale=1.0, precision="64-true"))
    for (name, whole), (_, parts) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@quiet
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_shift_steps_have_the_length_of_the_learning_rate(precision):
    torch.manual_seed(0)
    net = RubiksNet("tiny", 3)
    before = [p.detach().clone() for p in shift_parameters(net)]
    fit(net, 8, 1, precision=precision, shift_lr_scale=0.5, clip_grad_norm=1e-3)  # clipping must not touch the shifts
    for old, new in zip(before, shift_parameters(net), strict=True):
        lengths = (new.detach() - old).norm(dim=0)
        moved = lengths > 0
        assert moved.float().mean() > 0.5
        torch.testing.assert_close(lengths[moved], torch.full_like(lengths[moved], 0.05), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks2d", "fixed-tsm", "grouped"])
def test_all_shift_gradients_are_normalised_as_each_by_itself(variant):
    net = RubiksNet("tiny", 5, variant)
    shifts = shift_parameters(net)
    for number, parameter in enumerate(shifts):
        parameter.grad = torch.randn_like(parameter)
        parameter.grad[:, number] = 0
    if shifts:
        shifts[2].grad = None  # frozen
    expected = [None if p.grad is None else normalize_shift_grad(p.grad) for p in shifts]
    normalize_shifts(shifts)
    for parameter, gradient in zip(shifts, expected, strict=True):
        assert parameter.grad is None if gradient is None else torch.equal(parameter.grad, gradient)


@pytest.mark.parametrize(("done", "share"), [(True, 0.2), (False, 0.0)])
def test_waiting_for_data_counts_where_the_gpu_has_run_out_of_work(monkeypatch, done, share):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    event = SimpleNamespace(record=lambda: None, query=lambda: done)
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    logged = {}
    module = SimpleNamespace(device=torch.device("cuda"), log_dict=lambda values, **_: logged.update(values))
    loader = SimpleNamespace(waited=4.0)
    trainer = SimpleNamespace(num_training_batches=2, log_every_n_steps=2, world_size=1, train_dataloader=loader)
    throughput = Throughput()
    throughput._work = event  # of a step before
    throughput.on_train_epoch_start(trainer, module)
    now = 10.0
    throughput.on_train_batch_start(trainer, module, {"label": torch.zeros(40)}, 1)
    now = 20.0
    throughput.on_train_batch_end(trainer, module, None, None, 1)
    assert logged == {"clips/s": pytest.approx(2), "data wait": pytest.approx(share)}


@quiet
def test_clipping_bounds_the_step_of_everything_else():
    torch.manual_seed(0)
    net = RubiksNet("tiny", 3)
    shifts = {id(p) for p in shift_parameters(net)}
    before = {name: p.detach().clone() for name, p in net.named_parameters() if id(p) not in shifts}
    fit(net, 8, 1, clip_grad_norm=0.01)
    squares = sum((dict(net.named_parameters())[name] - old).square().sum() for name, old in before.items())
    assert squares.sqrt().item() == pytest.approx(0.1 * 0.01, rel=1e-2)  # learning rate times the limit


@quiet
def test_one_step_equals_sgd_written_out():
    torch.manual_seed(0)
    net = RubiksNet("tiny", 3, "rubiks3d-aq")
    twin = RubiksNet("tiny", 3, "rubiks3d-aq").train()
    twin.load_state_dict(net.state_dict())
    fit(net, 8, 1, weight_decay=0.1, shift_lr_scale=0.01, label_smoothing=0.1)
    batch = torch.stack([clip["views"] for clip in clips(8)])[:, 0] / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    labels = torch.tensor([clip["label"] for clip in clips(8)])
    F.cross_entropy(twin((batch - mean) / std), labels, label_smoothing=0.1).backward()
    with torch.no_grad():
        for name, p in twin.named_parameters():
            grad, rate = p.grad, 0.1
            if name.endswith("shift"):
                norm = grad.norm(dim=0)
                grad, rate = torch.where(norm > 0, grad / norm, grad), 0.001
            elif p.dim() > 1 and not name.endswith("conv2.0.weight"):
                grad = grad + 0.1 * p
            p -= rate * grad
    for (name, actual), (_, expected) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(
            actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_score_is_the_mean_of_the_views():
    net = RubiksNet("tiny", 4).eval()
    module = VideoClassifier(net).eval()
    views = torch.randint(0, 256, (2, 3, 2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        scores = module(views)
        alone = torch.stack([module(views[:, i : i + 1]) for i in range(3)]).mean(0)
    torch.testing.assert_close(scores, alone)
