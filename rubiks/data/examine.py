"""Check that one video is what its container promises."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from fractions import Fraction

import av
import av.logging
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from rubiks.data.containers import check_whole
from rubiks.data.decode import VideoFile, open_video
from rubiks.data.index import packets_with_data
from rubiks.data.jpegs import JpegVideo
from rubiks.data.manifest import Entry, stamp
from rubiks.data.records import VideoRecord
from rubiks.data.screen import Screen
from rubiks.data.stills import FrameFolder, ImageFile
from rubiks.errors import VideoError

# Called with every frame, as players show it, and the frames per second.
Use = Callable[[VideoFrame, Fraction], object]

_STILL_RATE = Fraction(30)  # folders of frames give none
# Share of the frames promised by duration x rate that may be missing: rates of uneven videos are averages.
_SLACK = 0.1
_CUT_OFF = 4  # frames that may be missing too: the last B-frames of a video cut without re-encoding
_ROUNDED = 0.02  # tolerance of the pixels' aspect ratio, as a scaled video has whole pixels
_INDEXED = ("mov,mp4,m4a,3gp,3g2,mj2", "avi")  # formats whose index has an entry for each frame
_EVEN = 0.9  # share of equal intervals between frames below which a video has no meaningful rate


def examine(record: VideoRecord, name: str, use: Use = lambda frame, rate: None) -> Entry:
    """Decode a video to its end and compare it with what its container promises.

    Args:
        record: the video.
        name: the entry's name.
        use: called with each frame in order; its results are valid only if this function returns.

    Raises:
        VideoError: it cannot be read, is cut short, or does not hold the frames that it promises.
    """
    size, mtime_ns = stamp(record)
    with open_video(record, "pyav") as video:
        if isinstance(video, VideoFile):
            return _decode(video, use, Entry(name, size, mtime_ns, _sha256(record.files)))
        rate = video.rate if isinstance(video, JpegVideo) else Fraction(0)
        width, height = _look_at_images(video, rate, use)
        frames = len(video)  # each can be decoded alone
        return Entry(name, size, mtime_ns, _sha256(record.files), frames, width, height, float(rate), frames, "any")


def _look_at_images(video: JpegVideo | FrameFolder | ImageFile, rate: Fraction, use: Use) -> tuple[int, int]:
    """Read every image; returns width and height."""
    shape = None
    for index in range(len(video)):
        image = video.frames([index])[0].permute(1, 2, 0).numpy()
        if shape not in (None, image.shape):
            raise VideoError(video.path, f"frame {index} differs in size from those before it")
        shape = image.shape
        use(VideoFrame.from_ndarray(image, format="rgb24"), rate or _STILL_RATE)
    assert shape is not None
    return shape[1], shape[0]


def _decode(video: VideoFile, use: Use, entry: Entry) -> Entry:
    """The entry, with what decoding found out about the frames."""
    path = video.path
    check_whole(path)
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    found = _Found()
    try:
        with av.logging.Capture(local=True) as complaints:
            container, stream = video.open()
            with container:
                average = stream.average_rate or stream.guessed_rate or Fraction(0)
                rate = Fraction(average.numerator, average.denominator)  # PyAV 19 and later return their own type
                for packet in packets_with_data(container, stream):
                    found.packets += 1
                    for frame in packet.decode():
                        use(found.add_frame(frame), rate or _STILL_RATE)
                for frame in stream.decode(None):
                    use(found.add_frame(frame), rate or _STILL_RATE)
                _compare(found, video, container, stream)
    except (av.FFmpegError, ValueError) as error:  # PyAV raises ValueError for what it does not support
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise VideoError(path, f"cannot be decoded at frame {len(found.times)}: {reason}") from error
    finally:
        av.logging.set_level(level)
    # Seeking relies on the packets, so they must have predicted the frames that the decoder gives.
    foreseen = video.times == found.times
    return dataclasses.replace(
        entry,
        frames=len(found.times),
        width=found.shown_size[0],
        height=found.shown_size[1],
        rate=float(rate),
        key_frames=video.key_frames if foreseen else 0,
        seek=video.seek if foreseen else "none",
        doubt=complaints[0][2].strip() if complaints else None,
        remark="; ".join(found.remarks) or None,
    )


class _Found:
    """What decoding a file has found.

    Attributes:
        packets: how many packets with data.
        times: of the frames, in order.
        corrupt: how many frames the decoder calls damaged.
        shown_size: width and height of the frames as players show them.
        remarks: what the user should know about them.
    """

    def __init__(self) -> None:
        self.packets = self.corrupt = 0
        self.times: list[int | None] = []
        self.shown_size = (0, 0)
        self.remarks: list[str] = []
        self._size: tuple[int, int] | None = None
        self._screen = Screen()

    def add_frame(self, frame: VideoFrame) -> VideoFrame:
        """The frame as players show it."""
        size = frame.width, frame.height
        self._size = self._size or size
        if size != self._size and not self.remarks:
            first, other = (f"{width}x{height}" for width, height in (self._size, size))
            self.remarks.append(f"from frame {len(self.times)} on, its frames are {other}; they are scaled to {first}")
        self.times.append(frame.pts)
        self.corrupt += frame.is_corrupt
        shown = self._screen.frame(frame)
        self.shown_size = shown.width, shown.height
        return shown


def _compare(found: _Found, video: VideoFile, container: InputContainer, stream: VideoStream) -> None:
    """Raise VideoError if the frames found are not those promised."""
    path, frames = video.path, len(found.times)
    if frames != len(video):
        raise VideoError(path, f"{frames} of the {len(video)} frames in its index can be decoded")
    if container.format.name in _INDEXED:
        # Not `stream.frames`, which also counts chunks without data, and frames that an edit list drops.
        announced = sum(entry.size > 0 for entry in stream.index_entries)
        if found.packets < announced:
            raise VideoError(path, f"has {found.packets} of the {announced} frames that its container announces")
    else:
        expected = _expected(found.times, container, stream)
        if expected - frames > max(_CUT_OFF, _SLACK * expected):
            raise VideoError(path, f"has {frames} frames, but its duration and rate imply {expected:.0f}")
    if found.corrupt:
        raise VideoError(path, f"{found.corrupt} of its {frames} frames are damaged")
    ratio = stream.sample_aspect_ratio
    if ratio and abs(ratio - 1) > _ROUNDED:
        found.remarks.append(f"its pixels are {ratio.numerator}:{ratio.denominator}, not square, and are not rescaled")


def _expected(times: list[int | None], container: InputContainer, stream: VideoStream) -> float:
    """How many frames the time from the first to the last, or the file's duration, promises at their usual interval; 0
    if the intervals vary too much."""
    known = [time for time in times if time is not None]
    if len(known) < 3 or not stream.time_base:
        return 0.0
    steps = np.diff(known)
    usual = float(np.median(steps))  # containers often give another rate
    # Matroska rounds to milliseconds, and a frame may last only a few. Screen recordings pause more than once.
    even = np.abs(steps - usual) <= 0.3 * usual
    if usual <= 0 or even.mean() < _EVEN or (~even).sum() > 2:
        return 0.0
    expected = (known[-1] - known[0]) / usual + 1
    if container.duration and len(container.streams) == 1:  # sound may be longer
        duration = float(Fraction(container.duration, av.time_base) / stream.time_base)
        # Matroska's duration counts from 0, wherever the first frame is.
        begin = max(0, known[0]) if container.format.name == "matroska,webm" else 0
        expected = max(expected, (duration - begin) / usual)
    return expected


def _sha256(paths: Iterable[str]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()
