"""Work on many videos in separate processes, so that a decoder that hangs or crashes costs only one video."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

from rubiks.errors import VideoError

LONGEST = 1_000_000  # maximum of a time limit, in seconds; system timers are limited too

Item = TypeVar("Item")
Result = TypeVar("Result")

# The server imports this once; a worker is forked from it in milliseconds, without the threads and libraries that the
# calling process has loaded by then (decord brings its own libvpx, with which PyAV fails).
_PRELOAD = ["rubiks.data.prepare"]


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LostWorkerError(VideoError):
    """The process that was reading a video ended: by the time limit, a crash, or for lack of memory."""


def work(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    path_of: Callable[[Item], str],
    processes: int,
    seconds: float,
) -> Iterator[tuple[Item, Result | VideoError]]:
    """Call a function for every item, each call in a separate process that may crash.

    Args:
        function: a module-level function; it may raise VideoError.
        items: its arguments, one for each call.
        path_of: the video of an item, for messages.
        processes: how many calls run at once.
        seconds: the time limit of one call.

    Yields:
        The item, and what the function returned or the VideoError that it raised; LostWorkerError if its process
        ended. In the order in which they finish. Other exceptions are raised here.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    waiting = list(reversed(items))
    busy: dict[Connection, tuple[BaseProcess, Item]] = {}

    def start() -> None:
        own, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function, seconds), daemon=True)
        process.start()
        theirs.close()
        give(own, process)

    def give(own: Connection, process: BaseProcess) -> None:
        busy[own] = process, waiting.pop()
        own.send(busy[own][1])

    try:
        while waiting and len(busy) < processes:
            start()
        while busy:
            for own in wait(list(busy)):
                assert isinstance(own, Connection)
                process, item = busy.pop(own)
                try:
                    result = own.recv()
                except (EOFError, ConnectionError):
                    process.join()
                    result = _lost(path_of(item), process.exitcode, seconds)
                if isinstance(result, Exception) and not isinstance(result, VideoError):
                    raise result
                if waiting and process.is_alive():
                    give(own, process)
                else:
                    own.close()  # makes the worker exit
                    process.join()
                    if waiting:
                        start()
                yield item, result
    finally:
        for process, _ in busy.values():
            process.kill()
            process.join()


def _lost(path: str, exitcode: int | None, seconds: float) -> LostWorkerError:
    if exitcode == -signal.SIGALRM:
        return LostWorkerError(path, f"took longer than the limit of {seconds:g} seconds and was stopped")
    return LostWorkerError(
        path, f"killed the process that read it (status {exitcode}): it crashed or ran out of memory"
    )


def _serve(connection: Connection, function: Callable[[Any], Any], seconds: float) -> None:
    """A worker's main loop, until its parent closes the connection or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # The kernel is the watchdog: its signal also ends code that never returns to Python, even if the parent has ended.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    while True:
        try:
            item = connection.recv()
        except (EOFError, ConnectionError):
            return
        if connection.poll():  # EOF, as items come one at a time: the parent is gone, and another may redo this one
            return
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            result = function(item)
        except Exception as error:
            result = error
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            connection.send(result)
        except BrokenPipeError:
            return
