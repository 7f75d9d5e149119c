"""Decoded frames as a player shows them."""

from __future__ import annotations

import struct
from typing import Any, NamedTuple

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter


class Turn(NamedTuple):
    """How a player turns frames: rows and columns are exchanged, then left and right, then top and bottom.

    Attributes:
        exact: whether the file says exactly this, and it is not the nearest quarter turn.
    """

    transposed: bool
    mirrored: bool
    flipped: bool
    exact: bool

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) as shown; a view."""
        image = image.transpose(1, 0, 2) if self.transposed else image
        return image[:: -1 if self.flipped else 1, :: -1 if self.mirrored else 1]


def turn_of(frame: VideoFrame) -> Turn | None:
    """The turn in a decoded frame's display matrix, to the nearest quarter turn; None for frames shown as they are.

    Source: ISO/IEC 14496-12, 6.2.2: a pixel (x, y) is shown at (a x + c y, b x + d y).
    """
    notes: Any = frame.side_data
    matrix = notes.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix)[:36])
    if abs(b) + abs(c) > abs(a) + abs(d):
        return Turn(True, c < 0, b < 0, a == d == 0)
    return Turn(False, a < 0, d < 0, b == c == 0) if a < 0 or d < 0 or b or c else None


class Screen:
    """Turns and mirrors frames as their file's display matrix says, and scales them to one size, as FFmpeg does.

    Pixels that are not square stay as they are. Size and turn are those of the first frame given: if they may change,
    it must be the video's first.
    """

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None  # as coded
        self._turn: Turn | None = None
        self._rgb = VideoReformatter()  # sets the conversion up once, not for every frame

    def image(self, frame: VideoFrame) -> np.ndarray:
        """uint8 (H, W, 3), RGB."""
        width, height = self._begin(frame)
        same = (frame.width, frame.height) == (width, height)
        interpolation = Interpolation.BILINEAR if same else Interpolation.BICUBIC
        image = self._rgb.reformat(frame, width, height, format="rgb24", interpolation=interpolation).to_ndarray()
        return image if self._turn is None else self._turn(image)

    def frame(self, frame: VideoFrame) -> VideoFrame:
        """The frame in its own pixel format, or in RGB if it is turned or mirrored."""
        width, height = self._begin(frame)
        if self._turn is not None:
            return VideoFrame.from_ndarray(np.ascontiguousarray(self.image(frame)), format="rgb24")
        if (frame.width, frame.height) == (width, height):
            return frame
        return frame.reformat(width, height, interpolation=Interpolation.BICUBIC)

    def _begin(self, frame: VideoFrame) -> tuple[int, int]:
        """The size of all frames."""
        if self._size is None:
            self._size, self._turn = (frame.width, frame.height), turn_of(frame)
        return self._size
