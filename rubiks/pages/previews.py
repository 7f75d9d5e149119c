"""Clips as small moving pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIDE = 160  # of previews, in pixels
FRAMES_PER_SECOND = 6
LIMIT = 60_000  # bytes of a preview
QUALITIES = (60, 35, 15, 0)  # of the compression, until a preview is small enough
# RGB of an activation map's colours, from low to high.
RAMP = torch.tensor([[0.19, 0.30, 0.75], [0.55, 0.75, 0.85], [0.98, 0.85, 0.40], [0.84, 0.10, 0.11]])


def animation(frames: Tensor) -> bytes:
    """An endless animated WebP, at most SIDE pixels high and wide, and LIMIT bytes if that can be done.

    Args:
        frames: uint8 (T, 3, H, W), RGB.
    """
    images = [Image.fromarray(frame) for frame in frames.movedim(1, -1).numpy()]
    for image in images:
        image.thumbnail((SIDE, SIDE))
    content = b""
    for quality in QUALITIES:
        content = _webp(images, quality)
        if len(content) <= LIMIT:
            break
    return content


def _webp(images: Sequence[Image.Image], quality: int) -> bytes:
    out = io.BytesIO()
    first, *others = images
    duration = round(1000 / FRAMES_PER_SECOND)
    first.save(out, "WEBP", save_all=True, append_images=others, duration=duration, loop=0, quality=quality)
    return out.getvalue()


def with_map(frames: Tensor, maps: Tensor) -> Tensor:
    """Frames with an activation map drawn over them: blue where it is lowest in the clip, red where it is highest.

    Args:
        frames: uint8 (T, 3, H, W).
        maps: (T, H', W'), any numbers.

    Returns:
        uint8 (T, 3, H, W).
    """
    maps = maps.float()
    low, high = maps.min(), maps.max()
    level = (maps - low) / (high - low).clamp(min=1e-12)
    level = F.interpolate(level[:, None], frames.shape[-2:], mode="bilinear")
    place = level * (len(RAMP) - 1)
    left = place.floor().clamp(max=len(RAMP) - 2).long()
    colour = torch.cat([torch.lerp(own[left], own[left + 1], place - left) for own in RAMP.t()], dim=1)
    strength = 0.15 + 0.4 * level  # weak evidence hides little
    return torch.lerp(frames / 255, colour, strength).mul(255).round().to(torch.uint8)
