"""Where the processes that run together meet: PyTorch's TCPStore."""

from __future__ import annotations

import datetime
import os
import socket
import time
from dataclasses import dataclass

import torch.distributed as dist

from rubiks.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a process stands among those that run together.

    Attributes:
        rank: its number.
        size: how many there are.
        local_rank: its number on this host.
        address, port: of the store.
    """

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @property
    def holds_store(self) -> bool:
        """Whether this process holds the store, and not what has started it."""
        return self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def connect(place: Place, limit: float) -> dist.TCPStore:
    """A connection to the store, which the first process opens if nothing else holds it.

    Args:
        place: where this process stands.
        limit: seconds for which to try.

    Raises:
        InputError: the store cannot be reached or opened.
    """
    host = socket.gethostname()
    deadline = time.monotonic() + limit
    while not place.holds_store:  # TCPStore would print much about each attempt
        try:
            socket.create_connection((place.address, place.port), timeout=limit).close()
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"process {place.rank} of {place.size} on {host} cannot reach {place.address}:{place.port} within "
                    f"{limit:g} s (connect_timeout): {error.strerror or error}; see whether process 0 was started "
                    "there (MASTER_ADDR, MASTER_PORT), and whether a firewall blocks the port"
                ) from None
            time.sleep(0.1)
    try:
        return dist.TCPStore(
            place.address,
            place.port,
            None,
            place.holds_store,
            datetime.timedelta(seconds=limit),
            wait_for_workers=False,
            multi_tenant=True,  # the process group uses it too
        )
    except RuntimeError as error:
        raise InputError(
            f"process {place.rank} of {place.size} on {host} cannot "
            f"{'open' if place.holds_store else 'reach'} {place.address}:{place.port}: {str(error).splitlines()[0]}"
        ) from None
