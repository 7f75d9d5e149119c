"""The networks that were published with RubiksNet, and the accuracy that they reach by the release's own logs."""

from __future__ import annotations

import csv
import functools
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("zoo.csv")


@dataclass(frozen=True)
class Published:
    """A published network under one protocol.

    Attributes:
        tier, variant: of the network.
        budget: largest share of the channels that it shifts in time, for rubiks3d-aq.
        data: the data set, as in `data=`.
        protocol: as in `protocol=`.
        top1, top5: accuracy on the validation set in percent; None if none was published.
        file: its checkpoint's name in the release.
        sha256: of that file, if it is known.
    """

    tier: str
    variant: str
    budget: float | None
    data: str
    protocol: str
    top1: float | None
    top5: float | None
    file: str
    sha256: str | None


@functools.cache
def rows() -> list[Published]:
    """All of them, in the table's order."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        return [
            Published(
                tier=row["tier"],
                variant=row["variant"],
                budget=_number(row["budget"]),
                data=row["data"],
                protocol=row["protocol"],
                top1=_number(row["top1"]),
                top5=_number(row["top5"]),
                file=row["file"],
                sha256=row["sha256"] or None,
            )
            for row in csv.DictReader(file)
        ]


def published(data: str, tier: str, variant: str, protocol: str) -> Published | None:
    """The published network with these properties; None if there is none, or none with an accuracy."""
    wanted = (data, tier, variant, protocol)
    found = (row for row in rows() if (row.data, row.tier, row.variant, row.protocol) == wanted)
    return next((row for row in found if row.top1 is not None), None)


def _number(text: str) -> float | None:
    return float(text) if text else None
