"""The files that an evaluation writes into its folder, and that reports and comparisons read.

results.json       the scores with their intervals, and how they came about
per_class.csv      videos, precision, recall and F1 of each class
confusion.csv      videos by label (rows) and predicted class (columns)
predictions.csv    each video's label and its five highest classes with their probabilities
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from rubiks.errors import InputError
from rubiks.evaluation import metrics
from rubiks.evaluation.predictions import Predictions
from rubiks.files import write_atomically, write_text

RESULTS, PER_CLASS, CONFUSION, PREDICTIONS = "results.json", "per_class.csv", "confusion.csv", "predictions.csv"
FILES = (RESULTS, PER_CLASS, CONFUSION, PREDICTIONS)
SHOWN = 5  # classes of a video in predictions.csv
# What results.json must have to be read.
NEEDED = ("top1", "top5", "mean_class_accuracy", "calibration_error", "intervals", "reliability", "videos", "protocol")

T = TypeVar("T")


@dataclass(frozen=True)
class ClassScore:
    """A row of per_class.csv; see `metrics.PerClass`. None where a share is not defined."""

    name: str
    support: int
    predicted: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Prediction:
    """A row of predictions.csv.

    Attributes:
        name: of the video.
        label: its class.
        top: the classes with the highest scores and their probabilities, highest first.
    """

    name: str
    label: str
    top: list[tuple[str, float]]

    @property
    def correct(self) -> bool:
        return self.top[0][0] == self.label


@dataclass(frozen=True)
class Results:
    """What an evaluation has written.

    Attributes:
        folder: where.
        numbers: results.json.
        classes: a row for each class, in label order.
        confusion: (C, C), videos by label and predicted class.
        predictions: a row for each video that was scored, in list order.
    """

    folder: Path
    numbers: dict[str, Any]
    classes: list[ClassScore]
    confusion: np.ndarray
    predictions: list[Prediction]


def measured(predictions: Predictions) -> dict[str, Any]:
    """The numbers of results.json that predictions give."""
    curve = metrics.reliability(predictions)
    return {
        **metrics.scores(predictions),
        "intervals": metrics.intervals(predictions),
        "calibration_error": curve.error,
        "reliability": {name: [_number(value) for value in values] for name, values in curve._asdict().items()},
    }


def write(folder: Path, numbers: dict[str, Any], predictions: Predictions) -> None:
    """Write the files; `numbers` is the content of results.json, which is written last.

    Raises:
        InputError: a file cannot be written.
    """
    confusion = metrics.confusion_matrix(predictions)
    shares = zip(*metrics.per_class(confusion), strict=True)
    rows = ([name, *map(_number, own)] for name, own in zip(predictions.classes, shares, strict=True))
    write_csv(folder / PER_CLASS, ["class", *metrics.PerClass._fields], rows)
    matrix = ([name, *own.tolist()] for name, own in zip(predictions.classes, confusion, strict=True))
    write_csv(folder / CONFUSION, ["label", *predictions.classes], matrix)
    count = min(SHOWN, len(predictions.classes))
    columns = [f"{what}{place}" for place in range(1, count + 1) for what in ("class", "score")]
    write_csv(folder / PREDICTIONS, ["name", "label", "predicted", "correct", *columns], _rows(predictions, count))
    text = json.dumps(numbers, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(folder / RESULTS, text)


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table; InputError if it cannot be written."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_text(path, text.getvalue())


def write_scores(path: str | os.PathLike, predictions: Predictions) -> None:
    """Write an .npz file: logits float32 (videos, classes), labels int64 (videos,), names of the videos, classes."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(
                file,
                logits=predictions.logits,
                labels=predictions.labels,
                names=np.array(predictions.names),
                classes=np.array(predictions.classes),
            )

    write_atomically(path, write)


def read(place: str | os.PathLike) -> Results:
    """Read what an evaluation has written, from its folder or from its results.json.

    Raises:
        InputError: a file is missing, damaged, or of another evaluation.
    """
    folder = Path(place)
    folder = folder.parent if folder.name == RESULTS else folder
    if not (folder / RESULTS).is_file():
        raise InputError(f"{folder} holds no {RESULTS}; give the folder of an evaluation, as rubiks eval writes it")
    numbers = _read_json(folder / RESULTS)
    classes = _read_csv(folder / PER_CLASS, ["class", *metrics.PerClass._fields], _class_score)
    header = ["label", *(own.name for own in classes)]
    confusion = np.array(_read_csv(folder / CONFUSION, header, lambda row: [int(cell) for cell in row[1:]]))
    predictions = read_predictions(folder / PREDICTIONS)
    if len(confusion) != len(classes) or not confusion.sum() == len(predictions) == numbers["videos"]:
        raise InputError(f"the files in {folder} are of different evaluations; evaluate again")
    return Results(folder, numbers, classes, confusion, predictions)


def read_predictions(path: Path) -> list[Prediction]:
    """Read predictions.csv.

    Raises:
        InputError: the file is missing, damaged, or holds no videos.
    """
    predictions = _read_csv(path, ["name", "label", "predicted", "correct", "class1", "score1"], _prediction)
    if not predictions:
        raise InputError(f"{path} holds no videos; evaluate again")
    return predictions


def _class_score(row: list[str]) -> ClassScore:
    shares = (float(cell) if cell else None for cell in row[3:])
    return ClassScore(row[0], int(row[1]), int(row[2]), *shares)


def _prediction(row: list[str]) -> Prediction:
    return Prediction(row[0], row[1], [(name, float(score)) for name, score in zip(row[4::2], row[5::2], strict=True)])


def _rows(predictions: Predictions, count: int) -> Iterable[list[Any]]:
    names, ranking, probabilities = predictions.classes, predictions.ranking[:, :count], predictions.probabilities
    for video, (name, label, best) in enumerate(zip(predictions.names, predictions.labels, ranking, strict=True)):
        top = [cell for other in best for cell in (names[other], f"{probabilities[video, other]:.6g}")]
        yield [name, names[label], names[best[0]], "yes" if best[0] == label else "no", *top]


def _number(value: np.generic) -> Any:
    """A number as JSON and CSV have it; None if it is not defined."""
    number = value.item()
    return None if number != number else number


def _read_csv(path: Path, header: Sequence[str], parse: Callable[[list[str]], T]) -> list[T]:
    """The rows of a file whose first columns are these; InputError for the first row that is damaged."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file, strict=True))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}; evaluate again"
        ) from None
    if not rows or rows[0][: len(header)] != list(header):
        raise InputError(f"{path} does not begin with the columns {', '.join(header[:6])}; evaluate again")
    found = []
    for number, row in enumerate(rows[1:], 2):
        try:
            if len(row) != len(rows[0]):
                raise ValueError(f"expected {len(rows[0])} cells, got {len(row)}")
            found.append(parse(row))
        except ValueError as error:
            raise InputError(f"{path}, row {number}: {error}; the file is damaged, evaluate again") from None
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        numbers = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}; evaluate again") from None
    missing = [key for key in NEEDED if key not in numbers] if isinstance(numbers, dict) else list(NEEDED)
    if missing:
        raise InputError(
            f"{path} has no {', '.join(missing)}; it is not from this version of rubiks eval: evaluate again"
        )
    return numbers
