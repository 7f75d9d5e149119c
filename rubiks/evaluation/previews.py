"""Moving previews of telling videos, with class activation maps, for the report.

previews/previews.json       which videos, and their files
previews/001.webp            the frames that were scored: the first clip's centre crop
previews/001-map.webp        the same, with the map of the predicted class over them
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from rubiks.evaluation.predictions import Predictions
from rubiks.evaluation.results import Prediction
from rubiks.files import write_atomically, write_text
from rubiks.models import RubiksNet
from rubiks.models.activation_maps import activation_maps
from rubiks.nn import Normalize
from rubiks.pages.previews import animation, with_map

FOLDER, LIST = "previews", "previews.json"
MOST = 12  # of a kind
LARGEST = 1 << 17  # bytes of a file that the report takes in; ours are far smaller

Kind = Literal["mistake", "hit"]


@dataclass(frozen=True)
class Preview:
    """A preview that has been read.

    Attributes:
        kind: a confident mistake, or a hit with low confidence.
        prediction: for this video.
        frames, map: animated WebP, without and with the activation map.
    """

    kind: Kind
    prediction: Prediction
    frames: bytes
    map: bytes


def choose(predictions: Predictions) -> list[tuple[int, Kind]]:
    """Places in the list: the mistakes with the highest confidence, and the hits with the lowest."""
    right, confidence = predictions.right(1), predictions.confidence
    mistakes = [place for place in np.argsort(-confidence, kind="stable") if not right[place]]
    hits = [place for place in np.argsort(confidence, kind="stable") if right[place]]
    return [(int(place), "mistake") for place in mistakes[:MOST]] + [(int(place), "hit") for place in hits[:MOST]]


def clear(folder: Path) -> None:
    """Remove the previews of an earlier evaluation."""
    for path in sorted((folder / FOLDER).glob("*"), key=lambda path: path.name != LIST):  # the list first
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        (folder / FOLDER).rmdir()


def write(
    folder: Path, predictions: Predictions, clip_of: Callable[[int], Tensor | None], net: RubiksNet, date: str
) -> None:
    """Write the previews that `choose` chooses.

    Args:
        folder: of the evaluation.
        predictions: all of them.
        clip_of: the scored frames uint8 (T, 3, H, W) of the video at a place in the list; None if it cannot be read
            again.
        net: the network, on the device to use.
        date: of the evaluation.

    Raises:
        InputError: a file cannot be written.
    """
    entries: list[dict[str, Any]] = []
    for place, kind in choose(predictions):
        clip = clip_of(place)
        if clip is None:
            continue
        name = f"{len(entries) + 1:03}"
        files = {"frames": f"{name}.webp", "map": f"{name}-map.webp"}
        over = with_map(clip, _map(net, clip, int(predictions.predicted[place])))
        for file, frames in zip(files.values(), (clip, over), strict=True):
            content = animation(frames)
            write_atomically(folder / FOLDER / file, partial(Path.write_bytes, data=content))
        entries.append({"place": place, "video": predictions.names[place], "kind": kind, "files": files})
    text = json.dumps({"date": date, "previews": entries}, indent=1, ensure_ascii=False) + "\n"
    write_text(folder / FOLDER / LIST, text)


def read(folder: Path, predictions: Sequence[Prediction], date: str) -> tuple[list[Preview], int]:
    """The previews of the evaluation of this date, and how many of its files are missing or damaged."""
    try:
        found = json.loads((folder / FOLDER / LIST).read_text(encoding="utf-8"))
        if found["date"] != date:
            return [], 0
        entries = list(found["previews"])
    except (OSError, ValueError, KeyError, TypeError):
        return [], 0
    previews = []
    for entry in entries:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError, TypeError):
            frames, over = (_webp(folder / FOLDER / Path(entry["files"][what]).name) for what in ("frames", "map"))
            prediction = predictions[entry["place"]]
            if prediction.name == entry["video"] and entry["kind"] == ("hit" if prediction.correct else "mistake"):
                previews.append(Preview(entry["kind"], prediction, frames, over))
    return previews, len(entries) - len(previews)


def _map(net: RubiksNet, clip: Tensor, label: int) -> Tensor:
    """The activation map (T, H', W') of a class, on the CPU."""
    device = net.new_fc.weight.device
    pixels = Normalize().to(device)(clip.to(device))
    return activation_maps(net, pixels[None], torch.tensor([label], device=device))[0].cpu()


def _webp(path: Path) -> bytes:
    """A file's content, if it is a WebP of full length; else ValueError."""
    if path.stat().st_size > LARGEST:
        raise ValueError("too large")
    content = path.read_bytes()
    length = int.from_bytes(content[4:8], "little") + 8
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP" or len(content) < length:
        raise ValueError("no WebP, or only a part of one")
    return content
