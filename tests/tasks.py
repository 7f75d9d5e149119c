"""Functions that tests run in workers. Each worker imports this module, so it imports little."""

from __future__ import annotations

import os
import time

from rubiks.errors import VideoError


def sleep_or_die(seconds):
    """A task: a number of seconds to sleep in C, -1 to crash, -2 for a bad video, -3 for a defect."""
    if seconds == -1:
        os.kill(os.getpid(), 11)
    if seconds == -2:
        raise VideoError("v", "bad")
    if seconds == -3:
        raise ZeroDivisionError
    time.sleep(seconds)
    return seconds
