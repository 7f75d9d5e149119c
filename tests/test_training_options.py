"""What is off by default in training: averaged weights, frozen stages, validation within epochs, early stopping,
profiles."""

from __future__ import annotations

import copy
import csv
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from commands import BASE, SMALL_RUNS
from configurations import training
from conftest import assert_rejected
from forked import end, start
from test_optimisation import CLASSES, Data, make_trainer, network, rates, videos
from torch import Tensor
from written_out import Rows, Training, assert_same, cross_entropy, exact_losses, one_hot, pixels

from rubiks import RubiksNet
from rubiks.models import checkpoint
from rubiks.training.aq import AttentionSchedule
from rubiks.training.module import VideoClassifier
from rubiks.training.optim import describe_groups
from rubiks.training.patience import Patience
from rubiks.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def recipe(**changes) -> Recipe:
    defaults = {"epochs": 2, "batch_size": 3, "lr": 0.003, "lr_batch": 3, "schedule": "constant"}
    return Recipe(**(defaults | changes))


# ---- the average of the weights

BUDGET = AttentionSchedule(budget=0.25, soft=0.5)


class States(pl.Callback):
    """Keeps the trained network's state after each batch, and the average's at each validation."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.scored: list[RubiksNet] = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.trained.append(copy.deepcopy(module.net.state_dict()))

    def on_validation_end(self, trainer, module):
        self.scored.append(copy.deepcopy(module.average))


def recurrence(before: dict[str, Tensor], states: list[dict[str, Tensor]], decay: float) -> dict[str, Tensor]:
    """The average after these states, one value of the temperature and of each counter being the latest."""
    average = copy.deepcopy(before)
    for step, state in enumerate(states):
        share = 1 - min(decay, (1 + step) / (10 + step))
        for name, value in state.items():
            newest = name.endswith((".T", "num_batches_tracked"))
            average[name] = value if newest else (1 - share) * average[name] + share * value
    return average


@pytest.mark.parametrize(("variant", "accumulate"), [("rubiks3d", 2), ("rubiks3d-aq", 1)])
def test_validation_and_checkpoints_have_the_average_of_the_weights(variant, accumulate, tmp_path):
    settings = recipe(ema_decay=0.3, accumulate=accumulate)
    net, rows, states = network(variant).double(), Rows(), States()
    before = copy.deepcopy(net.state_dict())
    module = VideoClassifier(net, settings, attention=BUDGET if "aq" in variant else None)
    data = Data(videos(8), 3)  # three batches an epoch
    trainer = make_trainer(settings, logger=rows, callbacks=[states])
    with exact_losses():
        trainer.fit(module, data)

    steps = states.trained if accumulate == 1 else [states.trained[batch] for batch in (1, 2, 4, 5)]
    expected = recurrence(before, steps, 0.3)
    if "aq" in variant:  # after the third step the choice is made, and the average has it from then on
        logits = [name for name in expected if name.endswith("conv2.0.weight")]
        assert net.temporal_share() is not None
        assert module.average.temporal_share() == net.temporal_share()
        expected |= {name: net.state_dict()[name] for name in logits}
    for name, value in module.average.state_dict().items():
        torch.testing.assert_close(
            value, expected[name], rtol=1e-10, atol=1e-12, msg=lambda text, at=name: f"{at}: {text}"
        )
    assert any(not torch.equal(value, expected[name]) for name, value in net.state_dict().items())

    losses = []
    for scored in states.scored:
        batches = list(data.val_dataloader())
        with torch.no_grad():
            logits = torch.cat([scored.eval()(pixels(batch["views"][:, 0])) for batch in batches])
        labels = torch.cat([batch["label"][:, 0] for batch in batches])
        losses.append(cross_entropy(logits, one_hot(labels, CLASSES)).item())
    assert rows.values("val/loss") == pytest.approx(losses, rel=1e-5)

    trainer.save_checkpoint(tmp_path / "best.ckpt")
    weights = checkpoint.read(tmp_path / "best.ckpt").weights
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in module.average.state_dict().items())


def test_a_run_may_go_on_with_an_average_that_it_did_not_have_and_without_the_one_it_had(tmp_path):
    for first, second in ((None, 0.5), (0.5, None)):
        module = VideoClassifier(network(), recipe(ema_decay=first))
        trainer = make_trainer(module.recipe, logger=False, precision="32-true")
        trainer.fit(module, Data(videos(6), 3))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        other = VideoClassifier(network(), recipe(ema_decay=second))
        trainer = make_trainer(other.recipe, logger=False, precision="32-true")  # all epochs are done
        trainer.fit(other, Data(videos(6), 3), ckpt_path=tmp_path / "last.ckpt", weights_only=True)
        trained = module.net.state_dict()
        assert all(torch.equal(value, trained[name]) for name, value in other.net.state_dict().items())
        assert (other.average is None) == (second is None)
        if other.average is not None:
            assert all(torch.equal(value, trained[name]) for name, value in other.average.state_dict().items())


def test_an_average_needs_weights_of_32_bits():
    training(recipe__ema_decay=0.99, precision="bf16-mixed")
    assert_rejected(lambda: training(recipe__ema_decay=0.99, precision="bf16-true"), "recipe.ema_decay", "bf16-true")


# ---- frozen stages

# Six batches of four, and as many optimiser steps, an epoch.
QUICK = (
    "data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4", "recipe.batch_size=4",
    "recipe.epochs=2", "trainer.log_every_n_steps=1",
)  # fmt: skip

PARTS = {"stem": "conv1", **{f"layer{stage}": f"layer{stage}" for stage in range(5)}, "backbone": "bn_last"}
frozen_is_meant = pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training")


def frozen_parts(last: str) -> list[str]:
    """Prefixes of the names in a network's state that belong to what is frozen."""
    names = list(PARTS)
    return [f"backbone.{PARTS[name]}." for name in names[: names.index(last) + 1]]


