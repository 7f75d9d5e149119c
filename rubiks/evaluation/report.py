"""Turns scores into accuracies, a table on the screen and files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy

from rubiks.files import write_atomically


def accuracies(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, of logits (videos, classes) and labels (videos,)."""
    classes = logits.shape[1]
    return {
        f"top{k}": 100 * multiclass_accuracy(logits, labels, classes, average="micro", top_k=min(k, classes)).item()
        for k in (1, 5)
    }


def print_table(results: dict[str, Any]) -> None:
    """The result of one evaluation as a table."""
    table = Table(title=f"{results['data']}, protocol {results['protocol']}")
    for column in ("tier", "variant", "views", "videos", "top-1 %", "top-5 %"):
        table.add_column(column, justify="left" if column in ("tier", "variant") else "right")
    views = (
        f"{results['clips']} clip{'s'[: results['clips'] > 1]} x {results['crops']} crop{'s'[: results['crops'] > 1]}"
    )
    table.add_row(
        results["tier"],
        results["variant"],
        views,
        f"{results['videos']:,}",
        f"{results['top1']:.2f}",
        f"{results['top5']:.2f}",
    )
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


def write_results(path: str | os.PathLike, results: dict[str, Any]) -> None:
    """Write results.json."""
    text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_predictions(path: str | os.PathLike, logits: Tensor, labels: Tensor, names: list[str]) -> None:
    """Write an .npz file: logits float32 (videos, classes), labels int64 (videos,) and names as in the list."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, logits=logits.numpy(), labels=labels.numpy(), names=np.array(names))

    write_atomically(path, write)
