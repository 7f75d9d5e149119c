"""Class activation maps: where in a clip the evidence for a class lies (Zhou et al., CVPR 2016)."""

from __future__ import annotations

import torch
from torch import Tensor

from rubiks.models.clips import as_clips
from rubiks.models.rubiksnet import RubiksNet


@torch.no_grad()
def activation_maps(net: RubiksNet, clips: Tensor, classes: Tensor) -> Tensor:
    """What each place of each frame adds to the logit of a class.

    Exact, and without gradients: after the last norm and ReLU the network only takes means and applies a linear layer.

    Args:
        net: in evaluation mode.
        clips: (N, T, 3, H, W), or the official (N, T*3, H, W), as for the network.
        classes: (N,) int64, the class to look at in each clip.

    Returns:
        (N, T, H', W') with a place for every 32 x 32 pixels. The mean over a clip's map is the logit, less the bias.
    """
    clips = as_clips(clips)
    frames = clips.shape[1]
    features = net.backbone.feature_maps(clips.flatten(0, 1), frames).unflatten(0, (len(clips), frames))
    return torch.einsum("ntchw,nc->nthw", features, net.new_fc.weight[classes])
