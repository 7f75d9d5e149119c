"""Frames of one video as uint8 tensors, from a video file, a folder of images or an image, behind one interface."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Sequence
from typing import Any

import av
import numpy as np
import torch
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch import Tensor

from rubiks.data.jpegs import JpegVideo, open_jpegs
from rubiks.data.readers import seeking_reader
from rubiks.data.records import CheckedFile, OpenVideo, Span, VideoRecord, checked_indices, count_frames
from rubiks.errors import VideoError

# Here random access returns the same frames as decoding in order. In AVI, MPEG-TS and MPEG-PS, whose time stamps are
# incomplete, and for MPEG-4 part 2 and HEVC with B-frames, decord returns others without an error (0.6.0), and of more
# than 8 bits per channel it makes slightly other colours.
_SEEKABLE_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv")
_SEEKABLE_CODECS = ("h264", "vp8", "vp9")
_SEEKABLE_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuv444p")

# For av.open. Tags that are no UTF-8 are an error for PyAV before 19, unless told otherwise.
ANY_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}


def open_video(record: VideoRecord, reader: str = "auto") -> VideoFile | JpegVideo | FrameFolder | ImageFile:
    """Open a record's video for reading, as a context manager; raises VideoError where it cannot be read."""
    if record.pattern is not None:
        return FrameFolder(record.path, record.num_frames, record.pattern, record.checked)
    if not record.image and (jpegs := open_jpegs(record.path, record.span)) is not None:
        return jpegs
    content = None if record.span is None else _read_span(record.path, record.span)
    if record.image:
        return ImageFile(record.path, content)
    return VideoFile(record.path, reader, content, record.checked)


