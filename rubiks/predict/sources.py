"""The videos that files, folders, patterns and lists name."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from rubiks.data.records import VideoRecord, is_hidden
from rubiks.errors import InputError

# Files in folders with other extensions are not taken for videos; a file that is named may have any.
EXTENSIONS = (
    ".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
)  # fmt: skip


def find(sources: Sequence[str | os.PathLike]) -> list[VideoRecord]:
    """The videos of all sources, in order.

    Args:
        sources: each a video file; a folder, for the videos in it and in its subfolders; a pattern with * and ? and **;
            or a .txt file with a path per line, relative to the working directory or to the list.

    Raises:
        InputError: a folder, pattern or list names no video. Files that do not exist are found out when they are read.
    """
    found: list[VideoRecord] = []
    for source in sources:
        found += [VideoRecord(path, 0) for path in _paths(os.fspath(source))]
    return found


def _paths(source: str) -> list[str]:
    if os.path.isdir(source):
        paths = [os.path.join(folder, name) for folder, _, names in os.walk(source) for name in names]
        videos = sorted(path for path in paths if _is_video(path))
        reason = f"is a folder without videos, files that end in {', '.join(EXTENSIONS)}"
    elif source.endswith(".txt"):
        videos, reason = _listed(Path(source)), "is an empty list; expected the path of a video in each line"
    elif glob.has_magic(source) and not os.path.exists(source):
        videos, reason = sorted(filter(os.path.isfile, glob.glob(source, recursive=True))), "matches no file"
    else:
        return [source]
    if not videos:
        raise InputError(f"{source} {reason}")
    return videos


def _is_video(path: str) -> bool:
    return path.lower().endswith(EXTENSIONS) and not is_hidden(os.path.basename(path))


def _listed(file: Path) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from None
    names = [line.strip() for line in lines if line.strip()]
    return [name if os.path.exists(name) else os.path.join(file.parent, name) for name in names]
