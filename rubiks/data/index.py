"""Where the frames of a video file are, and whether seeking returns the same ones as decoding from the start.

A file is demuxed once, which is quick compared to decoding. If seeking is not proven exact, it is decoded in order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from rubiks.data.bitstream import Packet
from rubiks.data.packets import packet_reader
from rubiks.data.records import Seek
from rubiks.data.screen import turn_of

# Formats for which decord (0.6.0) and torchcodec return the frames of a decode from the start, if the packets allow it
# too. In AVI, MPEG-TS and MPEG-PS, whose time stamps are incomplete, and for MPEG-4 part 2 and HEVC with B-frames,
# decord returns wrong frames without an error, and with more than 8 bits per channel its colours are slightly off.
_FORMATS = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "flv")
_CODECS = ("h264", "vp8", "vp9")
_PIXELS = ("yuv420p", "yuvj420p", "yuv422p", "yuv444p")
_HALF_HEIGHT = ("yuv420p", "yuvj420p")  # odd heights get different colours
_TURNS = ((True, True, False), (False, True, True), (True, False, True))  # quarter turns, no mirrors


@dataclass(frozen=True, slots=True)
class Entry:
    """A packet where decoding can start.

    Attributes:
        position: its number among the packets.
        time: of its frame.
        target: the time to seek to.
    """

    position: int
    time: int
    target: int


@dataclass(frozen=True, slots=True)
class Index:
    """The frames of a file. Times are in units of the stream's time base.

    Attributes:
        length: how many frames a decode from the start gives; None if the packets do not tell.
        seek: how any frame can be reached.
        steady: whether all frames are known to have one size.
        entries: where decoding can start, in order.
        times: when each frame is shown, in order; empty if that does not identify frames.
        positions: the packet's number for each time.
        packets: the number of each packet, by its time stamp and size.
    """

    length: int | None
    seek: Seek
    steady: bool
    entries: list[Entry]
    times: list[int]
    positions: dict[int, int]
    packets: dict[tuple[int | None, int], int]

    def entry_before(self, time: int) -> Entry:
        """The last entry from which the frame of this time can be decoded."""
        place = bisect_right(self.entries, self.positions[time], key=lambda entry: entry.position)
        while self.entries[place - 1].time > time:
            place -= 1
        return self.entries[place - 1]


def video_stream(container: InputContainer) -> VideoStream | None:
    """The first video that is not a cover picture; None if a file has none."""
    videos = container.streams.video
    return next((stream for stream in videos if not stream.disposition & Disposition.attached_pic), None)


def packets_with_data(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """A file's packets. Those without data, with which AVI and Theora repeat a frame, are left out, as in FFmpeg."""
    return (packet for packet in container.demux(stream) if packet.size)


