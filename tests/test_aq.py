"""Attention quantisation: schedule, choice within a budget, hard networks, and training through both phases."""

from __future__ import annotations

import contextlib
import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_inference import trained
from test_training import clips, quiet, recipe
from torch.utils.data import DataLoader
from written_out import small

from rubiks import RubiksNet
from rubiks.errors import InputError
from rubiks.models import training_path
from rubiks.models.inference_cuda import CudaInferenceNet
from rubiks.nn import AttentionShift
from rubiks.nn.attention import attention, attention_weights, harden
from rubiks.training.aq import Annealing, AttentionSchedule
from rubiks.training.module import VideoClassifier

BUDGETS = (0, 0.0625, 0.125, 0.25, 1)


# ---- schedule


@pytest.mark.parametrize("shape", ["exponential", "linear", "cosine"])
def test_temperature_falls_from_start_to_end(shape):
    schedule = AttentionSchedule(budget=0.1, start=2.0, end=0.1, shape=shape)
    temperatures = [schedule.temperature(step / 100) for step in range(101)]
    assert (temperatures[0], temperatures[-1]) == pytest.approx((2.0, 0.1))
    assert temperatures == sorted(temperatures, reverse=True)
    middle = {"exponential": math.sqrt(0.2), "linear": 1.05, "cosine": 1.05}[shape]
    assert temperatures[50] == pytest.approx(middle)


@pytest.mark.parametrize(
    ("shape", "temperatures"),
    [
        ("exponential", {0: 2.0, 0.25: 2 * 0.25**0.25, 0.5: 1.0, 1: 0.5}),
        ("linear", {0: 2.0, 0.25: 1.625, 0.5: 1.25, 1: 0.5}),
        ("cosine", {0: 2.0, 0.25: 1.25 + 0.75 * math.sqrt(0.5), 0.5: 1.25, 0.75: 1.25 - 0.75 * math.sqrt(0.5), 1: 0.5}),
    ],
)
def test_the_way_between_two_temperatures(shape, temperatures):
    schedule = AttentionSchedule(budget=0.1, start=2.0, end=0.5, shape=shape)
    assert {progress: schedule.temperature(progress) for progress in temperatures} == pytest.approx(temperatures)


def test_defaults_and_what_is_printed_of_them():
    assert AttentionSchedule(budget=0.125) == AttentionSchedule(
        budget=0.125, per_layer=False, soft=0.6, start=2.0, end=0.1, shape="exponential", multiplier_rate=100.0
    )
    assert str(AttentionSchedule(budget=0.125)) == (
        "attention: soft for 60% of training, temperature 2 to 0.1; "
        "after that, at most 12.50% of the channels of the network are shifted in time"
    )
    assert "1.00% of the channels of every block are" in str(AttentionSchedule(budget=0.01, per_layer=True))


def test_length_of_the_soft_phase():
    assert AttentionSchedule(budget=0.1, soft=0.6).soft_steps(100) == 60
    assert AttentionSchedule(budget=0.1, soft=0).soft_steps(100) == 0
    assert AttentionSchedule(budget=0.1, soft=0.999).soft_steps(100) == 99  # every training ends hard
    assert AttentionSchedule(budget=0, soft=0.6).soft_steps(100) == 0  # there is nothing to choose
    assert AttentionSchedule(budget=0.01, soft=0.39).soft_steps(10) == 3  # whole steps
    assert AttentionSchedule(budget=1, soft=0.99).soft_steps(1) == 0
    assert AttentionSchedule(budget=1, soft=math.nextafter(1, 0)).soft_steps(1_000_001) == 1_000_000


