"""What the classifier does with a batch, what its checkpoints contain, and how a run resumes with other settings."""

from __future__ import annotations

import copy
import datetime
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import Timer
from test_optimisation import CLASSES, Data, make_trainer, network, rates, videos
from written_out import Rows, Training, assert_same, exact_losses, one_hot, pixels

from rubiks import RubiksNet
from rubiks.runs import Run
from rubiks.training.aq import AttentionSchedule
from rubiks.training.checkpointing import Checkpoints
from rubiks.training.module import VideoClassifier
from rubiks.training.nonfinite import SkipNonFinite
from rubiks.training.optim import change_settings
from rubiks.training.position import Position
from rubiks.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:You.re resuming from a checkpoint"
)


def recipe(**changes) -> Recipe:
    return Recipe(**({"epochs": 2, "batch_size": 4, "lr": 0.001, "lr_batch": 4, "schedule": "constant"} | changes))


def alone(net: RubiksNet, step: int = 0, rank: int = 0, **arguments) -> VideoClassifier:
    """The module without a trainer, at a step; what it logs is in `logged`."""
    module = VideoClassifier(net, arguments.pop("recipe", recipe()), **arguments)
    module.logged = {}
    module.log = lambda name, value, **_: module.logged.update({name: value})
    module.log_dict = lambda values, **_: module.logged.update(values)
    module._trainer = SimpleNamespace(global_step=step, global_rank=rank, world_size=2)
    return module


# ---- a training step


def test_clips_go_with_their_own_labels_and_are_mixed_with_those_of_other_videos():
    """Three videos of two clips each: the first clip of each video, then the second ones."""
    net = network().double().train()
    views = torch.randint(0, 256, (3, 2, 2, 3, 32, 32), dtype=torch.uint8)
    label = torch.tensor([[0, 3], [1, 4], [2, 5]])
    seen = []

    def mixing(clips, labels, key):
        seen.append((labels.tolist(), key))
        return 0.3 * clips + 0.7 * clips.roll(1, 0), 0.3 * one_hot(labels, 7) + 0.7 * one_hot(labels.roll(1), 7)

    module = alone(net, step=5, rank=1, mixing=mixing, recipe=recipe(label_smoothing=0.1)).double()
    with exact_losses():
        loss = module.training_step({"views": views, "label": label}, 8)
    assert seen == [([0, 1, 2, 3, 4, 5], (5, 8, 1))]
    order = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1)]
    clips = pixels(torch.stack([views[video, clip] for video, clip in order]))
    before = [order[place - 1] for place in range(6)]
    others = pixels(torch.stack([views[video, clip] for video, clip in before]))
    mine, theirs = (torch.tensor([label[place].item() for place in places]) for places in (order, before))
    logits = copy.deepcopy(net)(0.3 * clips + 0.7 * others)
    odds = logits.log_softmax(1)
    expected = torch.stack([0.3 * odds[i, mine[i]] + 0.7 * odds[i, theirs[i]] for i in range(6)])
    assert loss.item() == pytest.approx(-(0.9 * expected + 0.1 * odds.mean(1)).mean().item())
    # A prediction is correct if it is the class with the larger share.
    right = (logits.argmax(1) == theirs).double().mean().item()
    assert module.train_accuracy["top1"].compute().item() == pytest.approx(right)
    assert module.logged["train/loss_step"] is loss


def test_dropout_follows_from_seed_step_batch_and_process_alone():
    views = {"views": torch.randint(0, 256, (3, 1, 2, 3, 32, 32), dtype=torch.uint8), "label": torch.arange(3)[:, None]}

    def loss(dropout=0.5, seed=3, step=2, batch=1, rank=0):
        torch.manual_seed(0)
        module = alone(network(dropout=dropout), step, rank, seed=seed, recipe=recipe(dropout=dropout))
        torch.rand(len(losses))  # earlier random numbers do not matter
        return module.training_step(views, batch).item()

    losses: list[float] = []
    for changes in ({}, {}, {"seed": 4}, {"step": 3}, {"batch": 2}, {"rank": 1}, {"dropout": 0.0}, {"dropout": 0.4}):
        losses.append(loss(**changes))
    assert losses[0] == losses[1]
    assert len(set(losses)) == 7
    module = alone(RubiksNet("tiny", 3), recipe=recipe())
    state = torch.get_rng_state()
    module.training_step(views, 0)
    assert torch.equal(torch.get_rng_state(), state)  # without dropout nothing is seeded


