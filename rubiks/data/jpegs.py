"""Videos as `rubiks prepare` stores them: JPEG frames in an MP4 file, any of which can be read without the others.

Players show such a file like any other. It differs in its brand, the word at the start of an MP4 file, and in what the
reader relies on: one track, whose frames lie one after the other, so that the index of their sizes (`stsz` in ISO/IEC
14496-12) tells where each is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import BinaryIO

import numpy as np
import simplejpeg
import torch
from torch import Tensor

from rubiks.data.records import OpenVideo, Span, checked_indices
from rubiks.errors import VideoError

BRAND = "rbks"

Read = Callable[[int, int], bytes | bytearray]  # from an offset, this many bytes


def open_jpegs(path: str, span: Span | None = None) -> JpegVideo | None:
    """Open a video if it has this form; None for others, and if it cannot be read.

    Args:
        path: the file, or a name for messages if it is in a shard.
        span: its place in a shard.

    Raises:
        VideoError: it has this form, but is damaged or cut off.
    """
    name, offset, size = span or (path, 0, None)
    if not os.path.isfile(name):  # opening a pipe would wait for its writer
        return None
    try:
        file = open(name, "rb")  # noqa: SIM115  closed with the video
    except (OSError, ValueError):
        return None
    try:
        file.seek(offset + 4)
        if file.read(8) == b"ftyp" + BRAND.encode():
            return JpegVideo(path, file, offset, os.path.getsize(name) if size is None else size)
    except OSError as error:
        file.close()
        raise VideoError(path, f"cannot be read: {error.strerror}") from error
    except VideoError:
        file.close()
        raise
    file.close()
    return None


class JpegVideo(OpenVideo):
    """A video of JPEG frames, as a context manager; made by `open_jpegs`.

    Args:
        path: its name in messages.
        file: the file with the video; closed with the video.
        offset, size: where it lies in the file, in bytes.

    Attributes:
        rate: frames per second.

    Raises:
        VideoError: it is damaged or cut off.
    """

    reader = "simplejpeg"

    def __init__(self, path: str, file: BinaryIO, offset: int, size: int) -> None:
        self.path = path
        self._file = file
        self._offset = offset
        try:
            self.rate, self._starts, self._sizes = _index(self._read, size)
        except (KeyError, ValueError, struct.error) as error:
            raise VideoError(path, f"its index is damaged or cut off ({error}); prepare it again") from error

    def __len__(self) -> int:
        """The number of frames."""
        return len(self._sizes)

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Decode frames by number.

        Args:
            indices: T numbers in range(len(self)), in any order, repeats allowed.

        Returns:
            uint8 (T, 3, H, W), RGB; channels last in memory.

        Raises:
            VideoError: a frame cannot be read or decoded, or differs in size from the first one asked for.
        """
        indices = checked_indices(indices, len(self))
        numbers = list(dict.fromkeys(indices))
        contents = [self._read(int(self._starts[number]), int(self._sizes[number])) for number in numbers]
        images = None
        for place, (number, content) in enumerate(zip(numbers, contents, strict=True)):
            try:
                height, width, *_ = simplejpeg.decode_jpeg_header(content)
                if images is None:
                    images = np.empty((len(numbers), height, width, 3), np.uint8)
                if images.shape[1:3] != (height, width):
                    raise ValueError(f"{width}x{height} pixels, unlike frame {numbers[0]}")
                simplejpeg.decode_jpeg(content, buffer=images[place])
            except ValueError as error:
                raise VideoError(self.path, f"frame {number} is damaged: {error}; prepare it again") from error
        assert images is not None
        if len(numbers) < len(indices):
            images = images[[numbers.index(index) for index in indices]]
        return torch.from_numpy(images).permute(0, 3, 1, 2)

    def close(self) -> None:
        """Close the file; the object cannot be used afterwards."""
        self._file.close()

    def _read(self, start: int, size: int) -> bytearray:
        """`size` bytes of the video from `start`; fewer at the end of its file."""
        content = bytearray(size)
        try:
            self._file.seek(self._offset + start)
            del content[self._file.readinto(content) :]  # type: ignore[attr-defined]
        except OSError as error:
            raise VideoError(self.path, f"cannot be read: {error.strerror}") from error
        return content


def _index(read: Read, size: int) -> tuple[Fraction, np.ndarray, np.ndarray]:
    """Frames per second, where each frame begins, and its bytes; raises ValueError, KeyError or struct.error."""
    boxes = _boxes(read, 0, size)
    first, end = boxes[b"mdat"]
    start, stop = boxes[b"moov"]
    moov = read(start, stop - start)

    def inside(place: tuple[int, int]) -> dict[bytes, tuple[int, int]]:
        return _boxes(lambda at, count: moov[at : at + count], *place)

    media = inside(inside((0, len(moov)))[b"trak"])
    media = inside(media[b"mdia"])
    units, duration = struct.unpack_from(">II", moov, media[b"mdhd"][0] + 12)
    table = inside(inside(media[b"minf"])[b"stbl"])[b"stsz"][0]
    equal, count = struct.unpack_from(">II", moov, table + 4)
    if equal and equal * count == end - first:
        sizes = np.full(count, equal, np.int64)
    else:
        sizes = np.frombuffer(moov, ">u4", count, table + 12).astype(np.int64)
    if not sizes.all() or sizes.sum() != end - first:
        raise ValueError(f"{count} frames of {sizes.sum()} bytes, expected {end - first} bytes")
    rate = Fraction(units * count, max(1, duration)).limit_denominator(10_000)
    if not 0 < rate < 100_000:  # FFmpeg's numbers have 32 bits
        raise ValueError(f"{count} frames in {duration}/{units} seconds")
    return rate, first + sizes.cumsum() - sizes, sizes


def _boxes(read: Read, start: int, stop: int) -> dict[bytes, tuple[int, int]]:
    """Where the content of each box begins and ends, by its kind."""
    found = {}
    while start < stop:
        size, kind = struct.unpack(">I4s", read(start, 8))
        header = 8
        if size == 1:
            size, header = int.from_bytes(read(start + 8, 8), "big"), 16
        if size < header or start + size > stop:
            raise ValueError(f"a part of {size} bytes at {start}, of {stop} bytes in all")
        found[bytes(kind)] = start + header, start + size
        start += size
    return found
