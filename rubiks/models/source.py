"""Where a network comes from: file, training and score."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel, Field, ValidationError

from rubiks.files import sha256

RESULTS = "results.json"  # of an evaluation, in the run's folder

Interval = tuple[float, float]


class Intervals(BaseModel, frozen=True):
    """95% confidence intervals of a score, in percent."""

    top1: Interval
    top5: Interval


class Score(BaseModel, frozen=True):
    """What `rubiks eval` has measured, and how; top-1 and top-5 in percent."""

    data: str
    protocol: str
    clips: int
    crops: int
    num_frames: int
    crop_size: int
    videos: int
    top1: float
    top5: float
    intervals: Intervals
    date: str


class Source(BaseModel, frozen=True):
    """Where a network comes from; None for what is not known.

    Attributes:
        file: its name, or for a checkpoint in a run's folder NAME/checkpoints/FILE.
        epoch: epochs trained.
        data: the name of the data set of the training.
        format: its format, as in data=FORMAT.
        protocol: the protocol of its validation.
        evaluation: the score of exactly these weights.
    """

    file: str | None = None
    epoch: int | None = Field(None, ge=0)
    data: str | None = None
    format: str | None = None
    protocol: str | None = None
    evaluation: Score | None = None


def name_of(path: Path) -> str:
    """How a source names a file: without the folders of this machine."""
    run = _run(path)
    return path.name if run is None else f"{run.name}/checkpoints/{path.name}"


def score_of(path: Path) -> Score | None:
    """The score of a run's checkpoint, if the results in the run's folder are of exactly this file."""
    run = _run(path)
    try:
        found = {} if run is None else json.loads((run / RESULTS).read_text(encoding="utf-8"))
        if found.get("frame_order") != "natural" or found.get("checkpoint_sha256") != sha256(path):
            return None
        return Score(**found)
    except (OSError, ValueError, AttributeError, ValidationError):  # no results, damaged, or of an older version
        return None


def _run(path: Path) -> Path | None:
    folder = path.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None
