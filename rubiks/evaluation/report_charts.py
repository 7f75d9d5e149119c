"""The charts of the report: calibration, learned shifts, the curves of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rubiks.errors import InputError
from rubiks.evaluation import curves
from rubiks.evaluation.curves import Curve
from rubiks.pages.charts import Plot, span, thinned

UNITS = {"T": ("Time", "frames"), "H": ("Height", "pixels"), "W": ("Width", "pixels")}
# Charts of the run: title, unit, factor, and curves by name. There are no others in the report.
CURVES = (
    ("Loss", "", 1, {"training": "train/loss_step", "validation": "val/loss"}),
    ("Validation accuracy", "%", 100, {"top-1": "val/top1", "top-5": "val/top5"}),
    ("Learning rate", "", 1, {"learning rate": "train/lr"}),
)


def reliability(curve: dict[str, list[Any]]) -> dict[str, Any]:
    """The reliability curve and the histogram of confidence, from results.json."""
    counts, total = curve["counts"], sum(curve["counts"])
    shares = [100 * count / total for count in counts]
    width = 100 / len(counts)
    bins = [
        {
            "from": number * width,
            "to": (number + 1) * width,
            "count": count,
            "confidence": x,
            "accuracy": y,
            "radius": round(2.5 + 5 * (count / total) ** 0.5, 2),
        }
        for number, (count, x, y) in enumerate(zip(counts, curve["confidence"], curve["accuracy"], strict=True))
    ]
    return {
        "plot": Plot((0, 100), (0, 100), height=300),
        "points": [own for own in bins if own["count"]],
        "line": [(own["confidence"], own["accuracy"]) for own in bins if own["count"]],
        "histogram": Plot((0, 100), (0, max(shares)), height=150).rounded(),
        "shares": shares,
        "titles": [f"{own['count']:,} with confidence {own['from']:.0f} to {own['to']:.0f}%" for own in bins],
    }


def shifts(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """Histograms of the learned shifts by axis and stage, and where temporal attention looks; None if not known."""
    if found is None:
        return None
    axes = []
    for axis, own in found["offsets"].items():
        stages = []
        for place, (stage, counts) in enumerate(own["counts"].items()):
            last = place == len(own["counts"]) - 1
            bottom = 34 if last else 4
            plot = Plot(
                (-own["limit"], own["limit"]), (0, max(counts)), height=46 + bottom, left=30, top=2, bottom=bottom
            )
            titles = _bin_titles(own["limit"], counts)
            stages.append({"name": _stage(stage), "plot": plot, "counts": counts, "titles": titles, "last": last})
        title, unit = UNITS[axis]
        axes.append({"title": title, "unit": unit, "stages": stages})
    attention = []
    for stage, counts in found["attention"].items():
        total = sum(counts.values())
        attention.append({"name": _stage(stage), "total": total, **counts, "share": 100 * (1 - counts["stay"] / total)})
    return {"axes": axes, "attention": attention, "hard": found["hard"]}


def curves_of(folder: Path) -> dict[str, Any]:
    """Charts of the training run in this folder, and `problem`, the reason if its curves cannot be read."""
    try:
        found = curves.read(folder)
    except InputError as error:
        return {"charts": [], "problem": str(error)}
    charts = []
    for title, unit, factor, names in CURVES:
        lines = {
            name: [(step, factor * value) for step, value in thinned(found[key])]
            for name, key in names.items()
            if key in found
        }
        if any(len(line) > 1 for line in lines.values()):
            charts.append({"title": title, "unit": unit, "plot": _plot(list(lines.values())), "lines": lines})
    return {"charts": charts, "problem": None}


def _plot(lines: list[Curve]) -> Plot:
    """Axes for curves; upwards from 0, unless that would flatten them."""
    steps, values = zip(*(point for line in lines for point in line), strict=True)
    low, high = span(values)
    return Plot(span(steps), (min(0, low) if low < high / 2 else low, high)).rounded()


def _bin_titles(limit: float, counts: list[int]) -> list[str]:
    """What each bin of a histogram from -limit to limit holds."""
    step = 2 * limit / len(counts)
    return [
        f"{count:,} channels, {number * step - limit:.2f} to {(number + 1) * step - limit:.2f}"
        for number, count in enumerate(counts)
    ]


def _stage(name: str) -> str:
    return f"Stage {name.removeprefix('layer')}"
