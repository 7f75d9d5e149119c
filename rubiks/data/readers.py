"""The libraries that seek to frames, decord and torchcodec, behind one function; PyAV decodes in order in `decode`."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
from torch.utils.dlpack import from_dlpack

from rubiks.errors import InputError

Reader = Literal["auto", "decord", "pyav", "torchcodec"]

FrameReader = Callable[[list[int]], np.ndarray]


def check_reader(reader: str) -> None:
    """Raise InputError if data.reader is unknown or its library cannot be used."""
    if reader not in get_args(Reader):
        raise InputError(f"data.reader must be one of {', '.join(get_args(Reader))}; got {reader!r}")
    if reader in ("decord", "torchcodec") and importlib.util.find_spec(reader) is None:
        raise InputError(
            f"data.reader={reader} needs {reader}, which is not installed: pip install {reader}, or set auto"
        )
    if reader == "torchcodec":
        try:
            from torchcodec.decoders import VideoDecoder

            VideoDecoder(b"no video")  # newer releases load their library here
        except Exception as error:
            if "could not load" in str(error).lower() or isinstance(error, (ImportError, OSError)):
                raise InputError(
                    "data.reader=torchcodec: torchcodec is installed, but its library does not load: it needs the "
                    "system's FFmpeg libraries and the PyTorch of its release; install them, or set data.reader=auto"
                ) from error


def seeking_reader(reader: str, file: str | io.BytesIO, length: int) -> FrameReader | None:
    """A function that reads a file's frames by number; None if the library cannot: then PyAV decides.

    Args:
        reader: one of `Reader`; auto is decord if installed (its wheels are only for x86-64).
        file: a path, or the file's content.
        length: how many frames the video has; a library that counts differently would return wrong ones.

    Returns:
        A function from T frame numbers to uint8 (T, H, W, 3) RGB. It may raise anything for a frame it cannot reach.
    """
    opened = {"auto": _decord, "decord": _decord, "torchcodec": _torchcodec}
    if reader not in opened:
        return None
    try:
        read, count = opened[reader](file)
    except Exception:  # not installed, or errors that the libraries do not document
        return None
    return read if count == length else None


def _decord(file: str | io.BytesIO) -> tuple[FrameReader, int]:
    import decord  # imported here, in the process that reads video, because it starts threads

    decord.logging.set_level(decord.logging.QUIET)
    # If decord cannot reach a frame it returns the nearest one; with a tolerance it mostly raises instead.
    video = decord.VideoReader(file, num_threads=1, fault_tol=1e-9)
    # Not asnumpy(), which copies; the result keeps the memory alive.
    return lambda indices: from_dlpack(video.get_batch(indices).to_dlpack()).numpy(), len(video)


def _torchcodec(file: str | io.BytesIO) -> tuple[FrameReader, int]:
    from torchcodec.decoders import VideoDecoder

    source = file.getvalue() if isinstance(file, io.BytesIO) else file
    video = VideoDecoder(source, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact")
    return lambda indices: video.get_frames_at(indices).data.numpy(), len(video)
