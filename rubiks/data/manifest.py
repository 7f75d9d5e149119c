"""What is known about a data set's files: one line of JSON for each, stored with the videos."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rubiks.data.records import CheckedFile, Seek, VideoRecord
from rubiks.errors import InputError, VideoError
from rubiks.files import write_atomically

NAME = "rubiks-manifest.jsonl"
VERSION = 2  # of the meaning of an entry; entries of other versions are not used

_BEGINNING = '{"name": "'
_ANY_NAME = "surrogatepass"  # file names may not be UTF-8
_ANOTHER = "set data.manifest to another name"


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, or one folder of frames.

    Attributes:
        name: path relative to the data set's folder; absolute if it lies elsewhere.
        size: bytes; for a folder, those of all its frames.
        mtime_ns: when it was last changed; for a folder, its newest frame.
        sha256: of the content; empty if a problem came first.
        frames: how many were decoded.
        width, height: pixels.
        rate: frames per second; 0 if it has none.
        key_frames: for a video file, from how many frames decoding can start; 0 if unknown.
        seek: how any frame of it can be reached.
        problem: why it cannot be used; None for a good one.
        doubt: what the decoder complained about although it gave all frames.
        remark: what the user should know about its frames: pixels that are not square, several sizes.
        version: of the rules by which it was examined.
    """

    name: str
    size: int
    mtime_ns: int
    sha256: str = ""
    frames: int = 0
    width: int = 0
    height: int = 0
    rate: float = 0.0
    key_frames: int = 0
    seek: Seek = "none"
    problem: str | None = None
    doubt: str | None = None
    remark: str | None = None
    version: int = VERSION


class Manifest:
    """The entries of a data set, by name. An interrupted check leaves those that it has finished.

    Args:
        root: folder of the data set.
        path: the manifest's file, absolute or relative to root; it need not exist.

    Attributes:
        entries: by name.
        outdated: how many entries of another version the file had; they are left out.

    Raises:
        InputError: the file exists but is not a manifest.
    """

    def __init__(self, root: str | os.PathLike, path: str = NAME) -> None:
        self.root = Path(root)
        self.path = self.root / path
        self.entries: dict[str, Entry] = {}
        self.outdated = 0
        try:
            lines = self.path.read_text(encoding="utf-8", errors=_ANY_NAME).split("\n")
        except FileNotFoundError:
            return
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: the manifest cannot be read: {error}; {_ANOTHER}") from None
        unfinished = lines.pop()  # by an interrupted check
        if not _BEGINNING.startswith(unfinished[: len(_BEGINNING)]):
            lines.append(unfinished)
        for number, line in enumerate(lines, start=1):
            try:
                values = json.loads(line)
                if isinstance(values["name"], str) and values.get("version", 1) != VERSION:
                    self.outdated += 1
                    continue
                entry = Entry(**values)
            except (ValueError, TypeError, KeyError) as error:
                raise InputError(
                    f"{self.path}, line {number}: expected an entry of `rubiks check`, got {line[:60]!r} ({error}); "
                    f"{_ANOTHER}, or remove the file if it is a damaged manifest"
                ) from None
            self.entries[entry.name] = entry

    @property
    def digest(self) -> str | None:
        """SHA-256 of names, sizes, hashes and frame counts: the same wherever the data set lies. None if empty."""
        if not self.entries:
            return None
        total = hashlib.sha256()
        for name, entry in sorted(self.entries.items()):
            total.update(f"{name}\t{entry.size}\t{entry.sha256}\t{entry.frames}\n".encode(errors=_ANY_NAME))
        return total.hexdigest()

    def name_of(self, path: str | os.PathLike) -> str:
        relative = os.path.relpath(path, self.root)
        return os.path.abspath(path) if relative.split(os.sep)[0] == ".." else relative

    def write(self, names: Iterable[str]) -> None:
        """Write the entries of these names, sorted, in place of the file, and forget the others."""
        self.entries = {name: self.entries[name] for name in sorted(set(names)) if name in self.entries}
        text = "".join(map(_line, self.entries.values()))
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors=_ANY_NAME))

    def append(self, entry: Entry) -> None:
        """Add an entry, and write it to the file at once."""
        self.entries[entry.name] = entry
        try:
            with open(self.path, "a", encoding="utf-8", errors=_ANY_NAME) as file:
                file.write(_line(entry))
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}") from None

    def apply(self, records: Sequence[VideoRecord]) -> list[VideoRecord]:
        """The records, with what is known about good videos, so that no reader counts their frames again."""
        if not self.entries:
            return list(records)
        return [self._applied(record) for record in records]

    def _applied(self, record: VideoRecord) -> VideoRecord:
        entry = self.entries.get(self.name_of(record.path))
        if entry is None or entry.problem is not None or record.image:
            return record
        return dataclasses.replace(record, checked=CheckedFile(entry.size, entry.frames, entry.key_frames, entry.seek))


def stamp(record: VideoRecord) -> tuple[int, int]:
    """Size and mtime_ns of an entry; (0, 0) for a missing file, or a folder of frames with gaps."""
    try:
        status = [os.stat(path) for path in record.files]
    except (OSError, VideoError):
        return 0, 0
    return sum(one.st_size for one in status), max((one.st_mtime_ns for one in status), default=0)


def _line(entry: Entry) -> str:
    return json.dumps(dataclasses.asdict(entry), ensure_ascii=False) + "\n"
