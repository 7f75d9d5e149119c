"""Finds out why processes that run together must end, from what they tell on the board."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from rubiks.board import Beat, Board, Report
from rubiks.errors import InputError
from rubiks.stopping import Interrupted

SETTLE = 1.0  # seconds after a failure for others to report theirs, which may be the cause
GRACE = 10.0  # seconds for the others to end on their own after one has failed
PATIENCE = 30.0  # seconds for a step to finish after a signal
SILENCE = 60.0  # seconds without a sign of life after which a process counts as gone
RESUMES = "the same command resumes from the last saved state"

# How long to wait for a better explanation than a report of this kind; the best comes first.
_KINDS = {"input": SETTLE, "defect": SETTLE, "killed": SETTLE, "signal": PATIENCE, "lost": GRACE}


class Failure(Exception):  # noqa: N818  a defect of the program, not of this process
    """A defect in one of the processes; the message holds its traceback."""


Cause = InputError | Interrupted | Failure


def status_of(cause: Cause) -> int:
    """The exit status that goes with a cause."""
    return cause.status if isinstance(cause, Interrupted) else 2 if isinstance(cause, InputError) else 1


class Watch:
    """Watches processes.

    Args:
        board: what they tell.
        ranks: which ones to watch; reports are only read if these are all.
        timeout: seconds without any progress after which a process counts as hanging.
    """

    def __init__(self, board: Board, ranks: Sequence[int], timeout: float) -> None:
        self.board = board
        self.ranks = ranks
        self.timeout = timeout
        self.reports: dict[int, Report] = {}
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}  # when each last gave a sign of life
        self._since: dict[str, float] = {}  # when each kind of report was first seen
        self._moved = 0.0  # when any last made progress
        self._now = 0.0
        self._looked = time.monotonic()

    def look(self) -> Cause | None:
        """Why the processes must end now; None if they need not.

        Called about every second. Time in which it is not called does not count: this process was then suspended.
        """
        now = time.monotonic()
        self._now += min(now - self._looked, 2.0)
        self._looked = now
        self._read()
        return self._reported() or self._silent() or self._hanging()

    def name(self, rank: int) -> str:
        """A process in messages, with its host if there are several."""
        hosts = {beat.host for beat in self._beats.values()}
        on = f" on {self._beats[rank].host}" if rank in self._beats and len(hosts) > 1 else ""
        return f"process {rank} of {self.board.size}{on}"

    def _read(self) -> None:
        beats = self.board.beats(self.ranks)
        for rank, beat in beats.items():
            before = self._beats.get(rank)
            if before is None or beat.number != before.number:
                self._heard[rank] = self._now
            if before is None or beat.steps is None or beat.steps != before.steps:
                self._moved = self._now
        self._beats = beats
        if len(self.ranks) == self.board.size:
            self.reports = self.board.reports()
        for report in self.reports.values():
            self._since.setdefault(report.kind, self._now)

    def _reported(self) -> Cause | None:
        if not self.reports:
            return None
        told = {rank for rank, beat in self._beats.items() if beat.done} | set(self.reports)
        if len(told) < self.board.size and all(self._now - at <= _KINDS[kind] for kind, at in self._since.items()):
            return None
        kind = min(self._since, key=list(_KINDS).index)
        gone = self._silent(SETTLE * 3) if kind == "lost" else None
        return gone or self._cause(min(rank for rank, report in self.reports.items() if report.kind == kind))

    def _cause(self, rank: int) -> Cause:
        report, name = self.reports[rank], self.name(rank)
        match report.kind:
            case "input":
                return InputError(report.text if rank == 0 else f"{name}: {report.text}")
            case "signal":
                return Interrupted(report.signal, report.text)
            case "killed":
                return InputError(
                    f"{name} was killed ({signal.Signals(report.signal).name}), often by the system for lack of "
                    f"memory; {RESUMES}"
                )
            case "lost":
                return Failure(f"{name} lost its connection to the others:\n{report.text}")
        return Failure(f"{name} failed:\n{report.text}")

    def _silent(self, limit: float | None = None) -> Cause | None:
        limit = min(SILENCE, self.timeout) if limit is None else limit
        for rank, beat in self._beats.items():
            if not beat.done and rank not in self.reports and self._now - self._heard[rank] > limit:
                return InputError(
                    f"process {rank} of {self.board.size} on {beat.host} no longer answers: it was killed or stopped, "
                    f"or its host is down or cannot be reached; {RESUMES}"
                )
        return None

    def _hanging(self) -> Cause | None:
        steps = {rank: beat.steps for rank, beat in self._beats.items() if beat.steps is not None}
        if len(steps) < self.board.size or self._now - self._moved <= self.timeout:
            return None
        rank = min(steps, key=lambda rank: (steps[rank], rank))
        return InputError(
            f"{self.name(rank)} hangs: the others waited for it for {self.timeout:g} s (process_timeout); {RESUMES}"
        )
