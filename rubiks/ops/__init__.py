"""The learnable shift operator (RubiksNet, ECCV 2020, section 3.1)."""

from rubiks.ops import library, operator
from rubiks.ops.shift import normalize_shift_grad, shift2d, shift3d

if library.ready():  # so that saved programs find the operator; otherwise it is built at first use
    operator.prepare()

__all__ = ["normalize_shift_grad", "shift2d", "shift3d"]
