"""Ending a command on Ctrl-C and SIGTERM with one sentence."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pytorch_lightning.utilities import rank_zero_only

_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Stopped(BaseException):
    """Raised where the program is when a signal comes; no exception of an error, so that nothing handles it as one."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def stoppable(what: str) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the program, with exit status 128 and their number as in a shell.

    Lightning by itself ignores SIGTERM where it does not train. A second signal ends the program at once.

    Args:
        what: is stopped, for the sentence.
    """

    process = os.getpid()

    def stop(number: int, frame: FrameType | None) -> None:
        for other in _NAMES:
            signal.signal(other, signal.SIG_DFL)
        if os.getpid() != process:  # a worker, which has inherited this
            os.kill(os.getpid(), number)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in _NAMES}
    try:
        yield
    except Stopped as stopped:
        if getattr(rank_zero_only, "rank", 0) == 0:
            print(f"{what} was stopped by {_NAMES[signal.Signals(stopped.number)]} before its end", file=sys.stderr)
        sys.exit(128 + stopped.number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
