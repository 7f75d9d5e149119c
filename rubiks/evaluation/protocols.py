"""Evaluation protocols: which clips and crops of a video are scored (TSN and TSM conventions)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

FRAME_ORDERS = ("natural", "reversed", "shuffled")


class Protocol:
    """Views that a video's score is the mean over.

    Frames are resized so that the short side has size * 256 / 224 pixels (bilinear, antialiased), then cropped.

    Args:
        name: one_clip, two_clip, ...
        clips: 1, the centres of T segments; or 2, these and the segments' starts.
        crops: 1, the centre; or 3, left, right and centre.
        num_frames: T.
        size: side of the square crops, in pixels.
        frame_order: natural; reversed or shuffled (anew for each video) to see how much a network uses time.
    """

    def __init__(
        self, name: str, clips: int, crops: int, num_frames: int, size: int, frame_order: str = "natural"
    ) -> None:
        self.name = name
        self.clips = clips
        self.crops = crops
        self.num_frames = num_frames
        self.size = size
        self.frame_order = frame_order

    @property
    def num_views(self) -> int:
        return self.clips * self.crops

    def frame_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(clips, T) frame numbers for a video of `length` frames."""
        choices = (segment_centres, segment_starts)[: self.clips]
        indices = np.stack([choose(length, self.num_frames) for choose in choices])
        if self.frame_order == "reversed":
            indices = indices[:, ::-1]
        elif self.frame_order == "shuffled":
            indices = rng.permuted(indices, axis=1)
        return indices

    def __call__(self, clips: Tensor, rng: np.random.Generator) -> Tensor:
        """Decoded frames uint8 (clips, T, 3, H, W) -> views uint8 (V, T, 3, size, size), a clip's crops together."""
        frames = tv.resize(clips.flatten(0, 1), [round(self.size * 256 / 224)], antialias=True)
        frames = frames.unflatten(0, clips.shape[:2])
        size = self.size
        if self.crops == 1:
            return tv.center_crop(frames, [size, size])
        step_y, step_x = (frames.shape[-2] - size) // 4, (frames.shape[-1] - size) // 4
        views = [tv.crop(frames, 2 * step_y, left, size, size) for left in (0, 4 * step_x, 2 * step_x)]
        return torch.stack(views, dim=1).flatten(0, 1)


def segment_centres(length: int, frames: int) -> np.ndarray:
    """The centre of each of `frames` equal segments, TSM's one-clip test sampling: ``int(tick / 2 + tick * i)``."""
    tick = length / frames
    return np.array([int(tick / 2 + tick * i) for i in range(frames)], dtype=np.int64)


def segment_starts(length: int, frames: int) -> np.ndarray:
    """The start of each of `frames` equal segments, the second clip of TSM's two-clip test: ``int(tick * i)``."""
    tick = length / frames
    return np.array([int(tick * i) for i in range(frames)], dtype=np.int64)
