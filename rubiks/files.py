"""Writing files and folders completely or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from rubiks.errors import InputError


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Write a file through `write(temporary path)` and a rename, so that it is never there in part.

    Raises:
        InputError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())  # otherwise a power cut may leave an empty file under this name
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):  # the error above is the one to report
            temporary.unlink(missing_ok=True)


def write_files(paths: Sequence[Path], write: Callable[[Path], object]) -> None:
    """Write files of one folder through `write(temporary folder)`, which gives them the same names, and renames.

    The first is the one that is opened: it is there only with all the others.

    Raises:
        InputError: they cannot be written.
    """
    first, *others = paths
    temporary = first.with_name(f".{first.name}.{os.getpid()}.tmp")
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write(temporary)
        for path in paths:
            with open(temporary / path.name, "rb") as file:
                os.fsync(file.fileno())
        if others:
            first.unlink(missing_ok=True)
        for path in (*others, first):
            os.replace(temporary / path.name, path)
    except OSError as error:
        raise InputError(f"{first} cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_folder(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Write a folder through `write(temporary folder)` and a rename, in place of what is there.

    Raises:
        InputError: it cannot be written; what was there is there still.
    """
    shown, path = path, Path(os.path.realpath(path))  # a link stays, and its target is written
    temporary, old = (path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        write(temporary)
        for name in os.listdir(temporary):
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{shown} cannot be written: {error.strerror or error}") from None
    finally:
        if old.exists() and not path.exists():
            os.replace(old, path)
        for left in (temporary, old):
            shutil.rmtree(left, ignore_errors=True)


def check_writable(path: str | os.PathLike) -> None:
    """Raise InputError if `write_atomically` could not write the file; leaves nothing behind."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        trial = folder / f".{path.name}.{os.getpid()}.tmp"
        trial.touch()
        trial.unlink()
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror or error}") from None


def sha256(path: str | os.PathLike) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write text in UTF-8 with `write_atomically`. File names may not be text; such bytes are escaped."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def write_lines(path: str | os.PathLike, lines: Iterable[str]) -> None:
    """Write lines of text with `write_text`."""
    write_text(path, "".join(f"{line}\n" for line in lines))
