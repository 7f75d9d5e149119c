"""How this process was started: alone, by a parent of ours, by torchrun, or by Slurm's srun."""

from __future__ import annotations

import os

from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from rubiks import processes
from rubiks.errors import InputError
from rubiks.rendezvous import Place


def environment() -> ClusterEnvironment:
    """Lightning's description of what starts the processes.

    Slurm's variables are also set in a shell of an allocation, where no other processes have been started: then this
    process starts them.
    """
    if _by_torchrun():
        return TorchElasticEnvironment()
    if _slurm_tasks() > 1:
        return SLURMEnvironment(auto_requeue=False)  # other runs would find its requeue checkpoints
    return LightningEnvironment()


def is_first() -> bool:
    """Whether this is the process of rank 0, which writes, or the parent that starts it."""
    if processes.is_child():
        return False
    if _by_torchrun():
        return os.environ.get("RANK", "0") == "0"
    if _slurm_tasks() > 1:
        return os.environ.get("SLURM_PROCID", "0") == "0"
    return {os.environ.get(name, "0") for name in ("LOCAL_RANK", "NODE_RANK")} == {"0"}


def place(devices: int, nodes: int) -> Place | None:
    """Where this process stands among those that run together; None if it is alone, or starts the others.

    Args:
        devices: processes on each machine, from the configuration.
        nodes: machines, from the configuration.
    """
    own = environment()
    if not isinstance(own, LightningEnvironment):
        rank, size = own.global_rank(), own.world_size()
    elif "LOCAL_RANK" in os.environ:
        size = _number("WORLD_SIZE", 1)
        rank = own.node_rank() * (size // nodes) + own.local_rank()
    elif devices == 1 and not _missing():
        rank, size = own.node_rank(), nodes
    else:
        return None
    return None if size == 1 else Place(rank, size, own.local_rank(), own.main_address, own.main_port)


def check(devices: int, nodes: int) -> None:
    """Raise InputError if the processes started from outside are not those that the trainer should have.

    Args:
        devices: processes on each machine, from the configuration.
        nodes: machines, from the configuration.
    """
    wanted = devices * nodes
    if _by_torchrun():
        started, own = _number("WORLD_SIZE", 1), _number("LOCAL_WORLD_SIZE", 1)
        who = f"torchrun has started {started} processes"
    elif _slurm_tasks() > 1:
        started = _slurm_tasks()
        own = max(1, started // max(1, _number("SLURM_NNODES", 1)))
        who = f"srun has started {started} tasks"
    elif "LOCAL_RANK" in os.environ and not processes.is_child():
        started = _number("WORLD_SIZE", 1)
        who = f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set, which means one of {started} processes (WORLD_SIZE)"
        if started != wanted:
            raise InputError(
                f"{who}, but trainer.devices and trainer.num_nodes make {wanted}: unset LOCAL_RANK to let "
                "this command start them, or start all of them yourself and set WORLD_SIZE"
            )
        return
    else:
        missing = _missing()
        if nodes > 1 and missing and not processes.is_child():
            raise InputError(
                f"trainer.num_nodes={nodes}, but {', '.join(missing)} is not set: start this with torchrun or srun, or "
                "on each machine with MASTER_ADDR, MASTER_PORT and NODE_RANK set"
            )
        return
    if started != wanted:
        raise InputError(
            f"{who}, but trainer.devices and trainer.num_nodes make {wanted}: choose trainer=ddp trainer.devices={own} "
            f"trainer.num_nodes={max(1, started // own)}"
        )


def _missing() -> list[str]:
    """What is not set of the variables with which a user starts one command on each machine."""
    return [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _slurm_tasks() -> int:
    """Number of tasks in the job step that srun started; 0 elsewhere, also in the batch script itself."""
    return _number("SLURM_STEP_NUM_TASKS", 0)


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
