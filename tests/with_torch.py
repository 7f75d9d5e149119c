"""Scripts in separate processes that have already imported PyTorch, which takes seconds, but nothing of rubiks."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

# Forks a process for each request, and another that reports its id and, in the end, its exit status.
_SERVER = """
import importlib, json, os, signal, socket, sys, tempfile, traceback, warnings
for module in ["torch", *sys.argv[2:]]:
    importlib.import_module(module)

requests = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    request, descriptors, _, _ = socket.recv_fds(requests, 1 << 20, 3)
    if not request:
        break
    out, err, told = descriptors
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        script, folder, environment = json.loads(request)
        process = os.fork()
        if process == 0:
            status = 1
            try:
                os.setsid()
                os.dup2(out, 1)
                os.dup2(err, 2)
                os.closerange(3, 1024)
                os.chdir(folder)
                os.environ.clear()
                os.environ.update(environment)
                sys.path.insert(0, folder)
                tempfile.tempdir = None
                exec(script, {"__name__": "__main__"})
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        os.write(told, b"%d\\n" % process)
        os.write(told, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
        os._exit(0)
    for descriptor in (out, err, told):
        os.close(descriptor)
"""


class Process:
    """A running script, with the part of subprocess.Popen that tests need; stdout and stderr are text."""

    returncode: int | None = None

    def __init__(self, requests: socket.socket, script: str, folder: Path, environment: Mapping[str, str]) -> None:
        self._outputs = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        told, tell = os.pipe()
        request = json.dumps([script, str(folder), dict(environment)]).encode()
        socket.send_fds(requests, [request], [*(output.fileno() for output in self._outputs), tell])
        os.close(tell)
        self._told = os.fdopen(told)
        self.pid = int(self._told.readline())

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        return self._wait(0)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Stdout and stderr, when it has ended."""
        assert self._wait(timeout) is not None, f"it still runs after {timeout:g} seconds"
        out, err = map(_read, self._outputs)
        self._told.close()
        return out, err

    def _wait(self, timeout: float) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], timeout)[0]:
            self.returncode = int(self._told.readline())
        return self.returncode


def _read(file: IO[bytes]) -> str:
    with file:
        file.seek(0)
        return file.read().decode()


class WithTorch:
    """Starts scripts. Must be closed.

    Args:
        modules: what is imported already besides PyTorch.
    """

    def __init__(self, *modules: str) -> None:
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-c", _SERVER, str(theirs.fileno()), *modules]
        self._server = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def start(self, script: str, folder: Path, environment: Mapping[str, str]) -> Process:
        """Run a Python script in a folder, which is first on its import path, with only this environment."""
        return Process(self._requests, script, folder, environment)

    def close(self) -> None:
        self._requests.close()
        self._server.wait()
