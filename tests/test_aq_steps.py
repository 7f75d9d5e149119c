"""Training through both phases of attention quantisation, against the formulas written out in float64."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from test_optimisation import CLASSES, Data, make_trainer, network, rates, videos
from torch import Tensor
from written_out import Rows, Training, assert_same, exact_losses, one_hot, pixels

from rubiks.training.aq import AttentionSchedule
from rubiks.training.module import VideoClassifier
from rubiks.training.recipe import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def attention(logits: Tensor, temperature: float) -> Tensor:
    """The softmax of RubiksNet's section 3.3."""
    mean = logits.mean(1, keepdim=True)
    deviation = ((logits - mean).square().sum(1, keepdim=True) / 2).sqrt()
    odds = (logits / (deviation + 1e-6) / temperature).exp()
    return odds / odds.sum(1, keepdim=True)


def allowed(budget: float, temperature: float) -> float:
    """The share of attention off "stay" in a network in which exactly a share `budget` of the channels moves."""
    moves, stays = attention(torch.tensor([[1.0, 0, 0], [0, 1, 0]]).double(), temperature)[:, 1].tolist()
    return 1 - budget * moves - (1 - budget) * stays


# Three epochs of three batches. For each: batches in a step, the optimiser, the recipe, and the number of soft steps.
CASES = {
    "whole network, AdamW, two batches a step": (
        False,
        2,
        {"optimizer": "adamw", "weight_decay": 0.1},
        3,
    ),
    "each block, SGD": (True, 1, {"momentum": 0.9, "weight_decay": 0.1}, 4),
}


@pytest.mark.parametrize("name", CASES)
def test_training_in_parts_goes_through_both_phases_by_the_formulas(name, tmp_path, caplog):
    per_layer, accumulate, changes, soft = CASES[name]
    recipe = Recipe(
        epochs=3, batch_size=3, lr=0.0003, lr_batch=3 * accumulate, accumulate=accumulate, shift_lr_scale=1.0,
        attention_lr_scale=20.0, schedule="constant", **changes,
    )  # fmt: skip
    schedule = AttentionSchedule(
        budget=0.125, per_layer=per_layer, soft=0.5, start=3.0, end=0.5, shape="exponential", multiplier_rate=200.0
    )
    net = network("rubiks3d-aq").double()
    before, rows = copy.deepcopy(net.state_dict()), Rows()
    momentum = None if recipe.optimizer == "adamw" else recipe.momentum
    decays = {"weights": recipe.weight_decay, "classifier": recipe.weight_decay}
    expected = Training(net, rates(0.0003, 0.0003, 0.006), decays, momentum)
    data = Data(videos(8), 3)
    caplog.set_level(logging.INFO)
    path, offsets = tmp_path / "last.ckpt", []
    for epochs in (1, 2, 3):  # the second part starts with a soft network, the third with a hard one
        if epochs > 1:
            net = network("rubiks3d-aq").double()
        module = VideoClassifier(net, recipe, attention=schedule)
        trainer = make_trainer(recipe, logger=rows, max_epochs=epochs)
        with exact_losses():
            trainer.fit(module, data, ckpt_path=path if path.is_file() else None, weights_only=True)
        trainer.save_checkpoint(path)
        offsets.append(module.initial_shifts)
    assert all(torch.equal(own[stage], offsets[0][stage]) for own in offsets for stage in offsets[0])

    logits = [shift.weight for shift in expected.net.attention_shifts()]
    widths = [len(own) for own in logits]
    multipliers = [0.0] * (len(widths) if per_layer else 1)
    weights = [width / sum(widths) for width in widths] if per_layer else [1.0]
    temperature, step = 3.0, 0
    wanted = {key: [] for key in ("aq/temperature", "aq/expected_share", "aq/multiplier")}
    shifted = []

    def shares() -> list[Tensor]:
        off_stay = [1 - attention(own, temperature)[:, 1] for own in logits]
        return [own.mean() for own in off_stay] if per_layer else [torch.cat(off_stay).mean()]

    def penalty() -> Tensor:
        excess = [share - allowed(0.125, temperature) for share in shares()]
        return sum(m * weight * own for m, weight, own in zip(multipliers, weights, excess, strict=True))

    for _ in range(3):
        for number, batch in enumerate(data.train_dataloader(), start=1):
            if (number - 1) % accumulate == 0:
                if step < soft:
                    temperature = 3.0 * (0.5 / 3.0) ** (step / soft)
                    for shift in expected.net.attention_shifts():
                        shift.T.fill_(temperature)
                elif step == soft:
                    temperature = 0.0
                    expected.net.harden(0.125, per_layer)
            hard = step >= soft
            clips, targets = pixels(batch["views"][:, 0]), one_hot(batch["label"][:, 0], CLASSES)
            expected.batch(clips, targets, accumulate, None if hard else penalty)
            if number % accumulate and number < 3:
                continue
            wanted["aq/temperature"].append(temperature)
            if hard:
                multipliers = [0.0] * len(multipliers)
                share = sum((own.argmax(1) != 1).sum().item() for own in logits) / sum(widths)
            else:
                share = sum(w * own.item() for w, own in zip(weights, shares(), strict=True))
            wanted["aq/expected_share"].append(share)
            wanted["aq/multiplier"].append(sum(w * m for w, m in zip(weights, multipliers, strict=True)))
            if not hard:
                multipliers = [
                    max(0.0, m + 200.0 / soft * (own.item() - allowed(0.125, temperature)))
                    for m, own in zip(multipliers, shares(), strict=True)
                ]
            expected.step(1.0, still=["conv2.0.weight"] if hard else [])
            step += 1
        shifted.append([(own.argmax(1) != 1).double().mean().item() for own in logits])

    assert min(wanted["aq/multiplier"][1:soft]) > 1  # the penalty matters in what is compared
    for key, values in wanted.items():
        assert rows.values(key) == pytest.approx(values, rel=1e-5), key
    assert rows.values("aq/shifted/layer0") == pytest.approx([own[0] for own in shifted])
    assert_same(net, expected.net, before)
    chosen = [record.message for record in caplog.records if "temporal shifts are chosen" in record.message]
    moved = sum((own.argmax(1) != 1).sum().item() for own in logits)
    assert [f"{moved:,} of {sum(widths):,} channels" in line for line in chosen] == [
        True,
        True,
    ]  # as created, and as loaded
