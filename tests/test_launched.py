"""Who has started the processes, and how many: torchrun, srun, or nobody, in shells with variables of any of them."""

from __future__ import annotations

import os
import re
import sys

import pytest
from configurations import training
from lightning_fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from test_trainers import trainer_of

from rubiks import assemble, launched, rendezvous
from rubiks.data import datamodule
from rubiks.errors import InputError


def by_torchrun(rank: int, total: int, per_host: int) -> dict[str, str]:
    return {
        "TORCHELASTIC_RUN_ID": "x",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % per_host),
        "GROUP_RANK": str(rank // per_host),
        "WORLD_SIZE": str(total),
        "LOCAL_WORLD_SIZE": str(per_host),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
    }


def by_sbatch(hosts: int, per_host: int) -> dict[str, str]:
    """In a batch script, or the shell of salloc."""
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "interactive",
        "SLURM_NTASKS": str(hosts * per_host),
        "SLURM_NNODES": str(hosts),
        "SLURM_NODELIST": "node[3-4]" if hosts > 1 else "node3",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
    }


def by_srun(rank: int, hosts: int, per_host: int) -> dict[str, str]:
    return by_sbatch(hosts, per_host) | {
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(hosts * per_host),
        "SLURM_STEP_NUM_NODES": str(hosts),
        "SLURM_STEP_TASKS_PER_NODE": f"{per_host}(x{hosts})" if hosts > 1 else str(per_host),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % per_host),
        "SLURM_NODEID": str(rank // per_host),
    }


@pytest.fixture
def set_environment(monkeypatch):
    """Sets these variables, and no others of any launcher."""

    def put(variables: dict[str, str]) -> None:
        names = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
        for name in [name for name in os.environ if name.startswith(("SLURM", "TORCHELASTIC", "RUBIKS_"))]:
            monkeypatch.delenv(name)
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


# The environment; what starts the processes; whether this one is the first; and how many, with trainer=ddp on a CPU.
STARTED = {
    "a shell": ({}, LightningEnvironment, True, (1, 1)),
    "a shell with a rank": ({"RANK": "1", "WORLD_SIZE": "2"}, LightningEnvironment, True, (1, 1)),
    "a shell with a torchrun job's id": ({"TORCHELASTIC_RUN_ID": "x"}, LightningEnvironment, True, (1, 1)),
    "a Kubernetes pod": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "pod-0", "MASTER_PORT": "23456"},
        LightningEnvironment,
        True,
        (1, 1),
    ),
    "torchrun": (by_torchrun(0, 2, 2), TorchElasticEnvironment, True, (2, 1)),
    "torchrun, other rank": (by_torchrun(1, 2, 2), TorchElasticEnvironment, False, (2, 1)),
    "torchrun, two hosts": (by_torchrun(2, 4, 2), TorchElasticEnvironment, False, (2, 2)),
    "torchrun, one process on each of two hosts": (by_torchrun(0, 2, 1), TorchElasticEnvironment, True, (1, 2)),
    "torchrun, a single process": (by_torchrun(0, 1, 1), TorchElasticEnvironment, True, (1, 1)),
    "torchrun in a Slurm job": (by_srun(1, 2, 1) | by_torchrun(3, 4, 2), TorchElasticEnvironment, False, (2, 2)),
    "a batch script": (by_sbatch(2, 4), LightningEnvironment, True, (1, 1)),
    "srun with one task": (by_srun(0, 1, 1), LightningEnvironment, True, (1, 1)),
    "srun": (by_srun(0, 1, 8), SLURMEnvironment, True, (8, 1)),
    "srun, other task": (by_srun(5, 1, 8), SLURMEnvironment, False, (8, 1)),
    "srun, two hosts": (by_srun(4, 2, 4), SLURMEnvironment, False, (4, 2)),
    "srun, fewer hosts than the job": (by_srun(0, 1, 4) | {"SLURM_NNODES": "2"}, SLURMEnvironment, True, (4, 1)),
}


@pytest.mark.parametrize("name", STARTED)
def test_the_number_of_processes_follows_what_started_them(name, set_environment):
    variables, kind, first, (devices, nodes) = STARTED[name]
    set_environment(variables)
    assert isinstance(launched.environment(), kind)
    assert launched.is_first() == first
    trainer = trainer_of("trainer=ddp")
    assert (trainer.num_devices, trainer.num_nodes, trainer.world_size) == (devices, nodes, devices * nodes)
    assert training("device=cpu", "trainer=ddp").processes == (devices, nodes)


def test_a_shell_that_srun_has_opened_is_a_shell(set_environment, monkeypatch):
    """`srun --ntasks=4 --pty bash`: the other tasks have ended."""
    set_environment(by_srun(0, 1, 4))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    assert isinstance(launched.environment(), LightningEnvironment)
    assert trainer_of("trainer=ddp").world_size == 1


