"""How this process was started: alone, by a parent of ours, by torchrun, or by Slurm's srun."""

from __future__ import annotations

import os
import re
import sys
from typing import Any

from lightning_fabric.plugins.environments import (
    ClusterEnvironment,
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)

from rubiks import processes
from rubiks.data.workers import cores
from rubiks.errors import InputError
from rubiks.rendezvous import Place


def environment() -> ClusterEnvironment:
    """Lightning's description of what starts the processes.

    Slurm's variables are also set in a shell of an allocation, where no other processes have been started: then this
    process starts them.
    """
    if _by_torchrun():
        return TorchElasticEnvironment()
    if _by_srun():
        return _Srun(auto_requeue=False)  # other runs would find its requeue checkpoints
    return LightningEnvironment()


class _Srun(SLURMEnvironment):
    """Lightning's, without its refusal of `srun --ntasks=8`; `check` knows the tasks of each host."""

    @staticmethod
    def _validate_srun_variables() -> None: ...

    def validate_settings(self, num_devices: int, num_nodes: int) -> None: ...


def is_first() -> bool:
    """Whether this is the process of rank 0, which writes, or the parent that starts it."""
    if processes.is_child():
        return False
    if _by_torchrun():
        return os.environ["RANK"] == "0"
    if _by_srun():
        return os.environ.get("SLURM_PROCID", "0") == "0"
    return {os.environ.get(name, "0") for name in ("LOCAL_RANK", "NODE_RANK")} == {"0"}


def counts(devices: Any, nodes: int | None) -> tuple[Any, int]:
    """trainer.devices and trainer.num_nodes, with the numbers of torchrun or srun for `auto` and null.

    Raises:
        InputError: srun or torchrun has started different numbers of processes on the hosts.
    """
    started = _started()
    if started is None:
        return devices, 1 if nodes is None else nodes
    per_host, hosts = started
    return per_host if devices in ("auto", -1, "-1") else devices, hosts if nodes is None else nodes


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
        devices: processes on each host, from the configuration.
        nodes: hosts, from the configuration.
    """
    started = _started()
    if started is not None:
        if started != (devices, nodes):
            per_host, hosts = started
            raise InputError(
                f"{_who(per_host * hosts)}, but trainer.devices={devices} and trainer.num_nodes={nodes}: choose "
                f"trainer=ddp without these two, or trainer.devices={per_host} trainer.num_nodes={hosts}"
            )
    elif "LOCAL_RANK" in os.environ and not processes.is_child():
        total = _number("WORLD_SIZE", 1)
        if total != devices * nodes:
            raise InputError(
                f"LOCAL_RANK={os.environ['LOCAL_RANK']} is set, which means one of {total} processes (WORLD_SIZE), but "
                f"trainer.devices and trainer.num_nodes make {devices * nodes}: unset LOCAL_RANK to let this command "
                "start them, or start all of them yourself and set WORLD_SIZE"
            )
    else:
        missing = _missing()
        if nodes > 1 and missing and not processes.is_child():
            raise InputError(
                f"trainer.num_nodes={nodes}, but {', '.join(missing)} is not set: start this with torchrun or srun, or "
                "on each machine with MASTER_ADDR, MASTER_PORT and NODE_RANK set"
            )


def check_gpus(visible: int) -> None:
    """Raise InputError if torchrun or srun has started more processes on this host than each of them sees GPUs."""
    started = _started()
    if started is not None and visible < started[0]:
        raise InputError(
            f"{_who(started[0] * started[1])}, {started[0]} on each host, but this one sees {visible} GPU(s). All of "
            "them must see all GPUs of their host, one for each: in Slurm use --gpus-per-node instead of "
            "--gpus-per-task and --gpu-bind"
        )


def share_of_cores(local: int) -> int:
    """How many of `local` processes on this host share the cores that this one may use."""
    # srun usually binds each task to cores of its own.
    own = _by_srun() and cores() < local * _number("SLURM_CPUS_PER_TASK", 0)
    return 1 if own else local


def _started() -> tuple[int, int] | None:
    """Processes on each host, and hosts, as torchrun or srun has started them; None if neither has."""
    if _by_torchrun():
        total, per_host = _number("WORLD_SIZE", 1), _number("LOCAL_WORLD_SIZE", 1)
        hosts = max(1, total // per_host)
    elif _by_srun():
        total = _number("SLURM_STEP_NUM_TASKS", 1)
        hosts = _number("SLURM_STEP_NUM_NODES", _number("SLURM_NNODES", 1))
        listed = os.environ.get("SLURM_STEP_TASKS_PER_NODE", str(total // hosts))  # 4(x2), or 4,2 where they differ
        same = re.fullmatch(r"(\d+)(\(x\d+\))?", listed)
        per_host = int(same[1]) if same else 0
    else:
        return None
    if per_host * hosts != total:
        raise InputError(
            f"{_who(total)}, not the same number on each of {hosts} hosts; use --ntasks-per-node with srun"
        )
    return per_host, hosts


def _who(total: int) -> str:
    return f"torchrun has started {total} processes" if _by_torchrun() else f"srun has started {total} tasks"


def _missing() -> list[str]:
    """What is not set of the variables with which a user starts one command on each machine."""
    return [name for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK") if name not in os.environ]


def _by_torchrun() -> bool:
    names = ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
    return all(name in os.environ for name in names)


def _by_srun() -> bool:
    """Whether srun has started this process and others; false in a batch script and in the shell of `srun --pty`."""
    if processes.is_child() or _by_torchrun() or (sys.stdin is not None and sys.stdin.isatty()):
        return False
    return _number("SLURM_STEP_NUM_TASKS", 0) > 1


def _number(name: str, otherwise: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else otherwise
