"""The temporal attention shift of the AQ variant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rubiks.ops.fused import mix_frames


def attention(logits: Tensor, temperature: Tensor) -> Tensor:
    """Weights (C, 3) of the previous, the same and the next frame from logits (C, 3); each row sums to 1.

    `temperature` is a scalar or (C, 1).
    """
    scale = logits.std(dim=1, keepdim=True) + 1e-6
    return torch.softmax(logits / scale / temperature, dim=1)


class AttentionShift(nn.Module):
    """Mix each channel with its previous and next frame by attention weights (RubiksNet, ECCV 2020, section 3.3).

    Each channel has three logits, for one frame back, stay and one frame ahead. The weights are the softmax of the
    logits, divided by their standard deviation and by a temperature; frames outside the clip count as zero. As the
    temperature falls towards 0 the weights become one-hot and the mix becomes a whole-frame shift.

    Args:
        channels: C.

    Attributes:
        weight: the logits (C, 3), drawn from U(0, 1).
        T: the temperature, a scalar buffer that the training schedule sets (2.0 at the start).
    """

    T: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(channels, 3))
        self.register_buffer("T", torch.tensor(2.0))

    def attention(self) -> Tensor:
        """The weights (C, 3) of the previous, the same and the next frame; each row sums to 1."""
        return attention(self.weight, self.T)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C, H, W) -> the same shape and dtype, for any number of frames."""
        return mix_frames(x, self.attention().to(x.dtype).t()[:, :, None, None])

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, temperature={self.T.item():g}"
