"""What processes that run together tell one another: that they live, how far they are, and why they fail.

They write it into a TCPStore of PyTorch, which is held by what starts the processes (`rubiks.parent`, torchrun's agent)
or else by process 0. It needs no process group.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch.distributed as dist

from rubiks.errors import InputError


class Beat(NamedTuple):
    """A sign of life.

    Attributes:
        host: name of the machine.
        number: how many signs of life the process has given.
        steps: a number that grows with its progress; None while it does nothing that others wait for.
        done: it ends, and reads the board no more.
    """

    host: str
    number: int
    steps: int | None = None
    done: bool = False


@dataclass(frozen=True)
class Report:
    """Why a process fails.

    Attributes:
        kind: input (for the user to fix), signal, killed, lost (another process does not answer) or defect.
        text: the message or traceback.
        signal: its number, if a signal ended the process.
    """

    kind: str
    text: str
    signal: int = 0


class Board:
    """The store, as the processes of one run see it. Its methods raise RuntimeError if the store is gone.

    Args:
        store: a connection to the store; not shared with code that waits for keys.
        size: how many processes there are.
        number: of the run, if the same processes do several, one after the other.
    """

    def __init__(self, store: dist.Store, size: int, number: int = 0) -> None:
        self.size = size
        self._store = dist.PrefixStore(f"rubiks/{number}", store)

    def beat(self, rank: int, beat: Beat) -> None:
        """Replace a process's sign of life."""
        self._store.set(f"beat/{rank}", json.dumps(beat))

    def beats(self, ranks: Iterable[int]) -> dict[int, Beat]:
        """The last signs of life of those of these processes that have given any."""
        return {rank: Beat(*json.loads(value)) for rank, value in self._present("beat", ranks).items()}

    def report(self, rank: int, report: Report) -> None:
        """Say why a process fails; the first reason stays."""
        key = f"report/{rank}"
        if not self._store.check([key]):
            self._store.set(key, json.dumps(asdict(report)))
            self._store.add("reports", 1)

    def reports(self) -> dict[int, Report]:
        """The reports, by rank."""
        if not self._store.add("reports", 0):
            return {}
        found = self._present("report", range(self.size))
        return {rank: Report(**json.loads(value)) for rank, value in found.items()}

    def end(self, status: int) -> bool:
        """Tell all processes to exit with a status; False if they have been told before."""
        if self._store.add("ends", 1) > 1:
            return False
        self._store.set("end", str(status))
        return True

    def ended(self) -> int | None:
        """The status to exit with, if the processes have been told to."""
        return int(self._store.get("end")) if self._store.check(["end"]) else None

    def share(self, key: str, value: object) -> None:
        """Give the others a value that JSON can hold."""
        self._store.set(f"shared/{key}", json.dumps(value))

    def shared(self, key: str, limit: float) -> Any:
        """What another process shares, once it does.

        Raises:
            InputError: it has not within `limit` seconds. If that process fails, this one is ended before.
        """
        deadline = time.monotonic() + limit
        while not self._store.check([f"shared/{key}"]):  # the store's own wait would block the other threads
            if time.monotonic() > deadline:
                raise InputError(f"other processes have not told {key} within {limit:g} s (process_timeout)")
            time.sleep(0.05)
        return json.loads(self._store.get(f"shared/{key}"))

    def gather(self, rank: int, name: str, value: object, limit: float) -> list[Any]:
        """A value of each process, in the order of ranks; each calls this with its own.

        Raises:
            InputError: as `shared`.
        """
        self.share(f"{name} of process {rank}", value)
        if rank == 0:
            self.share(name, [self.shared(f"{name} of process {other}", limit) for other in range(self.size)])
        return self.shared(name, limit)

    def _present(self, name: str, ranks: Iterable[int]) -> dict[int, bytes]:
        """The values of these ranks that are there; with all there, as usual, in two requests."""
        keys = {rank: f"{name}/{rank}" for rank in ranks}
        if not self._store.check(list(keys.values())):
            keys = {rank: key for rank, key in keys.items() if self._store.check([key])}
        return dict(zip(keys, self._store.multi_get(list(keys.values())), strict=True)) if keys else {}
