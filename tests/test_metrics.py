"""Metrics against scikit-learn, torchmetrics and plain loops; confidence intervals against simulated truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import assert_rejected
from sklearn import metrics as sklearn_metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from rubiks.evaluation import metrics
from rubiks.evaluation.predictions import Predictions


def predictions(logits: np.ndarray, labels) -> Predictions:
    """Predictions of videos and classes with numbers for names."""
    count, classes = logits.shape
    names = [f"video {number}" for number in range(count)]
    return Predictions(names, np.asarray(labels), logits.astype(np.float32), [str(label) for label in range(classes)])


def random_predictions(seed: int, videos: int, classes: int, ties: bool = False, missing: int = 0) -> Predictions:
    """Predictions that are right at times; the `missing` last classes have no videos, and are never predicted."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes - missing, size=videos)
    logits = rng.normal(size=(videos, classes)) + 1.5 * np.eye(classes)[labels]
    if ties:
        logits = logits.round()
    logits[:, classes - missing :] = -9
    return predictions(logits, labels)


CASES = {
    "many": random_predictions(0, 400, 12),
    "ties": random_predictions(1, 300, 9, ties=True),
    "classes without videos": random_predictions(2, 60, 20, missing=7),
    "few videos": random_predictions(3, 7, 30),
    "four classes": random_predictions(4, 50, 4),
    "one class": random_predictions(5, 10, 1),
    "one video": random_predictions(6, 1, 5),
    "one video of one class": random_predictions(7, 1, 1),
    "all equal": predictions(np.zeros((20, 6)), np.arange(20) % 6),
}
cases = pytest.mark.parametrize("own", CASES.values(), ids=CASES)
single = pytest.mark.filterwarnings("ignore:A single label was found in:UserWarning")  # by scikit-learn


@single
@cases
def test_confusion_and_numbers_of_classes_are_those_of_scikit_learn(own):
    labels, predicted, every = own.labels, own.logits.argmax(1), list(range(len(own.classes)))
    confusion = metrics.confusion_matrix(own)
    assert np.array_equal(confusion, sklearn_metrics.confusion_matrix(labels, predicted, labels=every))
    found = metrics.per_class(confusion)
    options = {"labels": every, "zero_division": np.nan}
    precision, recall, f1, support = sklearn_metrics.precision_recall_fscore_support(labels, predicted, **options)
    assert np.array_equal(found.support, support)
    assert np.array_equal(found.predicted, np.bincount(predicted, minlength=len(every)))
    for ours, theirs in ((found.precision, precision), (found.recall, recall), (found.f1, f1)):
        np.testing.assert_allclose(ours, 100 * theirs, rtol=1e-12)


@single
@cases
def test_scores_are_those_of_scikit_learn(own):
    found = metrics.scores(own)
    labels, predicted = own.labels, own.logits.argmax(1)
    assert found["top1"] == pytest.approx(100 * sklearn_metrics.accuracy_score(labels, predicted))
    recalls = [float((predicted[labels == label] == label).mean()) for label in np.unique(labels)]
    assert found["mean_class_accuracy"] == pytest.approx(100 * np.mean(recalls))
    if set(predicted) <= set(labels):  # otherwise scikit-learn warns
        balanced = sklearn_metrics.balanced_accuracy_score(labels, predicted)
        assert found["mean_class_accuracy"] == pytest.approx(100 * balanced)


@pytest.mark.parametrize("seed", range(3))
def test_top_k_is_that_of_scikit_learn(seed):
    own = random_predictions(seed, 200, 11)
    for k in (1, 2, 5, 10):
        theirs = sklearn_metrics.top_k_accuracy_score(own.labels, own.logits, k=k, labels=list(range(11)))
        assert own.right(k).mean() == pytest.approx(theirs)
    assert metrics.scores(own)["top5"] == pytest.approx(100 * own.right(5).mean())


@cases
def test_of_equal_scores_the_first_class_comes_first(own):
    for video, logits in enumerate(own.logits.tolist()):
        order = sorted(range(len(logits)), key=lambda label: (-logits[label], label))
        assert own.ranking[video].tolist() == order
        assert own.predicted[video] == order[0]
        for k in (1, 3, 5, 100):
            assert own.right(k)[video] == (own.labels[video] in order[:k])


def test_probabilities_are_the_softmax():
    own = CASES["many"]
    for logits, probabilities, confidence in zip(own.logits, own.probabilities, own.confidence, strict=True):
        powers = [np.exp(float(value) - float(logits.max())) for value in logits]
        np.testing.assert_allclose(probabilities, np.array(powers) / sum(powers), rtol=1e-12)
        assert confidence == probabilities.max()
    huge = predictions(np.array([[1000.0, 0, -1000]]), [0])
    assert huge.probabilities.tolist() == [[1, 0, 0]]


