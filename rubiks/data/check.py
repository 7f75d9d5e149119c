"""Whether every video of a data set is what its lists and its container promise."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import BinaryIO

import av
import av.logging
import numpy as np
from av.video.frame import VideoFrame

from rubiks.data.decode import ANY_TAGS, FrameFolder, ImageFile, VideoFile, open_video
from rubiks.data.jpegs import JpegVideo
from rubiks.data.manifest import Entry, Manifest, stamp
from rubiks.data.records import VideoRecord
from rubiks.data.sources import Split
from rubiks.data.workers import LostWorkerError, work
from rubiks.errors import VideoError

# Called with every frame, upright, and the frames a second.
Use = Callable[[VideoFrame, Fraction], object]

_STILL_RATE = Fraction(30)  # folders of frames name none
# Frames that duration x rate may promise and the video not hold: rates of uneven videos are averages.
_SLACK = 0.1


def check(
    records: Sequence[VideoRecord],
    manifest: Manifest,
    processes: int,
    seconds: float,
    advance: Callable[[], object] = lambda: None,
    whole: bool = True,
) -> None:
    """Examine the records that the manifest does not know as they are, and add them to it as they are done.

    Args:
        records: the videos; repeats count once.
        manifest: where entries come from and go to.
        processes: how many videos are read at once.
        seconds: the time limit of one video.
        advance: called for every video.
        whole: whether the records are all that there are, so that entries of others are to be forgotten.
    """
    by_name = {manifest.name_of(record.path): record for record in records}
    manifest.write(manifest.entries)  # without what an interrupted check left half-written
    todo = []
    for name, record in by_name.items():
        entry = manifest.entries.get(name)
        if entry is not None and (entry.size, entry.mtime_ns) == stamp(record):
            advance()
        else:
            todo.append((record, name))
    for (record, name), found in work(_examine, todo, lambda item: item[0].path, processes, seconds):
        if isinstance(found, VideoError):
            # A lost one may be good where there is more time or memory: with this time stamp it is read again.
            size, mtime_ns = stamp(record)
            lost = isinstance(found, LostWorkerError)
            found = Entry(name, size, -1 if lost else mtime_ns, problem=found.reason)
        manifest.append(found)
        advance()
    manifest.write(by_name if whole else manifest.entries)


def examine(record: VideoRecord, name: str, use: Use = lambda frame, rate: None) -> Entry:
    """Decode a video to its end and compare it with what its container promises.

    Args:
        record: the video.
        name: of the entry.
        use: called with each frame in order; what it makes of them is good only if this function returns.

    Raises:
        VideoError: it cannot be read, is cut short, or holds other frames than it promises.
    """
    size, mtime_ns = stamp(record)
    with open_video(record) as video:
        if isinstance(video, VideoFile):
            digest, can_seek = _sha256(record.files), video.can_seek
            frames, shape, rate, doubt = _decode(video, use)
        else:
            rate = video.rate if isinstance(video, JpegVideo) else Fraction(0)
            shape, doubt, can_seek = _look_at_images(video, rate, use), None, False
            digest, frames = _sha256(record.files), len(video)
    return Entry(name, size, mtime_ns, digest, frames, *shape, float(rate), can_seek, None, doubt)


def _examine(item: tuple[VideoRecord, str]) -> Entry:
    return examine(*item)


def _look_at_images(video: JpegVideo | FrameFolder | ImageFile, rate: Fraction, use: Use) -> tuple[int, int]:
    """Width and height."""
    shape = None
    for index in range(len(video)):
        image = video.frames([index])[0].permute(1, 2, 0).numpy()
        if shape not in (None, image.shape):
            raise VideoError(video.path, f"frame {index} has another size than those before it")
        shape = image.shape
        use(VideoFrame.from_ndarray(image, format="rgb24"), rate or _STILL_RATE)
    assert shape is not None
    return shape[1], shape[0]


def _decode(video: VideoFile, use: Use) -> tuple[int, tuple[int, int], Fraction, str | None]:
    """Frames, width and height, rate, and the decoder's first complaint."""
    path = video.path
    promised = _promised_bytes(path)
    missing = 0 if promised is None else promised - os.path.getsize(path)
    if missing > 0:
        raise VideoError(path, f"is cut short: {missing:,} of the {promised:,} bytes that its container promises miss")
    level = av.logging.get_level()
    av.logging.set_level(av.logging.ERROR)
    frames = corrupt = packets = 0
    shape = None
    try:
        with av.logging.Capture(local=True) as complaints, av.open(path, "r", **ANY_TAGS) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            found = stream.average_rate or stream.guessed_rate or Fraction(0)
            rate = Fraction(found.numerator, found.denominator)  # PyAV has a type of its own from 19 on
            for packet in container.demux(stream):
                packets += bool(packet.size)
                for frame in packet.decode():
                    if shape not in (None, (frame.width, frame.height)):
                        raise VideoError(path, f"changes its size at frame {frames}")
                    shape = frame.width, frame.height
                    corrupt += frame.is_corrupt
                    frames += 1
                    use(_upright(frame), rate or _STILL_RATE)
            announced = stream.frames
            seconds = float(stream.duration * stream.time_base) if stream.duration and stream.time_base else 0.0
            if not seconds and container.duration and len(container.streams) == 1:
                seconds = container.duration / av.time_base
    except av.FFmpegError as error:
        raise VideoError(path, f"cannot be decoded at frame {frames}: {error.strerror}") from error
    except ValueError as error:  # PyAV's own, for what it does not support
        raise VideoError(path, f"cannot be decoded at frame {frames}: {str(error).splitlines()[0]}") from error
    finally:
        av.logging.set_level(level)
    expected = seconds * rate
    if shape is None or frames != len(video):
        raise VideoError(path, f"{frames} of the {len(video)} frames of its index can be decoded")
    if packets < announced:
        raise VideoError(path, f"holds {packets} of the {announced} frames that its container promises")
    if expected - frames > max(2, _SLACK * expected):
        raise VideoError(path, f"holds {frames} frames, but its duration and rate promise {expected:.0f}")
    if corrupt:
        raise VideoError(path, f"{corrupt} of its {frames} frames are damaged")
    doubt = complaints[0][2].strip() if complaints else None
    return frames, shape, rate, doubt


