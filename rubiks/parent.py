"""Starts, watches and ends several processes of one command on this machine.

Lightning can start the others from the first one, but then the first, which may be busy or stuck itself, has to notice
when they fail. Here a parent that does nothing else starts all of them, passes signals on, and reports the cause.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from rubiks.board import Board, Report
from rubiks.choices import program
from rubiks.data.workers import cores
from rubiks.errors import InputError
from rubiks.processes import PARENT, RUN
from rubiks.stopping import Interrupted, heeded, tell_stopping
from rubiks.watch import GRACE, PATIENCE, RESUMES, Cause, Failure, Watch, status_of


def run(
    name: str, count: int, nodes: int, folder: Path, choices: Sequence[str], hang_timeout: float
) -> signal.Signals | None:
    """Run this program in `count` processes, the ranks of this machine, until all have succeeded.

    Args:
        name: train, which a signal stops after a step, or eval or check-cluster, which it stops at once.
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
    node = int(os.environ.get("NODE_RANK", "0"))
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    size, first = count * nodes, count * node
    store = _store(address, port) if node == 0 else None
    shared = {
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port if store is None else store.port),
        "NODE_RANK": str(node),
        "WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // count))),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # PyTorch's word for a store that is held by what starts the processes
        PARENT: str(os.getpid()),
        RUN: str(folder),
    }
    script = program(name)[0] == "python"
    own = [os.path.abspath(sys.argv[0])] if script else ["-m", "rubiks", name]
    command = [sys.executable, *own, *_for_hydra(sys.argv[1:]), *choices]
    processes: list[subprocess.Popen] = []
    received = _Received(processes, steps=name == "train")
    watch = None if store is None else Watch(Board(store, size), range(size), hang_timeout)
    family = _Family(processes, first, size, received, watch)
    try:
        with received.passing_on():
            for rank in range(count):
                # In separate sessions, so that Ctrl-C in a terminal reaches them only through this process.
                environment = os.environ | shared | {"LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, env=environment, start_new_session=True))
            if received.signal is not None:  # it came before all were started
                received.pass_on(received.signal)
            family.wait()
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # loader processes that it may have left behind
            process.wait()
    family.tell()
    return received.signal


def _store(address: str, port: int) -> dist.TCPStore:
    try:
        return dist.TCPStore(address, port, None, True, datetime.timedelta(minutes=1), wait_for_workers=False)
    except RuntimeError as error:
        raise InputError(f"cannot open {address}:{port} (MASTER_ADDR, MASTER_PORT): {error}") from None


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


class _Family:
    """The processes of this machine: waits for them to end, and says why they did.

    Args:
        processes: the processes.
        first: the rank of the first of them.
        size: how many there are on all machines.
        received: the signals of this process.
        watch: watches all of them; None on further machines, where the first one's parent does.
    """

    def __init__(
        self, processes: list[subprocess.Popen], first: int, size: int, received: _Received, watch: Watch | None
    ) -> None:
        self.processes = processes
        self.first = first
        self.size = size
        self.received = received
        self.watch = watch
        self.cause: Cause | None = None
        self.unfinished: list[int] = []  # ranks that had to be killed

    def wait(self) -> None:
        """Wait until all have ended; after a failure, or if they hang, not for long."""
        deadline = float("inf")
        while None in [process.poll() for process in self.processes]:
            now = time.monotonic()
            self._look()
            if self.cause is not None or any(process.returncode for process in self.processes):
                deadline = min(deadline, now + GRACE)
            if self.received.signal is not None:
                deadline = min(deadline, self.received.since + PATIENCE)
            if now > deadline or self.received.again:
                for rank, process in enumerate(self.processes, self.first):
                    if process.returncode is None:
                        process.kill()
                        self.unfinished.append(rank)
                return
            time.sleep(0.1)

    def _look(self) -> None:
        """Find the cause of a failure, and have all processes end."""
        if self.watch is None or self.cause is not None:
            return
        for rank, process in enumerate(self.processes, self.first):
            if process.returncode is not None and process.returncode < 0:
                self.watch.board.report(rank, Report("killed", "", -process.returncode))
        self.cause = self.watch.look()
        if self.cause is not None:
            self.watch.board.end(status_of(self.cause))
        for report in self.watch.reports.values():
            if report.signal and report.kind == "signal" and self.received.signal is None:
                self.received.pass_on(signal.Signals(report.signal))  # only one of them received it

    def tell(self) -> None:
        """Raise an error that says why the processes have ended; return if all is well."""
        statuses = {rank: process.returncode for rank, process in enumerate(self.processes, self.first)}
        if not any(statuses.values()):
            return
        if self.received.signal is not None and not isinstance(self.cause, (InputError, Failure)):
            late = f"process {self.unfinished[0]} of {self.size} did not finish its step" if self.unfinished else ""
            raise Interrupted(self.received.signal, late if self.cause is None else self.cause.message)
        if isinstance(self.cause, Failure):
            print(str(self.cause).rstrip(), file=sys.stderr)
            sys.exit(1)
        if self.cause is not None:
            raise self.cause
        for rank, status in statuses.items():
            if status < 0 and rank not in self.unfinished:
                name = signal.Signals(-status).name
                raise InputError(f"process {rank} of {self.size} was killed ({name}); {RESUMES}")
        if len(set(statuses.values())) > 1:  # otherwise they have said why
            print(f"the processes exited with statuses {', '.join(map(str, statuses.values()))}", file=sys.stderr)
        sys.exit(max(statuses.values()))
