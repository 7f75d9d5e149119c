"""The folders of training runs: what is in them, which is the newest, which can be resumed, and which are in use.

outputs/NAME/config.yaml                 the whole configuration
outputs/NAME/choices.txt                 the command line's choices, one a line
outputs/NAME/checkpoints/best.ckpt       best validation top-1
outputs/NAME/checkpoints/last.ckpt       newest, to resume from
outputs/NAME/checkpoints/previous.ckpt   the one before, in case the newest is damaged
outputs/NAME/finished.json               how training ended; missing until then
outputs/NAME/.lock                       the process that trains
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml

from rubiks.errors import InputError
from rubiks.models import checkpoint
from rubiks.models.checkpoint import SavedNetwork

log = logging.getLogger(__name__)

OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Run:
    """One training run's folder."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def choices(self) -> Path:
        return self.folder / "choices.txt"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        return self.folder / checkpoint.BEST

    @property
    def last(self) -> Path:
        return self.folder / checkpoint.LAST

    @property
    def previous(self) -> Path:
        return self.checkpoints / "previous.ckpt"

    @property
    def finished(self) -> Path:
        return self.folder / "finished.json"

    @property
    def lock(self) -> Path:
        return self.folder / ".lock"

    def epochs_finished(self) -> int | None:
        """Number of epochs if the run is finished, else None."""
        if not self.finished.is_file():
            return None
        try:
            return int(json.loads(self.finished.read_text())["epochs"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{self.finished} is damaged; remove it to resume from the run's checkpoint") from None

    def matches(self, data: str, **chosen: str) -> bool:
        """Whether the run was trained on this data set, with the tier and variant if they are given."""
        if not self.config.is_file():
            return False
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            return all(config[key]["name"] == name for key, name in {"data": data, **chosen}.items())
        except (yaml.YAMLError, KeyError, TypeError):
            return False

    def read_last(self) -> SavedNetwork | None:
        """The state to resume from: the newest, or the one before if that is damaged; None for a new run.

        Raises:
            InputError: there are files, but none can be read.
        """
        present = [path for path in (self.last, self.previous) if path.is_file()]
        while present:
            try:
                return checkpoint.read(present.pop(0))
            except InputError as error:
                if not present:
                    raise InputError(f"{error}; remove {self.folder} to train from scratch") from None
                log.warning("%s; resuming from %s", error, present[0])
        return None

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """Make the folder, and remove it at the end if nothing is in it.

        Raises:
            InputError: it cannot be made.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"the run's folder {self.folder} cannot be created: {error.strerror}") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Like `made`, and keep other processes from training in it. The lock ends with the process, even if killed.

        Raises:
            InputError: also where another process trains in it.
        """
        with self.made(), self._open_lock() as file:
            _lock(file, self)
            for left in self.checkpoints.glob(".*.tmp"):  # from a process that was killed while writing
                left.unlink(missing_ok=True)
            try:
                yield
            finally:
                if os.listdir(self.folder) == [self.lock.name]:  # nothing was written
                    self.lock.unlink()

    def _open_lock(self) -> IO[str]:
        try:
            return self.lock.open("a+")
        except OSError as error:
            raise InputError(f"the run's folder {self.folder} cannot be written: {error.strerror}") from None


def _lock(file: IO[str], run: Run) -> None:
    # The lock belongs to the process, not to the open file: forked processes do not keep it.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise InputError(f"{run.folder} is in use by {owner}; wait until it ends, or choose another run=") from None
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s): make sure that no other process trains in it", run.folder, error)
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def new(name: str) -> Run:
    """A new folder of this name, with a number appended if the name is taken.

    Raises:
        InputError: it cannot be made.
    """
    number = 1
    while True:
        folder = OUTPUTS / (name if number == 1 else f"{name}-{number}")
        try:
            OUTPUTS.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if not OUTPUTS.is_dir():
                raise InputError(f"the run's folder {folder} cannot be created: {OUTPUTS} is not a folder") from None
            number += 1
        except OSError as error:
            raise InputError(f"the run's folder {folder} cannot be created: {error.strerror}") from None
        else:
            return Run(folder)


def newest(data: str, outputs: Path = OUTPUTS, **chosen: str) -> Run | None:
    """The run on this data set, with this tier and variant if given, whose checkpoint was written last."""
    folders = [path for path in outputs.iterdir() if path.is_dir()] if outputs.is_dir() else []
    written = {}
    for run in map(Run, folders):
        path = checkpoint.in_run(run.folder)
        if path is not None and run.matches(data, **chosen):
            written[run] = path.stat().st_mtime
    return max(written, key=lambda run: written[run], default=None)
