"""What is off by default in training: averaged weights."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
from configurations import training
from conftest import assert_rejected
from test_optimisation import CLASSES, Data, make_trainer, network, videos
from torch import Tensor
from written_out import Rows, cross_entropy, exact_losses, one_hot, pixels

from rubiks import RubiksNet
from rubiks.models import checkpoint
from rubiks.training.aq import AttentionSchedule
from rubiks.training.module import VideoClassifier
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
