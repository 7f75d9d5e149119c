"""Where the compiled kernels of the fused block run."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from rubiks.ops import library

FRAMES = (8, 16)  # of clips that the compiled kernels take
SHARED_MEMORY = 120_000  # bytes that a thread block needs: data centre GPUs have them, consumer GPUs do not


@functools.cache
def available(device: torch.device) -> bool:
    """Whether the compiled kernels run on a device."""
    if device.type != "cuda" or not library.load().compiled("CUDA"):
        return False
    found: Any = torch.cuda.get_device_properties(device)  # its type lacks an attribute before PyTorch 2.15
    return (found.major, found.minor) >= (8, 0) and found.shared_memory_per_block_optin >= SHARED_MEMORY


def compiled(x: Tensor) -> bool:
    """Whether the compiled kernels take matrices (C, P) like x."""
    return x.dtype == torch.bfloat16 and x.shape[-1] % 8 == 0 and x.numel() > 0 and available(x.device)
