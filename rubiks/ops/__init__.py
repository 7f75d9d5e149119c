"""The learnable shift operator (RubiksNet, ECCV 2020, section 3.1)."""

from rubiks.ops.shift import normalize_shift_grad, shift2d, shift3d

__all__ = ["normalize_shift_grad", "shift2d", "shift3d"]
