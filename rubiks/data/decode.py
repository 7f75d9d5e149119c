"""Frames of one video as uint8 tensors, from a video file, a folder of images or an image, behind one interface."""

from __future__ import annotations

import contextlib
import io
import os
import stat
from collections.abc import Iterator, Sequence
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from torch import Tensor

from rubiks.data.index import Index, decode, read_index, video_stream
from rubiks.data.jpegs import JpegVideo, open_jpegs
from rubiks.data.readers import seeking_reader
from rubiks.data.records import CheckedFile, OpenVideo, Seek, Span, VideoRecord, as_tensor, checked_indices
from rubiks.data.screen import Screen
from rubiks.data.seeker import Seeker
from rubiks.data.stills import FrameFolder, ImageFile
from rubiks.errors import VideoError

# For av.open: without this, PyAV before 19 raises an error for tags that are not UTF-8.
ANY_TAGS: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}

_PLAYLISTS = ("concat", "dash", "hls", "imf")


def open_video(record: VideoRecord, reader: str = "auto") -> VideoFile | JpegVideo | FrameFolder | ImageFile:
    """Open a record's video for reading, as a context manager; raises VideoError if it cannot be read."""
    if record.pattern is not None:
        return FrameFolder(record.path, record.num_frames, record.pattern, record.checked, record.first_frame)
    if not record.image and (jpegs := open_jpegs(record.path, record.span)) is not None:
        return jpegs
    content = None if record.span is None else _read_span(record.path, record.span)
    if record.image:
        return ImageFile(record.path, content)
    return VideoFile(record.path, reader, content, record.checked)


