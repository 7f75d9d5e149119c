"""Evaluation protocols: which clips and crops of a video are scored (TSN and TSM conventions)."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from rubiks.settings import Count, Expected, Settings

FrameOrder = Literal["natural", "reversed", "shuffled"]


def _one_or_three(number: int) -> int:
    if number not in (1, 3):
        raise ValueError
    return number


class ProtocolSettings(Settings, section="protocol"):
    """Which views of a video are scored."""

    name: str = Field(description="names the protocol in results")
    clips: Count = Field(description="clips of a video; uniform sampling allows 1 or 2, dense sampling any number")
    crops: Annotated[int, AfterValidator(_one_or_three), Expected("1 or 3")] = Field(
        description="1: the centre; 3: left, right and centre"
    )


class Protocol:
    """The views whose mean score is a video's score.

    Frames are resized so that the short side has size * 256 / 224 pixels (bilinear, antialiased), then cropped.

    Args:
        name: one_clip, two_clip, ...
        clips: how many clips of T frames. Uniform sampling allows 1, the centres of T segments, or 2, these and the
            segments' starts; dense sampling any number.
        crops: 1, the centre; or 3, left, right and centre.
        num_frames: T.
        size: side of the square crops, in pixels.
        frame_order: natural; reversed or shuffled (differently for each video) to see how much a network uses time.
        window: frames that a clip spans in dense sampling; None for uniform sampling.
    """

    def __init__(
        self,
        name: str,
        clips: int,
        crops: int,
        num_frames: int,
        size: int,
        frame_order: FrameOrder = "natural",
        window: int | None = None,
    ) -> None:
        self.name = name
        self.clips = clips
        self.crops = crops
        self.num_frames = num_frames
        self.size = size
        self.frame_order = frame_order
        self.window = window

    @property
    def num_views(self) -> int:
        return self.clips * self.crops

    def frame_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(clips, T) frame numbers for a video of `length` frames."""
        if self.window is None:
            choices = (segment_centres, segment_starts)[: self.clips]
            indices = np.stack([choose(length, self.num_frames) for choose in choices])
        else:
            indices = spread_windows(length, self.num_frames, self.window, self.clips)
        if self.frame_order == "reversed":
            indices = indices[:, ::-1]
        elif self.frame_order == "shuffled":
            indices = rng.permuted(indices, axis=1)
        return indices

    def __call__(self, clips: Tensor, label: int, rng: np.random.Generator) -> tuple[Tensor, list[int]]:
        """Decoded frames uint8 (clips, T, 3, H, W) -> views uint8 (V, T, 3, size, size), a clip's crops together, and
        the label for each of them."""
        frames = tv.resize(clips.flatten(0, 1), [round(self.size * 256 / 224)], antialias=True)
        frames = frames.unflatten(0, clips.shape[:2])
        size = self.size
        if self.crops == 1:
            return tv.center_crop(frames, [size, size]), [label] * self.num_views
        step_y, step_x = (frames.shape[-2] - size) // 4, (frames.shape[-1] - size) // 4
        views = [tv.crop(frames, 2 * step_y, left, size, size) for left in (0, 4 * step_x, 2 * step_x)]
        return torch.stack(views, dim=1).flatten(0, 1), [label] * self.num_views


def segment_centres(length: int, frames: int) -> np.ndarray:
    """The centre of each of `frames` equal segments, TSM's one-clip test sampling: ``int(tick / 2 + tick * i)``."""
    tick = length / frames
    return np.array([int(tick / 2 + tick * i) for i in range(frames)], dtype=np.int64)


def segment_starts(length: int, frames: int) -> np.ndarray:
    """The start of each of `frames` equal segments, the second clip of TSM's two-clip test: ``int(tick * i)``."""
    tick = length / frames
    return np.array([int(tick * i) for i in range(frames)], dtype=np.int64)


def spread_windows(length: int, frames: int, window: int, clips: int) -> np.ndarray:
    """TSM's test with dense sampling: windows evenly spread from the first place to the last; a single one is central.

    Each gives frames at equal steps of window // frames; a video shorter than the window starts over at its end.

    Returns:
        (clips, frames) int64.
    """
    last = max(0, length - window)
    starts = np.array([last // 2]) if clips == 1 else np.linspace(0, last, clips).astype(np.int64)
    return (starts[:, None] + np.arange(frames) * (window // frames)) % length
