"""What `rubiks compare` writes.

compare.html            the comparison on one page
compare_classes.csv     recall of each class in A and in B
compare_videos.csv      the videos that only one of the two has right
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rubiks.evaluation.compare import Comparison, Difference, p_text
from rubiks.evaluation.results import write_csv
from rubiks.pages import page
from rubiks.pages.charts import Plot, span

PAGE, CLASSES, VIDEOS = "compare.html", "compare_classes.csv", "compare_videos.csv"
LISTED = 300  # videos of each kind on the page; the table has all


def write(folder: Path, found: Comparison) -> Path:
    """Write the files and return the page; InputError if one cannot be written."""
    rows = ([own.name, own.videos, own.a, own.b, own.change] for own in found.classes)
    write_csv(folder / CLASSES, ["class", "videos", "recall_a", "recall_b", "change"], rows)
    changes = (("gained", own) for own in found.gained), (("lost", own) for own in found.lost)
    videos = ([own.name, own.label, kind, *own.a, *own.b] for kinds in changes for kind, own in kinds)
    write_csv(folder / VIDEOS, ["name", "label", "change", "class_a", "score_a", "class_b", "score_b"], videos)
    path = folder / PAGE
    page.write(path, "compare.html", ["table.js"], ["charts.css", "compare.css"], **_context(found))
    return path


def _context(found: Comparison) -> dict[str, Any]:
    differences = {"Top-1": found.top1} | ({} if found.top5 is None else {"Top-5": found.top5})
    return {
        "found": found,
        "differences": differences,
        "plot": _plot(list(differences.values())),
        "p_text": p_text,
        "largest": max(abs(own.change) for own in found.classes),
        "kinds": {"gained": found.gained[:LISTED], "lost": found.lost[:LISTED]},
        "files": {"classes": CLASSES, "videos": VIDEOS},
    }


def _plot(differences: list[Difference]) -> Plot:
    """A row for each interval, on a scale that has 0."""
    low, high = span([0.0, *(end for own in differences for end in own.interval)])
    room = (high - low) / 20
    height = 44 + 34 * len(differences)
    return Plot((low - room, high + room), (0, len(differences)), width=400, height=height, left=52)