@pytest.mark.parametrize("name", ["many", "ties", "few videos", "all equal"])
def test_calibration_error_is_that_of_torchmetrics(name):
    own = CASES[name]
    assert own.confidence.max() < 1
    probabilities, labels = torch.from_numpy(own.probabilities), torch.from_numpy(own.labels)
    theirs = multiclass_calibration_error(probabilities, labels, len(own.classes), n_bins=metrics.BINS)
    assert metrics.reliability(own).error == pytest.approx(100 * float(theirs), abs=1e-4)


@cases
def test_reliability_by_loops(own):
    curve = metrics.reliability(own)
    members: list[list[int]] = [[] for _ in range(metrics.BINS)]
    for video, confidence in enumerate(own.confidence):
        members[min(int(confidence * metrics.BINS), metrics.BINS - 1)].append(video)
    error = 0.0
    for number, videos in enumerate(members):
        assert curve.counts[number] == len(videos)
        if not videos:
            assert np.isnan(curve.confidence[number])
            assert np.isnan(curve.accuracy[number])
            continue
        confidence = 100 * np.mean([own.confidence[video] for video in videos])
        accuracy = 100 * np.mean([own.predicted[video] == own.labels[video] for video in videos])
        assert curve.confidence[number] == pytest.approx(confidence)
        assert curve.accuracy[number] == pytest.approx(accuracy)
        error += abs(confidence - accuracy) * len(videos) / len(own)
    assert curve.error == pytest.approx(error)


# ---- intervals


def test_intervals_cover_the_truth_in_95_percent_of_simulated_lists():
    """60 videos of each of 5 classes; each is right with probability 0.6, else second with probability 0.5, else
    sixth, so that top-5 is 80%."""
    rng = np.random.default_rng(0)
    labels, simulations = np.arange(300) % 5, 500
    truth = {"top1": 60, "top5": 80, "mean_class_accuracy": 60}
    covered = dict.fromkeys(truth, 0)
    for _ in range(simulations):
        right, second = rng.random((2, 300)) < [[0.6], [0.5]]
        logits = np.tile(np.arange(7.0, 0, -1), (300, 1))  # classes 5 and 6 have no videos
        rank = np.where(right, 0, np.where(second, 1, 5))
        for video, (label, place) in enumerate(zip(labels, rank, strict=True)):
            order = [other for other in range(7) if other != label]
            order.insert(place, label)
            logits[video, order] = np.arange(7.0, 0, -1)
        own = predictions(logits, labels)
        for name, (low, high) in metrics.intervals(own).items():
            covered[name] += low <= truth[name] <= high
    shares = {name: 100 * count / simulations for name, count in covered.items()}
    assert all(abs(share - 95) <= 2 for share in shares.values()), shares


@pytest.mark.parametrize("videos", [1, 10, 300])
@pytest.mark.parametrize("right", [True, False])
def test_intervals_of_lists_without_spread_are_one_sided(videos, right):
    labels = np.zeros(videos, dtype=int)
    order = np.arange(7.0, 0, -1) if right else np.arange(7.0)
    found = metrics.intervals(predictions(np.tile(order, (videos, 1)), labels))
    least = 100 * 0.025 ** (1 / videos)
    for interval in found.values():
        assert interval == pytest.approx([least, 100] if right else [0, 100 - least])


@cases
def test_intervals_hold_the_scores_and_are_the_same_every_time(own):
    scores, found = metrics.scores(own), metrics.intervals(own)
    assert found == metrics.intervals(own)
    for name, (low, high) in found.items():
        assert 0 <= low <= scores[name] <= high <= 100


def test_intervals_are_those_of_a_bootstrap_by_loops():
    own = random_predictions(8, 120, 10)
    rng = np.random.default_rng(1)
    right, right5 = own.right(1), own.right(5)
    drawn = []
    for _ in range(4000):
        chosen = rng.integers(len(own), size=len(own))
        labels = own.labels[chosen]
        recalls = [right[chosen][labels == label].mean() for label in np.unique(labels)]
        drawn.append((right[chosen].mean(), right5[chosen].mean(), np.mean(recalls)))
    expected = 100 * np.percentile(drawn, (2.5, 97.5), axis=0).T
    np.testing.assert_allclose(list(metrics.intervals(own).values()), expected, atol=1)


# ---- predictions that cannot be used


def test_no_videos_and_scores_that_are_not_finite_are_refused():
    assert_rejected(lambda: predictions(np.zeros((0, 3)), []).check("net.ckpt"), "no video could be scored")
    logits = np.zeros((3, 2))
    logits[1:, 1] = np.nan, np.inf
    message = ("net.ckpt gives scores that are not finite for 2 of 3 videos", "video 1", "precision=32-true")
    assert_rejected(lambda: predictions(logits, [0, 1, 0]).check("net.ckpt"), *message)
    assert CASES["many"].check("net.ckpt") is None
