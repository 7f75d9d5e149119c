"""Folders of evaluations that were never run: any classes and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rubiks.evaluation import results
from rubiks.evaluation.predictions import Predictions

DATE = "2026-05-04T03:02:01+00:00"
FACTS = {
    "data": "made-up",
    "list_sha256": "ab" * 32,
    "manifest_sha256": None,
    "protocol": "two_clip",
    "clips": 2,
    "crops": 3,
    "crop_size": 224,
    "short_side": 256,
    "mean": "logits",
    "sampling": "uniform",
    "window": None,
    "num_frames": 8,
    "frame_order": "natural",
    "left_out": 0,
    "skipped": [],
    "readers": {"pyav": 1},
    "tier": "tiny",
    "variant": "rubiks3d",
    "checkpoint": "outputs/x/checkpoints/best.ckpt",
    "checkpoint_sha256": "cd" * 32,
    "epoch": 3,
    "seconds": 1.5,
    "device": "cpu",
    "precision": "32-true",
    "versions": {"rubiks": "0.1.0", "torch": "2.14", "pyav": "18.1"},
    "date": DATE,
}


def random_predictions(classes: list[str], videos: int, right: float = 0.6, seed: int = 0) -> Predictions:
    """Predictions of which this share is right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(len(classes), size=videos)
    logits = rng.normal(size=(videos, len(classes))).astype(np.float32)
    wanted = np.where(rng.random(videos) < right, labels, (labels + 1) % len(classes))
    logits[np.arange(videos), wanted] += 9
    return Predictions([f"v{number}.mp4" for number in range(videos)], labels, logits, classes)


def write(folder: Path, predictions: Predictions, **facts: Any) -> dict[str, Any]:
    """Write the files of an evaluation with these predictions; returns the content of results.json."""
    count = {"videos": len(predictions), "listed": len(predictions), "num_classes": len(predictions.classes)}
    numbers = {**results.measured(predictions), **FACTS, **count, **facts}
    results.write(folder, numbers, predictions)
    return numbers
