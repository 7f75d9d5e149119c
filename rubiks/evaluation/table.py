"""An evaluation's result on the screen."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

METRICS = {"top1": "top-1", "top5": "top-5", "mean_class_accuracy": "mean class accuracy"}


def print_results(results: dict[str, Any]) -> None:
    """The content of results.json as a table, and what must be known to read it."""
    views = f"{_count(results['clips'], 'clip')} x {_count(results['crops'], 'crop')}"
    print(
        f"{results['variant']} {results['tier']} on {results['data']}, {results['protocol']} ({views}), "
        f"{_count(results['videos'], 'video')}"
    )
    table = Table("", "%", "95% interval")
    for name, title in METRICS.items():
        low, high = results["intervals"][name]
        table.add_row(title, f"{results[name]:.2f}", f"{low:.2f} to {high:.2f}")
    for order, top1 in results.get("temporal", {}).items():
        if order != "natural":
            table.add_row(f"top-1, frames {order}", f"{top1:.2f}", "")
    Console().print(table)
    if "temporal_share" in results:
        shifted = results["temporal_share"]
        print(
            "Temporal attention is soft: every channel mixes frames, no budget holds yet."
            if shifted is None
            else f"Temporal budget: {shifted:.2%} of the channels are shifted in time, by whole frames."
        )
    if results["frame_order"] != "natural":
        print(f"Frames of each clip were {results['frame_order']} in time: this is not a score under the protocol.")
    if results["left_out"]:
        print(
            f"Not scored: {results['left_out']:,} of the {results['listed']:,} listed videos (missing or unreadable)."
        )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' if number != 1 else ''}"