class VideoFile(OpenVideo):
    """A video file: read by seeking where that is exact and of use, else, or if it fails, decoded in order with PyAV.

    Frames are as a player shows them, turned by the rotation that phones note in the file. Open it in the process that
    reads it and close it at once: an idle decord reader decodes ahead into memory.

    Args:
        path: any file that FFmpeg reads.
        reader: what seeks, one of `readers.READERS`; pyav always decodes in order.
        content: the file's bytes, where they do not lie at `path`.
        checked: what is known of it; it counts where the file has that size.

    Attributes:
        can_seek: whether the seeking readers reach any frame exactly, and without decoding all those before it.

    Raises:
        VideoError: the file cannot be read as a video.
    """

    def __init__(
        self, path: str, reader: str = "auto", content: bytes | None = None, checked: CheckedFile | None = None
    ) -> None:
        self.path = path
        self._content = content
        size = _check_file(path) if content is None else len(content)
        if checked is not None and checked.size == size:
            self._length, self.can_seek = checked.frames, checked.can_seek
        else:
            self._length, self.can_seek = self._look()
        self._seek = seeking_reader(reader, self._file(), self._length) if self.can_seek else None

    def _look(self) -> tuple[int, bool]:
        """The number of frames, and whether it can be read by seeking."""
        path = self.path
        try:
            # PyAV fails with a reason, and quietly; decord has neither quality.
            with av.open(self._file(), "r", **ANY_TAGS) as container:
                if not container.streams.video:
                    raise VideoError(path, "holds no video, only sound or data")
                codec = container.streams.video[0].codec_context
                if codec is None:
                    raise VideoError(path, "is coded in a way that FFmpeg does not know, or its header is broken")
                packets = [packet for packet in container.demux(video=0) if packet.size]
                # A video cut without encoding it anew keeps frames outside of the cut, which players and decoders drop.
                # decord counts them and mixes up the numbers.
                length = sum(not packet.is_discard for packet in packets)
                # With a single key frame there is nothing to seek to, and PyAV decodes faster in order than decord.
                can_seek = (
                    sum(packet.is_keyframe for packet in packets) > 1
                    and container.format.name in _SEEKABLE_FORMATS
                    and codec.codec.canonical_name in _SEEKABLE_CODECS
                    and codec.pix_fmt in _SEEKABLE_PIXELS
                )
        except av.FFmpegError as error:
            raise VideoError(path, f"cannot be opened as a video: {error.strerror}") from error
        if length == 0:
            raise VideoError(path, "holds no frames")
        return length, can_seek and length == len(packets)

    def __len__(self) -> int:
        """The number of frames that a player shows, by the container."""
        return self._length

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Decode frames by number.

        Args:
            indices: T numbers in range(len(self)), in any order, repeats allowed.

        Returns:
            uint8 (T, 3, H, W), RGB; channels last in memory.

        Raises:
            VideoError: a frame cannot be decoded.
        """
        indices = checked_indices(indices, self._length)
        if self._seek is not None:
            # decord fails on some videos that are whole, for example very narrow ones, with errors that it does not
            # document (RuntimeError, DECORDError, DECORDLimitReachedError); decoding in order then decides.
            with contextlib.suppress(Exception):
                return _as_tensor(self._seek(indices))
        return _as_tensor(self._decode_in_order(indices))

    def close(self) -> None:
        """Free the reader; the object is of no use afterwards."""
        self._seek = None

    def _file(self) -> str | io.BytesIO:
        return self.path if self._content is None else io.BytesIO(self._content)

    def _decode_in_order(self, indices: list[int]) -> np.ndarray:
        """uint8 (T, H, W, 3)."""
        last = max(indices)
        frames = {}
        rgb = VideoReformatter()  # sets the conversion up once, not for every frame
        try:
            with av.open(self._file(), "r", **ANY_TAGS) as container:
                container.streams.video[0].codec_context.thread_count = 1
                for index, frame in enumerate(container.decode(video=0)):
                    if index in indices:
                        image = rgb.reformat(frame, format="rgb24").to_ndarray()
                        # Upright, as the other readers return it.
                        frames[index] = np.rot90(image, round(frame.rotation / 90))
                    if index == last:
                        break
        except av.FFmpegError as error:
            raise VideoError(self.path, f"cannot be decoded, broken or cut off: {error.strerror}") from error
        if last not in frames:
            raise VideoError(self.path, f"ends before frame {last} of the {self._length} announced, broken or cut off")
        sizes = {_size(frame) for frame in frames.values()}
        if len(sizes) > 1:
            raise VideoError(self.path, f"changes its size on the way ({', '.join(sorted(sizes))}), expected one size")
        return np.stack([frames[index] for index in indices])


class FrameFolder(OpenVideo):
    """A folder with one JPEG or PNG image per frame, all of one size.

    Args:
        path: the folder.
        num_frames: how many frames the list gives it; None to count them.
        pattern: format of the file names, numbered from 1, e.g. "{:06d}.jpg" (TSM's convention).
        checked: what is known of it; its count is taken unless the folder has grown since.

    Raises:
        VideoError: there is no such folder, it has no frames, or those to be counted have gaps.
    """

    def __init__(self, path: str, num_frames: int | None, pattern: str, checked: CheckedFile | None = None) -> None:
        if not os.path.isdir(path):
            raise VideoError(path, "is not a folder of frames" if os.path.exists(path) else "no such folder")
        if num_frames is None and checked is not None:
            grown = os.path.exists(os.path.join(path, pattern.format(checked.frames + 1)))
            num_frames = None if grown else checked.frames
        if num_frames is None:
            num_frames = count_frames(path, pattern)
        if num_frames < 1:
            raise VideoError(path, f"the list gives it {num_frames} frames, expected at least 1")
        self.path = path
        self._length = num_frames
        self._pattern = pattern

    def __len__(self) -> int:
        """The number of frames."""
        return self._length

    def frames(self, indices: Sequence[int]) -> Tensor:
        """Read frames by number: index 0 is the file numbered 1.

        Args:
            indices: T numbers in range(len(self)), in any order, repeats allowed.

        Returns:
            uint8 (T, 3, H, W), RGB; channels last in memory.

        Raises:
            VideoError: a frame is missing, cannot be decoded, or differs in size from the first one read.
        """
        indices = checked_indices(indices, self._length)
        images = {index: self._image(index) for index in dict.fromkeys(indices)}
        first = images[indices[0]]
        for index, image in images.items():
            if image.shape != first.shape:
                raise VideoError(
                    self.path,
                    f"frame {self._file(index)} is {_size(image)}, unlike {self._file(indices[0])}, {_size(first)}",
                )
        return _as_tensor(np.stack([images[index] for index in indices]))

    def _file(self, index: int) -> str:
        return self._pattern.format(index + 1)

    def _image(self, index: int) -> np.ndarray:
        """uint8 (H, W, 3)."""
        name = self._file(index)
        try:
            return _read_image(os.path.join(self.path, name))
        except FileNotFoundError as error:
            raise VideoError(self.path, f"frame {name} is missing, expected {self._length} frames") from error
        except VideoError as error:
            raise VideoError(self.path, f"frame {name} {error.reason}") from error


class ImageFile(OpenVideo):
    """A still image as a video of one frame, which is read when it is asked for.

    Args:
        path: any image of 8 bits per channel that Pillow reads.
        content: the file's bytes, where they do not lie at `path`.
    """

    def __init__(self, path: str, content: bytes | None = None) -> None:
        self.path = path
        self._content = content

    def __len__(self) -> int:
        return 1

    def frames(self, indices: Sequence[int]) -> Tensor:
        """The image once for each index; as `FrameFolder.frames`."""
        indices = checked_indices(indices, 1)
        try:
            image = _read_image(self.path, self._content)
        except FileNotFoundError as error:
            raise VideoError(self.path, "no such file") from error
        return _as_tensor(np.stack([image] * len(indices)))


def _read_image(path: str, content: bytes | None = None) -> np.ndarray:
    """uint8 (H, W, 3); raises VideoError, or FileNotFoundError."""
    try:
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            if image.mode.startswith(("I", "F")):
                raise VideoError(path, "has more than 8 bits per channel, expected 8")
            return np.asarray(image.convert("RGB"))
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's for broken files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise VideoError(path, f"cannot be decoded: {reason}") from error


def _check_file(path: str) -> int:
    """The size in bytes; tells the common reasons apart, which decord's message does not."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise VideoError(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(path, "is a folder, expected a video file; for folders of frames use data=frames")
    if status.st_size == 0:
        raise VideoError(path, "is empty, 0 bytes")
    if not os.access(path, os.R_OK):
        raise VideoError(path, "cannot be opened: no permission to read it")
    return status.st_size


def _read_span(path: str, span: Span) -> bytes:
    """The bytes of a video in a shard."""
    try:
        with open(span.file, "rb") as file:
            file.seek(span.offset)
            content = file.read(span.size)
    except OSError as error:
        raise VideoError(path, f"cannot be read from {span.file}: {error.strerror}") from error
    if len(content) < span.size:
        raise VideoError(path, f"is not whole in {span.file}, which is cut off")
    if not content:
        raise VideoError(path, "is empty, 0 bytes")
    return content


def _as_tensor(frames: np.ndarray) -> Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, 3, H, W), not copied."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