@frozen_is_meant
@pytest.mark.parametrize(
    ("last", "optimizer"), [("stem", "sgd"), ("layer1", "adamw"), ("layer4", "sgd"), ("backbone", "adamw")]
)
def test_frozen_stages_stay_and_the_others_take_the_steps_of_the_formulas(last, optimizer):
    settings = recipe(freeze=last, optimizer=optimizer, momentum=0.8, weight_decay=0.1, shift_lr_scale=0.5)
    net = network().double()
    before = copy.deepcopy(net.state_dict())
    decays = {"weights": 0.1, "classifier": 0.1}
    expected = Training(net, rates(0.003, 0.0015), decays, 0.8 if optimizer == "sgd" else None)
    net.backbone.freeze(last)
    module, data = VideoClassifier(net, settings), Data(videos(8), 3)
    trainer = make_trainer(settings, logger=False)
    with exact_losses():
        trainer.fit(module, data)

    still = [name for name, _ in net.named_parameters() if name.startswith(tuple(frozen_parts(last)))]
    for _ in range(2):
        for batch in data.train_dataloader():
            expected.net.train()
            for name, norm in expected.net.named_modules():  # frozen by hand
                if isinstance(norm, torch.nn.BatchNorm2d) and f"{name}.".startswith(tuple(frozen_parts(last))):
                    norm.eval()
            expected.batch(pixels(batch["views"][:, 0]), one_hot(batch["label"][:, 0], CLASSES))
            expected.step(1.0, still)
    assert_same(net, expected.net, before)
    for name, value in net.state_dict().items():
        frozen = name.startswith(tuple(frozen_parts(last)))
        assert torch.equal(value, before[name]) == frozen, name
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for name, parameter in net.named_parameters():
        assert (name in still) == (parameter.grad is None and not parameter.requires_grad), name
        assert (name in still) == (id(parameter) not in trained), name


