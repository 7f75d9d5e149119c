"""A data set anew in a form that is quick to read at random: small frames, each to be had without many others."""

from __future__ import annotations

import contextlib
import csv
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePath
from typing import NamedTuple

import av
from av.video.frame import PictureType, VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from rubiks.data.examine import examine
from rubiks.data.jpegs import BRAND
from rubiks.data.manifest import Entry, Manifest, stamp
from rubiks.data.records import VideoRecord
from rubiks.data.workers import work
from rubiks.errors import InputError, VideoError
from rubiks.files import write_atomically

PATTERN = "{:06d}.jpg"  # of the form frames, TSM's


class Coding(NamedTuple):
    """How the frames of a video file are written; the same frames give the same bytes.

    Attributes:
        codec, pixels: FFmpeg's names.
        options: of the codec.
        brand: of the file (`rubiks.data.jpegs`).
        step: width and height are multiples of it.
    """

    codec: str
    pixels: str
    options: dict[str, str]
    brand: str
    step: int


# One thread and no macroblock tree give the same bytes of H.264 always: with the tree, six of 6,000 encodings of the
# same frames differed, without none of 12,000.
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
_JPEG_QUALITY = 95  # of the form frames


@dataclass(frozen=True)
class Job:
    """One video to prepare.

    Attributes:
        record: the source.
        target: the file, or folder of frames, to write.
        name: the target's name in the manifest.
        form: one of FORMS.
        short_side: pixels that the shorter side has at most.
    """

    record: VideoRecord
    target: Path
    name: str
    form: str
    short_side: int

    def written(self, frames: int, path: Path | None = None) -> VideoRecord:
        """So many frames as a record, at the target or another path."""
        pattern = (frames, PATTERN) if self.form == "frames" else ()
        return VideoRecord(str(path or self.target), self.record.label, *pattern)


def target_name(name: str, form: str, folder: bool = False) -> str:
    """Where a video of the source goes: its name with another extension, and an absolute one in the folder too.

    What follows a dot in the name of a `folder` of frames is no extension.
    """
    path = PurePath(name)
    path = path.relative_to(path.anchor)
    stem = path if folder else path.with_suffix("")
    return str(stem if form == "frames" else stem.with_name(stem.name + ".mp4"))


def prepare(
    jobs: Sequence[Job],
    manifest: Manifest,
    processes: int,
    seconds: float,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, str]:
    """Write what is not there yet, and the manifest; a call that was killed is made good by the next.

    Args:
        jobs: one for each video.
        manifest: that of the new folder.
        processes: how many videos are read at once.
        seconds: the time limit of one video.
        advance: called for every video.

    Returns:
        Why videos could not be prepared, by the source's path.
    """
    for left in list(manifest.root.rglob(".*.tmp")):  # of processes that were killed
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    manifest.write(manifest.entries)  # without a last line half-written
    todo = []
    for job in jobs:
        if _is_done(job, manifest.entries.get(job.name)):
            advance()
        else:
            todo.append(job)
    bad: dict[str, str] = {}
    for job, entry in work(_prepare_one, todo, lambda job: job.record.path, processes, seconds):
        if isinstance(entry, VideoError):
            bad[job.record.path] = entry.reason
        else:
            manifest.append(entry)
        advance()
    manifest.write(job.name for job in jobs)
    return bad


def _is_done(job: Job, entry: Entry | None) -> bool:
    if entry is None:
        return False
    # What is written has the source's time stamp.
    return stamp(job.written(entry.frames)) == (entry.size, entry.mtime_ns) and entry.mtime_ns == stamp(job.record)[1]


def _prepare_one(job: Job) -> Entry:
    """Write one video, whole or not at all; the entry of what was written."""
    mtime_ns = stamp(job.record)[1]
    entries: list[Entry] = []
    folder = job.form == "frames"

    def write(temporary: Path) -> None:
        writer = _FramesWriter(temporary, job) if folder else _VideoWriter(temporary, job)
        try:
            source = examine(job.record, job.name, writer.add)
        finally:
            writer.close()
        record = job.written(source.frames, temporary)
        for file in record.files:
            os.utime(file, ns=(mtime_ns, mtime_ns))
        entry = examine(record, job.name)
        if entry.frames != source.frames:
            raise VideoError(job.record.path, f"has {source.frames} frames, of which {entry.frames} were written")
        entries.append(entry)

    (_write_folder if folder else write_atomically)(job.target, write)
    return entries[0]


def _write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """As `write_atomically`, for a folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        shutil.rmtree(path, ignore_errors=True)  # one that the manifest does not know
        os.rename(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- writers


def _smaller(width: int, height: int, short_side: int, step: int = 1) -> tuple[int, int]:
    """Width and height with the shorter side at most so long, both rounded down to a multiple of `step`."""
    scale = min(1, short_side / min(width, height))
    width, height = (max(step, int(side * scale + 1e-6) // step * step) for side in (width, height))
    return width, height


class _VideoWriter:
    def __init__(self, path: Path, job: Job) -> None:
        self._coding = _CODINGS[job.form]
        self._short_side = job.short_side
        options = {"fflags": "+bitexact", "brand": self._coding.brand}
        self._container = av.open(str(path), "w", format="mp4", options=options)
        self._stream: av.VideoStream | None = None
        self._frames = 0

    def add(self, frame: VideoFrame, rate: Fraction) -> None:
        codec, pixels, options, _, step = self._coding
        width, height = _smaller(frame.width, frame.height, self._short_side, step)
        jpeg = codec == "mjpeg"
        small = frame.reformat(
            width,
            height,
            format=pixels,
            interpolation=Interpolation.BILINEAR,
            # JPEG knows one way to code colours.
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
            # How colours were coded, as readers need it.
            context.color_range, context.colorspace = small.color_range, small.colorspace
        small.pts, small.time_base, small.pict_type = self._frames, 1 / rate, PictureType.NONE
        self._frames += 1
        with _write_errors():
            self._container.mux(self._stream.encode(small))

    def close(self) -> None:
        with _write_errors():
            if self._stream is not None:
                self._container.mux(self._stream.encode())
            self._container.close()


@contextlib.contextmanager
def _write_errors() -> Iterator[None]:
    """FFmpeg's errors in writing, told apart from those of a source that cannot be decoded."""
    try:
        yield
    except av.FFmpegError as error:
        raise InputError(f"a video cannot be written: {error.strerror}; check --out and its disk") from None


class _FramesWriter:
    def __init__(self, folder: Path, job: Job) -> None:
        self._folder = folder
        self._short_side = job.short_side
        self._frames = 0

    def add(self, frame: VideoFrame, rate: Fraction) -> None:
        width, height = _smaller(frame.width, frame.height, self._short_side)
        image = frame.reformat(width, height, format="rgb24", interpolation=Interpolation.BILINEAR).to_image()
        self._frames += 1
        image.save(self._folder / PATTERN.format(self._frames), quality=_JPEG_QUALITY, subsampling=0)

    def close(self) -> None:
        pass


# ---- lists


def write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """A list of `data=csv`: path and label."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_atomically(path, write)
