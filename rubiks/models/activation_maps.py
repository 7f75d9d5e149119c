"""Where in a clip the evidence for a class lies: class activation maps (Zhou et al., CVPR 2016), logits by frame."""

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


@torch.no_grad()
def frame_logits(net: RubiksNet, clips: Tensor) -> Tensor:
    """The logits (N, T, classes) of each frame in its clip; their mean over the frames is the network's output."""
    clips = as_clips(clips)
    features = net.backbone(clips.flatten(0, 1), clips.shape[1])
    return net.new_fc(features).unflatten(0, clips.shape[:2])