@pytest.mark.parametrize(
    ("variables", "devices", "nodes", "words"),
    [
        ({}, 2, 1, None),
        ({"WORLD_SIZE": "2", "RANK": "1"}, 1, 1, None),  # left behind in a shell
        ({"LOCAL_RANK": "0"}, 1, 1, None),
        ({"LOCAL_RANK": "0"}, 2, 1, "unset LOCAL_RANK"),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 2, 1, None),
        ({"LOCAL_RANK": "0", "WORLD_SIZE": "2"}, 1, 1, "unset LOCAL_RANK"),
        ({}, 2, 2, "MASTER_ADDR, MASTER_PORT, NODE_RANK is not set"),
        (by_torchrun(0, 2, 2), 2, 1, None),
        (by_torchrun(0, 2, 2), 1, 1, "torchrun has started 2 processes, but"),
        (by_torchrun(0, 2, 2), 1, 2, "trainer.devices=2 trainer.num_nodes=1"),
        (by_torchrun(0, 4, 2), 2, 1, "trainer.num_nodes=2"),
        (by_torchrun(0, 4, 2), 2, 2, None),
        (by_torchrun(0, 5, 2), 2, 2, "not the same number on each of 2 hosts"),
        (by_sbatch(2, 2), 2, 1, None),  # within an allocation, without srun
        (by_srun(0, 1, 1), 2, 1, None),
        (by_srun(0, 1, 2), 1, 1, "srun has started 2 tasks"),
        (by_srun(0, 2, 4), 4, 2, None),
        (by_srun(0, 2, 4), 1, 2, "trainer.devices=4 trainer.num_nodes=2"),
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_NNODES": "2"}, 4, 2, None),
        (by_srun(0, 2, 2) | {"SLURM_STEP_TASKS_PER_NODE": "3,1"}, 2, 2, "not the same number on each of 2 hosts"),
    ],
)
def test_processes_that_contradict_the_configuration(variables, devices, nodes, words, set_environment):
    set_environment(variables)
    if words is None:
        launched.check(devices, nodes)
    else:
        with pytest.raises(InputError, match=re.escape(words)):
            launched.check(devices, nodes)


def test_tasks_that_do_not_see_the_gpus_of_their_host(set_environment):
    launched.check_gpus(1)
    set_environment(by_srun(0, 2, 4))
    launched.check_gpus(4)
    with pytest.raises(InputError, match="srun has started 8 tasks, 4 on each host, but this one sees 1 GPU"):
        launched.check_gpus(1)


@pytest.mark.parametrize(
    ("variables", "cores", "workers"),
    [
        (by_torchrun(0, 4, 4), 32, 7),  # all see all cores
        (by_srun(0, 1, 4) | {"SLURM_CPUS_PER_TASK": "8"}, 32, 7),
        (by_srun(0, 1, 4) | {"SLURM_CPUS_PER_TASK": "8"}, 8, 7),  # each is bound to its own
        (by_srun(0, 1, 4), 32, 7),
    ],
)
def test_the_loader_processes_use_the_cores_that_are_left(variables, cores, workers, set_environment, monkeypatch):
    set_environment(variables)
    monkeypatch.setattr(datamodule, "cores", lambda: cores)
    monkeypatch.setattr(launched, "cores", lambda: cores)
    settings = training("device=cpu", "trainer=ddp", data__workers="auto")
    assert assemble.training_data(settings, [], [], None).workers == workers


PLACES = {
    "alone": ({}, 1, 1, None),
    "starts the others": ({}, 2, 1, None),
    "left behind in a shell": ({"WORLD_SIZE": "2", "RANK": "1"}, 1, 1, None),
    "in an allocation": ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, 2, 1, None),
    "of our parent": ({"LOCAL_RANK": "1", "WORLD_SIZE": "4", "NODE_RANK": "1"}, 2, 2, (3, 4, 1)),
    "one of each host": ({"NODE_RANK": "1"}, 1, 3, (1, 3, 0)),
    "torchrun": (by_torchrun(5, 8, 4), 4, 2, (5, 8, 1)),
    "one of torchrun": (by_torchrun(0, 1, 1), 1, 1, None),
    "srun": (by_srun(6, 2, 4), 4, 2, (6, 8, 2)),
}


@pytest.mark.parametrize("name", PLACES)
def test_where_a_process_stands(name, set_environment):
    variables, devices, nodes, expected = PLACES[name]
    set_environment(variables | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    place = None if expected is None else rendezvous.Place(*expected, "10.0.0.1", 29500)
    assert launched.place(devices, nodes) == place
