"""Which frames of a video make a clip: the TSN and TSM conventions. Frames are numbered from 0."""

from __future__ import annotations

import numpy as np


def random_segments(length: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame from each of `frames` equal segments, as TSM samples for training.

    A video of fewer frames than segments gives its first frame throughout, as there.

    Args:
        length: frames of the video, at least 1.
        frames: T, frames of the clip.

    Returns:
        (T,) int64, in order.
    """
    segment = length // frames
    if segment == 0:
        return np.zeros(frames, dtype=np.int64)
    return np.arange(frames) * segment + rng.integers(segment, size=frames)


def segment_centres(length: int, frames: int) -> np.ndarray:
    """The centre of each of `frames` equal segments, TSM's one-clip test sampling: ``int(tick / 2 + tick * i)``."""
    tick = length / frames
    return np.array([int(tick / 2 + tick * i) for i in range(frames)], dtype=np.int64)


def segment_starts(length: int, frames: int) -> np.ndarray:
    """The start of each of `frames` equal segments, the second clip of TSM's two-clip test: ``int(tick * i)``."""
    tick = length / frames
    return np.array([int(tick * i) for i in range(frames)], dtype=np.int64)
