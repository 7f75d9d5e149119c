"""Where the parts of a chart lie in its SVG; templates/charts.html draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plot:
    """Axes in an SVG of `width` x `height`, with room for labels at the left and below.

    Attributes:
        x, y: the lowest and the highest value of each axis.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    width: int = 340
    height: int = 210
    left: int = 44
    right: int = 12
    top: int = 8
    bottom: int = 36

    def across(self, value: float) -> float:
        """The horizontal place of a value of x."""
        low, high = self.x
        return round(self.left + (value - low) / (high - low) * (self.width - self.left - self.right), 2)

    def up(self, value: float) -> float:
        """The vertical place of a value of y."""
        low, high = self.y
        return round(self.height - self.bottom - (value - low) / (high - low) * self.inside, 2)

    @property
    def inside(self) -> int:
        """The height without the labels."""
        return self.height - self.top - self.bottom

    def line(self, points: Iterable[tuple[float, float]]) -> str:
        """The path through points (x, y)."""
        return " ".join(
            f"{'L' if number else 'M'}{self.across(x):g},{self.up(y):g}" for number, (x, y) in enumerate(points)
        )

    def bars(self, heights: Sequence[float]) -> list[tuple[float, float, float, float]]:
        """Boxes (x, y, width, height) of bars from 0 that share the x axis equally, with small gaps."""
        low, high = self.x
        step = (high - low) / len(heights)
        edges = [self.across(low + number * step) for number in range(len(heights) + 1)]
        boxes = []
        for left, right, value in zip(edges, edges[1:], heights, strict=False):
            top, gap = self.up(value), min(1, (right - left) / 8)
            boxes.append((left + gap / 2, top, right - left - gap, self.up(0) - top))
        return [tuple(round(side, 2) for side in box) for box in boxes]  # type: ignore[misc]

    @property
    def x_ticks(self) -> list[float]:
        return ticks(*self.x)

    @property
    def y_ticks(self) -> list[float]:
        return ticks(*self.y)

    def rounded(self) -> Plot:
        """With a y axis that ends at whole ticks."""
        step = _step(*self.y)
        low, high = math.floor(self.y[0] / step) * step, math.ceil(self.y[1] / step) * step
        return replace(self, y=(low, high))


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from low to high, about five."""
    step = _step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, 12) for number in range(first, last + 1)]


def label(value: float) -> str:
    """A tick's number, short: 0.05, 20, 1.5k, 2e-5."""
    return f"{value / 1000:g}k" if abs(value) >= 1000 else f"{value:g}".replace("e-0", "e-")


def span(values: Iterable[float]) -> tuple[float, float]:
    """The lowest and the highest of some finite numbers, apart from each other."""
    values = list(values)
    low, high = min(values), max(values)
    room = 0 if low < high else abs(low) / 2 or 1
    return low - room, high + room


def thinned(points: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most so many points of a curve: means of neighbours, and the last point as it is."""
    size = math.ceil(len(points) / most)
    if size <= 1:
        return list(points)
    groups = (points[start : start + size] for start in range(0, len(points) - 1, size))
    return [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups] + [points[-1]]


def _step(low: float, high: float) -> float:
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
