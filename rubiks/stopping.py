"""Signals that stop a run: noted, agreed on by all processes, and turned into one sentence and an exit status."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any, Protocol

import torch.distributed as dist
from torch import tensor

# Slurm sends SIGUSR1 before the time limit if asked to (--signal=USR1@60).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def heeded() -> list[signal.Signals]:
    """The SIGNALS that this process does not ignore; nohup ignores SIGHUP, and background jobs may ignore SIGINT."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class Interrupted(BaseException):
    """A signal stops the program, which exits with 128 + the signal's number, as a shell expects.

    Attributes:
        signal: which one.
        message: what happened to the run, one sentence for the user.
    """

    def __init__(self, number: int, message: str = "") -> None:
        super().__init__(number, message)
        self.signal = signal.Signals(number)
        self.message = message

    @property
    def status(self) -> int:
        return 128 + self.signal

    def __str__(self) -> str:
        return f"interrupted by {self.signal.name}{': ' if self.message else ''}{self.message}"


def tell_stopping(number: int) -> None:
    """From a signal handler, print what will happen."""
    text = "Stopping after this step" + ("; Ctrl-C again stops at once" if number == signal.SIGINT else "")
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())  # print is not reentrant, and the signal may have interrupted one


class Beat(Protocol):
    """Reports that this process makes progress.

    Attributes:
        ending: what starts the processes may signal that they end, which they do anyway.
    """

    ending: bool

    def __call__(self) -> None: ...

    def end(self) -> None: ...


class Stop:
    """Which signal has come, and when to obey it.

    Args:
        quiet: print nothing when a signal comes, because another process does.
        timeout: seconds to wait for another process; None for PyTorch's own.
        beat: called whenever training makes progress, and ended with it; None for nothing.

    Attributes:
        signal: the first signal that came; None if none has.
        patient: signals are only noted, so that the training loop can stop where its state is exact. Otherwise they
            raise Interrupted at once.
    """

    def __init__(self, quiet: bool = False, timeout: float | None = None, beat: Beat | None = None) -> None:
        self._beat = beat
        self._quiet = quiet
        self._timeout = None if timeout is None else datetime.timedelta(seconds=timeout)
        self.signal: signal.Signals | None = None
        self.patient = False
        self._since = 0.0
        self._group: Any = None
        self._asked: tuple[Any, Any] | None = None

    def install(self) -> None:
        """Set the signal handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in heeded():
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals, and restore the previous handlers at the end."""
        before = {number: signal.getsignal(number) for number in heeded()}
        self.install()
        try:
            yield
        finally:
            self.patient = False
            if threading.current_thread() is threading.main_thread():
                for number, handler in before.items():
                    signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.signal is None
        if first:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        # A terminal and a parent process may both deliver the same Ctrl-C; a real second one comes later.
        again = number == signal.SIGINT and not first and time.monotonic() - self._since > 0.5
        if again or (first and not self.patient):
            raise Interrupted(self.signal or number)
        ending = self._beat is not None and self._beat.ending
        if first and not self._quiet and not ending:
            tell_stopping(number)

    def agreed(self) -> bool:
        """Whether all processes should stop here. Each calls this at the same points of its training.

        Nothing blocks: each call sends the others the signal of this process, and returns what all of them knew at the
        previous call. A process that has died is noticed here.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.signal is not None
        if self._group is None:
            # On the CPU, whichever backend the gradients use.
            self._group = dist.new_group(backend="gloo", timeout=self._timeout)
        answer = None
        if self._asked is not None:
            wish, work = self._asked
            work.wait()
            answer = int(wish)
        wish = tensor(0 if self.signal is None else int(self.signal))
        self._asked = wish, dist.all_reduce(wish, dist.ReduceOp.MAX, group=self._group, async_op=True)
        if answer and self.signal is None:
            self.signal = signal.Signals(answer)
        return bool(answer)

    def beat(self) -> None:
        """Report that training makes progress."""
        if self._beat is not None:
            self._beat()

    def end(self) -> None:
        """At the end of training, receive the last answer: a process that left earlier would make the others fail."""
        if self._asked is not None:
            self._asked[1].wait()
            self._asked = None
        if self._beat is not None:
            self._beat.end()
