"""What the networks take as input."""

from __future__ import annotations

from torch import Tensor


def as_clips(clips: Tensor) -> Tensor:
    """(N, T, 3, H, W), or the official (N, T*3, H, W), frame-major -> (N, T, 3, H, W).

    Raises:
        ValueError, TypeError: the shape is neither of the two; the pixels are not floating point.
    """
    if clips.dim() == 4 and clips.shape[1] % 3 == 0:
        clips = clips.unflatten(1, (clips.shape[1] // 3, 3))
    if clips.dim() != 5 or clips.shape[2] != 3:
        raise ValueError(f"clips must be (N, T, 3, H, W) or (N, T*3, H, W), got {tuple(clips.shape)}")
    if not clips.is_floating_point():
        raise TypeError(f"clips must be floating point and normalised, got {clips.dtype}; see rubiks.nn.Normalize")
    return clips
