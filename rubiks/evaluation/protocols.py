"""Evaluation protocols: which clips and crops of a video are scored (TSN and TSM conventions)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import AfterValidator, Field, model_validator
from torch import Tensor
from torchvision.transforms.v2 import functional as tv
from typing_extensions import Self

from rubiks.errors import InputError
from rubiks.models.scoring import Mean
from rubiks.settings import Count, Expected, Settings, Side


def _one_or_three(number: int) -> int:
    if number not in (1, 3):
        raise ValueError
    return number


class ProtocolSettings(Settings, section="protocol"):
    """Which views of a video are scored."""

    name: str = Field(description="names the protocol in results; if a preset's values are changed: custom")
    clips: Count = Field(description="clips of a video; uniform sampling allows 1 or 2, dense sampling any number")
    crops: Annotated[int, AfterValidator(_one_or_three), Expected("1 or 3")] = Field(
        description="1: the centre; 3: left, right and centre"
    )
    crop_size: Side | None = Field(None, description="side of the square crops, in pixels; null: data.size")
    short_side: Side | None = Field(
        None, description="pixels of the short side to which frames are resized; null: 256/224 of the crop"
    )
    sampling: Literal["uniform", "dense"] | None = Field(
        None, description="how a clip's frames are chosen; null: data.sampling"
    )
    mean: Mean = Field("logits", description="what is averaged over a video's views: logits or probabilities")

    @model_validator(mode="after")
    def _large_enough(self) -> Self:
        if self.crop_size is not None and self.short_side is not None and self.short_side < self.crop_size:
            raise self.wrong("short_side", f"at least protocol.crop_size={self.crop_size}")
        return self

    @property
    def label(self) -> str:
        """The name, or custom if it is a standard protocol's but the values are not."""
        return self.name if STANDARD.get(self.name, self) == self else "custom"

    def protocol(self, num_frames: int, size: int, sampling: str, window: int) -> Protocol:
        """The protocol for a network that was trained on such clips.

        Args:
            num_frames: T.
            size: side of the views, in pixels.
            sampling: uniform or dense.
            window: frames that a clip spans in dense sampling.

        Raises:
            InputError: they do not fit together.
        """
        size = self.crop_size or size
        dense = (self.sampling or sampling) == "dense"
        if not dense and self.clips > 2:
            raise InputError(
                f"protocol.clips must be 1 or 2 with uniform sampling, got {self.clips}; choose another protocol, or "
                "protocol.sampling=dense, which allows any number"
            )
        if dense and window < num_frames:
            raise InputError(
                f"data.window must be at least data.num_frames={num_frames}, the frames of a clip in it, got {window}"
            )
        if self.short_side is not None and self.short_side < size:
            raise self.wrong("short_side", f"at least data.size={size}, the side of the crops")
        spanned = window if dense else None
        return Protocol(self.label, self.clips, self.crops, num_frames, size, spanned, self.short_side, self.mean)


# As in conf/protocol.
STANDARD = {
    known.name: known
    for known in (
        ProtocolSettings(name="one_clip", clips=1, crops=1),
        ProtocolSettings(name="two_clip", clips=2, crops=3),
        ProtocolSettings(name="dense_10x3", clips=10, crops=3, crop_size=256, short_side=256, sampling="dense"),
    )
}


@dataclass(frozen=True)
class Protocol:
    """The views whose mean score is a video's score.

    Args:
        name: one_clip, two_clip, ...
        clips: how many clips of T frames. Uniform sampling allows 1, the centres of T segments, or 2, these and the
            segments' starts; dense sampling any number.
        crops: 1, the centre; or 3, left, right and centre.
        num_frames: T.
        size: side of the square crops, in pixels.
        window: frames that a clip spans in dense sampling; None for uniform sampling.
        short_side: pixels of the short side to which frames are resized before cropping (bilinear, antialiased);
            None: size * 256 / 224.
        mean: what is averaged over the views.
    """

    name: str
    clips: int
    crops: int
    num_frames: int
    size: int
    window: int | None = None
    short_side: int | None = None
    mean: Mean = "logits"

    @property
    def num_views(self) -> int:
        return self.clips * self.crops

    @property
    def resized(self) -> int:
        """Pixels of the short side before cropping."""
        return self.short_side or round(self.size * 256 / 224)

    @property
    def central_view(self) -> int:
        """Which view is the first clip's centre crop."""
        return self.crops - 1

    def facts(self) -> dict[str, Any]:
        """The protocol as results state it."""
        return {
            "protocol": self.name,
            "clips": self.clips,
            "crops": self.crops,
            "crop_size": self.size,
            "short_side": self.resized,
            "mean": self.mean,
            "sampling": "uniform" if self.window is None else "dense",
            "window": self.window,
            "num_frames": self.num_frames,
        }

    def frame_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(clips, T) frame numbers for a video of `length` frames."""
        if self.window is not None:
            return spread_windows(length, self.num_frames, self.window, self.clips)
        choices = (segment_centres, segment_starts)[: self.clips]
        return np.stack([choose(length, self.num_frames) for choose in choices])

    def resize(self, frames: Tensor) -> Tensor:
        """Decoded frames uint8 (N, 3, H, W) at the size from which views are cropped; once more changes nothing."""
        return tv.resize(frames, [self.resized], antialias=True)

    def __call__(self, clips: Tensor, label: int, rng: np.random.Generator) -> tuple[Tensor, list[int]]:
        """Decoded frames uint8 (clips, T, 3, H, W) -> views uint8 (V, T, 3, size, size), a clip's crops together, and
        the label for each of them."""
        frames = self.resize(clips.flatten(0, 1)).unflatten(0, clips.shape[:2])
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