@pytest.mark.parametrize("classes", [3, 7])
def test_top5_of_fewer_classes_is_right_whenever_there_is_a_label(classes):
    module = alone(RubiksNet("tiny", classes).eval())
    views = torch.randint(0, 256, (20, 1, 1, 3, 32, 32), dtype=torch.uint8)
    label = torch.randint(0, classes, (20,))
    module.validation_step({"views": views, "label": label[:, None]}, 0)
    with torch.no_grad():
        logits = module(views)
    order = logits.argsort(dim=1, descending=True)
    for k in (1, 5):
        right = [label[clip].item() in order[clip, :k].tolist() for clip in range(20)]
        assert module.logged[f"val/top{k}"].compute().item() == pytest.approx(np.mean(right))
    assert module.logged["val/loss"].compute().item() == pytest.approx(F.cross_entropy(logits, label).item())


def test_a_validation_batch_without_a_readable_video_counts_for_nothing():
    module = alone(RubiksNet("tiny", 3).eval())
    module.validation_step({"views": torch.empty(0, 1, 1, 3, 32, 32, dtype=torch.uint8), "label": torch.empty(0)}, 0)
    assert module.logged == {}
    assert not module.val_accuracy["top1"].update_called


def test_a_loss_that_is_not_finite_is_no_part_of_the_epochs_mean():
    """The step and its loss are skipped; the videos count as usual otherwise."""
    losses = []

    def mixing(clips, labels, key):  # nothing is mixed, but the second batch of each epoch is spoiled
        return (clips * float("nan") if key[1] == 1 else clips), one_hot(labels, CLASSES).float()

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(outputs["loss"].item())

    net, rows = network(), Rows()
    module = VideoClassifier(net, recipe(epochs=1), mixing=mixing)
    trainer = make_trainer(module.recipe, logger=rows, precision="32-true", callbacks=[SkipNonFinite(), Watch()])
    data = Data(videos(10), 4)
    data.train_dataloader()  # four, four and two
    trainer.fit(module, data)
    assert np.isnan(losses[1])
    assert rows.values("train/loss_epoch") == [pytest.approx((4 * losses[0] + 2 * losses[2]) / 6)]
    assert all(value.isfinite().all() for value in net.state_dict().values())


def test_what_is_logged_does_not_wait_for_a_gpu():
    module = alone(network("rubiks3d-aq"))
    module._trainer.optimizers = [SimpleNamespace(param_groups=[{"lr": 0.25}, {"lr": 1.0}])]
    module.on_train_batch_start({}, 0)
    rate = module.logged["train/lr"]
    assert isinstance(rate, torch.Tensor)
    assert rate.device.type == "cpu"
    assert rate == 0.25


# ---- the best checkpoint


def test_the_best_checkpoint_has_the_best_top1_whatever_the_loss(tmp_path, monkeypatch):
    saved = []
    checkpoints = Checkpoints(Run(tmp_path), stop=None, non_finite=SimpleNamespace(check=lambda *_: None))
    monkeypatch.setattr(checkpoints, "_save", lambda trainer, module, path: saved.append((trainer.epoch, path)))
    scores = [(0.3, 0.9, 1.0), (0.5, 0.8, 2.0), (0.5, 0.95, 0.5), (0.4, 1.0, 0.1), (0.6, 0.7, 3.0)]
    for epoch, (top1, top5, loss) in enumerate(scores):
        metrics = {"val/top1": torch.tensor(top1), "val/top5": torch.tensor(top5), "val/loss": torch.tensor(loss)}
        for rehearsal in (True, False):
            trainer = SimpleNamespace(epoch=epoch, callback_metrics=metrics, sanity_checking=rehearsal)
            checkpoints.on_validation_end(trainer, None)
    assert saved == [(epoch, tmp_path / "checkpoints/best.ckpt") for epoch in (0, 1, 4)]
    assert checkpoints.best == pytest.approx(0.6)


# ---- resuming with other settings


