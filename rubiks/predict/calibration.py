"""Clips that show which values a network's activations have, for quantisation."""

from __future__ import annotations

import logging

from torch import Tensor

from rubiks.data.dataset import VideoDataset
from rubiks.errors import InputError, VideoError
from rubiks.evaluation.protocols import STANDARD
from rubiks.models.preprocessing import Preprocessing
from rubiks.predict import sources

log = logging.getLogger(__name__)

MOST = 300


def clips(source: str, clip: tuple[int, int, int], trained: Preprocessing) -> list[Tensor]:
    """Central clips of videos, as in evaluation.

    Args:
        source: a folder, a pattern or a list of videos; of more than MOST, MOST are taken at equal steps.
        clip: T, H and W.
        trained: how frames are sampled.

    Returns:
        uint8 (T, 3, H, W) of each video that can be read.

    Raises:
        InputError: the source names no video, none can be read, or H and W differ.
    """
    frames, height, width = clip
    if height != width:
        raise InputError(f"--int8 needs square frames, since videos are cropped to squares; got {height}x{width}")
    records = sources.find([source])
    records = [records[place * len(records) // MOST] for place in range(MOST)] if len(records) > MOST else records
    protocol = STANDARD["one_clip"].protocol(frames, height, trained.sampling, trained.window)
    dataset = VideoDataset(records, protocol, 0, "auto")
    found, errors = [], []
    for place in range(len(records)):
        item = dataset[0, place, 0]
        if isinstance(item, VideoError):
            errors.append(item)
        else:
            found.append(item["views"][0])
    if not found:
        raise InputError(f"--int8 {source}: no video can be read; {errors[0]}")
    if errors:
        log.warning(
            "%d of %d videos for --int8 cannot be read and are left out; %s", len(errors), len(records), errors[0]
        )
    return found
