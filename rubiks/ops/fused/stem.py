"""The network's first convolution, 3x3 with stride 2 and padding 1, as a product of matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rubiks.ops.fused.conv1x1 import pointwise_weight_grad
from rubiks.ops.fused.kernels import FRAMES, available

WINDOW = 27  # values of a window: 3 channels x 3 x 3
STEM_ROWS = 28  # with a row of zeros: the kernels take even numbers


def stem_columns(images: Tensor, frames: int, dtype: torch.dtype) -> Tensor:
    """The windows that the convolution reads: (N*T, 3, H, W) -> (STEM_ROWS, P) of `dtype`."""
    takes = images.dtype in (torch.float32, torch.bfloat16) and dtype == torch.bfloat16 and frames in FRAMES
    if takes and available(images.device):
        return torch.ops.rubiks.stem_columns(images.contiguous(), frames)
    windows = F.pad(images, (1, 1, 1, 1)).unfold(2, 3, 2).unfold(3, 3, 2)  # (N*T, 3, H', W', 3, 3)
    windows = windows.unflatten(0, (-1, frames)).permute(2, 5, 6, 0, 3, 4, 1)
    columns = images.new_zeros(STEM_ROWS, windows[0, 0, 0].numel(), dtype=dtype)
    columns[:WINDOW].view(windows.shape).copy_(windows)
    return columns


def stem_matrix(weight: Tensor) -> Tensor:
    """The weight (C, 3, 3, 3) as the matrix (C, STEM_ROWS) that multiplies `stem_columns`."""
    return F.pad(weight.flatten(1), (0, STEM_ROWS - WINDOW))


def stem_weight_grad(gx: Tensor, columns: Tensor) -> Tensor:
    """The gradient (C, 3, 3, 3) of the weight, from that of the result (C, P) and from `stem_columns`."""
    return pointwise_weight_grad(gx, columns)[:, :WINDOW].unflatten(1, (3, 3, 3))