def decode(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame in order, as coded."""
    for packet in packets_with_data(container, stream):
        yield from packet.decode()
    yield from stream.decode(None)


def read_index(container: InputContainer, stream: VideoStream) -> Index:
    """Demux a file to its end.

    Raises:
        av.FFmpegError: it cannot be demuxed.
    """
    codec = stream.codec_context
    read = packet_reader(codec.codec.canonical_name, codec.extradata, codec.codec.intra_only)
    reordered = bool(codec.has_b_frames)
    rows, once = [], False
    for packet in packets_with_data(container, stream):
        rows.append(
            _Row(packet.pts, packet.dts, packet.size, packet.is_keyframe, packet.is_discard, read(bytes(packet)))
        )
        if packet.is_keyframe:  # a header or a palette for what follows, which a demuxer gives only once
            once = once or packet.has_sidedata("new_extradata") or packet.has_sidedata("palette")
    length = _length(rows, reordered)
    times = [] if length is None or once else _times(rows, length, reordered)
    packets = {(row.pts, row.size): position for position, row in enumerate(rows)}
    if not times or len(packets) < len(rows):
        return Index(length, "none", False, [], [], {}, {})
    layouts = {row.said.layout for row in rows}
    index = Index(
        length,
        "pyav",
        len(layouts - {None}) == 1,
        _entries(rows, stream),
        times,
        {row.pts: position for position, row in enumerate(rows) if row.shown and row.pts is not None},
        packets,
    )
    if _any_library(container, stream, rows, index) and _shown_by_libraries(container, stream, index):
        return replace(index, seek="any")
    return index


class _Row(NamedTuple):
    """A packet with data: times, bytes, what the container says about it, and what it says about itself."""

    pts: int | None
    dts: int | None
    size: int
    is_key: bool
    is_discarded: bool
    said: Packet

    @property
    def shown(self) -> bool:
        return bool(self.said.frames) and not self.is_discarded


def _length(rows: list[_Row], reordered: bool) -> int | None:
    """How many frames are shown; None if the packets do not tell."""
    if not rows or any(row.said.frames is None for row in rows):
        return None
    known = [row.pts for row in rows if row.pts is not None]
    if known and len(known) < len(rows):  # FFmpeg gives no time to frames whose references were cut off
        return None
    # Frames that refer to others before the first are not shown, or are damaged.
    if not rows[0].said.entry or (known and min(known) < known[0]):
        return None
    # A decoder that does not expect frames in a different order from their packets drops some at the start.
    if not reordered and not _increase([row.pts for row in rows if row.shown and row.pts is not None]):
        return None
    return sum(row.shown for row in rows)


def _times(rows: list[_Row], length: int, reordered: bool) -> list[int]:
    """When each frame is shown, in order; empty if that does not identify frames, or is not the decoder's order."""
    times = [row.pts for row in rows if row.shown and row.pts is not None]
    if not times or len(set(times)) < length or not all(row.said.timed for row in rows):
        return []
    shown = sorted((row for row in rows if row.shown), key=lambda row: row.pts or 0)
    places = [row.said.order for row in shown if row.said.order is not None]
    if len(places) == length:
        if not _increase(places):
            return []
    elif reordered and length > 2 and _increase(times):  # like decoding times, but frames are reordered
        return []
    first, latest = min(times), float("-inf")  # latest: of those so far
    for row in rows:
        assert row.pts is not None  # checked by `_length`
        # Times go back if files were joined, or an edit list repeats a part.
        if first < row.pts < latest and (row.said.entry or row.is_discarded):
            return []
        if row.shown:
            latest = max(latest, row.pts)
    return sorted(times)


def _increase(times: list[int]) -> bool:
    return all(first < second for first, second in pairwise(times))


def _entries(rows: list[_Row], stream: VideoStream) -> list[Entry]:
    # Some containers index presentation times, others decoding times.
    indexed = {entry.timestamp for entry in stream.index_entries}
    found = []
    for position, row in enumerate(rows):
        if row.said.entry and row.pts is not None:
            times = [time for time in (row.pts, row.dts) if time is not None]
            target = next((time for time in times if time in indexed), min(times))
            found.append(Entry(position, row.pts, target))
    return found


def _any_library(container: InputContainer, stream: VideoStream, rows: list[_Row], index: Index) -> bool:
    """Whether libraries that seek by the container's key frames and count packets return the same frames.

    With a single key frame there is nothing to seek to, and PyAV decodes in order faster than decord.
    """
    keys = [position for position, row in enumerate(rows) if row.is_key]
    if len(keys) < 2 or len(container.streams.video) > 1:
        return False
    codec = stream.codec_context
    if container.format.name not in _FORMATS or codec.codec.canonical_name not in _CODECS:
        return False
    if codec.pix_fmt not in _PIXELS or not index.steady or index.length != len(rows):
        return False
    if sum(entry.is_keyframe for entry in stream.index_entries) != len(keys):
        return False
    entries = {entry.position for entry in index.entries}
    later = float("inf")  # the earliest time of the packets that follow
    for position in reversed(range(len(rows))):
        time = rows[position].pts
        assert time is not None  # all are shown, and have unique times
        if rows[position].is_key and (position not in entries or later < time):
            return False
        later = min(later, time)
    return True


def _shown_by_libraries(container: InputContainer, stream: VideoStream, index: Index) -> bool:
    """Whether libraries show the first frame as players do: the only turns they know are quarter turns in mp4 files."""
    announced = stream.codec_context.width, stream.codec_context.height
    container.seek(index.entries[0].target, stream=stream)
    try:
        frame = next(decode(container, stream))
    except (av.FFmpegError, ValueError, StopIteration):
        return False
    if (frame.width, frame.height) != announced or (frame.height % 2 and frame.format.name in _HALF_HEIGHT):
        return False
    turn = turn_of(frame)
    return turn is None or (container.format.name == _FORMATS[0] and turn.exact and turn[:3] in _TURNS)
