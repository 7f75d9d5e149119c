"""How good predictions are, and how sure that is. Shares are in percent, in float64 from exact counts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from rubiks.evaluation.predictions import Predictions

RESAMPLES = 2000  # of the bootstrap
BINS = 15  # of the reliability curve, as in Guo et al., On Calibration of Modern Neural Networks, 2017


class PerClass(NamedTuple):
    """Numbers of each class (C,): counts of videos, and shares in percent, which are NaN where they are not defined.

    Attributes:
        support: videos of the class.
        predicted: videos that were taken for it.
        precision: share of the videos taken for it that are of it; NaN if none was.
        recall: share of its videos that were recognised; NaN if it has none.
        f1: harmonic mean of the two; NaN if it has no videos and none was taken for it.
    """

    support: np.ndarray
    predicted: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


class Reliability(NamedTuple):
    """The reliability curve: videos by the probability of the predicted class, in BINS equal bins from 0 to 1.

    Attributes:
        counts: videos in each bin.
        confidence, accuracy: mean probability and share of right predictions in each bin; NaN in empty bins.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """Expected calibration error: how far the two are apart, in percentage points, averaged over the videos."""
        gaps = np.nan_to_num(abs(self.confidence - self.accuracy))
        return float((gaps * self.counts).sum() / self.counts.sum())


def confusion_matrix(predictions: Predictions) -> np.ndarray:
    """(C, C) int64: the number of videos by label (rows) and predicted class (columns)."""
    classes = len(predictions.classes)
    return np.bincount(predictions.labels * classes + predictions.predicted, minlength=classes**2).reshape(classes, -1)


def per_class(confusion: np.ndarray) -> PerClass:
    """The numbers of each class, from the confusion matrix."""
    hits, support, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    with np.errstate(invalid="ignore"):
        shares = (100 * hits / predicted, 100 * hits / support, 200 * hits / (support + predicted))
    return PerClass(support, predicted, *shares)


def scores(predictions: Predictions) -> dict[str, float]:
    """top1, top5 (of all classes if there are fewer), and mean_class_accuracy: the mean recall of the classes that have
    videos."""
    return {
        "top1": 100 * float(predictions.right(1).mean()),
        "top5": 100 * float(predictions.right(5).mean()),
        "mean_class_accuracy": float(np.nanmean(per_class(confusion_matrix(predictions)).recall)),
    }


def intervals(predictions: Predictions) -> dict[str, list[float]]:
    """95% confidence intervals [low, high] of `scores`: the percentile bootstrap over videos.

    Where all videos are right, or none is, resampling always gives the same share. The interval then reaches to where
    such a list would have a probability of 2.5% (Clopper and Pearson, 1934). A class with one or two videos says little
    about itself: with many of them the interval of mean_class_accuracy covers about 90% rather than 95%.
    """
    count, right, right5 = len(predictions), predictions.right(1), predictions.right(5)
    # Videos that count alike are drawn together; how many of each kind a resample has is multinomial.
    kinds, sizes = np.unique(np.column_stack([predictions.labels, right, right5]), axis=0, return_counts=True)
    samples = np.random.default_rng(0).multinomial(count, sizes / count, RESAMPLES)
    label, right, right5 = kinds.T
    first = np.flatnonzero(np.diff(label, prepend=-1))  # of the kinds of a class
    support = np.add.reduceat(samples, first, axis=1)
    with np.errstate(invalid="ignore"):
        recall = np.add.reduceat(samples * right, first, axis=1) / support
    drawn = np.column_stack([samples @ right / count, samples @ right5 / count, np.nanmean(recall, axis=1)])
    low, high = np.percentile(drawn, (2.5, 97.5), axis=0)
    bound = 1 - 0.025 ** (1 / count)  # of the share of mistakes, if there are none
    low[low == 1], high[high == 0] = 1 - bound, bound
    names = ("top1", "top5", "mean_class_accuracy")
    return {name: [100 * float(a), 100 * float(b)] for name, a, b in zip(names, low, high, strict=True)}


def reliability(predictions: Predictions) -> Reliability:
    """The reliability curve."""
    confidence, right = predictions.confidence, predictions.right(1)
    bins = np.minimum(np.digitize(confidence, np.linspace(0, 1, BINS + 1)) - 1, BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    with np.errstate(invalid="ignore"):
        means = [100 * np.bincount(bins, values, BINS) / counts for values in (confidence, right)]
    return Reliability(counts, *means)
