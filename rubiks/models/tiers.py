"""The sizes and variants of RubiksNet (ECCV 2020, table 1)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tier:
    """Size of a network: stem width, blocks in stages 1 to 4, reduction of the squeeze-excite (None: there is none)."""

    width: int
    blocks: tuple[int, int, int, int]
    reduction: int | None = None


TIERS = {
    "tiny": Tier(54, (3, 4, 6, 3)),
    "small": Tier(72, (3, 4, 6, 3), reduction=12),
    "medium": Tier(72, (3, 4, 23, 3)),
    "large": Tier(72, (3, 8, 36, 3)),
}
VARIANTS = ("rubiks3d", "rubiks3d-aq")
