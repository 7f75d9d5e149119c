"""What in a clip speaks for a class: activation maps, the logit of each frame, and what the order of frames does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rubiks.errors import InputError
from rubiks.models import RubiksNet
from rubiks.models.activation_maps import activation_maps, frame_logits
from rubiks.nn import Normalize
from rubiks.predict.predictor import ClassScore, Predictor

SHUFFLES = 20


@dataclass(frozen=True)
class Explanation:
    """Of one clip of a video: the protocol's first, its centre crop.

    Attributes:
        predictions: the classes with the highest scores for this clip, highest first.
        shown: the class that is looked at, with its score.
        frames: uint8 (T, 3, S, S), the pixels that were scored.
        maps: (T, H', W'), what each place adds to the logit of the class.
        frame_logits: (T, classes); their mean is the clip's.
        reversed: the score of the class if the frames are reversed.
        shuffled: (SHUFFLES,), the scores of the class with frames in random orders.
    """

    predictions: list[ClassScore]
    shown: ClassScore
    frames: Tensor
    maps: Tensor
    frame_logits: Tensor
    reversed: float
    shuffled: np.ndarray


@torch.no_grad()
def explain(predictor: Predictor, video: str, label: str | None = None) -> Explanation:
    """Explain what the network sees in a video, in float32.

    Args:
        predictor: whose network is asked.
        video: the file.
        label: name or number of the class to look at; None for the predicted one.

    Raises:
        VideoError: the video cannot be read.
        InputError: there is no such class, or the network is an exported file's.
    """
    net = explainable(predictor)
    device = net.new_fc.weight.device
    frames = predictor.views(video)[predictor.protocol.central_view].contiguous()
    clip = _normalised(net, frames)
    logits = net(clip)[0].cpu()
    ranked = predictor.ranked(logits)
    index = ranked[0].index if label is None else _index(label, predictor.classes)

    def score(order: np.ndarray) -> float:
        return net(clip[:, torch.from_numpy(order).to(device)])[0].double().softmax(0)[index].item()

    rng, places = np.random.default_rng(0), np.arange(len(frames))
    return Explanation(
        ranked,
        ClassScore(predictor.classes[index], index, logits.double().softmax(0)[index].item()),
        frames,
        class_maps(net, frames, index),
        frame_logits(net, clip)[0].cpu(),
        score(places[::-1].copy()),
        np.array([score(rng.permutation(places)) for _ in range(SHUFFLES)]),
    )


def explainable(predictor: Predictor) -> RubiksNet:
    """The predictor's network; InputError if it is an exported file's."""
    if not isinstance(predictor.net, RubiksNet):
        raise InputError(f"{predictor.path} is an exported file, which gives logits alone; use its checkpoint")
    return predictor.net


def class_maps(net: RubiksNet, frames: Tensor, index: int) -> Tensor:
    """What each place of frames, uint8 (T, 3, S, S), adds to the logit of a class: (T, H', W')."""
    classes = torch.tensor([index], device=net.new_fc.weight.device)
    return activation_maps(net, _normalised(net, frames), classes)[0].cpu()


def _normalised(net: RubiksNet, frames: Tensor) -> Tensor:
    """The frames as the network's input (1, T, 3, S, S), on its device."""
    device = net.new_fc.weight.device
    return Normalize().to(device)(frames.to(device))[None]


def _index(label: str, classes: list[str]) -> int:
    """The number of a class that is given by name or number."""
    if label in classes:
        return classes.index(label)
    if label.isdecimal() and int(label) < len(classes):
        return int(label)
    raise InputError(f"the network has no class {label!r}; give a name, or a number from 0 to {len(classes) - 1}")
