"""Training views: random frames, and TSM's multi-scale crop of them."""

from __future__ import annotations

import numpy as np
from torch import Tensor
from torchvision.transforms.v2 import functional as tv


class TrainingViews:
    """One view per video: random frames, a random crop that all of them share, and a flip where classes allow it.

    Args:
        num_frames: T.
        size: side of the square views, in pixels.
        crop_scales: sides of the crop as shares of the short side, largest first, as in TSM (1, .875, .75, .66). Width
            and height are drawn together, at most one step apart.
        flip: mirror half of the clips left to right. Never where left and right name classes.
    """

    def __init__(self, num_frames: int, size: int, crop_scales: tuple[float, ...], flip: bool) -> None:
        self.num_frames = num_frames
        self.size = size
        self.crop_scales = tuple(crop_scales)
        self.flip = flip

    def frame_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(1, T): the frames to decode of a video of `length` frames."""
        return random_segments(length, self.num_frames, rng)[None]

    def __call__(self, clips: Tensor, rng: np.random.Generator) -> Tensor:
        """Decoded frames uint8 (1, T, 3, H, W) -> views uint8 (1, T, 3, size, size)."""
        top, left, height, width = multi_scale_crop(clips.shape[-2], clips.shape[-1], self.size, self.crop_scales, rng)
        view = tv.resized_crop(clips[0], top, left, height, width, [self.size, self.size], antialias=True)
        if self.flip and rng.random() < 0.5:
            view = tv.horizontal_flip(view)
        return view[None]


def multi_scale_crop(
    height: int, width: int, size: int, scales: tuple[float, ...], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw TSM's multi-scale crop: (top, left, height, width) in pixels.

    The sides are shares of the short side, at most one step of `scales` apart; a side within 2 pixels of `size` becomes
    `size`. The place is one of 13 fixed ones: corners, edge middles, centre, and the four points between.
    """
    sides = [int(min(height, width) * scale) for scale in scales]
    sides = [size if abs(side - size) < 3 and size <= min(height, width) else side for side in sides]
    pairs = [(a, b) for i, a in enumerate(sides) for j, b in enumerate(sides) if abs(i - j) <= 1]
    crop_height, crop_width = pairs[rng.integers(len(pairs))]
    step_y, step_x = (height - crop_height) // 4, (width - crop_width) // 4
    places = [(y, x) for y in (0, 2, 4) for x in (0, 2, 4)] + [(1, 1), (1, 3), (3, 1), (3, 3)]
    y, x = places[rng.integers(len(places))]
    return y * step_y, x * step_x, crop_height, crop_width


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
