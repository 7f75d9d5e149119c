"""What the shifts of the network that was evaluated have learned: shifts.json, for the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from rubiks.files import write_text
from rubiks.models import RubiksNet
from rubiks.models.shifts import axes_of, moves, offsets

FILE = "shifts.json"
BINS = 41  # an odd number: shifts near 0 have a bin of their own


def summary(net: RubiksNet) -> dict[str, Any]:
    """Numbers of channels, by stage.

    Returns:
        offsets: by axis T, H, W, what is learned: the `limit` of the histograms in frames or pixels, from -limit to
            limit, and `counts`, BINS for each stage. Empty if the shifts are fixed.
        attention: by stage, how many channels look back, stay and look ahead. Empty without temporal attention.
        hard: whether attention shifts by whole frames; False while it is soft.
    """
    learned = offsets(net)
    by_axis = {}
    for row, axis in enumerate(axes_of(next(iter(learned.values()))) if learned else ""):
        own = {stage: values[row].numpy() for stage, values in learned.items()}
        limit = max(0.1, *(float(abs(values).max()) for values in own.values()))
        counts = {stage: np.histogram(values, BINS, (-limit, limit))[0].tolist() for stage, values in own.items()}
        by_axis[axis] = {"limit": limit, "counts": counts}
    return {
        "offsets": by_axis,
        "attention": {stage: counts._asdict() for stage, counts in moves(net).items()},
        "hard": net.temporal_share() is not None,
    }


def write(folder: Path, net: RubiksNet, date: str) -> None:
    """Write shifts.json; `date` is that of the evaluation."""
    text = json.dumps({"date": date, **summary(net)}) + "\n"
    write_text(folder / FILE, text)


def read(folder: Path, date: str) -> dict[str, Any] | None:
    """What `write` has written for the evaluation of this date; None if there is nothing of it."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("date") == date else None
