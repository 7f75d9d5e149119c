"""The shift, one output element at a time: slow, obvious, independent of the package."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def shift(x: Tensor, shift: Tensor, stride: tuple, padding: tuple, quantize: bool = False) -> Tensor:
    """x (N, T, C, H, W) and shift (3, C) in float64; differentiable in x through plain indexing."""
    lengths = (x.shape[1], x.shape[3], x.shape[4])
    outs = [(length + 2 * p - 1) // s + 1 for length, s, p in zip(lengths, stride, padding, strict=True)]
    rows = []
    for c in range(x.shape[2]):
        for place in itertools.product(*(range(out) for out in outs)):
            value = 0 * x[:, 0, c, 0, 0]
            for taps in itertools.product((0, 1), repeat=3):
                weight, index = 1.0, []
                for axis in range(3):
                    s = float(shift[axis, c])
                    base = math.floor(s + 0.5) if quantize else math.floor(s)
                    fraction = 0.0 if quantize else s - math.floor(s)
                    weight *= fraction if taps[axis] else 1 - fraction
                    index.append(place[axis] * stride[axis] - padding[axis] + base + taps[axis])
                if weight and all(0 <= i < length for i, length in zip(index, lengths, strict=True)):
                    value = value + weight * x[:, index[0], c, index[1], index[2]]
            rows.append(value)
    return torch.stack(rows, 1).view(x.shape[0], x.shape[2], *outs).movedim(1, 2)
