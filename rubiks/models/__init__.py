"""RubiksNet and its checkpoints."""

from rubiks.models.preprocessing import Preprocessing
from rubiks.models.rubiksnet import RubiksNet
from rubiks.models.tiers import TIERS, VARIANTS

__all__ = ["TIERS", "VARIANTS", "Preprocessing", "RubiksNet"]
