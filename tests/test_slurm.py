"""scripts/train.sbatch with stand-ins for srun and scontrol: small programs that start tasks and note requests."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import BASE, SMALL_RUNS
from conftest import ROOT
from forked import end, popen, start
from test_run_life import QUICK, assert_same_state, last

SCRIPT = ROOT / "scripts/train.sbatch"

# Asks the test to start tasks, since a new interpreter would import for seconds.
SRUN = """#!/bin/bash
printf '%s\\0' "$@" >arguments
env -0 >environment
touch wanted
until [ -s status ]; do sleep 0.05; done
exit "$(cat status)"
"""
# Ends as the test says, and notes its arguments.
SRUN_THAT_ENDS = """#!/bin/bash
printf '%s\\n' "$@" >srun-arguments
exit "$STATUS"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>requests
"""


class Job:
    """A batch job in a folder, as Slurm treats it: an environment, a log, signals, and another start on request."""

    def __init__(self, folder: Path, srun: str, *arguments: str) -> None:
        self.folder, self.arguments = folder, arguments
        options = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SCRIPT.read_text(), re.MULTILINE)
        self.options = dict(options)
        self.id = _job_id()
        (folder / "bin").mkdir()
        for name, text in (("srun", srun), ("scontrol", SCONTROL)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def start(self, **environment: str) -> subprocess.Popen:
        own = {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(self.id),
            "SLURM_JOB_NAME": self.options["job-name"],
            "SLURM_NTASKS": "2",
            "SLURM_NTASKS_PER_NODE": "2",
            "SLURM_NNODES": "1",
        }
        with self.log.open(self.options["open-mode"][0]) as log:
            return subprocess.Popen(
                ["bash", SCRIPT, *self.arguments],
                env=os.environ | own | environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def tasks(self, script: subprocess.Popen) -> list[subprocess.Popen]:
        """Wait for SRUN, and start two tasks of one host as srun does."""
        wanted = self.folder / "wanted"
        while not wanted.is_file():
            assert script.poll() is None, self.log.read_text()
            time.sleep(0.05)
        wanted.unlink()
        arguments = (self.folder / "arguments").read_text().split("\0")[:-1]
        environment = dict(line.split("=", 1) for line in (self.folder / "environment").read_text().split("\0")[:-1])
        environment |= {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "1"}
        environment |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODELIST": "127.0.0.1", "SLURM_NODEID": "0"}
        command = [sys.executable, *arguments[arguments.index("python") + 1 :]]
        with self.log.open("a") as log:
            return [
                popen(
                    command,
                    environment | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
                for rank in range(2)
            ]

    def end(self, script: subprocess.Popen, tasks: list[subprocess.Popen]) -> int:
        """The script's exit status, when the tasks have ended."""
        statuses = [task.wait(60) for task in tasks]
        status = self.folder / "status"
        status.write_text(str(max(128 - status if status < 0 else status for status in statuses)))
        try:
            return script.wait(10)
        finally:
            status.unlink()

    @property
    def log(self) -> Path:
        return self.folder / "job.log"

    @property
    def requests(self) -> list[str]:
        """What scontrol was asked for."""
        path = self.folder / "requests"
        return path.read_text().splitlines() if path.is_file() else []


def _job_id() -> int:
    """One whose port (Lightning makes one of a job's number) is free."""
    while True:
        number = random.randrange(1000, 10000)
        with socket.socket() as free:
            if free.connect_ex(("127.0.0.1", 15000 + number)):
                return number


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck")
def test_shellcheck_finds_nothing():
    subprocess.run(["shellcheck", SCRIPT], check=True)


@pytest.mark.parametrize(
    ("status", "requeued"), [(0, False), (1, False), (2, False), (130, False), (137, False), (138, True), (143, True)]
)
def test_a_job_is_requeued_only_if_a_signal_has_stopped_it(status, requeued, tmp_path):
    job = Job(tmp_path, SRUN_THAT_ENDS)
    assert job.start(STATUS=str(status)).wait() == status
    assert job.requests == ([f"requeue {job.id}"] if requeued else [])
    assert "requeue" in job.options
    assert ("requeued" in job.log.read_text()) == requeued


@pytest.mark.parametrize("given", [(), ("run=mine",)])
def test_arguments_are_passed_on_and_the_run_is_named_after_the_job(given, tmp_path):
    choices = ("data=csv", "data.root=a folder", "augment.rand_augment=null", *given)
    job = Job(tmp_path, SRUN_THAT_ENDS, *choices)
    job.start(STATUS="0", SLURM_CPUS_PER_TASK="7").wait()
    arguments = (tmp_path / "srun-arguments").read_text().splitlines()
    first = arguments.index("python")
    assert "--cpus-per-task=7" in arguments[:first]
    assert arguments[first : first + 3] == ["python", "train.py", "trainer=ddp"]
    named = given or (f"run=rubiks-{job.id}",)
    assert sorted(arguments[first + 3 :]) == sorted({*choices, *named})


@pytest.mark.slow
@SMALL_RUNS
def test_a_job_that_is_stopped_goes_on_after_its_requeue(small_network, builtin_data, tmp_path):
    choices = (builtin_data, *QUICK, "recipe.batch_size=2")
    job = Job(tmp_path, SRUN, *BASE, "logger=csv", *choices)
    script = job.start(FAULT="training 0 1 1 wait")
    tasks = job.tasks(script)
    while "inside" not in job.log.read_text() and tasks[0].poll() is None:
        time.sleep(0.05)
    for task in tasks:  # two minutes before the time limit
        task.send_signal(signal.Signals[f"SIG{job.options['signal'].removesuffix('@120')}"])
    assert job.end(script, tasks) == 138, job.log.read_text()
    assert job.requests == [f"requeue {job.id}"]
    run = tmp_path / f"outputs/rubiks-{job.id}"
    steps = last(run)["global_step"]
    assert 8 <= steps < 12

    whole = start(tmp_path, "train", *choices, "trainer=ddp", "trainer.devices=2", "run=whole")
    script = job.start()
    assert job.end(script, job.tasks(script)) == 0, job.log.read_text()
    status, _, err = end(whole)
    assert status == 0, err
    assert len(job.requests) == 1
    assert_same_state(last(run), last(tmp_path / "outputs/whole"))

    # One folder, and one log with everything once.
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {run.name, "whole"}
    log = job.log.read_text()
    for line in (
        f"Run in outputs/{run.name}",
        "Stopping after this step",
        f"interrupted by SIGUSR1: to resume: python train.py run={run.name} ",
        f"Resuming outputs/{run.name} after 1 epoch and {4 * (steps - 6)} videos of the next ({steps} steps)",
        "epoch 1/2  validation",
        "epoch 2/2  validation",
        "Best validation top-1",
    ):
        assert log.count(line) == 1, line
    assert "instead of" not in log  # the same number of processes
