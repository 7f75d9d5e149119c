"""The parts of the report about classes: the table, the most confused pairs, the confusion matrix."""

from __future__ import annotations

from typing import Any

import numpy as np

from rubiks.evaluation.ordering import by_confusion
from rubiks.evaluation.results import Results

PAIRS = 20
OTHERS = 8  # classes named in the details of a class


def rows(found: Results) -> list[dict[str, Any]]:
    """For each class its score, its hits, and which classes it was confused with, the most frequent first.

    `taken_for` says what its videos were taken for, `taken_from` whose videos were taken for it: the first OTHERS as
    (class, videos), and `.._more`, how many classes follow.
    """
    names = [own.name for own in found.classes]
    table = []
    for label, score in enumerate(found.classes):
        row: dict[str, Any] = {"score": score, "hits": int(found.confusion[label, label])}
        for key, counts in (("taken_for", found.confusion[label]), ("taken_from", found.confusion[:, label])):
            others = [int(other) for other in np.argsort(-counts, kind="stable") if counts[other] and other != label]
            row[key] = [(names[other], int(counts[other])) for other in others[:OTHERS]]
            row[f"{key}_more"] = len(others[OTHERS:])
        table.append(row)
    return table


def confused_pairs(found: Results) -> list[dict[str, Any]]:
    """The PAIRS that are confused most: by the number of videos, then by their share of the class."""
    support = found.confusion.sum(1)
    pairs = [(label, other) for label, other in np.argwhere(found.confusion).tolist() if label != other]
    pairs.sort(key=lambda pair: (-found.confusion[pair], support[pair[0]]))
    return [
        {
            "label": found.classes[label].name,
            "predicted": found.classes[other].name,
            "count": int(found.confusion[label, other]),
            "support": int(support[label]),
            "share": 100 * float(found.confusion[label, other] / support[label]),
        }
        for label, other in pairs[:PAIRS]
    ]


def matrix(found: Results) -> dict[str, Any]:
    """What matrix.js draws: class names, their order by confusion, and [label, predicted, videos] of cells above 0."""
    places = np.argwhere(found.confusion)
    counts = found.confusion[tuple(places.T)]
    return {
        "classes": [own.name for own in found.classes],
        "order": by_confusion(found.confusion).tolist(),
        "cells": np.column_stack([places, counts]).tolist(),
    }
