"""The forms in which `rubiks prepare` writes a video: a file of JPEG or H.264 frames, or a folder of JPEG files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from rubiks.data.jpegs import BRAND
from rubiks.errors import InputError

PATTERN = "{:06d}.jpg"  # for the form frames, as in TSM


class Coding(NamedTuple):
    """How the frames of a video file are written; the same frames give the same bytes.

    Attributes:
        codec, pixels: FFmpeg's names.
        options: the codec's.
        brand: the file's (`rubiks.data.jpegs`).
        step: width and height are multiples of it.
    """

    codec: str
    pixels: str
    options: dict[str, str]
    brand: str
    step: int


# With one thread and no macroblock tree, H.264 always gives the same bytes: with the tree, six of 6,000 encodings of
# the same frames differed, without it none of 12,000.
_CODINGS = {
    "jpeg": Coding("mjpeg", "yuvj420p", {"qmin": "2", "qmax": "2", "flags": "+bitexact"}, BRAND, 1),
    "h264": Coding(
        "libx264",
        "yuv420p",
        {
            "crf": "20",
            "preset": "veryfast",
            "tune": "fastdecode",
            "g": "4",
            "keyint_min": "4",
            "bf": "0",
            "x264-params": "mbtree=0",
        },
        "isom",
        2,
    ),
}
FORMS = (*_CODINGS, "frames")
_JPEG_QUALITY = 95  # for the form frames


def writer(path: Path, form: str, short_side: int) -> VideoWriter | FramesWriter:
    """The writer of a video in one of FORMS; the path is a file, or for `frames` an existing folder."""
    return FramesWriter(path, short_side) if form == "frames" else VideoWriter(path, form, short_side)


def _smaller(width: int, height: int, short_side: int, step: int = 1) -> tuple[int, int]:
    """Width and height with the shorter side at most `short_side`, both rounded down to a multiple of `step`."""
    scale = min(1, short_side / min(width, height))
    width, height = (max(step, int(side * scale + 1e-6) // step * step) for side in (width, height))
    return width, height


class VideoWriter:
    """Writes a video file.

    Args:
        path: the file.
        form: jpeg or h264.
        short_side: maximum of the shorter side, in pixels.
    """

    def __init__(self, path: Path, form: str, short_side: int) -> None:
        self._coding = _CODINGS[form]
        self._short_side = short_side
        options = {"fflags": "+bitexact", "brand": self._coding.brand}
        self._container = av.open(str(path), "w", format="mp4", options=options)
        self._stream: av.VideoStream | None = None
        self._frames = 0

    def add(self, frame: VideoFrame, rate: Fraction) -> None:
        """Write the next frame; the first one's rate becomes the file's. Raises InputError."""
        codec, pixels, options, _, step = self._coding
        width, height = _smaller(frame.width, frame.height, self._short_side, step)
        jpeg = codec == "mjpeg"
        small = frame.reformat(
            width,
            height,
            format=pixels,
            interpolation=Interpolation.BILINEAR,
            # JPEG has only one way to code colours.
            dst_colorspace=Colorspace.ITU601 if jpeg else None,
            dst_color_range=ColorRange.JPEG if jpeg else None,
        )
        if self._stream is None:
            stream = self._container.add_stream(codec, rate=rate, options=options)
            assert isinstance(stream, av.VideoStream)
            self._stream = stream
            stream.width, stream.height, stream.pix_fmt = width, height, pixels
            context = stream.codec_context
            context.thread_count = 1
            # Readers need to know how colours were coded.
            context.color_range, context.colorspace = small.color_range, small.colorspace
        small.pts, small.time_base, small.pict_type = self._frames, 1 / rate, PictureType.NONE
        self._frames += 1
        with _write_errors():
            self._container.mux(self._stream.encode(small))

    def close(self) -> None:
        """Write what is left."""
        with _write_errors():
            if self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()


@contextlib.contextmanager
def _write_errors() -> Iterator[None]:
    """Turn FFmpeg's errors in writing into InputError, unlike those of a source that cannot be decoded."""
    try:
        yield
    except av.FFmpegError as error:
        raise InputError(f"a video cannot be written: {error.strerror}; check --out and its disk") from None


class FramesWriter:
    """Writes the frames of a video into an existing folder, like `VideoWriter`."""

    def __init__(self, folder: Path, short_side: int) -> None:
        self._folder = folder
        self._short_side = short_side
        self._frames = 0

    def add(self, frame: VideoFrame, rate: Fraction) -> None:
        width, height = _smaller(frame.width, frame.height, self._short_side)
        image = frame.reformat(width, height, format="rgb24", interpolation=Interpolation.BILINEAR).to_image()
        self._frames += 1
        image.save(self._folder / PATTERN.format(self._frames), quality=_JPEG_QUALITY, subsampling=0)

    def close(self) -> None:
        pass
