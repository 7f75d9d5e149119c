"""What a network made of each video of a list, from any of the files that an evaluation writes."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rubiks.errors import InputError
from rubiks.evaluation import results
from rubiks.evaluation.predictions import Predictions
from rubiks.evaluation.results import Prediction


@dataclass(frozen=True)
class Outcomes:
    """The predictions of a network for a list of videos.

    Attributes:
        path: the file or folder they were read from.
        about: network, data set and protocol; empty where the file does not say.
        classes: class names in label order; None where the file does not list them.
        numbered: whether the classes are numbers, because the file does not name them.
        predictions: one for each video, each with another name.
    """

    path: Path
    about: str
    classes: list[str] | None
    numbered: bool
    predictions: list[Prediction]


def read(path: Path) -> Outcomes:
    """Read the outcomes of an evaluation.

    Args:
        path: its folder, results.json, predictions.csv, or an .npz file that `save_predictions=` wrote.

    Raises:
        InputError: it is none of these, is damaged, holds no videos, or names a video twice.
    """
    if path.is_dir() or path.name == results.RESULTS:
        found = results.read(path)
        classes: list[str] | None = [own.name for own in found.classes]
        outcomes = Outcomes(path, _about(found.numbers), classes, False, found.predictions)
    elif path.suffix == ".csv":
        outcomes = Outcomes(path, "", None, False, results.read_predictions(path))
    elif path.suffix == ".npz":
        predictions, named = _read_scores(path)
        classes = predictions.classes if named else None
        outcomes = Outcomes(path, "", classes, not named, _listed(predictions))
    else:
        raise InputError(
            f"{path} is no result of an evaluation; give its folder, {results.RESULTS}, {results.PREDICTIONS}, or the "
            ".npz file of save_predictions="
        )
    name, times = Counter(own.name for own in outcomes.predictions).most_common(1)[0]
    if times > 1:
        raise InputError(f"{path} has {times} predictions for the video {name}, expected one for each; evaluate again")
    return outcomes


def paired(a: Outcomes, b: Outcomes) -> list[tuple[Prediction, Prediction]]:
    """The two predictions for each video, in A's order.

    Raises:
        InputError: they are not of the same videos, labels and classes.
    """
    if a.numbered != b.numbered:
        old, other = (a, b) if a.numbered else (b, a)
        raise InputError(
            f"{old.path} does not name its classes, as it is from an older version, and {other.path} does; a file of "
            "class numbers can only be compared with another one: evaluate again"
        )
    in_b = {own.name: own for own in b.predictions}
    missing = _missing(a, in_b) or _missing(b, {own.name for own in a.predictions})
    if missing is not None:
        common = sum(own.name in in_b for own in a.predictions)
        raise InputError(
            f"{a.path} ({len(a.predictions):,} videos) and {b.path} ({len(b.predictions):,}) are not of the same "
            f"videos: they have {common:,} in common, and {missing}; evaluate both on the same list"
        )
    pairs = [(own, in_b[own.name]) for own in a.predictions]
    other_labels = [pair for pair in pairs if pair[0].label != pair[1].label]
    if other_labels:
        first, second = other_labels[0]
        raise InputError(
            f"{a.path} and {b.path} have other labels for {len(other_labels):,} of {len(pairs):,} videos: the first is "
            f"{first.name}, {first.label!r} and {second.label!r}; evaluate both on the same list"
        )
    if a.classes is not None and b.classes is not None and set(a.classes) != set(b.classes):
        extra = sorted(set(a.classes) ^ set(b.classes))
        where = a.path if extra[0] in a.classes else b.path
        raise InputError(
            f"{a.path} has {len(a.classes):,} classes and {b.path} {len(b.classes):,}, which are not the same: "
            f"{extra[0]!r} is only in {where}; compare networks with the same classes"
        )
    return pairs


def _missing(one: Outcomes, others: Container[str]) -> str | None:
    """The first video of one list that is not in the other, in words."""
    first = next((own.name for own in one.predictions if own.name not in others), None)
    return None if first is None else f"{first} is only in {one.path}"


def _about(numbers: dict) -> str:
    """Network, data set and protocol."""
    network = " ".join(str(numbers[key]) for key in ("variant", "tier") if key in numbers)
    data = f"on {numbers['data']}" if "data" in numbers else ""
    order = numbers.get("frame_order", "natural")
    text = f"{network} {data}, {numbers['protocol']}".strip(" ,")
    return text if order == "natural" else f"{text}, frames {order}"


def _read_scores(path: Path) -> tuple[Predictions, bool]:
    """What `results.write_scores` has written, and whether it names the classes, which older versions did not."""
    try:
        with open(path, "rb") as opened:
            file = np.load(opened, allow_pickle=False)
            arrays = {key: file[key] for key in ("logits", "labels", "names")}
            named = "classes" in file
            arrays["classes"] = file["classes"] if named else np.arange(arrays["logits"].shape[1]).astype(str)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile, NotImplementedError):
        raise InputError(
            f"{path} is damaged, or not a file that save_predictions= wrote; evaluate again with save_predictions="
        ) from None
    logits, labels, names, classes = arrays["logits"], arrays["labels"], arrays["names"], arrays["classes"]
    fits = (
        logits.ndim == 2
        and (logits.dtype.kind, labels.dtype.kind, names.dtype.kind, classes.dtype.kind) == ("f", "i", "U", "U")
        and labels.shape == names.shape == logits.shape[:1]
        and classes.shape == logits.shape[1:]
        and bool(np.isfinite(logits).all())
        and bool(((labels >= 0) & (labels < len(classes))).all())
    )
    if not fits:
        raise InputError(
            f"{path}: expected finite logits (videos, classes), a label below the number of classes and a name for "
            "each video, and a name for each class; evaluate again with save_predictions="
        )
    if not len(labels):
        raise InputError(f"{path} holds no videos; evaluate again")
    return Predictions(_escaped(names), labels, logits, _escaped(classes)), named


def _escaped(texts: np.ndarray) -> list[str]:
    """Names as predictions.csv has them, since file names may not be text."""
    return [text.encode(errors="backslashreplace").decode() for text in texts.tolist()]


def _listed(predictions: Predictions) -> list[Prediction]:
    """As rows of predictions.csv."""
    classes, best = predictions.classes, predictions.ranking[:, : results.SHOWN]
    scores = np.take_along_axis(predictions.probabilities, best, 1).tolist()
    return [
        Prediction(name, classes[label], [(classes[other], score) for other, score in zip(own, row, strict=True)])
        for name, label, own, row in zip(predictions.names, predictions.labels, best.tolist(), scores, strict=True)
    ]
