"""The curves of a training run, as Lightning's CSVLogger has kept them."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from rubiks.errors import InputError

Curve = list[tuple[float, float]]  # (step, value), by step


def read(folder: Path) -> dict[str, Curve]:
    """The curves by name, as in "train/loss_step", over training steps; values that are not finite are left out.

    Each start of a run has its file. Where a run went on from an earlier step, what came after that step in the earlier
    files is left out.

    Raises:
        InputError: a file is damaged.
    """
    curves: dict[str, Curve] = {}
    for path in sorted((folder / "csv").glob("version_*/metrics.csv"), key=_version):
        own = _curves(path)
        begin = min((curve[0][0] for curve in own.values()), default=math.inf)
        curves = {name: [point for point in curve if point[0] < begin] for name, curve in curves.items()}
        for name, curve in own.items():
            curves.setdefault(name, []).extend(curve)
    return curves


def _version(path: Path) -> int:
    number = path.parent.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def _curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = {}
    try:
        with open(path, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                step = float(row.pop("step"))
                for name, cell in row.items():
                    if cell and math.isfinite(value := float(cell)):
                        curves.setdefault(name, []).append((step, value))
    except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    return {name: sorted(curve) for name, curve in curves.items()}
