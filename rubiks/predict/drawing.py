"""Writes videos with the predicted class drawn on."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from rubiks.data.decode import VideoFile
from rubiks.data.index import decode
from rubiks.data.screen import Screen
from rubiks.errors import InputError
from rubiks.files import write_atomically
from rubiks.predict.predictor import Prediction

RATE = Fraction(25)  # frames per second where a file has none


class Drawn:
    """Writes a copy of each classified video, H.264 in MP4 without sound, with its class and score in a corner.

    Args:
        folder: for the copies, NAME.mp4; of videos with equal names NAME-2.mp4 and so on.
        sources: all videos.
    """

    def __init__(self, folder: Path, sources: Sequence[str]) -> None:
        seen: Counter[str] = Counter()
        self._targets = {}
        for source in dict.fromkeys(sources):
            stem = Path(source).stem
            seen[stem] += 1
            self._targets[source] = folder / f"{stem}{f'-{seen[stem]}' if seen[stem] > 1 else ''}.mp4"

    def write(self, prediction: Prediction) -> Prediction:
        """Write the copy of a video that could be read, and return the prediction.

        Raises:
            InputError: the copy cannot be written.
        """
        if prediction.error is None:
            best = prediction.predictions[0]
            text = f"{best.label}  {best.score:.0%}"
            target = self._targets[prediction.source]
            write_atomically(target, lambda temporary: _copy(prediction.source, temporary, text))
        return prediction


def _copy(source: str, target: Path, text: str) -> None:
    container, stream = VideoFile(source).open()
    rate = stream.average_rate or stream.guessed_rate or RATE
    screen, label = Screen(), None
    with container, av.open(str(target), "w", format="mp4") as out:
        copy: av.VideoStream | None = None
        for frame in decode(container, stream):
            image = screen.image(frame)
            image = image[: len(image) // 2 * 2, : image.shape[1] // 2 * 2]  # H.264 needs even sides
            if copy is None:
                copy = out.add_stream("libx264", rate=rate, options={"crf": "20", "preset": "veryfast"})
                copy.height, copy.width, copy.pix_fmt = *image.shape[:2], "yuv420p"
                label = _label(text, image.shape[1])
            assert label is not None
            try:
                out.mux(copy.encode(av.VideoFrame.from_ndarray(_over(image, label), format="rgb24")))
            except av.FFmpegError as error:
                raise InputError(f"{target} cannot be written: {error.strerror}") from None
        if copy is not None:
            out.mux(copy.encode())


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


def _over(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """The image with the label in its upper left corner."""
    image = np.ascontiguousarray(image)
    height, width = min(len(label), len(image)), min(label.shape[1], image.shape[1])
    image[:height, :width] = label[:height, :width]
    return image


@functools.lru_cache(4)
def _kept_label(text: str, width: int) -> np.ndarray:
    return _label(text, width)


def captioned(image: np.ndarray, text: str) -> np.ndarray:
    """A copy of the image, uint8 (H, W, 3), with the text in its upper left corner."""
    return _over(image.copy(), _kept_label(text, image.shape[1]))
