"""The score of a video, from the logits of its views."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

Mean = Literal["logits", "probabilities"]


class PixelNet(nn.Module):
    """A network that takes pixels as they are, uint8 (N, T, 3, H, W), such as an exported file's."""

    num_classes: int


def score_videos(net: nn.Module, normalize: nn.Module, views: Tensor, mean: Mean = "logits") -> Tensor:
    """Score videos by the mean over their views.

    Args:
        net: gives logits (B, classes) for clips (B, T, 3, H, W).
        normalize: turns pixels into the network's input, as `rubiks.nn.Normalize` does.
        views: uint8 (B, V, T, 3, H, W).
        mean: of the views' logits, or of their probabilities.

    Returns:
        (B, classes) float32. For mean="probabilities" the logarithm of the mean: its softmax is the mean.
    """
    # One view at a time: the activations of all views at once would need several times the memory.
    logits = torch.stack([net(normalize(view)).float() for view in views.unbind(1)])
    if mean == "logits":
        return logits.mean(0)
    return logits.log_softmax(-1).logsumexp(0) - math.log(len(logits))
