"""One of several processes that run together: it says that it lives, and ends with the others when one fails.

Whoever starts them, each process has two threads. The first tells the board (`rubiks.board`) every half second that the
process lives, and ends it when the board says so. In process 0, unless a parent of ours does this, it also watches the
others and prints why all end. The second notices that the board does not answer: then process 0 or its host is gone.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NoReturn

from rubiks.board import Beat, Board, Report
from rubiks.errors import InputError, readable
from rubiks.rendezvous import Place, connect
from rubiks.stopping import Interrupted
from rubiks.watch import GRACE, PATIENCE, RESUMES, SILENCE, Cause, Watch, status_of

PARENT = "RUBIKS_PARENT"
RUN = "RUBIKS_RUN"  # the run's folder, chosen and locked by the parent
PERIOD = 0.5  # seconds between signs of life
LINGER = 3.0  # seconds for the others to read why all end, as the store may end with this process


def is_child() -> bool:
    """Whether this process was started by `rubiks.parent.run`."""
    return PARENT in os.environ


def given_run() -> Path | None:
    """The run's folder, as chosen by the parent; None in other processes."""
    return Path(os.environ[RUN]) if RUN in os.environ else None


class Member:
    """This process, as one of several.

    Args:
        place: where it stands.
        board: what all of them tell.
        timeout: seconds without progress after which a process counts as hanging.

    Attributes:
        ending: all processes end, and why has been printed.
    """

    def __init__(self, place: Place, board: Board, timeout: float) -> None:
        self.place = place
        self.board = board
        self.timeout = timeout
        self._watches_all = place.rank == 0 and not is_child()
        self._host = socket.gethostname()
        self._beats = 0
        self._answers = 0
        self._steps: int | None = None
        self.ending = False
        self._done = False  # nothing is left to do, and nothing more is read
        self._failing = False  # the main thread unwinds
        self._failed = False  # it has done so
        self._stopped = threading.Event()
        self._tell()
        self._threads = [threading.Thread(target=task, daemon=True) for task in (self._talk, self._listen)]
        for thread in self._threads:
            thread.start()

    # ---- called by the main thread

    def __call__(self) -> None:
        """Report progress. What comes before the first call may take long."""
        self._steps = (self._steps or 0) + 1

    def end(self) -> None:
        """Report no more progress: what follows may take long."""
        self._steps = None

    def report(self, error: BaseException) -> None:
        """Tell the others that this process fails, before it waits for others that wait for it."""
        self._failing = True
        with contextlib.suppress(RuntimeError):
            self.board.report(self.place.rank, _report_of(error))

    def fail(self, error: BaseException, status: int) -> NoReturn:
        """End this process, and the others; one process prints the cause."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it, which must not come before the message
        self.report(error)
        self._failed = True
        if isinstance(error, Interrupted) and not self._watches_all:  # the others have received it too
            self._done = True
            with contextlib.suppress(RuntimeError):
                self._tell()
        else:
            time.sleep(2 * PATIENCE)  # meanwhile the thread ends this process
        sys.stdout.flush()
        os._exit(status)  # an orderly end of NCCL would wait for the others

    def leave(self) -> None:
        """Finish. Process 0 waits for the others, which may still need the store or fail."""
        self._done, self._steps = True, None
        with contextlib.suppress(RuntimeError):
            self._tell()
            while self.place.rank == 0 and not self._others_done():
                time.sleep(0.05)
        self._stopped.set()
        for thread in self._threads:
            thread.join(GRACE)

    def _others_done(self) -> bool:
        beats = self.board.beats(range(self.place.size))
        return all(beat.done for rank, beat in beats.items() if rank != self.place.rank)

    # ---- the threads

    def _tell(self) -> None:
        self._beats += 1
        self.board.beat(self.place.rank, Beat(self._host, self._beats, self._steps, self._done))

    def _talk(self) -> None:
        watched = range(self.place.size) if self._watches_all else [0]
        watch = None if is_child() else Watch(self.board, watched, self.timeout)
        while not self._stopped.wait(PERIOD):
            try:
                self._tell()
                status = self.board.ended()
                cause = watch.look() if watch is not None and status is None else None
                if cause is not None:
                    status = self._announce(cause)
            except RuntimeError:
                self._alone()
            self._answers += 1
            if status is not None:
                self.ending = self._done = True
                with contextlib.suppress(RuntimeError):
                    self._tell()
                self._quit(status)

    def _listen(self) -> None:
        """Count the periods without an answer, rather than the time, in which this process may have been suspended."""
        answers, waited = 0, 0.0
        while not self._stopped.wait(PERIOD):
            waited = waited + PERIOD if answers == self._answers else 0.0
            answers = self._answers
            if waited > min(SILENCE, self.timeout):
                self._alone()

    def _announce(self, cause: Cause) -> int:
        """Print why all processes end, and tell them."""
        status = status_of(cause)
        self.ending = True
        if self.board.end(status):
            print(f"error: {cause}" if isinstance(cause, InputError) else str(cause).rstrip(), file=sys.stderr)
            deadline = time.monotonic() + LINGER
            with contextlib.suppress(RuntimeError):
                while time.monotonic() < deadline and not self._others_done():
                    time.sleep(0.05)
        return status

    def _alone(self) -> NoReturn:
        """End this process because the board does not answer."""
        if self._stopped.is_set() or self.ending:
            sys.exit()  # this thread only
        self.ending = True
        if is_child():
            time.sleep(2)  # without its parent, `follow_parent` ends it
        if self.place.local_rank == 0:
            print(
                f"error: process {self.place.rank} of {self.place.size} on {self._host} gets no answer from process 0 "
                f"({self.place.address}:{self.place.port}): it was killed or stopped, or its host is down or cannot be "
                f"reached; {RESUMES}",
                file=sys.stderr,
            )
        self._quit(2)

    def _quit(self, status: int) -> NoReturn:
        """End this process from one of its threads."""
        deadline = time.monotonic() + GRACE
        while self._failing and not self._failed and time.monotonic() < deadline:
            time.sleep(0.05)  # the main thread finishes what it must, such as the logger
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


_member: Member | None = None
_joined = 0  # how many times this process has joined others


def member() -> Member | None:
    """This process as one of several; None if it is alone, or starts the others."""
    return _member


def join(place: Place | None, limit: float, timeout: float) -> None:
    """Meet the other processes; with no place, do nothing.

    Args:
        place: where this process stands.
        limit: seconds in which all must have come.
        timeout: seconds without progress after which a process counts as hanging.

    Raises:
        InputError: the store cannot be reached; or, in process 0, another process has not come.
    """
    global _member, _joined
    if place is None:
        return
    board = Board(connect(place, limit), place.size, _joined)
    _joined += 1
    _member = Member(place, board, timeout)
    deadline = time.monotonic() + limit
    while place.rank == 0 and len(present := board.beats(range(place.size))) < place.size:
        if time.monotonic() > deadline:
            missing = ", ".join(str(rank) for rank in range(place.size) if rank not in present)
            raise InputError(
                f"{len(present)} of {place.size} processes have connected to {place.address}:{place.port} on "
                f"{socket.gethostname()} within {limit:g} s (connect_timeout); missing: {missing}. See whether they "
                "were started, and whether a firewall blocks the port"
            )
        time.sleep(0.05)


def leave() -> None:
    """Finish together with the others, if there are any."""
    global _member
    if _member is not None:
        _member.leave()
        _member = None


def _report_of(error: BaseException) -> Report:
    error = readable(error)
    if isinstance(error, InputError):
        return Report("input", str(error))
    if isinstance(error, Interrupted):
        return Report("signal", error.message, error.signal)
    return Report("lost" if _is_lost(error) else "defect", "".join(traceback.format_exception(error)))


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