@frozen_is_meant
def test_attention_of_frozen_stages_is_not_trained_but_cools_and_is_chosen_with_the_rest():
    net = network("rubiks3d-aq").double()
    net.backbone.freeze("layer1")
    frozen, trained = net.attention_shifts()[:2], net.attention_shifts()[2:]
    before = [shift.weight.detach().clone() for shift in frozen]
    temperatures = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if not frozen[0].hard:
                assert all(torch.equal(shift.weight, own) for shift, own in zip(frozen, before, strict=True))
            temperatures.append([shift.T.item() for shift in (*frozen, *trained)])

    module = VideoClassifier(net, recipe(epochs=2), attention=BUDGET)
    make_trainer(module.recipe, logger=False, callbacks=[Watch()]).fit(module, Data(videos(8), 3))
    assert [len(set(own)) for own in temperatures] == [1] * 6
    assert temperatures[0][0] > temperatures[2][0] > temperatures[3][0] == 0
    assert net.temporal_share() <= 0.25
    for shift, own in zip(frozen, before, strict=True):
        moved = torch.cat([shift.back, shift.ahead])
        assert torch.equal(shift.weight[moved].argmax(1), own[moved].argmax(1))


def test_the_table_of_groups_shows_what_is_frozen():
    net = RubiksNet("tiny", 5)
    rows = describe_groups(net, recipe(), 1).splitlines()
    net.backbone.freeze("layer0")
    frozen = sum(p.numel() for name, p in net.named_parameters() if name.startswith(tuple(frozen_parts("layer0"))))
    assert f"  frozen          {frozen:>12,}" in describe_groups(net, recipe(), 1).splitlines()
    assert not any("frozen" in row for row in rows)