@pytest.mark.parametrize("temperature", [2.0, 0.7, 0.1, 0.01])
def test_allowed_share_is_that_of_a_network_that_has_chosen(temperature):
    shift = AttentionShift(8)
    shift.harden(torch.tensor([0, 0, 0, -1, 0, 0, 1, 0]))
    share = 1 - attention(shift.weight.double(), torch.tensor(temperature, dtype=torch.float64))[:, 1].mean()
    assert AttentionSchedule(budget=0.25).allowed_share(temperature) == pytest.approx(share.item(), rel=1e-4)
    assert AttentionSchedule(budget=1).allowed_share(temperature) == 1
    assert AttentionSchedule(budget=0.25).allowed_share(0) == 0.25
    assert AttentionSchedule(budget=0.25).allowed_share(1e-2) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"budget": 2}, "aq.budget must be a number from 0 to 1, got 2"),
        ({"budget": True}, "aq.budget"),
        ({"budget": math.nan}, "aq.budget"),
        ({"budget": -0.01}, "aq.budget"),
        ({"budget": "much"}, "aq.budget must be a number from 0 to 1, got 'much'"),
        ({"soft": 1}, "aq.soft must be a number from 0 to below 1, got 1"),
        ({"soft": -0.1}, "aq.soft"),
        ({"soft": "long"}, "aq.soft"),
        ({"start": 0}, "aq.start must be a temperature above 0, got 0"),
        ({"start": math.inf}, "aq.start"),
        ({"start": None}, "aq.start"),
        ({"end": 0}, "aq.end must be a temperature above 0, got 0"),
        ({"end": True}, "aq.end"),
        ({"end": 3.0}, "aq.end must be at most aq.start=2, got 3.0"),
        ({"shape": "steep"}, "aq.shape must be one of exponential, linear, cosine; got 'steep'"),
        ({"per_layer": 1}, "aq.per_layer must be true or false, got 1"),
        ({"multiplier_rate": -1}, "aq.multiplier_rate must be a number of at least 0, got -1"),
        ({"multiplier_rate": math.inf}, "aq.multiplier_rate"),
        ({"multiplier_rate": "fast"}, "aq.multiplier_rate"),
    ],
)
def test_bad_settings_are_refused(values, words):
    with pytest.raises(InputError, match=words):
        AttentionSchedule(**({"budget": 0.125} | values))


@pytest.mark.parametrize(
    "values",
    [
        {"budget": 0},
        {"budget": 1},
        {"soft": 0},
        {"soft": 0.999},
        {"start": 0.5, "end": 0.5},
        {"start": 2, "end": 1e-3},
        {"multiplier_rate": 0},
        {"multiplier_rate": 5},
    ],
)
def test_settings_at_the_limits_are_allowed(values):
    schedule = AttentionSchedule(**({"budget": 0.125} | values))
    assert {key: getattr(schedule, key) for key in values} == values


# ---- the choice


def test_attention_at_temperature_0_is_the_limit_without_gradient():
    logits = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    weights = attention(logits, torch.tensor(0.0))
    torch.testing.assert_close(weights, attention(logits, torch.tensor(1e-4)), rtol=0, atol=1e-6)
    assert set(weights.unique().tolist()) == {0, 1}
    (weights * torch.randn(50, 3)).sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    mixed = attention(logits, torch.tensor([[0.0], [2.0]]).repeat(25, 1))  # some hard, some soft
    torch.testing.assert_close(mixed[1::2], attention(logits, torch.tensor(2.0))[1::2])
    assert torch.equal(mixed[::2], weights[::2])


@settings(max_examples=60, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    budget=st.one_of(st.sampled_from(BUDGETS), st.floats(0, 1)),
    temperature=st.sampled_from([2.0, 0.5, 0.01]),
    levels=st.sampled_from([1, 2, 1000]),  # few levels make ties
    seed=st.integers(0, 999),
    per_layer=st.booleans(),
)
def test_choice_is_within_the_budget(widths, budget, temperature, levels, seed, per_layer):
    torch.manual_seed(seed)
    shifts = [AttentionShift(width) for width in widths]
    for shift in shifts:
        shift.weight.data = (torch.rand(len(shift.weight), 3) * levels).round() / levels
        shift.T.fill_(temperature)
    before = [shift.weight.detach().clone() for shift in shifts]
    weights = [shift.attention().detach().double() for shift in shifts]
    harden(shifts, budget, per_layer)

    groups = [[index] for index in range(len(shifts))] if per_layer else [list(range(len(shifts)))]
    for group in groups:
        best = torch.cat([before[index].argmax(1) for index in group])
        chosen = torch.cat([shifts[index].weight.argmax(1) for index in group])
        off_stay = 1 - torch.cat([weights[index][:, 1] for index in group])
        moved = chosen != 1
        assert moved.sum() <= math.floor(budget * len(moved))
        assert moved.sum().item() / len(moved) <= budget
        assert torch.equal(chosen[moved], best[moved])
        would = best != 1
        assert moved.sum() == min(would.sum(), math.floor(budget * len(moved))) or 0 < budget < 1
        left_out = would & ~moved
        if left_out.any() and moved.any():
            assert off_stay[moved].min() >= off_stay[left_out].max() - 1e-6
    for shift in shifts:
        assert shift.hard
        assert torch.equal(shift.attention(), shift.weight)
        assert len(shift.back) == (shift.weight.argmax(1) == 0).sum()


