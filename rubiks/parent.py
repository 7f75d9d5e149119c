"""Starts, watches and ends several processes of one command on this machine.

Lightning can start the others from the first one, but then the first, which may be busy or stuck itself, has to notice
when they fail. Here a parent that does nothing else starts all of them, passes signals on, and reports the cause.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_fabric.plugins.environments.lightning import find_free_network_port

from rubiks.choices import program
from rubiks.data.workers import cores
from rubiks.errors import InputError
from rubiks.processes import PARENT, REPORTS, RUN, Report, beat_path
from rubiks.stopping import Interrupted, heeded, tell_stopping

GRACE = 10.0  # seconds for the others to end on their own after one has failed
PATIENCE = 30.0  # seconds for a step to finish after a signal


def run(
    name: str, count: int, nodes: int, folder: Path, choices: Sequence[str], hang_timeout: float
) -> signal.Signals | None:
    """Run this program in `count` processes, the ranks of this machine, until all have succeeded.

    Args:
        name: train, which a signal stops after a step, or eval, which it stops at once.
        count: how many on this machine.
        nodes: machines; if there are several, the user sets MASTER_ADDR, MASTER_PORT and NODE_RANK.
        folder: the run's folder.
        choices: arguments of the program.
        hang_timeout: seconds without progress after which a process counts as hanging.

    Returns:
        A signal that came too late to stop the run; None if none came.

    Raises:
        InputError: one of them ended with bad input, was killed, or hangs.
        Interrupted: a signal stopped them.
        SystemExit: with status 1, if one failed with a defect; its traceback is printed.
    """
    with tempfile.TemporaryDirectory(prefix="rubiks-") as reports:
        shared = {
            "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
            "MASTER_PORT": os.environ.get("MASTER_PORT", str(find_free_network_port())),
            "NODE_RANK": os.environ.get("NODE_RANK", "0"),
            "WORLD_SIZE": str(count * nodes),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count))),
            REPORTS: reports,
            PARENT: str(os.getpid()),
            RUN: str(folder),
        }
        script = program(name)[0] == "python"
        own = [os.path.abspath(sys.argv[0])] if script else ["-m", "rubiks", name]
        command = [sys.executable, *own, *_for_hydra(sys.argv[1:]), *choices]
        processes: list[subprocess.Popen] = []
        received = _Received(processes, steps=name == "train")
        watch = _Watch(processes, received, Path(reports), hang_timeout)
        try:
            with received.passing_on():
                for rank in range(count):
                    # In separate sessions, so that Ctrl-C in a terminal reaches them only through this process.
                    environment = os.environ | shared | {"LOCAL_RANK": str(rank)}
                    processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
                if received.signal is not None:  # it came before all were started
                    received.pass_on(received.signal)
                watch.wait()
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # loader processes that it may have left behind
                process.wait()
        watch.tell()
    return received.signal


def _for_hydra(arguments: list[str]) -> list[str]:
    """The command-line arguments that tell Hydra where configurations are."""
    found = []
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, _ = argument.partition("=")
        if flag in ("--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn"):
            found += [argument] if equals else [argument, following]
    return found


class _Received:
    """Receives signals and passes them on to the processes."""

    def __init__(self, processes: list[subprocess.Popen], steps: bool) -> None:
        self.processes = processes
        self.steps = steps
        self.signal: signal.Signals | None = None
        self.since = 0.0
        self.again = False

    @contextlib.contextmanager
    def passing_on(self):
        before = {number: signal.signal(number, self._handle) for number in heeded()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.signal is None:
            if self.steps:
                tell_stopping(number)
            self.pass_on(signal.Signals(number))
        elif number == signal.SIGINT and time.monotonic() - self.since > 0.5:
            self.again = True

    def pass_on(self, number: signal.Signals) -> None:
        self.signal, self.since = number, time.monotonic()
        for process in self.processes:
            process.send_signal(signal.SIGTERM)  # does nothing if it has ended


class _Watch:
    """Waits for processes to end, and finds out why they did."""

    def __init__(self, processes: list[subprocess.Popen], received: _Received, reports: Path, timeout: float) -> None:
        self.processes = processes
        self.received = received
        self.folder = reports
        self.timeout = timeout
        self.killed: set[int] = set()
        self.hangs: int | None = None  # the rank that the others wait for
        self._beats: list[int] = []
        self._moved = time.monotonic()

    def wait(self) -> None:
        """Wait until all have ended; after a failure, or if they hang, not for long."""
        deadline = float("inf")
        while None in [process.poll() for process in self.processes]:
            reports = self.reports()
            now = time.monotonic()
            if reports or any(process.returncode for process in self.processes):
                deadline = min(deadline, now + GRACE)
            for found in reports.values():
                if found.signal and self.received.signal is None:  # only one of them received it
                    self.received.pass_on(signal.Signals(found.signal))
            if self.received.signal is not None:
                deadline = min(deadline, self.received.since + PATIENCE)
            if now > deadline or self.received.again or self._stuck(now):
                for rank, process in enumerate(self.processes):
                    if process.returncode is None:
                        process.kill()
                        self.killed.add(rank)
                return
            time.sleep(0.1)

    def _stuck(self, now: float) -> bool:
        """Whether no process has made progress for too long."""
        try:
            beats = [
                int.from_bytes(beat_path(self.folder, rank).read_bytes(), "little")
                for rank in range(len(self.processes))
            ]
        except FileNotFoundError:  # one has not started training yet, or has finished it
            beats = []
        if not beats or beats != self._beats:
            self._beats, self._moved = beats, now
            return False
        if now - self._moved > self.timeout:
            self.hangs = beats.index(min(beats))
            return True
        return False

    def reports(self) -> dict[int, Report]:
        found = {}
        for rank in range(len(self.processes)):
            path = self.folder / str(rank)
            if path.is_file():
                found[rank] = Report(**json.loads(path.read_text()))
        return found

    def tell(self) -> None:
        """Raise an error that says why the processes have ended; return if all is well."""
        reports = self.reports()
        statuses = [process.returncode for process in self.processes]
        if not any(statuses):
            return
        total = len(statuses)
        kinds = {found.kind: (rank, found) for rank, found in sorted(reports.items(), reverse=True)}
        if "input" in kinds:
            rank, found = kinds["input"]
            raise InputError(found.text if rank == 0 else f"process {rank} of {total}: {found.text}")
        if "defect" in kinds:
            rank, found = kinds["defect"]
            print(f"process {rank} of {total} failed:\n{found.text}", end="", file=sys.stderr)
            sys.exit(1)
        silent = sorted(self.killed - set(reports))
        if "signal" in kinds:  # the others may have waited for it
            raise Interrupted(self.received.signal or kinds["signal"][1].signal, kinds["signal"][1].text)
        if self.received.signal is not None:
            why = f"process {silent[0]} of {total} did not finish its step" if silent else ""
            raise Interrupted(self.received.signal, why)
        if self.hangs is None:
            for rank, status in enumerate(statuses):
                if status < 0 and rank not in self.killed:
                    raise InputError(
                        f"process {rank} of {total} was killed ({signal.Signals(-status).name}), often by the system "
                        "for lack of memory; the same command resumes from the last saved state"
                    )
        if self.hangs is not None or silent:
            rank = silent[0] if self.hangs is None else self.hangs
            raise InputError(
                f"process {rank} of {total} hangs: the others waited for it for {self.timeout:g} s (process_timeout); "
                "the same command resumes from the last saved state"
            )
        if "lost" in kinds:
            rank, found = kinds["lost"]
            print(
                f"process {rank} of {total} lost its connection to the others:\n{found.text}", end="", file=sys.stderr
            )
        else:
            print(f"the processes exited with statuses {', '.join(map(str, statuses))}", file=sys.stderr)
        sys.exit(1)
