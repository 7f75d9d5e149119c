"""Network files: the official release's and our own, read as plain data."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rubiks.errors import InputError
from rubiks.models.tiers import TIERS, VARIANTS

# Our training checkpoints keep the network's weights in Lightning's state dict, and what describes it under this key.
META_KEY = "rubiks"
NET_PREFIX = "net."
# The log of the released AQ model calls the variant by this name.
VARIANT_ALIASES = {"attention": "rubiks3d-aq"}


@dataclass(frozen=True)
class SavedNetwork:
    """What a checkpoint file says of its network.

    Attributes:
        path: the file.
        weights: the state dict.
        classes: class names in label order, where the file has them.
        config: the whole configuration of the run, where the file has it.
        epoch: epochs trained, where the file has it.
        initial_shifts: what `rubiks.training.shifts.offsets` gave at the start of training, where the file has it.
    """

    path: str
    tier: str
    variant: str
    num_classes: int
    num_frames: int
    weights: Mapping[str, Tensor]
    classes: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    initial_shifts: dict[str, Tensor] = field(default_factory=dict)


def read(path: str | os.PathLike) -> SavedNetwork:
    """Read a checkpoint, official or ours; see `RubiksNet.load_pretrained`.

    Raises:
        InputError: the file is missing, damaged or not a RubiksNet checkpoint.
    """
    path = os.fspath(path)
    content = _load(path)
    if isinstance(content.get(META_KEY), dict) and isinstance(content.get("state_dict"), dict):
        meta = content[META_KEY]
        state = content["state_dict"]
        weights = {key.removeprefix(NET_PREFIX): value for key, value in state.items() if key.startswith(NET_PREFIX)}
    elif isinstance(content.get("model"), Mapping):
        meta = content
        weights = content["model"]
    else:
        raise _not_ours(path, f"its keys are {', '.join(map(str, list(content)[:8])) or 'none'}")
    try:
        tier, variant = str(meta["tier"]), str(meta["variant"])
        num_classes, num_frames = int(meta["num_classes"]), int(meta["num_frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours(path, f"tier, variant, num_classes and num_frames cannot be read ({error!r})") from None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise _not_ours(path, "its state dict does not hold tensors alone")
    variant = VARIANT_ALIASES.get(variant, variant)
    for key, value, choices in (("tier", tier, TIERS), ("variant", variant, VARIANTS)):
        if value not in choices:
            raise _not_ours(path, f"its {key} is {value!r}, expected one of {', '.join(choices)}")
    if num_classes < 1 or num_frames < 1:
        raise _not_ours(path, f"num_classes={num_classes}, num_frames={num_frames}")
    return SavedNetwork(
        path,
        tier,
        variant,
        num_classes,
        num_frames,
        weights,
        meta.get("classes"),
        meta.get("config") or {},
        meta.get("epoch"),
        meta.get("initial_shifts") or {},
    )


def _load(path: str) -> dict:
    if not os.path.isfile(path):
        raise InputError(f"no checkpoint at {path}: give the path of a .ckpt or .pth.tar file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # weights_only refuses everything but plain data; the first line says what it met
        raise _not_ours(path, str(error).splitlines()[0]) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError, UnicodeDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _not_ours(path, f"damaged or of another format ({reason})") from None
    if not isinstance(content, dict):
        raise _not_ours(path, f"it holds a {type(content).__name__}")
    return content


def _not_ours(path: str, why: str) -> InputError:
    return InputError(
        f"{path} is not a RubiksNet checkpoint: {why}. Expected a checkpoint of train.py or an official .pth.tar file"
    )


def load_weights(net: nn.Module, saved: SavedNetwork) -> None:
    """Copy a file's weights into a network of its tier, variant and class count.

    Raises:
        InputError: names or shapes differ.
    """
    own = net.state_dict()
    missing = [key for key in own if key not in saved.weights]
    unknown = [key for key in saved.weights if key not in own]
    shapes = [
        f"{key} is {tuple(saved.weights[key].shape)}, expected {tuple(own[key].shape)}"
        for key in own
        if key in saved.weights and saved.weights[key].shape != own[key].shape
    ]
    problems = [
        f"{what}: {', '.join(keys[:3])}{f' and {len(keys) - 3} more' if len(keys) > 3 else ''}"
        for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        if keys
    ]
    if problems:
        raise InputError(f"{saved.path} does not fit tier {saved.tier}, variant {saved.variant}; {'; '.join(problems)}")
    net.load_state_dict(dict(saved.weights))