class VideoFile(OpenVideo):
    """A video file. Every frame is the one that a decode from the start gives, as a player shows it (`Screen`).

    A library that seeks reads it if that is proven exact (`read_index`) and useful; else PyAV does, from the nearest
    packet where decoding can start. If times do not identify frames, or anything is unexpected, PyAV decodes in order
    and counts. Open a file in the process that reads it and close it right after: an idle decord reader decodes ahead
    into memory.

    Args:
        path: any file that FFmpeg reads.
        reader: the library that seeks, one of `readers.Reader`.
        content: the file's bytes, if they are not at `path`.
        checked: what `rubiks check` found; used if the file still has that size.

    Attributes:
        seek: how any frame can be reached.
        key_frames: from how many frames decoding can start; 0 if unknown.

    Raises:
        VideoError: the file cannot be read as a video.
    """

    def __init__(
        self, path: str, reader: str = "auto", content: bytes | None = None, checked: CheckedFile | None = None
    ) -> None:
        self.path = path
        self._content = content
        self._container: InputContainer | None = None  # for seeking with `_index`
        self._index: Index | None = None
        self._stamps: list[int | None] | None = None  # of the frames, if all were decoded
        size = _check_file(path) if content is None else len(content)
        if checked is not None and checked.size == size:
            self.seek, self.key_frames, self._length = checked.seek, checked.key_frames, checked.frames
        else:
            self.seek, self.key_frames, self._length = self._look()
        self._library = seeking_reader(reader, self._file(), self._length) if self.seek == "any" else None
        self._library_name = "decord" if reader == "auto" else reader
        if self._library is not None:
            self._close_container()

    @property
    def can_seek(self) -> bool:
        """Whether some frames can be reached without decoding all those before them."""
        return self.seek != "none" and self.key_frames > 1

    @property
    def times(self) -> list[int]:
        """When each frame is shown, according to the packets; empty if they do not tell."""
        return self._read_index().times

    @property
    def stamps(self) -> list[int | None]:
        """The presentation time stamp of each frame that `decoded` gives, in units of the stream's time base; None for
        frames without one. Decodes the file if its packets do not tell; raises VideoError."""
        if self._stamps is None:
            self._stamps = [*self.times] or [frame.pts for frame in self.decoded()]
        return self._stamps

    def __len__(self) -> int:
        """The number of frames that a player shows."""
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
        if self._library is not None:
            # decord fails on some intact videos, for example very narrow ones, with undocumented errors (RuntimeError,
            # DECORDError, DECORDLimitReachedError); PyAV then decides.
            with contextlib.suppress(Exception):
                frames = as_tensor(self._library(indices))
                self.reader = self._library_name
                return frames
        self.reader = "pyav"
        if self.seek != "none":
            # If packets have moved or are damaged, decoding in order reports it.
            with contextlib.suppress(av.FFmpegError, LookupError, ValueError):
                return as_tensor(self._from_entries(indices))
        return as_tensor(self._in_order(indices))

    def decoded(self) -> Iterator[VideoFrame]:
        """Every frame in order, as coded, decoded from the start; raises VideoError where that fails."""
        try:
            container, stream = self.open()
            with container:
                yield from decode(container, stream)
        except (av.FFmpegError, ValueError) as error:  # PyAV raises ValueError for what it does not support
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise VideoError(self.path, f"is broken or cut off and cannot be decoded: {reason}") from error

    def close(self) -> None:
        """Free the reader; the object cannot be used afterwards."""
        self._library = None
        self._close_container()

    def open(self) -> tuple[InputContainer, VideoStream]:
        """The file, which the caller must close, and the video in it; raises VideoError, or av.FFmpegError."""
        # Unlike decord, PyAV gives a reason when it fails, and prints nothing.
        container = av.open(self._file(), "r", **ANY_TAGS)
        stream = video_stream(container)
        reason = None
        if container.format.name in _PLAYLISTS:
            reason = "is a playlist, expected a video file"
        elif stream is None:
            cover = "only a picture such as a cover" if container.streams.video else "only sound or data"
            reason = f"contains no video, {cover}"
        elif stream.codec_context is None:
            reason = "has a codec that FFmpeg does not know, or a broken header"
        if reason is not None:
            container.close()
            raise VideoError(self.path, reason)
        assert stream is not None
        stream.codec_context.thread_count = 1
        return container, stream

    def _file(self) -> str | io.BytesIO:
        # FFmpeg takes the beginning of a:b.mp4 for a protocol.
        return os.path.abspath(self.path) if self._content is None else io.BytesIO(self._content)

    def _close_container(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container = self._index = None

    def _look(self) -> tuple[Seek, int, int]:
        """How any frame can be reached, the number of key frames, and of frames."""
        try:
            index = self._read_index()
        except av.FFmpegError as error:
            raise VideoError(self.path, f"cannot be opened as a video: {error.strerror}") from error
        if index.length is None:
            self._stamps = [frame.pts for frame in self.decoded()]
            length = len(self._stamps)
        else:
            length = index.length
        if length == 0:
            raise VideoError(self.path, "contains no frames")
        return index.seek, len(index.entries), length

    def _read_index(self) -> Index:
        if self._index is None:
            self._container, stream = self.open()
            self._index = read_index(self._container, stream)
        return self._index

    def _from_entries(self, indices: list[int]) -> np.ndarray:
        """uint8 (T, H, W, 3); raises av.FFmpegError, ValueError, or LookupError if a packet is not as expected."""
        index = self._read_index()
        assert self._container is not None
        if len(index.times) != self._length:
            raise LookupError
        images = Seeker(self._container, index).images({index.times[number] for number in indices})
        return np.stack([images[index.times[number]] for number in indices])

    def _in_order(self, indices: list[int]) -> np.ndarray:
        """uint8 (T, H, W, 3)."""
        last = max(indices)
        images, screen = {}, Screen()
        for number, frame in enumerate(self.decoded()):
            if number == 0 or number in indices:  # the first gives the size
                images[number] = screen.image(frame)
            if number == last:
                break
        if last not in images:
            raise VideoError(self.path, f"is broken or cut off: it ends before frame {last} of {self._length}")
        return np.stack([images[number] for number in indices])


def _check_file(path: str) -> int:
    """The size in bytes; its errors distinguish the common reasons, which decord's message does not."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise VideoError(path, f"cannot be opened: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(path, "is a folder, expected a video file; for folders of frames use data=frames")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(path, "is a pipe or a device, expected a video file")
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
        raise VideoError(path, f"is incomplete in {span.file}, which is cut off")
    if not content:
        raise VideoError(path, "is empty, 0 bytes")
    return content
