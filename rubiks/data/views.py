"""Training views: random frames, a random crop that they share, a flip and augmentation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from rubiks.data.augment import NOTHING, Augment


class TrainingViews:
    """Random clips of a video, each with one random crop that all of its frames share.

    Args:
        num_frames: T.
        size: side of the square views, in pixels.
        crop_scales: sides of the crop as shares of the short side, largest first, as in TSM (1, .875, .75, .66). Width
            and height are drawn together, at most one step apart.
        flip: mirror half of the clips left to right; a mirrored clip of class c then belongs to class flip[c].
            None: mirror none.
        clips: V, clips of a video; frames, crop, flip and augmentation are drawn for each.
        window: how many frames a clip spans, as in I3D; None: the whole video, in segments, as in TSN.
        augment: further augmentation of a clip.
    """

    def __init__(
        self,
        num_frames: int,
        size: int,
        crop_scales: tuple[float, ...],
        flip: Sequence[int] | None = None,
        clips: int = 1,
        window: int | None = None,
        augment: Augment = NOTHING,
    ) -> None:
        self.num_frames = num_frames
        self.size = size
        self.crop_scales = tuple(crop_scales)
        self.flip = flip
        self.clips = clips
        self.window = window
        self.temporal_jitter = augment.temporal_jitter
        area = augment.random_resized_crop
        self._random_resized_crop = None if area is None else v2.RandomResizedCrop(size, scale=area)
        self._transforms = augment.transforms()

    def frame_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(clips, T): the frames to decode of a video of `length` frames."""
        return np.stack([self._clip_indices(length, rng) for _ in range(self.clips)])

    def _clip_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        if self.window is None:
            return random_segments(length, self.num_frames, rng)
        return random_window(length, self.num_frames, self.window, rng, self.temporal_jitter)

    def __call__(self, clips: Tensor, label: int, rng: np.random.Generator) -> tuple[Tensor, list[int]]:
        """Decoded frames uint8 (V, T, 3, H, W) -> views uint8 (V, T, 3, size, size), and the class that each shows."""
        views, labels = zip(*[self._view(clip, label, rng) for clip in clips], strict=True)
        return torch.stack(views), list(labels)

    def _view(self, clip: Tensor, label: int, rng: np.random.Generator) -> tuple[Tensor, int]:
        # The order of the random draws is part of what a seed means: add new ones after the others.
        if self._random_resized_crop is None:
            place = multi_scale_crop(clip.shape[-2], clip.shape[-1], self.size, self.crop_scales, rng)
            view = tv.resized_crop(clip, *place, [self.size, self.size], antialias=True)
        else:
            with _torch_seeded(rng):
                view = self._random_resized_crop(clip)
        if self.flip is not None and rng.random() < 0.5:
            view, label = tv.horizontal_flip(view), self.flip[label]
        if self._transforms:
            with _torch_seeded(rng):
                for transform in self._transforms:
                    view = transform(view)
        return view, label


@contextlib.contextmanager
def _torch_seeded(rng: np.random.Generator) -> Iterator[None]:
    """Seed PyTorch's generator, which torchvision uses, from `rng`; its state is restored afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(int(rng.integers(2**63)))
        yield


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

    A video with fewer frames than segments gives only its first frame, as in TSM.

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


def random_window(length: int, frames: int, window: int, rng: np.random.Generator, jitter: bool = False) -> np.ndarray:
    """Frames at equal steps of window // frames from a window at a random place: I3D's sampling, "dense" in TSM.

    A video shorter than the window starts over at its end. TSM leaves out the last place for the window; here all are
    equally likely.

    Args:
        length: frames of the video, at least 1.
        frames: T, frames of the clip.
        window: frames that the clip spans, at least T.
        jitter: move each frame ahead by less than a step, at random.

    Returns:
        (T,) int64.
    """
    step = window // frames
    indices = rng.integers(max(1, 1 + length - window)) + np.arange(frames) * step
    if jitter:
        indices += rng.integers(step, size=frames)
    return indices % length
