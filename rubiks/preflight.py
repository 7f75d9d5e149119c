"""Checks, in the first seconds of a training of several processes, that they can train together.

Each process states a few facts, all read those of all, and `problems` compares them. Then they do an all-reduce.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import secrets
import shutil
import socket
import struct
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist

from rubiks.data.records import VideoRecord
from rubiks.errors import InputError, VideoError
from rubiks.files import write_text
from rubiks.ops import library
from rubiks.processes import Member
from rubiks.rendezvous import Place
from rubiks.version import VERSION


@dataclass(frozen=True)
class Facts:
    """What one process states about itself.

    Attributes:
        rank: its number.
        host: name of the machine.
        interface, address: through which the host reaches the first process.
        device: name of the GPU, or cpu.
        gpu: the GPU's unique id; empty on a CPU.
        equal: what must be the same everywhere, by name.
        faults: what is wrong in this process alone, a sentence each.
        sees_folder: whether it sees what process 0 writes to the run's folder.
    """

    rank: int
    host: str
    interface: str
    address: str
    device: str
    gpu: str
    equal: dict[str, str]
    faults: list[str]
    sees_folder: bool = True


def exchange(
    member: Member, device: torch.device, equal: Mapping[str, str], faults: Sequence[str], folder: Path | None
) -> list[Facts]:
    """State the facts of this process and read those of all, in the order of ranks.

    Args:
        member: this process.
        device: what it trains on.
        equal: what must be the same everywhere, besides versions.
        faults: what is already known to be wrong in this process.
        folder: the run's folder, in process 0; None to leave it unchecked.
    """
    board, place = member.board, member.place
    with contextlib.ExitStack() as stack:
        if place.rank == 0:
            token = None if folder is None else str(folder / f".preflight-{secrets.token_hex(8)}")
            if token is not None:
                write_text(token, "")
                stack.callback(Path(token).unlink, missing_ok=True)
            board.share("token", token)
        token = board.shared("token", member.timeout)
        properties = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
        own = Facts(
            place.rank,
            socket.gethostname(),
            *network(place),
            "cpu" if properties is None else properties.name,
            "" if properties is None else str(properties.uuid),
            {**versions(), **equal},
            list(faults),
            token is None or _appears(Path(token)),
        )
        return [Facts(**facts) for facts in board.gather(place.rank, "facts", asdict(own), member.timeout)]


def problems(facts: Sequence[Facts]) -> list[str]:
    """Why these processes cannot train together, a sentence each; pure, so that each process finds the same."""
    found = [f"process {own.rank} on {own.host}: {fault}" for own in facts for fault in own.faults]
    gpus: dict[tuple[str, str], list[Facts]] = {}
    for own in facts:
        gpus.setdefault((own.host, own.gpu or f"cpu of process {own.rank}"), []).append(own)
    for (_, gpu), users in gpus.items():
        if len(users) > 1:
            found.append(
                f"{_who(users)} would share one GPU ({users[0].device}, {gpu}): start one process for each GPU, and "
                "let each see all GPUs of its host (CUDA_VISIBLE_DEVICES)"
            )
    for name in {name: None for own in facts for name in own.equal}:
        values: dict[str, list[Facts]] = {}
        for own in facts:
            values.setdefault(own.equal.get(name, "missing"), []).append(own)
        if len(values) > 1:
            found.append(f"{name} differs: {'; '.join(f'{value} in {_who(users)}' for value, users in values.items())}")
    return found


def notes(facts: Sequence[Facts]) -> list[str]:
    """What does not prevent training but may surprise later."""
    blind = [own for own in facts if not own.sees_folder]
    if not blind:
        return []
    return [
        f"{_who(blind)} cannot see the run's folder of process 0 on {facts[0].host}: the run trains, but cannot resume "
        "until its checkpoints are copied to every host; a folder on a shared file system avoids this"
    ]


def _who(users: Sequence[Facts]) -> str:
    hosts: dict[str, list[str]] = {}
    for own in users:
        hosts.setdefault(own.host, []).append(str(own.rank))
    return ", ".join(
        f"process{'es' if len(ranks) > 1 else ''} {', '.join(ranks)} on {host}" for host, ranks in hosts.items()
    )


# ---- facts


def versions() -> dict[str, str]:
    """Versions of what must be the same everywhere."""
    built = library.load().library
    found = {
        "version of rubiks": VERSION,
        "version of PyTorch": torch.__version__,
        "version of Python": platform.python_version(),
        "build of the operators": "none (PyTorch reference)" if built is None else built.facts["sha256"][:12],
    }
    if torch.cuda.is_available():
        found["version of NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def network(place: Place) -> tuple[str, str]:
    """Interface and IPv4 address through which this host reaches the first process; question marks if unknown."""
    address = "?"
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((place.address, place.port))
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                answer = fcntl.ioctl(probe, 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name, address
    return "?", address


def unreadable(name: str, videos: Sequence[VideoRecord]) -> list[str]:
    """What is wrong if the first and the last video of a list cannot be opened here."""
    try:
        for video in (videos[0], videos[-1]):
            with open(video.span.file if video.span is not None else next(iter(video.files)), "rb") as file:
                file.read(1)
    except (OSError, VideoError) as error:
        return [f"a video of the {name} list cannot be read: {error}"]
    return []


def no_room(folder: Path, needed: int) -> list[str]:
    """What is wrong if a folder's file system has less free space than so many bytes."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return []
    return [f"{folder} has {free / 1e9:.1f} GB of free space, but the run's checkpoints need {needed / 1e9:.1f} GB"]