def _upright(frame: VideoFrame) -> VideoFrame:
    """As players show it, and the readers return it."""
    if not frame.rotation:
        return frame
    image = np.rot90(frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False), round(frame.rotation / 90))
    return VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")


def _sha256(paths: Iterable[str]) -> str:
    total = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                total.update(block)
    return total.hexdigest()


# ---- how long a file should be, by its container


def _promised_bytes(path: str) -> int | None:
    """Bytes that an MP4, Matroska, WebM or AVI file says it has; None for others and those that do not say."""
    with open(path, "rb") as file:
        head = file.read(12)
        file.seek(0)
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide"):
            return _end_of_boxes(file)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _end_of_segment(file)
        if head[:4] == b"RIFF" and head[8:] == b"AVI ":
            return 8 + int.from_bytes(head[4:8], "little") if head[4:8] != bytes(4) else None
    return None


def _end_of_boxes(file: BinaryIO) -> int | None:
    end = 0
    while head := file.read(8):
        if len(head) < 8:
            return end + 8
        size, kind = struct.unpack(">I4s", head)
        if size == 0:  # to the end of the file
            return None
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        if size < 8 or not kind.isalnum():  # something else follows the video
            return end
        end += size
        file.seek(end)
    return end


def _end_of_segment(file: BinaryIO) -> int | None:
    file.seek(4)
    header = _ebml_size(file)
    if header is None:
        return None
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return None
    size = _ebml_size(file)
    return None if size is None else file.tell() + size


def _ebml_size(file: BinaryIO) -> int | None:
    """A size as EBML writes it: as many bytes follow the first as that begins with zero bits. None for "unknown"."""
    first = file.read(1)
    if not first or not first[0]:
        return None
    following = 8 - first[0].bit_length()
    value = int.from_bytes(bytes([first[0] & (1 << (7 - following)) - 1]) + file.read(following), "big")
    return None if value == (1 << 7 * (following + 1)) - 1 else value


# ---- the data set as a whole


def repeated(lists: Mapping[Split, Sequence[VideoRecord]], manifest: Manifest) -> list[list[tuple[Split, str]]]:
    """Groups of (split, path) with the same content, also where a list names one file twice."""
    groups: dict[str, list[tuple[Split, str]]] = {}
    for split, records in lists.items():
        for record in records:
            entry = manifest.entries.get(manifest.name_of(record.path))
            if entry is not None and entry.sha256:
                groups.setdefault(entry.sha256, []).append((split, record.path))
    return [group for group in groups.values() if len(group) > 1]


# Videos in the official lists, by the data set's name and its number of classes. Kinetics-400: the csv files beside the
# copy that CVDF hosts; those of 600 and 700 have been released in several versions, so nothing is said of them. The
# test lists of UCF101 and HMDB51 are the validation lists here.
_OFFICIAL: dict[tuple[str, int | None], dict[str, int]] = {
    ("ssv1", 174): {"train": 86_017, "val": 11_522, "test": 10_960},
    ("ssv2", 174): {"train": 168_913, "val": 24_777, "test": 27_157},
    ("jester", 27): {"train": 118_562, "val": 14_787, "test": 14_743},
    ("kinetics", 400): {"train": 246_534, "val": 19_906},
    ("ucf101-split1", 101): {"train": 9_537, "val": 3_783},
    ("ucf101-split2", 101): {"train": 9_586, "val": 3_734},
    ("ucf101-split3", 101): {"train": 9_624, "val": 3_696},
    **{(f"hmdb51-split{split}", 51): {"train": 3_570, "val": 1_530} for split in (1, 2, 3)},
}


def official_total(name: str, num_classes: int | None, split: str) -> int | None:
    """How many videos the official list of a split names; None where that is not known.

    Args:
        name: of the data set, data.name.
        num_classes: how many classes it has; a part of a data set, or another edition, has another number.
        split: train, val or test.
    """
    return _OFFICIAL.get((name, num_classes), {}).get(split)
