"""What the scorer gives for a batch of views."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_optimisation import CLASSES, make_trainer, network
from test_views import assert_all_alike
from torch.utils.data import DataLoader
from written_out import pixels

from rubiks import RubiksNet
from rubiks.data.batches import collate
from rubiks.evaluation.predictions import Predictions
from rubiks.evaluation.scorer import Scorer
from rubiks.models.activation_maps import activation_maps
from rubiks.ops import fused
from rubiks.training.module import VideoClassifier

pytestmark = [
    pytest.mark.usefixtures("small_network"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


def samples(count: int, views: int = 3, frames: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(4)
    shape = (views, frames, 3, 32, 32)
    return [
        {
            "views": torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
            "label": [number % 3] * views,
            "index": 10 + number,
            "reader": "pillow",
        }
        for number in range(count)
    ]


def predictions(scorer: Scorer, kept: list[dict], batch_size: int, precision: str = "32-true") -> list[dict]:
    trainer = make_trainer(SimpleNamespace(epochs=1, accumulate=1), logger=False, precision=precision)
    return trainer.predict(scorer, DataLoader(kept, batch_size=batch_size, collate_fn=collate))


def of_each_view(net: RubiksNet, kept: list[dict], change=lambda video: video) -> torch.Tensor:
    """Logits (views, videos, classes) in float64, by the modules."""
    views = torch.stack([change(video["views"]) for video in kept], dim=1)
    with torch.no_grad():
        return torch.stack([net.double()(pixels(view)) for view in views])


@pytest.mark.parametrize("precision", ["32-true", "64-true"])
@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_scores_are_the_mean_over_the_views_of_every_video(precision, mean):
    net, kept = network().eval(), samples(5)
    scorer = Scorer(net, mean)
    parts = predictions(scorer, kept, 2, precision)
    each = of_each_view(net, kept)
    expected = each.mean(0) if mean == "logits" else each.softmax(-1).mean(0).log()
    scores = torch.cat([part["logits"] for part in parts])[:, 0].double()
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert [len(part["logits"]) for part in parts] == [2, 2, 1]
    assert torch.cat([part["label"] for part in parts]).tolist() == [0, 1, 2, 0, 1]
    assert torch.cat([part["index"] for part in parts]).tolist() == [10, 11, 12, 13, 14]
    assert [part["reader"] for part in parts] == [["pillow"] * 2, ["pillow"] * 2, ["pillow"]]


def test_validation_averages_what_evaluation_does():
    net, kept = network().eval(), samples(3)
    views = torch.stack([video["views"] for video in kept])
    for mean in ("logits", "probabilities"):
        with torch.no_grad():
            own = VideoClassifier(net.float(), mean=mean)(views)
        (part,) = predictions(Scorer(net.float(), mean), kept, 3)
        torch.testing.assert_close(own, part["logits"][:, 0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
def test_scores_do_not_depend_on_the_batch(variant):
    kept = samples(8)
    scorer = Scorer(network(variant).eval())
    one, *others = (torch.cat([part["logits"] for part in predictions(scorer, kept, size)]) for size in (1, 3, 8))
    for other in others:
        assert torch.equal(one, other)
    assert len(one.unique(dim=0)) == 8


def test_frames_are_scored_in_other_orders():
    net, kept = network().eval(), samples(4, frames=5)
    scorer = Scorer(net, orders=("natural", "reversed", "shuffled"), seed=3)
    scores = torch.cat([part["logits"] for part in predictions(scorer, kept, 3)]).double()
    orders = iter([np.random.default_rng((3, 10 + number)).permutation(5) for number in range(4)])
    changes = (lambda video: video, lambda video: video[:, [4, 3, 2, 1, 0]], lambda video: video[:, next(orders)])
    for order, change in enumerate(changes):
        expected = of_each_view(net, kept, change).mean(0)
        torch.testing.assert_close(scores[:, order], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores[:, 0], scores[:, 1], atol=1e-3)


def test_every_order_of_shuffled_frames_is_equally_likely():
    scorer, video = Scorer(network(), orders=("shuffled",)), torch.arange(3)[None]
    orders = Counter(tuple(scorer._in_order(video, "shuffled", index)[0].tolist()) for index in range(1200))
    assert_all_alike(orders, set(permutations(range(3))))


def alone(net: RubiksNet, precision: str) -> Scorer:
    scorer = Scorer(net)
    scorer._trainer = SimpleNamespace(precision=precision)
    return scorer


def test_the_fast_form_of_the_network_scores_and_empty_batches_are_known():
    scorer = alone(network(), "32-true")
    scorer.on_predict_start()
    assert type(scorer.fast_net) is type(scorer.net.optimize_for_inference())
    found = scorer.predict_step(collate([]), 0)
    shapes = {name: tuple(found[name].shape) for name in ("logits", "label", "index")}
    assert shapes == {"logits": (0, 1, CLASSES), "label": (0,), "index": (0,)}
    assert found["reader"] == []


@pytest.mark.parametrize(
    ("device", "kernels", "precision", "converted"),
    [
        ("cuda", True, "bf16-mixed", [torch.bfloat16]),
        ("cuda", True, "bf16-true", [torch.bfloat16]),
        ("cuda", True, "16-mixed", None),
        ("cuda", False, "bf16-mixed", None),
        ("cpu", True, "bf16-mixed", []),
    ],
)
def test_what_scores_on_which_device(device, kernels, precision, converted, monkeypatch):
    asked = []
    monkeypatch.setattr(fused, "available", lambda where: kernels and where.type == "cuda")
    monkeypatch.setattr(Scorer, "device", torch.device(device))
    monkeypatch.setattr(RubiksNet, "optimize_for_inference", lambda net, *dtype: asked.append([*dtype]) or net.backbone)
    scorer = alone(network(), precision)
    scorer.on_predict_start()
    assert asked == ([] if converted is None else [converted])
    assert scorer.fast_net is (scorer.net if converted is None else scorer.net.backbone)


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
def test_an_activation_map_adds_up_to_the_logit(variant):
    net = network(variant).double().eval()
    clips, classes = torch.randn(2, 3, 3, 70, 40, dtype=torch.float64), torch.tensor([4, 1])
    maps = activation_maps(net, clips, classes)
    assert maps.shape == (2, 3, 3, 2)
    logits = net(clips)[torch.arange(2), classes]
    torch.testing.assert_close(maps.mean((1, 2, 3)) + net.new_fc.bias[classes], logits)


def test_the_first_of_equal_classes_is_predicted():
    logits = np.array([[1, 3, 3, 0], [2, 2, 2, 2], [0, 1, 5, 5]], dtype=np.float32)
    found = Predictions(["a", "b", "c"], np.array([2, 3, 3]), logits, ["w", "x", "y", "z"])
    assert found.ranking.tolist() == [[1, 2, 0, 3], [0, 1, 2, 3], [2, 3, 1, 0]]
    assert found.right(1).tolist() == [False, False, False]
    assert found.right(2).tolist() == [True, False, True]
    odds = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(found.probabilities, odds / odds.sum(1, keepdims=True), rtol=1e-12)
