"""What a network expects of its input: which frames of a video, their size, and how pixels are normalised."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from rubiks.nn.normalize import IMAGENET_MEAN, IMAGENET_STD

UNIFORM_WINDOW = 2.5  # seconds, a usual length of the clips of data sets with uniform sampling
DENSE_RATE = 25.0  # frames per second of the videos of data sets with dense sampling

Positive = Annotated[int, Field(ge=1)]
Colours = tuple[float, float, float]  # red, green, blue


@dataclass(frozen=True)
class Preprocessing:
    """The input that a network was trained with; by default that of the official files.

    Attributes:
        num_frames: T, frames per clip.
        size: side of the square crops, in pixels.
        short_side: pixels of the short side to which frames are resized before cropping; None: size * 256 / 224.
        sampling: how a clip's frames are chosen. uniform: one from each of T segments of the video (TSN); dense: at
            equal steps within a window (I3D).
        window: frames that a clip spans in dense sampling.
        mean, std: of the colours red, green and blue in [0, 1], by which pixels are normalised; ImageNet's.

    Raises:
        pydantic.ValidationError: a value is out of range (a ValueError).
    """

    num_frames: Positive
    size: Positive = 224
    short_side: Positive | None = None
    sampling: Literal["uniform", "dense"] = "uniform"
    window: Positive = 64
    mean: Colours = IMAGENET_MEAN
    std: Colours = IMAGENET_STD

    @property
    def interval(self) -> float:
        """Seconds between the frames of a clip, if videos are as usual: 25 frames a second, or cut to 2.5 seconds."""
        if self.sampling == "dense":
            return max(1, self.window // self.num_frames) / DENSE_RATE
        return UNIFORM_WINDOW / self.num_frames

    @property
    def resized(self) -> int:
        """Pixels of the short side before cropping."""
        return self.short_side or round(self.size * 256 / 224)
