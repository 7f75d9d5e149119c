"""Which of two networks is better on the same videos, how sure that is, and where they differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest

from rubiks.evaluation.metrics import RESAMPLES
from rubiks.evaluation.outcomes import Outcomes, paired
from rubiks.evaluation.results import SHOWN, Prediction

SIGNIFICANT = 0.05  # p values below it are called a difference


@dataclass(frozen=True)
class Difference:
    """Two shares of the same videos that are right.

    Attributes:
        a, b: the shares, in percent.
        difference: b - a, in percentage points.
        interval: of the difference, 95%.
        only_a, only_b: videos that are right in A alone, and in B alone.
        p: the probability of videos that differ so unevenly, or more, if A and B were equally good: McNemar's test.
    """

    a: float
    b: float
    difference: float
    interval: tuple[float, float]
    only_a: int
    only_b: int
    p: float

    @property
    def significant(self) -> bool:
        return self.p < SIGNIFICANT


@dataclass(frozen=True)
class ClassChange:
    """A class with its recall in A and in B, in percent; `change` is b - a, in percentage points."""

    name: str
    videos: int
    a: float
    b: float
    change: float


@dataclass(frozen=True)
class VideoChange:
    """A video that is right in only one of the two.

    Attributes:
        name, label: the video and its class.
        a, b: the class that was predicted, and its probability.
    """

    name: str
    label: str
    a: tuple[str, float]
    b: tuple[str, float]


@dataclass(frozen=True)
class Comparison:
    """B compared with A.

    Attributes:
        a, b: what is compared.
        videos: how many.
        both, neither: videos that both have right, and that both have wrong.
        top1: the shares of videos whose first class is right.
        top5: the same for the first five classes; None where a file has fewer.
        classes: that have videos; the largest gain of recall first.
        gained, lost: videos that only B, and only A, has right; those of which B is most certain first.
    """

    a: Outcomes
    b: Outcomes
    videos: int
    both: int
    neither: int
    top1: Difference
    top5: Difference | None
    classes: list[ClassChange]
    gained: list[VideoChange]
    lost: list[VideoChange]

    def most_gained(self, count: int) -> list[ClassChange]:
        """The classes whose recall rose most, at most so many."""
        return [own for own in self.classes if own.change > 0][:count]

    def most_lost(self, count: int) -> list[ClassChange]:
        """The classes whose recall fell most, at most so many."""
        fallen = [own for own in self.classes if own.change < 0]
        return sorted(fallen, key=lambda own: (own.change, -own.videos))[:count]

    def verdict(self) -> str:
        """What the difference in top-1 means, in one sentence."""
        own = self.top1
        if not own.only_a + own.only_b:
            return "A and B are right on the same videos."
        low, high = own.interval
        if own.significant:
            better, sign = ("B", 1) if own.difference > 0 else ("A", -1)
            low, high = sorted((sign * low, sign * high))
            size = f"{abs(own.difference):.2f} points (95% interval {low:.2f} to {high:.2f})"
            return f"{better} is better by {size}; {p_text(own.p)}."
        size = f"{own.difference:+.2f} points (95% interval {low:.2f} to {high:.2f})"
        return f"These videos show no certain difference: B - A is {size}; {p_text(own.p)}."

    def facts(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "a": {"path": str(self.a.path), "about": self.a.about},
            "b": {"path": str(self.b.path), "about": self.b.about},
            "videos": self.videos,
            "both_right": self.both,
            "both_wrong": self.neither,
            "top1": asdict(self.top1),
            "top5": None if self.top5 is None else asdict(self.top5),
            "verdict": self.verdict(),
            "classes": [asdict(own) for own in self.classes],
            "gained": [own.name for own in self.gained],
            "lost": [own.name for own in self.lost],
        }


def p_text(p: float) -> str:
    """A p value as it is quoted."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def compare(a: Outcomes, b: Outcomes) -> Comparison:
    """Compare two networks on the same videos.

    Raises:
        InputError: they are not of the same videos, labels and classes.
    """
    pairs = paired(a, b)
    right = np.array([[own.correct for own in pair] for pair in pairs])
    top5 = None
    if _has_top5(a) and _has_top5(b):
        among = np.array([[own.label in (name for name, _ in own.top[:SHOWN]) for own in pair] for pair in pairs])
        top5 = difference(*among.T)
    changes = [(pair, bool(after)) for pair, (before, after) in zip(pairs, right, strict=True) if before != after]
    changes.sort(key=lambda change: -change[0][1].top[0][1])
    return Comparison(
        a,
        b,
        len(pairs),
        int(right.all(1).sum()),
        int((~right).all(1).sum()),
        difference(*right.T),
        top5,
        class_changes([own.label for own, _ in pairs], right),
        [_video_change(*pair) for pair, better in changes if better],
        [_video_change(*pair) for pair, better in changes if not better],
    )


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """The difference of two bool arrays (videos,): right in A, right in B."""
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    shares = 100 * float(a.mean()), 100 * float(b.mean())
    interval = bootstrap(len(a), only_a, only_b)
    return Difference(*shares, 100 * (only_b - only_a) / len(a), interval, only_a, only_b, mcnemar(only_a, only_b))


def bootstrap(videos: int, only_a: int, only_b: int) -> tuple[float, float]:
    """95% interval of B - A in percentage points: the percentile bootstrap over videos, which keeps pairs together.

    If the two are right on the same videos, resampling always gives 0. The interval then reaches to where a list
    without a video that differs would have a probability of 2.5%, as in `metrics.intervals`.
    """
    if not only_a + only_b:
        bound = 100 * (1 - 0.025 ** (1 / videos))
        return -bound, bound
    # Three kinds of videos; how many of each a resample has is multinomial.
    kinds = np.array([only_a, only_b, videos - only_a - only_b])
    drawn = np.random.default_rng(0).multinomial(videos, kinds / videos, RESAMPLES)
    low, high = np.percentile(100 * (drawn[:, 1] - drawn[:, 0]) / videos, (2.5, 97.5))
    return float(low), float(high)


def mcnemar(only_a: int, only_b: int) -> float:
    """The two-sided p value of McNemar's exact test (1947)."""
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def class_changes(labels: list[str], right: np.ndarray) -> list[ClassChange]:
    """The recall of each class that has videos; the largest gain first, of equal ones the class with more videos.

    Args:
        labels: class of each video.
        right: bool (videos, 2), right in A and in B.
    """
    names, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    a, b = (100 * np.bincount(numbers, own) / counts for own in right.T)
    columns = (own.tolist() for own in (names, counts, a, b, b - a))
    changes = [ClassChange(*row) for row in zip(*columns, strict=True)]
    return sorted(changes, key=lambda own: (-own.change, -own.videos))


def _has_top5(outcomes: Outcomes) -> bool:
    """Whether five classes of each video are known, or all if there are fewer."""
    predictions = outcomes.predictions
    known = outcomes.classes or {name for own in predictions for name in (own.label, *(other for other, _ in own.top))}
    return all(len(own.top) >= min(SHOWN, len(known)) for own in predictions)


def _video_change(a: Prediction, b: Prediction) -> VideoChange:
    return VideoChange(a.name, a.label, a.top[0], b.top[0])
