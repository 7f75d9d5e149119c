"""Videos in a few large tar files: for file systems that are slow to open many small ones.

An index says where in which tar file each video's bytes are, so they can be read in any order: the batches are the same
as from loose files, and an interrupted epoch resumes where it was. `tar` unpacks the shards like any tar file.
"""

from __future__ import annotations

import io
import json
import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from rubiks.data.records import Span, VideoRecord
from rubiks.data.sources.source import Source, Split
from rubiks.errors import InputError
from rubiks.files import write_atomically

INDEX = "index.json"


class Shards(Source):
    """A folder that `write` has filled."""

    missing_is_normal = True  # it was already accepted when the shards were written

    format: Literal["shards"] = "shards"

    @cached_property
    def _index(self) -> dict[str, Any]:
        path = self.classes_path
        try:
            with open(path, encoding="utf-8") as file:
                index = json.load(file)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be read: {error.strerror}; set data.root to a finished folder of `rubiks shard`"
            ) from error
        except ValueError as error:
            raise InputError(f"{path}: expected JSON, got an error: {error}; write the shards again") from error
        if not isinstance(index, dict) or not {"classes", "splits"} <= index.keys():
            raise InputError(
                f"{path}: expected the classes and splits that `rubiks shard` writes; write the shards again"
            )
        return index

    @property
    def classes_path(self) -> str:
        return os.path.join(self.root, INDEX)

    @property
    def classes(self) -> list[str] | None:
        return self._index["classes"]

    def records(self, split: Split) -> tuple[list[VideoRecord], list[str]]:
        if split not in self._index["splits"]:
            raise InputError(f"{self.root}: has no {split} videos; write shards for that list too")
        content = self._index["splits"][split]
        shards = [(os.path.join(self.root, name), size) for name, size in content["shards"]]
        for path, size in shards:
            there = os.path.getsize(path) if os.path.isfile(path) else None
            if there != size:
                got = "no such file" if there is None else f"{there:,} bytes"
                raise InputError(f"{path}: expected a shard of {size:,} bytes, got {got}; copy it again")
        records = [
            VideoRecord(name, label, image=image, span=Span(shards[shard][0], offset, size), listed=(*listed, None)[0])
            for name, label, image, shard, offset, size, *listed in content["videos"]  # older shards have no `listed`
        ]
        return records, content["missing"]


def write(
    folder: Path,
    splits: Mapping[Split, tuple[list[VideoRecord], list[str]]],
    classes: list[str] | None,
    size: int,
) -> Iterator[str]:
    """Write shards of the given splits, and the index last; yields a line for the user after each shard.

    Args:
        folder: made if missing.
        splits: the present videos in the order of their list, and the paths of the missing ones.
        classes: class names in label order; None if the data set does not name them.
        size: bytes after which a shard ends; it ends with a whole video, so it may be longer.

    Raises:
        InputError: the folder holds shards already, a record is not a loose file, or a file cannot be read or written.
    """
    if (folder / INDEX).exists():
        raise InputError(f"{folder}: already contains shards; choose another folder or remove it")
    index: dict[str, Any] = {"classes": classes, "splits": {}}
    for split, (records, missing) in splits.items():
        shards: list[tuple[str, int]] = []
        videos: list[tuple] = []
        names = _names(records)
        for part in _parts(records, size):
            path = folder / f"{split}-{len(shards):05d}.tar"
            _write_tar(path, [(names[number], records[number].path) for number in part])
            with tarfile.open(path) as tar:
                for number, member in zip(part, tar, strict=True):
                    record = records[number]
                    place = len(shards), member.offset_data, member.size
                    videos.append((member.name, record.label, record.image, *place, record.listed))
            shards.append((path.name, path.stat().st_size))
            yield f"{path}: {len(part):,} videos, {shards[-1][1] / 1e6:,.1f} MB"
        index["splits"][split] = {"shards": shards, "videos": videos, "missing": missing}
    write_atomically(folder / INDEX, lambda path: path.write_text(json.dumps(index), encoding="utf-8"))


def _names(records: list[VideoRecord]) -> list[str]:
    """The videos' paths relative to the folder that holds them all."""
    for record in records:
        if record.pattern is not None or record.span is not None:
            raise InputError(f"{record.path}: shards are made of video files or images, not of folders or other shards")
    paths = [os.path.abspath(record.path) for record in records]
    top = os.path.commonpath([os.path.dirname(path) for path in paths]) if paths else ""
    return [Path(path).relative_to(top).as_posix() for path in paths]


def _parts(records: list[VideoRecord], size: int) -> Iterator[range]:
    """The numbers of the records that each shard holds."""
    start = total = 0
    for number, record in enumerate(records):
        try:
            status = os.stat(record.path)
        except OSError as error:
            raise InputError(f"{record.path}: cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would not end
            raise InputError(f"{record.path}: expected a video file, got something else; remove it from the list")
        total += status.st_size
        if total >= size or number == len(records) - 1:
            yield range(start, number + 1)
            start, total = number + 1, 0


def _write_tar(path: Path, members: list[tuple[str, str]]) -> None:
    """Write a tar file; the same videos give the same bytes, as no owner and no time is stored."""

    def write(temporary: Path) -> None:
        with tarfile.open(temporary, "w") as tar:
            for name, source in members:
                try:
                    content = Path(source).read_bytes()
                except OSError as error:
                    raise InputError(f"{source}: cannot be read: {error.strerror}") from error
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))

    write_atomically(path, write)
