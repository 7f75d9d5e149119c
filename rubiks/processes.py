"""What a process started by a parent (`rubiks.parent`) reports to it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from rubiks.errors import InputError
from rubiks.files import write_atomically
from rubiks.stopping import Interrupted

REPORTS = "RUBIKS_REPORTS"  # the folder for reports, in the environment of the processes
PARENT = "RUBIKS_PARENT"
RUN = "RUBIKS_RUN"  # the run's folder, chosen and locked by the parent


@dataclass(frozen=True)
class Report:
    """Why a process has ended.

    Attributes:
        kind: input (for the user to fix), signal, lost (another process does not answer) or defect.
        text: the message or traceback.
        signal: its number, if a signal ended the process.
    """

    kind: str
    text: str
    signal: int = 0


def is_child() -> bool:
    """Whether this process was started by `rubiks.parent.run`."""
    return REPORTS in os.environ


def given_run() -> Path | None:
    """The run's folder, as chosen by the parent; None in other processes."""
    return Path(os.environ[RUN]) if RUN in os.environ else None


def report(error: BaseException) -> None:
    """In a child: tell the parent why this process ends."""
    if isinstance(error, InputError):
        found = Report("input", str(error))
    elif isinstance(error, Interrupted):
        found = Report("signal", error.message, error.signal)
    else:
        kind = "lost" if _is_lost(error) else "defect"
        found = Report(kind, "".join(traceback.format_exception(error)))
    path = Path(os.environ[REPORTS], os.environ["LOCAL_RANK"])
    with contextlib.suppress(InputError):
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(asdict(found))))


class Beat:
    """Tells the parent that this process makes progress, so that it notices when all of them wait for one.

    Each call adds one to a count; the parent looks for the lowest count. A call costs a few microseconds.
    """

    def __init__(self) -> None:
        self._path = beat_path(Path(os.environ[REPORTS]), int(os.environ["LOCAL_RANK"]))
        self._file: int | None = None
        self._count = 0

    def __call__(self) -> None:
        if self._file is None:  # what comes before the first call may take long
            self._file = os.open(self._path, os.O_CREAT | os.O_WRONLY)
        self._count += 1
        os.pwrite(self._file, self._count.to_bytes(8, "little"), 0)

    def end(self) -> None:
        """Stop counting: what follows may take long."""
        if self._file is not None:
            os.close(self._file)
            self._path.unlink()


def beat_path(reports: Path, rank: int) -> Path:
    return reports / f"beat-{rank}"


def _is_lost(error: BaseException) -> bool:
    """Whether this is PyTorch's error for another process that is gone or does not answer."""
    words = r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out|ProcessGroup|TCPStore|DistStore"
    chain = error
    while chain is not None:
        if isinstance(chain, RuntimeError) and re.search(words, str(chain), re.IGNORECASE):
            return True
        chain = chain.__cause__ or chain.__context__  # type: ignore[assignment]
    return False


def follow_parent() -> None:
    """In a child: end this process, and its loader processes, when the parent is gone."""
    parent = int(os.environ[PARENT])

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()
