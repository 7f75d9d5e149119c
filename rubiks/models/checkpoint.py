"""Networks in files and folders: official files, checkpoints and runs of ours, saved folders. Read as plain data."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from rubiks.errors import InputError
from rubiks.models import saved_folder, source
from rubiks.models.preprocessing import Preprocessing
from rubiks.models.source import Source
from rubiks.models.tiers import TIERS, VARIANTS

# Our checkpoints have the network's weights in Lightning's state dict, and its description under this key.
META_KEY = "rubiks"
NET_PREFIX = "net."
AVERAGE_PREFIX = "average."  # of the weights' moving average, if the run has one: it is what validation has scored
# The prefixes that DataParallel, DistributedDataParallel and torch.compile add to names within a network.
_WRAPPERS = ("module", "_orig_mod")
# The log of the released AQ model calls the variant by this name.
VARIANT_ALIASES = {"attention": "rubiks3d-aq"}
# Within a run's folder.
BEST, LAST = "checkpoints/best.ckpt", "checkpoints/last.ckpt"


@dataclass(frozen=True)
class SavedNetwork:
    """What a checkpoint or a saved folder says about its network.

    Attributes:
        path: the file, or the saved folder.
        preprocessing: the input that the network was trained with; the official one if the file does not have it.
        weights: the state dict; the average of the weights if the file has it.
        classes: class names in label order, if the file has them.
        config: the whole configuration of the run, if the file has it.
        epoch: epochs trained, if the file has it.
        source: where the network comes from, as far as it is known.
        initial_shifts: what `rubiks.models.shifts.offsets` gave at the start of training, if the file has it.
        position: the fields of `rubiks.training.position.Position`, if the file is a training state.
        causal: whether no shift of the network reads a later frame; false if the file does not say.
    """

    path: str
    tier: str
    variant: str
    num_classes: int
    preprocessing: Preprocessing
    weights: Mapping[str, Tensor]
    classes: list[str] | None = None
    config: dict[str, Any] = field(default_factory=dict)
    epoch: int | None = None
    source: Source = field(default_factory=Source)
    initial_shifts: dict[str, Tensor] = field(default_factory=dict)
    position: dict[str, Any] = field(default_factory=dict)
    causal: bool = False

    @property
    def file(self) -> str:
        """The file with the weights."""
        return os.path.join(self.path, saved_folder.WEIGHTS) if os.path.isdir(self.path) else self.path


def in_run(folder: Path) -> Path | None:
    """The checkpoint of a run to use: the best, or the last if training ended before a validation."""
    return next((path for path in (folder / BEST, folder / LAST) if path.is_file()), None)


def read(path: str | os.PathLike) -> SavedNetwork:
    """Read a network from a file or folder; see `RubiksNet.load_pretrained`.

    Raises:
        InputError: the file or folder is missing, damaged or not of a RubiksNet.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        return _read_file(path)
    if saved_folder.is_one(path):
        config, weights = saved_folder.read(path)
        shape = (config.tier, config.variant, config.num_classes, config.preprocessing)
        known = config.source
        return SavedNetwork(
            path, *shape, weights, config.classes, epoch=known.epoch, source=known, causal=config.causal
        )
    found = in_run(Path(path))
    if found is None:
        raise InputError(
            f"{path} is a folder without {BEST} or {LAST}, as a run has them, and without {saved_folder.CONFIG} and "
            f"{saved_folder.WEIGHTS}, as a saved network has them"
        )
    return _read_file(os.fspath(found))


def _read_file(path: str) -> SavedNetwork:
    content = _load(path)
    if isinstance(content.get(META_KEY), dict) and isinstance(content.get("state_dict"), dict):
        meta = content[META_KEY]
        state = _unwrapped(path, content["state_dict"])
        prefix = AVERAGE_PREFIX if any(key.startswith(AVERAGE_PREFIX) for key in state) else NET_PREFIX
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    elif isinstance(content.get("model"), Mapping):
        meta = content
        weights = _unwrapped(path, content["model"])
    else:
        raise _not_ours(path, f"its keys are {', '.join(map(str, list(content)[:8])) or 'none'}")
    try:
        tier, variant = str(meta["tier"]), str(meta["variant"])
        num_classes, num_frames = int(meta["num_classes"]), int(meta["num_frames"])
    except (KeyError, TypeError, ValueError) as error:
        raise _not_ours(path, f"tier, variant, num_classes and num_frames cannot be read ({error!r})") from None
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise _not_ours(path, "its state dict is empty or contains values that are not tensors")
    variant = VARIANT_ALIASES.get(variant, variant)
    for key, value, choices in (("tier", tier, TIERS), ("variant", variant, VARIANTS)):
        if value not in choices:
            raise _not_ours(path, f"its {key} is {value!r}, expected one of {', '.join(choices)}")
    if num_classes < 1 or num_frames < 1:
        raise _not_ours(path, f"num_classes={num_classes}, num_frames={num_frames}")
    config = _section(path, meta, "config")
    data, protocol = _section(path, config, "data"), _section(path, config, "protocol")
    return SavedNetwork(
        path,
        tier,
        variant,
        num_classes,
        _preprocessing(path, num_frames, data),
        weights,
        meta.get("classes"),
        dict(config),
        meta.get("epoch"),
        _source(path, meta.get("epoch"), data, protocol),
        meta.get("initial_shifts") or {},
        meta.get("position") or {},
        meta.get("causal") is True,
    )