@pytest.mark.parametrize("budget", BUDGETS)
def test_network_has_the_budget(budget):
    net = RubiksNet("tiny", 4, "rubiks3d-aq")
    assert net.temporal_share() is None
    best = [shift.weight.argmax(1) for shift in net.attention_shifts()]
    assert net.harden(budget) is net
    channels = sum(len(own) for own in best)
    assert channels == 2862
    # Two thirds of random logits are largest off "stay", enough for every budget except 1.
    expected = sum((own != 1).sum().item() for own in best) if budget == 1 else math.floor(budget * channels)
    assert net.temporal_share() == expected / channels
    if budget == 1:
        assert all(torch.equal(s.weight.argmax(1), own) for s, own in zip(net.attention_shifts(), best, strict=True))
    net.harden(budget / 2)
    assert net.temporal_share() <= budget / 2


def test_what_cannot_be_hardened():
    with pytest.raises(ValueError, match="only rubiks3d-aq has"):
        RubiksNet("tiny", 4).harden(0.5)
    for budget in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match="0 to 1"):
            RubiksNet("tiny", 4, "rubiks3d-aq").harden(budget)
    assert RubiksNet("tiny", 4).temporal_share() is None


# ---- hard networks


def written_out(shift: AttentionShift, x: torch.Tensor) -> torch.Tensor:
    """The mix of frames by the one-hot weights."""
    zero = torch.zeros_like(x[:, :1])
    back, stay, ahead = shift.weight.detach().t()[..., None, None].to(x.dtype)
    return back * torch.cat((zero, x[:, :-1]), 1) + stay * x + ahead * torch.cat((x[:, 1:], zero), 1)


def by_weights(net: RubiksNet) -> RubiksNet:
    """The same network with every attention shift computed from its one-hot weights."""
    twin = RubiksNet(net.tier, net.num_classes, net.variant).to(net.new_fc.weight.dtype).train(net.training)
    twin.load_state_dict(net.state_dict())
    for shift in twin.attention_shifts():
        shift.forward = lambda x, shift=shift: written_out(shift, x)
    return twin


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("tier", ["tiny", "small"])
def test_logits_equal_the_soft_operation_with_one_hot_weights(tier, budget):
    net = trained(tier, "rubiks3d-aq").harden(budget)
    for_gpus = CudaInferenceNet(net.backbone, net.new_fc, torch.float64)
    modules = {"network": net, "CPU": net.optimize_for_inference(), "GPU": for_gpus}
    twin = by_weights(net)
    for shape in ((2, 4, 3, 40, 32), (1, 1, 3, 16, 16), (2, 2, 3, 16, 24)):
        batch = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            expected = twin(batch)
            for name, module in modules.items():
                difference = (module(batch) - expected).abs().max() / expected.abs().max()
                assert difference < 1e-12, f"{name}, {shape}"


def test_gradients_of_a_hard_network():
    net = trained("tiny", "rubiks3d-aq").harden(0.25).train()
    batch = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for module in (net, by_weights(net)):
        module(batch).square().sum().backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        if name.endswith("conv2.0.weight"):
            assert gradient is None, name
        else:
            torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-6, atol=1e-9, msg=name)


def test_blocks_for_gpus_take_the_choice():
    net = trained("tiny", "rubiks3d-aq").harden(0.25).train()
    shifts = net.attention_shifts()
    for shift, weights in zip(shifts, attention_weights(shifts), strict=True):
        assert torch.equal(weights, shift.weight)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    expected = by_weights(net).backbone(images, 4)
    torch.testing.assert_close(training_path.features(net.backbone, images, 4), expected)


def test_budget_0_is_a_network_of_single_frames():
    net = trained("tiny", "rubiks3d-aq").harden(0)
    batch = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    for module in (net, net.optimize_for_inference()):
        with torch.no_grad():
            torch.testing.assert_close(module(batch[:, order]), module(batch), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        some = trained("tiny", "rubiks3d-aq").harden(0.125)
        assert (some(batch[:, order]) - some(batch)).abs().max() > 1e-3


def test_hard_networks_are_saved_and_loaded_exactly(tmp_path):
    net = trained("tiny", "rubiks3d-aq", torch.float32).harden(0.125)
    soft = {name: value.clone() for name, value in trained("tiny", "rubiks3d-aq", torch.float32).state_dict().items()}
    net.save_pretrained(tmp_path / "net.pth.tar")
    again = RubiksNet.load_pretrained(tmp_path / "net.pth.tar")
    batch = torch.randn(1, 4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(batch), net(batch))
    assert again.temporal_share() == net.temporal_share() == 357 / 2862
    again.load_state_dict(soft)
    assert again.temporal_share() is None
    moved = net.double()  # the choice is part of the network
    assert moved.temporal_share() == 357 / 2862


def test_official_files_can_be_hardened(shared, tmp_path):
    path = shared / "golden" / "ref_tiny_rubiks3d-aq.pth.tar"
    net = RubiksNet.load_pretrained(path)
    assert net.temporal_share() is None
    net.harden(0.125).save_pretrained(tmp_path / "hard.pth.tar")
    before, after = (torch.load(file, weights_only=True)["model"] for file in (path, tmp_path / "hard.pth.tar"))
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed == {name for name in before if name.endswith(("conv2.0.T", "conv2.0.weight"))}
    assert RubiksNet.load_pretrained(tmp_path / "hard.pth.tar").temporal_share() == 357 / 2862


# ---- training


def fit(attention, net):
    """An epoch of two optimiser steps on eight clips."""
    module = VideoClassifier(net, recipe(epochs=1, lr_batch=4), attention=attention)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(clips(8), batch_size=4), DataLoader(clips(2), batch_size=2))
    return module


