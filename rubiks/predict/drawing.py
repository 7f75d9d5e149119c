"""Writes videos with the predicted class drawn on."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter, deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, TypeVar

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rubiks.data.decode import VideoFile
from rubiks.data.screen import Screen
from rubiks.data.timing import SECOND, frame_rate, frame_times
from rubiks.errors import InputError
from rubiks.files import write_atomically
from rubiks.predict.predictor import ClassScore, Prediction
from rubiks.predict.timeline import Segment, Timeline

Found = TypeVar("Found", Prediction, Timeline)


class Drawn:
    """Writes a copy of each video, H.264 in MP4 without sound, with its class and score in a corner, or those of the
    current segment.

    Args:
        folder: for the copies.
        sources: all videos.
    """

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        self._targets = targets(folder, sources, ".mp4")

    def write(self, found: Found) -> Found:
        """Write the copy of a video that could be read, and return what was found.

        Raises:
            InputError: the copy cannot be written.
        """
        if found.error is None:
            captions = _captions(found)
            write_atomically(self._targets[found.source], lambda temporary: _copy(found.source, temporary, captions))
        return found


def targets(folder: Path, sources: Sequence[str], extension: str) -> dict[str, Path]:
    """A file for each video: NAME.mp4 with extension .mp4, and of videos with equal names NAME-2.mp4 and so on.

    Raises:
        InputError: one of them is a video itself.
    """
    originals = {os.path.realpath(source) for source in sources}
    seen: Counter[str] = Counter()
    files = {}
    for source in dict.fromkeys(sources):
        stem = Path(source).stem
        seen[stem] += 1
        files[source] = folder / f"{stem}{f'-{seen[stem]}' if seen[stem] > 1 else ''}{extension}"
        if os.path.realpath(files[source]) in originals:
            raise InputError(f"{files[source]} is one of the videos and would be overwritten; choose another folder")
    return files


class _Caption(NamedTuple):
    """A text and when it is shown, in seconds."""

    start: float
    end: float
    text: str


def _captions(found: Prediction | Timeline) -> list[_Caption]:
    if isinstance(found, Timeline):
        return [_Caption(one.start, one.end, _text(one)) for one in found.segments]
    return [_Caption(0, math.inf, _text(found.predictions[0]))]


def _text(one: ClassScore | Segment) -> str:
    return f"{one.label}  {one.score:.0%}"


def _copy(source: str, target: Path, captions: Sequence[_Caption]) -> None:
    """Write the video with the captions, which are in order."""
    with VideoFile(source, "pyav") as video:
        times = frame_times(video).tolist()
    container, stream = video.open()
    with container:
        rate = frame_rate(stream)
    screen, rest = Screen(), deque(captions)
    with av.open(str(target), "w", format="mp4") as out:
        copy: av.VideoStream | None = None
        for time, frame in zip(times, video.decoded(), strict=False):
            image = screen.image(frame)
            image = image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2]  # H.264 needs even sides
            if copy is None:
                copy = out.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
                copy.height, copy.width, copy.pix_fmt = *image.shape[:2], "yuv420p"
            while rest and rest[0].end <= time / SECOND:
                rest.popleft()
            if rest and rest[0].start <= time / SECOND:
                image = captioned(image, rest[0].text)
            drawn = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            drawn.pts, drawn.time_base = time, Fraction(1, SECOND)
            try:
                out.mux(copy.encode(drawn))
            except av.FFmpegError as error:
                raise InputError(f"{target} cannot be written: {error.strerror}") from None
        if copy is not None:
            out.mux(copy.encode())


@functools.lru_cache(4)
def _label(text: str, width: int) -> np.ndarray:
    """uint8 (H, W, 3): the text in white on black, at most as wide as the video."""
    size = max(10, width // 24)
    while True:
        font = ImageFont.load_default(size)
        left, top, right, bottom = font.getbbox(text)
        if right - left + size <= width or size <= 6:
            break
        size -= 1
    label = Image.new("RGB", (int(right - left) + size, int(bottom - top) + size))
    ImageDraw.Draw(label).text((size / 2 - left, size / 2 - top), text, font=font)
    return np.asarray(label)


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """A copy of the image, uint8 (H, W, 3), with the text in its upper left corner."""
    image, label = image.copy(), _label(text, image.shape[1])
    height, width = min(len(label), len(image)), min(label.shape[1], image.shape[1])
    image[:height, :width] = label[:height, :width]
    return image