@SMALL_RUNS
@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_a_run_with_frozen_stages_in_parts_ends_as_one_in_a_piece(builtin_data, commands, tmp_path):
    given = RubiksNet("tiny", 5, "rubiks3d-aq")
    given.save_pretrained(tmp_path / "given.pth.tar")
    choices = (builtin_data, *QUICK, "variant=rubiks3d-aq", "aq.budget=0.25", "recipe.ema_decay=0.9")
    init, freeze = f"init={tmp_path}/given.pth.tar", "recipe.freeze=layer2"
    commands.train(*choices, init, freeze, "run=whole")
    output = commands.train(*choices, init, freeze, "run=parts", "trainer.max_steps=4")
    assert "  frozen  " in output
    message = commands.refused("train", "logger=csv", *choices, "recipe.freeze=layer1", "run=parts")
    assert "recipe.freeze: layer2 -> layer1" in message
    commands.train(*choices, freeze, "run=parts")  # without init=, the weights are the run's own
    ours, reference = (
        torch.load(tmp_path / f"outputs/{run}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for run in ("parts", "whole")
    )
    assert all(torch.equal(ours[name], value) for name, value in reference.items())
    for name, value in given.state_dict().items():
        if name.startswith(tuple(frozen_parts("layer2"))) and "conv2.0." not in name:
            assert torch.equal(ours[f"net.{name}"], value), name
            assert torch.equal(ours[f"average.{name}"], value), name


@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_two_processes_go_on_with_frozen_stages_and_average(builtin_data, tmp_path):
    """Each has its own running statistics; the average that is validated and kept is that of the first."""
    RubiksNet("tiny", 5).save_pretrained(tmp_path / "given.pth.tar")
    choices = (
        builtin_data, *QUICK, "recipe.batch_size=2", "trainer=ddp", "trainer.devices=2", "trainer.val_check_interval=4",
        f"init={tmp_path}/given.pth.tar", "recipe.freeze=layer0", "recipe.ema_decay=0.9",
    )  # fmt: skip
    for run in (("run=whole",), ("run=parts", "trainer.max_steps=10"), ("run=parts",)):
        if (tmp_path / "outputs/parts").is_dir():
            choices = [choice for choice in choices if not choice.startswith("init=")]
        status, _, err = end(start(tmp_path, "train", *choices, *run))
        assert status == 0, err
    for name in ("best.ckpt", "last.ckpt"):
        ours, reference = (
            torch.load(tmp_path / "outputs" / run / "checkpoints" / name, weights_only=True)
            for run in ("parts", "whole")
        )
        assert all(torch.equal(ours["state_dict"][key], value) for key, value in reference["state_dict"].items())
        own, other = reference["statistics"]
        assert not torch.equal(own, other)
        assert all(map(torch.equal, ours["statistics"], reference["statistics"]))


def test_random_weights_are_not_frozen(builtin_data, commands, fits):
    message = commands.refused("train", builtin_data, *QUICK, "recipe.freeze=layer1")
    assert "recipe.freeze=layer1 would keep random weights; give the weights to start from, init=FILE" in message


# ---- validation within epochs


def validated(run: Path) -> dict[int, str]:
    """The optimiser steps of an epoch's start that were validated, with their scores, from all parts of the run."""
    found = {}
    for path in run.glob("csv/version_*/metrics.csv"):
        with path.open() as file:
            for row in csv.DictReader(file):
                if row.get("val/loss"):
                    step = int(row["step"]) + 1
                    assert step not in found, "validated twice"
                    found[step] = row["val/loss"]
    return dict(sorted(found.items()))


@pytest.mark.parametrize(
    ("choices", "steps"),
    [
        (("trainer.val_check_interval=4",), [4, 6, 10, 12]),
        (("trainer.val_check_interval=0.5",), [3, 6, 9, 12]),
        (("trainer.val_check_interval=0.01", "trainer.limit_train_batches=2"), [1, 2, 3, 4]),
        (("trainer.val_check_interval=6",), [6, 12]),
        (("trainer.val_check_interval=1", "recipe.accumulate=4"), [1, 2, 3, 4]),  # steps of four and of two batches
        (("trainer.val_check_interval=0.5", "recipe.accumulate=4"), [1, 2, 3, 4]),
        (("trainer.val_check_interval=4", "trainer.check_val_every_n_epoch=2", "recipe.epochs=3"), [10, 12, 16, 18]),
    ],
)
@SMALL_RUNS
@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_when_a_run_is_validated(choices, steps, builtin_data, commands, tmp_path):
    commands.train(builtin_data, *QUICK, *choices, "run=often")
    assert list(validated(tmp_path / "outputs/often")) == steps


def test_an_interval_longer_than_an_epoch_is_refused(builtin_data, commands, fits):
    message = commands.refused("train", builtin_data, *QUICK, "logger=csv", "trainer.val_check_interval=7")
    assert "trainer.val_check_interval must be at most the 6 optimiser steps of an epoch, got 7" in message
    assert "trainer.check_val_every_n_epoch" in message
    commands.train(builtin_data, *QUICK, "trainer.val_check_interval=7", "trainer.fast_dev_run=true")


@SMALL_RUNS
@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_a_run_in_parts_is_validated_as_one_in_a_piece(builtin_data, commands, tmp_path, monkeypatch):
    choices = (builtin_data, *QUICK, "trainer.val_check_interval=2", "recipe.ema_decay=0.9")
    whole, parts = tmp_path / "outputs/whole", tmp_path / "outputs/parts"
    commands.train(*choices, "run=whole")
    for place, step in (("training_step", 0), ("validation_step", 4), ("training_step", 6), ("training_step", 7)):
        original = getattr(VideoClassifier, place)

        def interrupted(self, batch, index, original=original, place=place, step=step):
            if self.global_step == step and (index == 0 or place == "training_step"):
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self, batch, index)

        with monkeypatch.context() as patch:
            patch.setattr(VideoClassifier, place, interrupted)
            status, _, err = commands.run("train", (*BASE, "logger=csv", *choices, "run=parts"))
        assert (status, "interrupted by SIGTERM" in err) == (143, True)
    commands.train(*choices, "run=parts")
    assert list(validated(whole)) == [2, 4, 6, 8, 10, 12]
    assert validated(parts) == validated(whole)
    for name in ("best.ckpt", "last.ckpt"):
        ours, reference = (
            torch.load(run / "checkpoints" / name, weights_only=True)["state_dict"] for run in (parts, whole)
        )
        assert all(torch.equal(ours[key], value) for key, value in reference.items())


# ---- early stopping