def _section(path: str, config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A section of the configuration; empty if there is none."""
    section = config.get(key) or {}
    if not isinstance(section, Mapping):
        raise _not_ours(path, f"{key} of its configuration is {section!r}")
    return section


def _preprocessing(path: str, num_frames: int, trained: Mapping[str, Any]) -> Preprocessing:
    """The input that a network was trained with, by the section `data` of its configuration."""
    known = {key: trained[key] for key in ("size", "sampling", "window") if key in trained}
    try:
        return Preprocessing(num_frames, **known)
    except ValidationError as error:
        first = error.errors()[0]
        raise _not_ours(path, f"data.{first['loc'][0]} of its configuration is {first['input']!r}") from None


def _source(path: str, epoch: int | None, data: Mapping[str, Any], protocol: Mapping[str, Any]) -> Source:
    """Where the network of a file comes from, by its epoch and by sections of its configuration."""
    file = Path(path)
    names = {"data": data.get("name"), "format": data.get("format"), "protocol": protocol.get("name")}
    try:
        return Source(file=source.name_of(file), epoch=epoch, **names, evaluation=source.score_of(file))
    except ValidationError as error:
        first = error.errors()[0]
        raise _not_ours(path, f"{first['loc'][0]} of its description is {first['input']!r}") from None


def _unwrapped(path: str, state: Mapping[Any, Any]) -> dict[str, Any]:
    """A state dict without the prefixes of DataParallel, DistributedDataParallel and torch.compile."""
    unwrapped: dict[str, Any] = {}
    for key, value in state.items():
        name = ".".join(part for part in str(key).split(".") if part not in _WRAPPERS)
        if name in unwrapped:
            raise _not_ours(path, f"its state dict contains {name} twice, once as {key}")
        unwrapped[name] = value
    return unwrapped


def _load(path: str) -> dict:
    if not os.path.isfile(path):
        raise InputError(
            f"no checkpoint at {path}: give the path of a .ckpt or .pth.tar file, or of a run's or saved folder"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are refused below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # other kinds of files can fail in any way
        if isinstance(error, OSError) and error.filename is not None:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        raise _unreadable(path, error) from None
    if not isinstance(content, dict):
        raise _not_ours(path, f"it contains a {type(content).__name__}")
    return content


def _unreadable(path: str, error: Exception) -> InputError:
    """The error for a file that torch.load refuses as plain data: what the file is, and what to do."""
    refused = re.search(r"GLOBAL ([\w.]+)", str(error))  # the first class or function that is not plain data
    pickled = False
    with contextlib.suppress(OSError, zipfile.BadZipFile, tarfile.TarError):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = {name.rpartition("/")[2] for name in archive.namelist()}
            if any(name.endswith(".npy") for name in names):
                return _not_ours(path, "it is a NumPy file")
            if "constants.pkl" in names:
                return _runs_code(path, "a TorchScript module")
            pickled = "data.pkl" in names and isinstance(error, pickle.UnpicklingError)
        elif tarfile.is_tarfile(path):
            with tarfile.open(path) as old:
                pickled = "pickle" in old.getnames()  # as written by the first versions of PyTorch
        else:
            with open(path, "rb") as file:
                if file.read(6) == b"\x93NUMPY":
                    return _not_ours(path, "it is a NumPy file")
                file.seek(0)
                pickled = refused is not None or _is_pickle(file)
    if pickled:
        return _runs_code(path, f"a pickle of {refused.group(1)}" if refused else "a pickle")
    return _not_ours(path, "it is damaged or in another format")


def _is_pickle(file: IO[bytes]) -> bool:
    """Whether a file begins with a pickle, without running it."""
    try:
        for _ in pickletools.genops(file):
            pass
    except Exception:  # any, as the bytes may be anything
        return False
    return True


def _runs_code(path: str, what: str) -> InputError:
    return InputError(
        f"{path} is {what}, which is not loaded because it could run code; save the network with "
        "net.save_pretrained(FILE), or give a checkpoint of train.py"
    )


def _not_ours(path: str, why: str) -> InputError:
    return InputError(
        f"{path} is not a RubiksNet checkpoint: {why}. Expected a checkpoint of train.py or an official .pth.tar file"
    )


def load_weights(net: nn.Module, saved: SavedNetwork) -> None:
    """Copy a checkpoint's weights into a network of the same tier, variant and class count.

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
        for what, keys in (("missing", missing), ("unknown", unknown), ("wrong shape", shapes))
        if keys
    ]
    if problems:
        raise InputError(f"{saved.path} does not fit tier {saved.tier}, variant {saved.variant}; {'; '.join(problems)}")
    net.load_state_dict(dict(saved.weights))
