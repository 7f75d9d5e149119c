"""Explains to the user when the machine's limits stop a loader's workers: full shared memory, and kills."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from rubiks.errors import VideoError

_SHM = "/dev/shm"  # where Linux keeps shared memory
_CRASHES = (signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGABRT)  # caused by the process itself
_REMEDY = "fewer loader processes (data.workers=N) or a smaller batch (recipe.batch_size; in evaluation, batch_size)"


class Space(NamedTuple):
    """Bytes of /dev/shm."""

    total: int
    free: int


def space() -> Space | None:
    """The space of /dev/shm; None if there is none."""
    try:
        found = shutil.disk_usage(_SHM)
    except OSError:
        return None
    return Space(found.total, found.free)


@dataclass(frozen=True)
class NoRoom:
    """What a worker returns instead of a batch if there is not enough shared memory for it.

    Attributes:
        reason: the system's message.
        size: bytes of the batch's views.
        space: of /dev/shm, as the worker found it.
    """

    reason: str
    size: int
    space: Space | None


class WorkerCollate:
    """A collate function for a loader's workers, which returns `NoRoom` if there is not enough shared memory.

    All of a batch's tensors are in shared memory before it is returned. Otherwise a thread of the worker would move the
    small ones there; if that fails, the batch is lost, and the training process waits for it forever.

    Args:
        collate: makes a batch of samples.
    """

    def __init__(self, collate: Callable[[list[Any]], dict[str, Any]]) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> dict[str, Any] | NoRoom:
        try:
            batch = self.collate(samples)
            for value in batch.values():
                if isinstance(value, Tensor):
                    value.share_memory_()
        except (RuntimeError, OSError) as error:
            reason = no_room(error)
            if reason is None:
                raise
            size = sum(sample["views"].nbytes for sample in samples if not isinstance(sample, VideoError))
            return NoRoom(reason, size, space())
        return batch


# A terminal (Ctrl-C, or when it closes) and Slurm (--signal=USR1) may send these to all processes. The parent handles
# them, and may still want the workers' batches.
FOR_PARENT = signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


def start_worker(number: int) -> None:
    """A `DataLoader`'s `worker_init_fn`: sets how a worker handles signals."""
    # PyTorch's crash handlers print extra lines; the other handlers are the parent's, inherited by forking.
    for number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    for number in FOR_PARENT:
        signal.signal(number, signal.SIG_IGN)


def no_room(error: BaseException) -> str | None:
    """The system's message if shared memory could not be allocated; None for other errors."""
    if isinstance(error, OSError):
        return os.strerror(errno.ENOSPC) if error.errno == errno.ENOSPC else None
    # PyTorch gives the system's error number only in its text.
    text = r"unable to (?:allocate shared memory|mmap|write to file|resize file|stretch file).*\((\d+)\)"
    found = re.search(text, str(error))
    return os.strerror(int(found[1])) if found else None


def describe_full(reason: str, size: int, left: Space | None, batches: int) -> str:
    """The message for full shared memory.

    Args:
        reason: the system's message.
        size: bytes of a batch; 0 if unknown.
        left: the space of /dev/shm.
        batches: how many are there at a time, at most.
    """
    room = "" if left is None else f"{_SHM} has {_mib(left.total)}, {_mib(left.free)} of it free; "
    room += f"a batch takes {_mib(size)}, and " if size else ""
    return (
        f"shared memory is full ({reason}): {room}up to {batches} batches are held at a time. Give a container more "
        f"with docker run --ipc=host or --shm-size=8g, or use {_REMEDY}; data.workers=0 needs none"
    )


def describe_lost(process: int, number: int) -> str:
    """The message for a worker that a signal has ended."""
    name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
    who = f"a loader process (id {process})"
    if number == signal.SIGBUS:  # a page of a mapped file is not available
        left = space()
        room = "" if left is None else f": {_SHM} has {_mib(left.total)}, {_mib(left.free)} of it free"
        return (
            f"{who} died of a bus error, probably because shared memory is full{room}. Give a container more with "
            f"docker run --ipc=host or --shm-size=8g, or use {_REMEDY}"
        )
    if number in _CRASHES:
        return (
            f"{who} crashed ({name}), as decoders do on some damaged videos: rubiks check finds them, and "
            "data.reader=NAME selects another library to read them"
        )
    if number != signal.SIGKILL:
        return f"{who} was killed from outside ({name})"
    return (
        f"{who} was killed from outside (SIGKILL), usually by the system for lack of memory; all processes here may "
        f"use {memory() / 2**30:,.1f} GiB in total: use {_REMEDY}"
    )


def memory() -> int:
    """Bytes that the processes here may use together: the machine's memory, or a container's limit."""
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
