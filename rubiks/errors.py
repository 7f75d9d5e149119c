"""The errors raised for bad input, as opposed to bugs in the program."""

from __future__ import annotations

import errno
from pathlib import Path


class InputError(Exception):
    """A file, key or value that the user gave cannot be used.

    The message is complete: it names the file, key or value, what was expected, what was found, and what to do.
    The commands print it without a traceback and exit with status 2.
    """


class VideoError(InputError):
    """One video cannot be read.

    Attributes:
        path: the file or frame folder.
        reason: what is wrong with it, in one line.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both in args, so that the error survives pickling between processes
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def readable(error: BaseException) -> BaseException:
    """The error itself, or for a full disk the `InputError` that says so."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = error.filename or Path.cwd()
        return InputError(f"no space left on the device that holds {where}; free some space and start again")
    return error
