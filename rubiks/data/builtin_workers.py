"""The processes that make the clips of the built-in data set."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from rubiks.data.builtin_clips import Plan, make
from rubiks.errors import InputError

# What a worker process runs. Clips are always made in processes that do not load decord: it brings its own libvpx,
# which PyAV would then call, and fail. The packages' __init__ files are skipped, as they import torch, which takes
# seconds; and unlike multiprocessing's workers, these don't run the calling script again.
_WORKER = """
import sys, types
for name, folder in zip(("rubiks", "rubiks.data"), sys.argv[1:]):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]
from rubiks.data.builtin_workers import serve
serve()
"""


def make_in_processes(videos: Path, plan: Plan, workers: int, advance: Callable[[], None]) -> None:
    """Shares the clips out to worker processes.

    All of them write to one pipe: an empty line for each clip, or the message of an InputError as a line of JSON. When
    this process is killed the pipe breaks, which ends them.
    """
    here = Path(__file__).resolve().parent
    search_path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    environment = {**os.environ, "PYTHONPATH": search_path, "PYTHONSAFEPATH": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    processes: list[subprocess.Popen[bytes]] = []
    read_end, write_end = os.pipe()
    try:
        with open(read_end, encoding="utf-8") as replies:
            try:
                for worker in range(workers):
                    job = json.dumps([str(videos.absolute()), plan, worker, workers])
                    command = [sys.executable, "-c", _WORKER, str(here.parent), str(here), job]
                    # A separate session keeps the terminal's Ctrl-C from the worker: this process ends it.
                    processes.append(
                        subprocess.Popen(
                            command,
                            stdin=subprocess.DEVNULL,
                            stdout=write_end,
                            env=environment,
                            start_new_session=True,
                        )
                    )
            finally:
                os.close(write_end)
            for line in replies:
                if message := line.strip():
                    raise InputError(json.loads(message))
                advance()
        for process in processes:
            if code := process.wait():
                raise RuntimeError(
                    f"a process that made videos in {videos} exited with status {code}; if memory ran out, "
                    "use fewer processes. Running again continues where it stopped."
                )
    finally:
        for process in processes:
            process.kill()
            process.wait()


def serve() -> None:
    """The main function of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    folder, plan_fields, worker, workers = json.loads(sys.argv[3])
    plan = Plan(*plan_fields)
    with contextlib.suppress(BrokenPipeError):
        try:
            make(Path(folder), plan, plan.clips()[worker::workers], lambda: _reply(b""))
        except InputError as error:
            _reply(json.dumps(str(error)).encode())


def _reply(message: bytes) -> None:
    os.write(1, message + b"\n")  # a single write stays in one piece, even with several writers
