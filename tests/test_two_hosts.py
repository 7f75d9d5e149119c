"""A training on two hosts, started by torchrun: when one fails, both end by themselves and say why, once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from commands import SMALL_RUNS
from forked import end, start, start_agent

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("small_network"), SMALL_RUNS]

CHOICES = (
    "data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4", "recipe.batch_size=2",
    "recipe.epochs=1", "trainer.log_every_n_steps=1", "trainer=ddp", "trainer.devices=1", "trainer.num_nodes=2",
    "process_timeout=4", "checkpoint.every_n_steps=1", "run=both",
)  # fmt: skip


@pytest.fixture
def agents(builtin_data, tmp_path):
    """Starts both agents."""
    started: list[subprocess.Popen] = []

    def run(*choices: str, fault: str = "") -> list[subprocess.Popen]:
        own = {"FAULT": fault} if fault else {}
        port = free_port()
        both = [start_agent(tmp_path, node, port, builtin_data, *CHOICES, *choices, **own) for node in (0, 1)]
        started.extend(both)
        return both

    yield run
    for agent in started:
        if agent.poll() is None:
            for child in children(agent):
                os.kill(child, signal.SIGKILL)
            agent.kill()
            agent.communicate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def children(process: subprocess.Popen) -> list[int]:
    """The processes that a process has started."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def position(folder: Path) -> int:
    return torch.load(folder / "outputs/both/checkpoints/last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("training 1 0 3 raise", "process 1 of 2 on host-1 failed:\nTraceback"),
        ("training 1 0 3 SIGSTOP", "error: process 1 of 2 on host-1 no longer answers"),
        ("training 1 0 3 hang", "error: process 1 of 2 on host-1 hangs"),
        ("training 1 0 1 worker", "error: process 1 of 2 on host-1: "),
        ("training 1 0 3 SIGTERM", "interrupted by SIGTERM: to resume: python train.py run=both "),
    ],
)
def test_a_process_that_fails_ends_both_hosts_with_one_cause(fault, cause, agents):
    both = agents("data.workers=1" if "worker" in fault else "data.workers=0", fault=fault)
    ends = [end(both[0], timeout=60)]
    if "SIGSTOP" in fault:  # torchrun would kill it after 30 seconds
        os.kill(*children(both[1]), signal.SIGKILL)
    ends.append(end(both[1], timeout=60))
    assert [status != 0 for status, _, _ in ends] == [True, True]
    errors = "".join(err for _, _, err in ends)
    assert errors.count(cause) == 1
    assert errors.count("process 1 of 2") == ("SIGTERM" not in fault)
    assert "process 0 of 2" not in errors


@pytest.mark.parametrize(
    ("gone", "cause"),
    [
        (0, "error: process 1 of 2 on host-1 gets no answer from process 0 (127.0.0.1:"),
        (1, "error: process 1 of 2 on host-1 no longer answers"),
    ],
)
def test_a_host_that_is_gone_ends_the_other_and_both_go_on(gone, cause, agents, tmp_path):
    both = agents(fault=f"training {gone} 0 3 hang")
    assert any(line.startswith("inside") for line in both[gone].stdout)
    for pid in (both[gone].pid, *children(both[gone])):
        os.kill(pid, signal.SIGKILL)
    both[gone].communicate()
    status, _, err = end(both[1 - gone], timeout=60)
    assert status != 0
    assert err.count(cause) == 1
    before = position(tmp_path)
    ends = [end(agent) for agent in agents()]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert "Resuming outputs/both after" in ends[0][1]
    assert position(tmp_path) > before


def test_a_first_process_that_holds_the_store_is_killed(builtin_data, tmp_path):
    """As with srun, which starts each process without an agent."""
    shared = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "FAULT": "training 0 0 3 SIGKILL"}
    first, second = (
        start(tmp_path, "train", builtin_data, *CHOICES, **shared, RANK=rank, GROUP_RANK=rank) for rank in ("0", "1")
    )
    assert end(first)[0] == -signal.SIGKILL
    status, _, err = end(second, timeout=30)
    assert status == 2
    assert err.count("error: process 1 of 2 on ") == err.count("gets no answer from process 0 (127.0.0.1:") == 1
