"""Rewrites a data set for fast random reading: small frames, each readable without decoding many others."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

from rubiks.data.examine import examine
from rubiks.data.manifest import Entry, Manifest, stamp
from rubiks.data.records import VideoRecord
from rubiks.data.workers import work
from rubiks.data.writers import PATTERN, writer
from rubiks.errors import InputError, VideoError
from rubiks.files import write_atomically


@dataclass(frozen=True)
class Job:
    """One video to prepare.

    Attributes:
        record: the source.
        target: the file, or folder of frames, to write.
        name: the target's name in the manifest.
        form: one of FORMS.
        short_side: maximum of the shorter side, in pixels.
    """

    record: VideoRecord
    target: Path
    name: str
    form: str
    short_side: int

    def written(self, frames: int, path: Path | None = None) -> VideoRecord:
        """The written video as a record with this many frames, at the target or another path."""
        pattern = (frames, PATTERN) if self.form == "frames" else ()
        return VideoRecord(str(path or self.target), self.record.label, *pattern)


def target_name(name: str, form: str, folder: bool = False) -> str:
    """Where a source video is written: its name with another extension; absolute names go into the folder too.

    A dot in the name of a `folder` of frames does not start an extension.
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
    """Write what is not there yet, and the manifest; after a killed call, the next one does the rest.

    Args:
        jobs: one for each video.
        manifest: the new folder's.
        processes: how many videos are read at once.
        seconds: the time limit of one video.
        advance: called for every video.

    Returns:
        Why videos could not be prepared, by source path.
    """
    for left in list(manifest.root.rglob(".*.tmp")):  # left by killed processes
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    manifest.write(manifest.entries)  # drops a half-written last line
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
    # Written files have the source's time stamp.
    return stamp(job.written(entry.frames)) == (entry.size, entry.mtime_ns) and entry.mtime_ns == stamp(job.record)[1]


def _prepare_one(job: Job) -> Entry:
    """Write one video atomically; returns the entry of what was written."""
    mtime_ns = stamp(job.record)[1]
    entries: list[Entry] = []
    folder = job.form == "frames"

    def write(temporary: Path) -> None:
        writing = writer(temporary, job.form, job.short_side)
        try:
            source = examine(job.record, job.name, writing.add)
        finally:
            writing.close()
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
    """Like `write_atomically`, for a folder."""
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


# ---- lists


def write_csv(path: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Write a list for `data=csv`: path and label."""

    def write(temporary: Path) -> None:
        with open(temporary, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)

    write_atomically(path, write)
