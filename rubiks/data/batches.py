"""Batches samples, and passes batches from a loader's workers to the training process."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from rubiks.data.limits import FOR_PARENT, NoRoom, describe_full, describe_lost, no_room, space
from rubiks.errors import InputError, VideoError

Sample = dict[str, Any] | VideoError


def collate(samples: list[Sample], stack: Callable[[list[Tensor]], Tensor] = default_collate) -> dict[str, Any]:
    """Batch: views uint8 (B, V, T, 3, H, W), label int64 (B, V), index int64 (B,), the libraries that read the videos
    (reader), and the videos that could not be read (bad).

    Unreadable videos make the batch smaller; nothing takes their place. If none could be read, `views` is [].

    The views stay channels last in memory, as decoders and resizing leave them: reordering them here would add a fifth
    to the time of reading a prepared video. A worker's batch is made in shared memory, and not copied again.

    Args:
        samples: from `VideoDataset`.
        stack: makes one tensor of the views.
    """
    good = [sample for sample in samples if not isinstance(sample, VideoError)]
    views = [sample["views"].movedim(2, -1) for sample in good]
    return {
        "views": stack(views).movedim(-1, 3) if views else [],
        "label": torch.tensor([sample["label"] for sample in good], dtype=torch.int64),
        "index": torch.tensor([sample["index"] for sample in good], dtype=torch.int64),
        "reader": [sample["reader"] for sample in good],
        "bad": [(sample.path, sample.reason) for sample in samples if isinstance(sample, VideoError)],
    }


class PinnedCollate:
    """`collate` for a `DataLoader` with workers and ``pin_memory=True``, which reuses shared memory.

    New shared memory for each batch is cleared page by page in the worker, and mapped, read in and unmapped page by
    page in the training process, which holds Python's lock meanwhile: some 25 ms for 38 MB, of which copying takes 7.
    So each worker has a few slots, which it fills in turn and which the training process keeps mapped. A slot is free
    when its turn comes again: the loader gives a worker a new task only when it returns one of its batches, at most
    `prefetch` tasks are under way, and with pinned memory the loader returns a copy.

    Args:
        prefetch: the loader's `prefetch_factor`.
    """

    def __init__(self, prefetch: int) -> None:
        self._slots = [torch.empty(0, dtype=torch.uint8)] * (prefetch + 1)
        self._turn = 0

    def __call__(self, samples: list[Sample]) -> SharedBatch:
        self._turn = (self._turn + 1) % len(self._slots)
        return SharedBatch(collate(samples, self._stack), os.getpid(), self._turn)

    def _stack(self, views: list[Tensor]) -> Tensor:
        size = len(views) * views[0].numel()
        if self._slots[self._turn].numel() < size:
            self._slots[self._turn] = torch.empty(size, dtype=torch.uint8).share_memory_()
        out = self._slots[self._turn][:size].view(len(views), *views[0].shape)
        return torch.stack(views, out=out)


class SharedBatch(dict):
    """A batch whose views are in a worker's slot; `DataLoader` calls `pin_memory` in the receiving process."""

    _mapped: ClassVar[defaultdict[int, dict[int, torch.UntypedStorage]]] = defaultdict(dict)  # by worker and slot

    def __init__(self, batch: dict[str, Any], worker: int, slot: int) -> None:
        super().__init__(batch)
        self.worker, self.slot = worker, slot

    def pin_memory(self) -> dict[str, Any]:
        """The batch with its tensors copied to pinned memory."""
        if isinstance(self["views"], Tensor):
            if self.worker not in self._mapped:
                for gone in [worker for worker in self._mapped if not _runs(worker)]:
                    del self._mapped[gone]
            self._mapped[self.worker][self.slot] = self["views"].untyped_storage()  # stays mapped
        return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in self.items()}


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):  # there is none, or another user's with the same id
        return False
    return True


class Loader(DataLoader):
    """A `DataLoader` that measures how long its user waits for it, and says why its workers fail.

    With workers, it needs ``persistent_workers=True``, a `WorkerCollate` and `start_worker`.

    Attributes:
        waited: seconds waited for the latest batch.

    Raises:
        InputError: from its iterator, if shared memory is full, or a worker was killed from outside or has crashed.
    """

    waited = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # PyTorch declares its own class
        batches = None
        while True:
            start = time.perf_counter()
            try:
                if batches is None:
                    with _without_interrupts(), _own_handler_of_children():
                        batches = super().__iter__()
                self._check_workers()
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:
                workers = getattr(self._iterator, "_workers", [])
                for ended in wait([worker.sentinel for worker in workers], timeout=1.0):
                    next(worker for worker in workers if worker.sentinel == ended).join()
                self._check_workers()
                reason = no_room(error)
                if reason is None:
                    raise
                raise self._full(NoRoom(reason, 0, space())) from None
            if batch is None:
                return
            if isinstance(batch, NoRoom):
                raise self._full(batch)
            self.waited = time.perf_counter() - start
            yield batch

    def _check_workers(self) -> None:
        """If a signal has ended a worker, kill the others, which PyTorch would wait for, and raise InputError."""
        workers = getattr(self._iterator, "_workers", [])
        for worker in workers:
            if worker.exitcode is not None and worker.exitcode < 0:
                for other in workers:
                    other.kill()
                raise InputError(describe_lost(worker.pid, -worker.exitcode)) from None

    def _full(self, found: NoRoom) -> InputError:
        batches = self.num_workers * ((self.prefetch_factor or 0) + 1)
        return InputError(describe_full(found.reason, found.size, found.space, batches))


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Block the signals that workers leave to this process, until they can; they inherit the block."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _own_handler_of_children() -> Iterator[None]:
    """Keep the current handler of SIGCHLD.

    Once a worker has ended, PyTorch's handler raises an error wherever the process happens to be: in an optimiser step,
    while writing a checkpoint, or halfway through a batch from another worker. Without it a lost worker is noticed
    before the next batch, or, by PyTorch's own check, within five seconds of waiting for one.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        in_main = threading.current_thread() is threading.main_thread()  # other threads may not set handlers
        if in_main and handler is not None:  # None: not set by Python
            signal.signal(signal.SIGCHLD, handler)