def _appears(path: Path) -> bool:
    """Whether a file appears soon: a network file system may show it late."""
    deadline = time.monotonic() + 3
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


# ---- the network of the gradients


def connect(trainer: pl.Trainer, place: Place, limit: float) -> None:
    """Set up the process groups and do a first all-reduce with each backend that training uses.

    Args:
        trainer: Lightning's trainer, which uses the groups from here on.
        place: where this process stands.
        limit: seconds in which this must succeed.

    Raises:
        InputError: it does not.
    """
    reason: list[str] = []

    def task() -> None:
        try:
            trainer.strategy.setup_environment()
            all_reduce(trainer.strategy.root_device)
            if trainer.strategy.root_device.type == "cuda":  # signals are agreed on through gloo
                group = dist.new_group(backend="gloo", timeout=timedelta(seconds=limit))
                all_reduce(torch.device("cpu"), group)
                dist.destroy_process_group(group)
        except RuntimeError as error:
            reason.append(str(error).splitlines()[0])

    thread = threading.Thread(target=task, daemon=True)  # as the calls may block for much longer
    thread.start()
    thread.join(limit)
    if thread.is_alive() or reason:
        interface, address = network(place)
        raise InputError(
            f"process {place.rank} of {place.size} on {socket.gethostname()} ({interface}, {address}{_own_name()}): "
            f"an all-reduce with the others {'failed' if reason else f'got no answer within {limit:g} s'}"
            f"{': ' if reason else ''}{''.join(reason)}. Set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME to the "
            "interface that connects the hosts, and let a firewall open all ports between them; NCCL_DEBUG=INFO says "
            "more"
        )


def _own_name() -> str:
    """A remark if the host's own name leads to itself alone, since gloo gives others the address that it finds so."""
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(socket.gethostname())
        if address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
            return f"; it knows its own name as {address}, which others cannot reach"
    return ""


def all_reduce(device: torch.device, group: Any = None, numbers: int = 1) -> float:
    """Seconds that an all-reduce of so many float32 takes."""
    tensor = torch.zeros(numbers, device=device)
    _wait(device)
    start = time.perf_counter()
    dist.all_reduce(tensor, group=group)
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
