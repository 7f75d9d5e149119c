"""Parameter groups, schedules and the optimiser step."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from torch.utils.data import DataLoader
from written_out import small

from rubiks import RubiksNet
from rubiks.errors import InputError
from rubiks.ops import normalize_shift_grad
from rubiks.training.callbacks import Throughput
from rubiks.training.module import VideoClassifier
from rubiks.training.optim import (
    describe_groups,
    flat,
    lr_factor,
    normalize_shifts,
    optimizer,
    parameter_groups,
    running_statistics,
    shift_parameters,
    write_flat,
)
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


def test_learning_rate_follows_the_total_batch():
    assert recipe(accumulate=3).total_batch(2) == 24
    assert recipe(accumulate=3).scaled_lr(2) == pytest.approx(0.3)
    assert recipe(batch_size=2).scaled_lr(1) == pytest.approx(0.025)


# The recipe, and the factor of the rate at some steps; ten epochs of four steps.
SCHEDULES = {
    "constant": ({"schedule": "constant"}, {0: 1, 1: 1, 39: 1, 400: 1}),
    "warm-up": (
        {"schedule": "constant", "warmup_epochs": 1},
        {0: 1 / 5, 1: 2 / 5, 3: 4 / 5, 4: 1, 5: 1},
    ),
    "warm-up within an epoch": (
        {"schedule": "constant", "warmup_epochs": 0.6},  # 2.4 steps
        {0: 1 / 3.4, 1: 2 / 3.4, 2: 3 / 3.4, 3: 1, 4: 1},
    ),
    "milestones": (
        {"schedule": "step", "milestones": (2, 3, 5.5)},
        {0: 1, 7: 1, 8: 0.1, 11: 0.1, 12: 0.01, 21: 0.01, 22: 0.001, 39: 0.001},
    ),
    "no milestone": ({"schedule": "step"}, {0: 1, 39: 1}),
    "milestones in a warm-up": (
        {"schedule": "step", "milestones": (0.5, 2), "warmup_epochs": 1},
        {0: 1 / 5, 2: 3 / 5, 3: 4 / 5, 4: 0.1, 8: 0.01},
    ),
    "cosine": (
        {"schedule": "cosine"},
        {0: 1, 10: 0.5 + 0.5**1.5, 20: 0.5, 30: 0.5 - 0.5**1.5, 39: 0.5 - 0.5 * math.cos(math.pi / 40), 40: 0, 44: 0},
    ),
    "cosine after a warm-up": (
        {"schedule": "cosine", "warmup_epochs": 2},
        {0: 1 / 9, 7: 8 / 9, 8: 1, 16: 0.5 + 0.5**1.5, 24: 0.5, 40: 0},
    ),
    "half an epoch of cosine": ({"schedule": "cosine", "warmup_epochs": 9.5}, {38: 1, 39: 0.5, 40: 0}),
    "a warm-up all along": (
        {"schedule": "cosine", "warmup_epochs": 10},
        {0: 1 / 41, 39: 40 / 41},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_step_by_step(name):
    changes, factors = SCHEDULES[name]
    factor = lr_factor(recipe(**changes), steps_per_epoch=4)
    assert {step: factor(step) for step in factors} == pytest.approx(factors, abs=1e-12)


def test_a_first_step_that_is_left_out_leaves_a_momentum_of_zero():
    net = RubiksNet("tiny", 3)

    def groups():
        return parameter_groups(net, recipe(), 0.1)

    for fused in (True, False):
        made = optimizer(groups(), recipe(momentum=0.9), fused=fused)
        assert type(made) is torch.optim.SGD
        assert all(not made.state[p]["momentum_buffer"].any() for p in net.parameters())
        assert {(group["momentum"], group["nesterov"], group["fused"]) for group in made.param_groups} == {
            (0.9, False, fused)
        }
        assert not optimizer(groups(), recipe(momentum=0.0), fused=fused).state
        made = optimizer(groups(), recipe(optimizer="adamw"), fused=fused)
        assert type(made) is torch.optim.AdamW
        assert {group["fused"] for group in made.param_groups} == {fused}
    assert optimizer(groups(), recipe()).param_groups[0]["fused"]


def test_what_is_frozen_is_in_no_group():
    net = RubiksNet("tiny", 3)
    net.backbone.requires_grad_(False)
    groups = parameter_groups(net, recipe(), 0.1)
    assert [(group["name"], len(group["params"])) for group in groups] == [("classifier", 1), ("classifier bias", 1)]
    net.new_fc.weight.requires_grad_(False)
    assert [group["name"] for group in parameter_groups(net, recipe(), 0.1)] == ["classifier bias"]


def test_the_table_of_groups():
    scales = {"shift_lr_scale": 0.25, "attention_lr_scale": 3.0, "classifier_lr_scale": 5.0, "weight_decay": 5e-4}
    settings = recipe(**scales, accumulate=3, optimizer="adamw", schedule="cosine")
    head, names, *rows = describe_groups(RubiksNet("tiny", 174, "rubiks3d-aq"), settings, 2).splitlines()
    assert head == "adamw, cosine schedule, 10 epochs, total batch 24 (recipe.lr=0.1 is for 8)"
    assert names.split() == ["group", "parameters", "lr", "weight", "decay"]
    cells = {row[:18].strip(): row[18:].split() for row in rows}
    assert {name: own[1:] for name, own in cells.items()} == {
        "weights": ["0.3", "0.0005"],
        "bias and norm": ["0.3", "0"],
        "shift": ["0.075", "0"],
        "attention": ["0.9", "0"],
        "classifier": ["1.5", "0.0005"],
        "classifier bias": ["1.5", "0"],
    }
    counts = {name: int(own[0].replace(",", "")) for name, own in cells.items()}
    assert (counts["classifier"], counts["classifier bias"]) == (432 * 174, 174)
    assert (counts["attention"], counts["shift"]) == (3 * 2862, 2 * 3240)
    assert sum(counts.values()) == 1_904_106
    assert len({len(row) for row in (names, *rows)}) == 1  # right-aligned


def test_running_statistics_are_written_back_where_they_came_from():
    net = RubiksNet("small", 3)
    norms = [module for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    statistics = running_statistics(net)
    own = [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var)]
    assert sorted(map(id, statistics)) == sorted(map(id, own))
    for tensor in own:
        tensor.uniform_()
    before = [tensor.clone() for tensor in own]
    values = flat(statistics)
    assert values.shape == (sum(tensor.numel() for tensor in own),)
    for tensor in own:
        tensor.zero_()
    write_flat(values, statistics)
    assert all(torch.equal(tensor, old) for tensor, old in zip(own, before, strict=True))
    pair = [torch.zeros(2, 3), torch.zeros(2)]
    write_flat(torch.arange(8.0), pair)
    assert [tensor.tolist() for tensor in pair] == [[[0, 1, 2], [3, 4, 5]], [6, 7]]
    assert flat(pair).tolist() == list(range(8))


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
            "label": torch.tensor([index % 3]),
        }
        for index in range(count)
    ]


def fit(net, batch_size, accumulate, count=8, precision="32-true", mixing=None, **changes):
    settings = recipe(
        batch_size=batch_size, accumulate=accumulate, lr_batch=batch_size * accumulate, epochs=1, **changes
    )
    module = VideoClassifier(net, settings, mixing=mixing)
    # Lightning offers 16-mixed only on GPUs, but a plugin can be passed in.
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
    """Batch norm with running statistics, so that a batch in parts gives the same gradient as the whole."""
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
        net = frozen_statistics(small(3))
        nets.append(fit(net, batch_size, accumulate, shift_lr_scale=1.0, precision="64-true"))
    for (name, whole), (_, parts) in zip(nets[0].named_parameters(), nets[1].named_parameters(), strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@quiet
@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_shift_steps_have_the_length_of_the_learning_rate(precision):
    torch.manual_seed(0)
    net = small(3)
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


@quiet
def test_a_causal_network_stays_causal_in_training():
    torch.manual_seed(0)
    net = small(3, causal=True)
    before = torch.cat([p.detach()[0] for p in shift_parameters(net)])
    fit(net, 2, 1, shift_lr_scale=1.0)
    after = torch.cat([p.detach()[0] for p in shift_parameters(net)])
    assert after.max() == 0
    assert (after[before == 0] < 0).any()  # zero is no trap
    assert (after[before < 0] == 0).any()


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
    throughput._work = event  # from an earlier step
    throughput.on_train_epoch_start(trainer, module)
    now = 10.0
    throughput.on_train_batch_start(trainer, module, {"label": torch.zeros(40)}, 1)
    now = 20.0
    throughput.on_train_batch_end(trainer, module, None, None, 1)
    assert logged == {"clips/s": pytest.approx(2), "data wait": pytest.approx(share)}


@quiet
def test_clipping_bounds_the_step_of_everything_else():
    torch.manual_seed(0)
    net = small(3)
    shifts = {id(p) for p in shift_parameters(net)}
    before = {name: p.detach().clone() for name, p in net.named_parameters() if id(p) not in shifts}
    fit(net, 8, 1, clip_grad_norm=0.01)
    squares = sum((dict(net.named_parameters())[name] - old).square().sum() for name, old in before.items())
    assert squares.sqrt().item() == pytest.approx(0.1 * 0.01, rel=1e-2)  # learning rate times the limit


def test_score_is_the_mean_of_the_views():
    net = RubiksNet("tiny", 4).eval()
    module = VideoClassifier(net).eval()
    views = torch.randint(0, 256, (2, 3, 2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        scores = module(views)
        alone = torch.stack([module(views[:, i : i + 1]) for i in range(3)]).mean(0)
    torch.testing.assert_close(scores, alone)
