"""report.html: what an evaluation has found, on one page, from the files in its folder alone."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from rubiks.errors import InputError
from rubiks.evaluation import learned, previews, report_charts, report_classes, results
from rubiks.evaluation.published import published
from rubiks.evaluation.results import Results
from rubiks.pages import page

REPORT = "report.html"
# What the report shows of results.json, besides what `results.read` demands.
NEEDED = (
    "data", "list_sha256", "manifest_sha256", "clips", "crops", "crop_size", "short_side", "mean", "sampling", "window",
    "num_frames", "frame_order", "listed", "left_out", "skipped", "readers", "tier", "variant", "num_classes",
    "checkpoint", "checkpoint_sha256", "epoch", "seconds", "device", "precision", "versions", "date",
)  # fmt: skip
SKIPPED = 500  # videos named among those that were left out


def write(place: Path, out: Path | None = None) -> Path:
    """Write the report of an evaluation.

    Args:
        place: the evaluation's folder, or its results.json.
        out: the HTML file; None for report.html in the folder.

    Returns:
        The HTML file.

    Raises:
        InputError: a file of the evaluation is missing, damaged or of another one, or the report cannot be written.
    """
    found = results.read(place)
    path = found.folder / REPORT if out is None else out
    page.write(path, "report.html", ["table.js", "matrix.js"], ["charts.css", "report.css"], **build(found))
    return path


def clear(folder: Path) -> None:
    """Remove the report of an earlier evaluation, and what only the report needs."""
    for path in (folder / REPORT, folder / learned.FILE):
        with contextlib.suppress(OSError):
            path.unlink()
    previews.clear(folder)


def build(found: Results) -> dict[str, Any]:
    """What the template shows."""
    numbers = found.numbers
    missing = [key for key in NEEDED if key not in numbers]
    if missing:
        raise InputError(f"{found.folder / results.RESULTS} has no {', '.join(missing)}; evaluate again")
    shown, left_out = previews.read(found.folder, found.predictions, numbers["date"])
    return {
        "numbers": numbers,
        "published": published(numbers["data"], numbers["tier"], numbers["variant"], numbers["protocol"]),
        "protocol": protocol_in_words(numbers),
        "skipped": numbers["skipped"][:SKIPPED],
        "previews": {kind: [own for own in shown if own.kind == kind] for kind in ("mistake", "hit")},
        "previews_left_out": left_out,
        "data_url": page.data_url,
        "classes": report_classes.rows(found),
        "pairs": report_classes.confused_pairs(found),
        "matrix": report_classes.matrix(found),
        "reliability": report_charts.reliability(numbers["reliability"]),
        "shifts": report_charts.shifts(learned.read(found.folder, numbers["date"])),
        "curves": report_charts.curves_of(found.folder),
        "facts": facts(numbers),
    }


def protocol_in_words(numbers: dict[str, Any]) -> str:
    """Which views of a video are scored, and what is averaged."""
    clips, crops = page.count(numbers["clips"], "clip"), page.count(numbers["crops"], "crop")
    dense = numbers["sampling"] == "dense"
    text = (
        f"{clips} of {page.count(numbers['num_frames'], 'frame')} "
        f"{'within ' + page.count(numbers['window'], 'frame') if dense else 'spread over the video'}, "
        f"{crops} of {numbers['crop_size']} pixels, short side {numbers['short_side']} pixels"
    )
    views = numbers["clips"] * numbers["crops"]
    return text if views == 1 else f"{text}; the {numbers['mean']} of the {views} views are averaged"


def facts(numbers: dict[str, Any]) -> dict[str, dict[str, str]]:
    """How the results came about, by title and name."""
    manifest, share = numbers["manifest_sha256"], numbers.get("temporal_share")
    exported = numbers.get("exported")
    return {
        "Network": {
            "tier": numbers["tier"],
            "variant": numbers["variant"],
            "classes": f"{numbers['num_classes']:,}",
            **({} if share is None else {"channels shifted in time": page.percent(100 * share, 2)}),
            "checkpoint": numbers["checkpoint"],
            "its SHA-256": numbers["checkpoint_sha256"],
            **({} if numbers["epoch"] is None else {"epoch": f"{numbers['epoch']}"}),
            **({} if exported is None else {"run by": exported["runtime"]}),
        },
        "Data": {
            "data set": numbers["data"],
            "listed videos": f"{numbers['listed']:,}",
            "scored videos": f"{numbers['videos']:,}",
            "list, SHA-256": numbers["list_sha256"],
            "manifest": "no manifest" if manifest is None else manifest,
            "read by": ", ".join(f"{name} ({count:,})" for name, count in numbers["readers"].items()),
        },
        "Protocol": {
            "name": numbers["protocol"],
            "clips": f"{numbers['clips']}",
            "crops": f"{numbers['crops']}, {numbers['crop_size']} pixels",
            "short side": f"{numbers['short_side']} pixels",
            "frames": f"{numbers['num_frames']}, {numbers['frame_order']} order",
            "sampling": numbers["sampling"] + (f", window {numbers['window']}" if numbers["window"] else ""),
            "mean of": numbers["mean"],
        },
        "Evaluation": {
            "date": numbers["date"].replace("T", " ").replace("+00:00", " UTC"),
            "took": f"{numbers['seconds']:,.1f} s",
            "device": numbers["device"],
            "precision": numbers["precision"],
            **numbers["versions"],
        },
    }
