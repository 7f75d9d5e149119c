"""train.py and eval.py in processes forked from the tests' process, since a new interpreter would import for seconds.

They have their own signals, environment, output and exit status, as do the processes that they start.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed.run
from commands import BASE, ENTRIES
from conftest import ROOT
from faulty_train import insert
from hydra.core.global_hydra import GlobalHydra
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

from rubiks import parent
from rubiks.cli.entry import launch


def start(folder: Path, name: str, *choices: str, fault: str = "", **environment: str) -> subprocess.Popen:
    """Start train.py or eval.py with these choices in a folder; `fault` is one of `faulty_train`."""
    return _start(folder, [sys.executable, *_words(name, choices)], ({"FAULT": fault} if fault else {}) | environment)


def start_torchrun(folder: Path, processes: int, *choices: str) -> subprocess.Popen:
    """Start this many processes of train.py by torchrun, which is itself forked from the tests."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return _start(folder, [sys.executable, *launcher, *_words("train", choices)], {})


def start_agent(folder: Path, node: int, port: int, *choices: str, **environment: str) -> subprocess.Popen:
    """Start one of two torchrun agents of one process each, which takes itself for a host of its own, host-NODE."""
    meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf=is_host={node == 0}"]
    options = ["--nnodes=2", "--nproc-per-node=1", *meeting, "--local-addr=127.0.0.1"]
    launcher = ["-m", "torch.distributed.run", *options]
    own = {"HOST": f"host-{node}"} | environment
    return _start(folder, [sys.executable, *launcher, *_words("train", choices)], own)


def _words(name: str, choices: Sequence[str]) -> list[str]:
    return [str(ROOT / f"{name}.py"), *BASE, *(["logger=csv"] if name == "train" else []), *choices]


def _start(folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
    return popen(
        command,
        cwd=folder,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen, timeout: float = 180) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, once no process is left to write to them."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out, err


def popen(command: Sequence[str], env: Mapping[str, str], **options: Any) -> subprocess.Popen:
    """subprocess.Popen for [python, train.py or eval.py, ...] or torchrun's command, without a new interpreter."""
    return subprocess.Popen(command, preexec_fn=functools.partial(_become, command, dict(env)), **options)


def _let_go() -> None:
    """Nothing of the tests' process stays open; what tells Popen that the command has begun neither.

    The numbers stay taken: at the next fork, libuv closes those of the pipe that it had in the tests' process.
    """
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3, 1024):
        with contextlib.suppress(OSError):
            os.fstat(number)
            os.dup2(null, number)


def _become(command: Sequence[str], environment: dict[str, str]) -> NoReturn:
    """In the forked process, run the command instead of starting a new interpreter."""
    status = 1
    try:
        gc.freeze()  # objects of the parent, such as threads that this process does not have, are left alone
        gc.unfreeze = lambda: None
        multiprocessing.process._children = set()
        _let_go()
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as in a new interpreter
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        warnings.resetwarnings()
        for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", category)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = list(command[1:])
        GlobalHydra.instance().clear()
        parent.subprocess = types.SimpleNamespace(Popen=popen)
        if "HOST" in environment:
            socket.gethostname = lambda: environment["HOST"]
        if "FAULT" in environment and command[1] != "-m":
            insert(*environment["FAULT"].split())
        if command[1] == "-m":
            subprocess_handler.Popen = lambda args, env, **options: popen([sys.executable, *args[2:]], env, **options)
            torch.distributed.run.main(command[3:])
        else:
            name = Path(command[1]).stem
            launch(*ENTRIES[name])
        status = 0
    except SystemExit as exit_:
        status = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for child in multiprocessing.active_children():  # as an interpreter does at exit
            child.terminate()
            child.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