def watched(early: Patience, scores: list[float], hard: list[bool] | None = None) -> int | None:
    """After which of these validations it stops training."""
    for number, score in enumerate(scores):
        trainer = SimpleNamespace(
            callback_metrics={"val/top1": torch.tensor(score)}, should_stop=False, fast_dev_run=False,
            sanity_checking=False, current_epoch=0, state=SimpleNamespace(fn="fit"),
            strategy=SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision),
        )  # fmt: skip
        annealing = None if hard is None else SimpleNamespace(hard=hard[number])
        early.on_validation_end(trainer, SimpleNamespace(annealing=annealing))
        if trainer.should_stop:
            return number
    return None


def test_patience_counts_validations_without_a_better_top1():
    assert watched(Patience(2), [0.1, 0.2, 0.2, 0.1, 0.3]) == 3
    assert watched(Patience(2), [0.1, 0.05, 0.2, 0.1, 0.3, 0.3]) is None
    # Soft networks do not count: they are not what the training is for.
    hard = [False] * 4 + [True] * 4
    assert watched(Patience(2), [0.9, 0.8, 0.7, 0.6, 0.2, 0.3, 0.3, 0.3], hard) == 7


@pytest.mark.parametrize(("patience", "keep_best", "stops"), [(2, True, 0), (3, True, 1), (1, False, 1)])
def test_a_resumed_run_keeps_waiting_with_its_current_patience(patience, keep_best, stops):
    before = Patience(2)
    assert watched(before, [0.5, 0.4]) is None
    after = Patience(patience, keep_best)
    after.load_state_dict(before.state_dict())
    assert watched(after, [0.4, 0.3, 0.3]) == stops


@SMALL_RUNS
@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
def test_a_run_in_parts_stops_early_where_one_in_a_piece_does(builtin_data, commands, tmp_path):
    choices = (builtin_data, *QUICK, "recipe.lr=0.0", "recipe.epochs=9", "patience=3", "trainer.val_check_interval=0.5")
    outputs = [commands.train(*choices, "run=whole")]
    commands.train(*choices, "run=parts", "trainer.max_steps=6")
    outputs.append(commands.train(*choices, "run=parts"))
    for output in outputs:  # the first is the best, and three more follow
        assert "(patience=3: validation top-1 has not risen for so many validations)" in output
    steps = [
        torch.load(tmp_path / f"outputs/{run}/checkpoints/last.ckpt", weights_only=True)["global_step"]
        for run in ("whole", "parts")
    ]
    assert steps == [12, 12]


# ---- profiles


@SMALL_RUNS
@pytest.mark.slow
@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("simple", "fit-simple.txt", ["Mean duration", "run_training_batch", "Checkpoints.on_train_epoch_end"]),
        ("advanced", "fit-advanced.txt", ["cumtime", "(training_step)"]),
        ("pytorch", "pytorch.txt", ["Self CPU", "aten::convolution_backward"]),
    ],
)
def test_a_profile_is_in_the_runs_folder(kind, name, words, builtin_data, commands, tmp_path, monkeypatch):
    choices = (builtin_data, *QUICK, f"trainer.profiler={kind}")
    output = commands.train(*choices, "run=watched")
    assert f"Profile: outputs/watched/profile/{name}\n" in output
    table = (tmp_path / "outputs/watched/profile" / name).read_text()
    assert all(word in table for word in words)
    if kind == "pytorch":
        trace = json.loads((tmp_path / "outputs/watched/profile/pytorch.json").read_text())
        names = {event["name"] for event in trace["traceEvents"] if "name" in event}
        assert {"ProfilerStep#7", "ProfilerStep#8", "ProfilerStep#9"} <= names
        assert "ProfilerStep#10" not in names
        output = commands.train(*choices, "recipe.epochs=1", "run=short")
        assert "trainer.profiler=pytorch: nothing recorded" in output
        assert "Profile:" not in output
        monkeypatch.chdir(tmp_path / "outputs")
        commands.train(*choices, "trainer.fast_dev_run=true")
        assert not (tmp_path / "outputs/outputs").exists()


def test_an_evaluation_has_no_profile(commands, builtin_data):
    message = commands.refused("eval", builtin_data, "trainer.profiler=simple")
    assert message == "error: trainer.profiler=simple is for training; leave it out\n"