@quiet
def test_training_from_a_hard_network_keeps_its_choice():
    net = RubiksNet("tiny", 3, "rubiks3d-aq").harden(0.0625)
    before = [shift.weight.detach().clone() for shift in net.attention_shifts()]
    fit(AttentionSchedule(budget=0.125), net)
    assert all(torch.equal(shift.weight, own) for shift, own in zip(net.attention_shifts(), before, strict=True))
    with pytest.raises(InputError, match=r"aq.budget=0.03.*6\.22%"):
        fit(AttentionSchedule(budget=0.03), net)


def test_a_hard_network_of_exactly_the_budget_is_trained():
    net = small(3, "rubiks3d-aq").harden(0.25)
    for budget, allowed in ((net.temporal_share(), True), (net.temporal_share() - 1e-6, False)):
        module = VideoClassifier(net, recipe(), attention=AttentionSchedule(budget=budget))
        module._trainer = SimpleNamespace(is_global_zero=True)
        with contextlib.nullcontext() if allowed else pytest.raises(InputError, match=f"aq.budget={budget:g}, but"):
            module.on_train_start()


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("budget", BUDGETS[1:])
def test_the_multiplier_holds_the_share(budget, per_layer):
    """With no other loss, gradients alone move the attention to the budget; with budget 1 it stays where it is."""
    net = small(3, "rubiks3d-aq")
    annealing = Annealing(net, AttentionSchedule(budget=budget, soft=0.8, per_layer=per_layer))
    logits = [shift.weight for shift in net.attention_shifts()]
    before = [own.detach().clone() for own in logits]
    optimizer = torch.optim.Adam(logits, lr=0.02)
    for step in range(100):
        if annealing.begin_step(step, 100):
            break
        optimizer.zero_grad()
        annealing.penalty().backward()
        annealing.end_step(100)
        optimizer.step()
        assert (annealing.multiplier >= 0).all()
    assert step == 80
    if budget == 1:
        assert all(torch.equal(own.argmax(1), old.argmax(1)) for own, old in zip(logits, before, strict=True))
    else:
        assert (annealing.share < budget + 0.02).all()
    assert net.temporal_share() <= budget
    for shift in net.attention_shifts() if per_layer else []:
        assert (shift.weight.argmax(1) != 1).float().mean() <= budget


@pytest.mark.parametrize(("per_layer", "shape"), [(False, (1,)), (True, (5,))])
def test_checkpoints_have_the_multipliers_alone(per_layer, shape):
    annealing = Annealing(small(3, "rubiks3d-aq"), AttentionSchedule(budget=0.5, per_layer=per_layer))
    assert {name: tuple(value.shape) for name, value in annealing.state_dict().items()} == {"multiplier": shape}
    assert annealing.channels.sum() == 1
    assert not annealing.multiplier.any()


def test_where_there_is_room_the_multiplier_falls_but_not_below_0():
    net = small(3, "rubiks3d-aq")
    first, *others = net.attention_shifts()
    for shift in others:  # nearly all of their attention is on "stay"
        shift.weight.data = torch.tensor([0.0, 1.0, 0.0]).repeat(len(shift.weight), 1)
    schedule = AttentionSchedule(budget=0.5, per_layer=True, soft=0.5, start=1.0, end=1.0, multiplier_rate=6.0)
    annealing = Annealing(net, schedule)
    annealing.multiplier.fill_(3.0)
    limit = schedule.allowed_share(1.0)
    soft = [attention(shift.weight, torch.tensor(1.0)) for shift in (first, *others)]
    room = [weights[:, [0, 2]].sum(1).mean().item() - limit for weights in soft]
    for step in (1, 2, 3):
        assert not annealing.begin_step(step, 20)
        annealing.penalty()
        annealing.end_step(20)
        expected = [max(0.0, 3.0 + 0.6 * step * own) for own in room]
        assert annealing.multiplier.tolist() == pytest.approx(expected, rel=1e-4)
    for _ in range(26):
        annealing.end_step(20)
    assert annealing.multiplier[1:].tolist() == [0.0] * len(others)
    assert annealing.multiplier[0] > 3