# The optimiser; the settings of the second part, and their effect: rates of weights and shifts, momentum, decay, and
# the factors of its steps. The first part is one step on 4 of 12 videos: a third of the epoch.
GOING_ON = {
    "rates, momentum and decay": (
        "sgd",
        {"lr": 0.004, "momentum": 0.5, "weight_decay": 0.3, "shift_lr_scale": 0.5},
        (0.004, 0.002),
        0.5,
        0.3,
        [1, 1, 1, 1, 1],
    ),
    "schedule": (
        "adamw",
        {"schedule": "step", "milestones": (0.5, 1.5)},
        (0.001, 0.0001),
        0.9,
        0.1,
        [1, 0.1, 0.1, 0.1, 0.01],
    ),
    "half the batch, in a cosine": (
        "adamw",
        {"schedule": "cosine", "batch_size": 2},
        (0.0005, 0.00005),
        0.9,
        0.1,
        [0.5 * (1 + np.cos(np.pi * step / 12)) for step in range(2, 12)],
    ),
}


@pytest.mark.parametrize("name", GOING_ON)
def test_a_run_goes_on_with_the_settings_of_its_last_start(name, tmp_path):
    optimizer, changes, (weights, shift), momentum, decay, factors = GOING_ON[name]
    first = recipe(optimizer=optimizer, momentum=0.9, weight_decay=0.1, shift_lr_scale=0.1)
    second = recipe(**{**vars(first), **changes})
    net, listed = network().double(), videos(12)
    before = copy.deepcopy(net.state_dict())
    expected = Training(
        net, rates(0.001, 0.0001), {"weights": 0.1, "classifier": 0.1}, 0.9 if optimizer == "sgd" else None
    )

    module = VideoClassifier(net, first, start=Position())
    trainer = make_trainer(first, logger=False, max_steps=1, limit_val_batches=0)
    with exact_losses():
        trainer.fit(module, Data(listed, 4))
    module.position = Position(0, 4, 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    net, rows = network().double(), Rows()
    module = VideoClassifier(net, second, start=Position(0, 4, 1))
    trainer = make_trainer(second, logger=rows, limit_val_batches=0)
    with exact_losses():
        trainer.fit(module, Data(listed, second.batch_size, 4), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert trainer.global_step == 1 + len(factors)

    batches = [listed[:4]]
    size = second.batch_size
    for part in (listed[4:], listed):
        batches += [part[start : start + size] for start in range(0, len(part), size)]
    for number, batch in enumerate(batches):
        clips = pixels(torch.stack([video["views"][0] for video in batch]))
        expected.batch(clips, one_hot(torch.cat([video["label"] for video in batch]), CLASSES))
        expected.step(([1.0, *factors])[number])
        expected.rates, expected.decays = rates(weights, shift), {"weights": decay, "classifier": decay}
        if optimizer == "sgd":
            expected.momentum = momentum
    assert rows.values("train/lr") == pytest.approx([weights * factor for factor in factors])
    assert_same(net, expected.net, before)


@pytest.mark.parametrize("fused", [True, False])
def test_the_count_of_steps_lies_where_the_optimiser_wants_it(fused):
    """A fused optimiser keeps it on the parameter's device, others keep it on the CPU."""
    adam, plain = (torch.nn.Parameter(torch.empty(2, device="meta")) for _ in range(2))
    state = {adam: {"step": torch.tensor(7.0)}, plain: {"momentum_buffer": torch.zeros(2)}}
    optimizer = SimpleNamespace(param_groups=[{"params": [adam, plain], "lr": 9.0, "fused": not fused}], state=state)
    schedule = SimpleNamespace(lr_lambdas=[lambda step: 0.5**step])
    change_settings(optimizer, schedule, [{"initial_lr": 0.8, "fused": fused}], done=2)
    assert state[adam]["step"].device.type == ("meta" if fused else "cpu")
    assert state[plain].keys() == {"momentum_buffer"}
    assert optimizer.param_groups[0] == {"params": [adam, plain], "lr": 0.2, "fused": fused, "initial_lr": 0.8}
    assert (schedule.base_lrs, schedule.last_epoch) == ([0.8], 2)


def test_the_limit_of_time_is_for_each_start():
    module = alone(RubiksNet("tiny", 3))
    timer = Timer(datetime.timedelta(1))
    checkpoint = {"rubiks": {}, "callbacks": {timer.state_key: {}, "other": 1}, "loops": {}, "state_dict": {}}
    module.on_load_checkpoint(checkpoint)
    assert checkpoint["callbacks"] == {"other": 1}
    module.on_load_checkpoint(checkpoint)
    assert module.initial_shifts == {}  # for a checkpoint that has none


@pytest.mark.parametrize(("processes", "factor"), [(2, 1.0), (3, 0.5), (1, 0.5)])
def test_statistics_of_processes_are_each_ones_own_or_their_mean_where_there_are_others(processes, factor):
    """From a checkpoint of two processes, with running statistics 0 and 1; this is the second process."""
    module = alone(RubiksNet("tiny", 3), rank=1)
    module._trainer.world_size = processes
    count = sum(buffer.numel() for name, buffer in module.net.named_buffers() if "running" in name)
    statistics = [torch.zeros(count), torch.ones(count)]
    checkpoint = {"rubiks": {}, "callbacks": {}, "state_dict": {}, "statistics": statistics}
    module.on_load_checkpoint(checkpoint)
    for _ in range(2):
        module.on_train_start()
        found = {name: buffer for name, buffer in module.net.named_buffers() if "running" in name}
        assert len(found) == 2 * sum(isinstance(norm, torch.nn.BatchNorm2d) for norm in module.net.modules())
        for buffer in found.values():
            assert (buffer == factor).all()
        factor = 7  # what training makes of them is not overwritten
        for buffer in found.values():
            buffer.fill_(factor)


def test_an_epoch_that_only_had_to_be_validated_has_no_training_metrics():
    module = alone(network())
    module.on_train_epoch_end()
    assert module.logged == {}
    module.training_step(
        {"views": torch.zeros(2, 1, 2, 3, 32, 32, dtype=torch.uint8), "label": torch.tensor([[0], [1]])}, 0
    )
    module.on_train_epoch_end()
    assert {"train/loss_epoch", "train/top1", "train/top5"} <= module.logged.keys()


def test_shares_of_attention_are_logged_for_every_stage():
    net = network("rubiks3d-aq")
    module = alone(net, attention=AttentionSchedule(budget=0.5))
    module.on_train_epoch_end()
    for stage, layer in enumerate(net.backbone.layers()):
        off_stay = torch.cat([block.attention.weight.argmax(1) != 1 for block in layer])
        assert module.logged.pop(f"aq/shifted/layer{stage}") == pytest.approx(off_stay.double().mean().item())
    assert module.logged == {}


# ---- what a checkpoint says about itself


def test_a_checkpoint_describes_its_network_and_its_training(tmp_path):
    net = RubiksNet("small", 3, "rubiks3d-aq", num_frames=5)
    offsets = {
        f"layer{stage}": torch.cat([block.as3.shift.detach() for block in layer], dim=1).clone()
        for stage, layer in enumerate(net.backbone.layers())
    }
    module = VideoClassifier(net, recipe(), ["a", "b", "c"], {"seed": 4})
    net.backbone.layer0[0].as3.shift.data.zero_()
    module._trainer = SimpleNamespace(current_epoch=0, world_size=1)

    def saved():
        content = {}
        module.on_save_checkpoint(content)
        torch.save(content, tmp_path / "net.ckpt")
        return torch.load(tmp_path / "net.ckpt", weights_only=True)  # it is plain data

    content = saved()
    assert "statistics" not in content  # one process has one set of them
    described = content["rubiks"]
    found = described.pop("initial_shifts")
    assert found.keys() == offsets.keys()
    assert all(torch.equal(found[stage], offsets[stage]) for stage in offsets)
    assert described == {
        "tier": "small", "variant": "rubiks3d-aq", "causal": False, "num_classes": 3, "num_frames": 5,
        "classes": ["a", "b", "c"], "config": {"seed": 4}, "epoch": 1, "position": None,
    }  # fmt: skip
    module.position = Position(3, 8, 40)
    described = saved()["rubiks"]
    assert described["epoch"] == 4  # begun
    assert described["position"] == {
        "epoch": 3, "videos": 8, "steps": 40, "validation_due": False, "validation_due_within": False,
    }  # fmt: skip
    assert VideoClassifier(net).config == {}
    assert VideoClassifier(net, start=Position(2)).position == Position(2)  # until training continues
