"""The sizes of RubiksNet (ECCV 2020, table 1), its variants and their ablations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from rubiks.nn import ChannelShift, FixedTimeShift, GroupedShift, LearnableShift, QuantizedShift


@dataclass(frozen=True)
class Tier:
    """Size of a network: stem width, blocks in stages 1 to 4, squeeze-excite reduction (None: no squeeze-excite)."""

    width: int
    blocks: tuple[int, int, int, int]
    reduction: int | None = None


TIERS = {
    "tiny": Tier(54, (3, 4, 6, 3)),
    "small": Tier(72, (3, 4, 6, 3), reduction=12),
    "medium": Tier(72, (3, 4, 23, 3)),
    "large": Tier(72, (3, 8, 36, 3)),
}


@dataclass(frozen=True)
class Variant:
    """What the blocks of a network do in space and time.

    Attributes:
        about: the same in a few words.
        shift: makes a block's shift from a number of channels and a stride.
        temporal_attention: whether blocks begin with a temporal attention shift.
    """

    about: str
    shift: Callable[[int, int], ChannelShift]
    temporal_attention: bool = False


SPATIAL_SHIFT = partial(LearnableShift, temporal=False)
VARIANTS = {
    "rubiks3d": Variant("3D shift", LearnableShift),
    "rubiks3d-aq": Variant("2D shift, temporal attention shift", SPATIAL_SHIFT, temporal_attention=True),
    "rubiks3d-quantized": Variant("3D shift by whole numbers", QuantizedShift),
    "rubiks2d": Variant("2D shift", SPATIAL_SHIFT),
    "fixed-tsm": Variant("2D shift, TSM's fixed temporal shift", FixedTimeShift),
    "grouped": Variant("fixed 3x3 grouped shift, TSM's fixed temporal shift", GroupedShift),
}
