"""Signals that end a run: noted, agreed on by all processes, and turned into one sentence and an exit status."""

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

# SIGUSR1 is what Slurm is asked to send before the time is up (--signal=USR1@60).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def heeded() -> list[signal.Signals]:
    """Those of SIGNALS that this process was not told to ignore, as SIGHUP by nohup, or SIGINT in the background."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


class Interrupted(BaseException):
    """A signal ends the program; it exits with 128 + the signal's number, as a shell expects.

    Attributes:
        signal: which one.
        message: what has become of the run, one sentence for the user.
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
    """From a signal handler, tell what will happen."""
    text = "Stopping after this step" + ("; Ctrl-C again stops at once" if number == signal.SIGINT else "")
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())  # print is not reentrant, and may be where the signal has come in


class Beat(Protocol):
    """Tells somebody that this process gets on."""

    def __call__(self) -> None: ...

    def end(self) -> None: ...


class Stop:
    """What signals have asked for.

    Args:
        quiet: say nothing when a signal comes: somebody else does.
        timeout: seconds to wait for another process; None for PyTorch's own.
        beat: is called wherever training gets on, and ended with it; None for nothing.

    Attributes:
        signal: the first signal that came; None so far.
        patient: signals are only noted, for the training loop to end where its state is exact. Otherwise they raise
            Interrupted at once.
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
        """Handle the signals here."""
        if threading.current_thread() is threading.main_thread():
            for number in heeded():
                signal.signal(number, self._handle)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handle the signals, and put the handlers of before back at the end."""
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
        # A terminal and a parent process may both deliver the same Ctrl-C; a second one that is meant comes later.
        again = number == signal.SIGINT and not first and time.monotonic() - self._since > 0.5
        if again or (first and not self.patient):
            raise Interrupted(self.signal or number)
        if first and not self._quiet:
            tell_stopping(number)

    def agreed(self) -> bool:
        """Whether all processes are to stop here. Each calls this at the same points of its training.

        Nothing waits: each call tells the others what this process has been asked for, and returns what all of them
        knew at the call before. A process that has died is noticed here.
        """
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return self.signal is not None
        if self._group is None:
            # On the CPU, whatever the gradients go through.
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
        """Note that training gets on."""
        if self._beat is not None:
            self._beat()

    def end(self) -> None:
        """At the end of training, receive the last answer: a process that left before would make the others fail."""
        if self._asked is not None:
            self._asked[1].wait()
            self._asked = None
        if self._beat is not None:
            self._beat.end()
