"""A network as a folder that describes itself.

config.json          tier, variant, classes, preprocessing, where the network comes from
model.safetensors    its weights
README.md            a model card
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from safetensors import SafetensorError
from torch import Tensor
from typing_extensions import Self

from rubiks.errors import InputError
from rubiks.files import sha256, write_folder
from rubiks.models import model_card
from rubiks.models.preprocessing import Preprocessing
from rubiks.models.source import Source
from rubiks.models.tiers import TIERS, VARIANTS
from rubiks.version import VERSION

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"


class Config(BaseModel, frozen=True):
    """The content of config.json.

    Attributes:
        causal: whether no shift reads a later frame.
        classes: class names in label order; None if they are not known.
        temporal_attention: of the AQ variant: whether it is hard, its temperature, and the share of channels that
            whole-frame shifts move in time; None for other variants. For readers: the weights say the same.
        weights_sha256: the SHA-256 of model.safetensors.
    """

    model_type: Literal["rubiksnet"] = "rubiksnet"
    format_version: Literal[1] = 1
    rubiks_version: str = VERSION
    tier: str
    variant: str
    causal: bool = False
    num_classes: int = Field(ge=1)
    classes: list[str] | None
    preprocessing: Preprocessing
    temporal_attention: dict[str, Any] | None = None
    source: Source = Source()
    weights_sha256: str = ""

    @field_validator("tier", "variant")
    @classmethod
    def _known(cls, name: str, info: Any) -> str:
        choices = TIERS if info.field_name == "tier" else VARIANTS
        if name not in choices:
            raise ValueError(f"expected one of {', '.join(choices)}")
        return name

    @model_validator(mode="after")
    def _all_classes_named(self) -> Self:
        if self.classes is not None and len(self.classes) != self.num_classes:
            raise ValueError(f"there are {len(self.classes)} class names for {self.num_classes} classes")
        return self


def is_one(folder: str | os.PathLike) -> bool:
    """Whether a folder has a part of a saved network, so that it is meant to be one."""
    return any(os.path.exists(os.path.join(folder, name)) for name in (CONFIG, WEIGHTS))


def read(folder: str | os.PathLike) -> tuple[Config, dict[str, Tensor]]:
    """The description and the weights of a saved network.

    Raises:
        InputError: a file is missing, damaged, or of another program.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    path = folder / WEIGHTS
    try:
        if sha256(path) != config.weights_sha256:
            raise InputError(
                f"{path} is damaged, or of another network: its SHA-256 is not the one in {CONFIG}; copy or save the "
                "folder again"
            )
        return config, safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}; copy or save the folder again") from None


def _read_config(path: Path) -> Config:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {_reason(error)}; copy or save the folder again") from None
    except ValueError as error:  # also of bytes that are not UTF-8
        raise InputError(f"{path} is damaged, it is not JSON ({error}); copy or save the folder again") from None
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind != "rubiksnet":
        raise InputError(f'{path} is of another program: expected "model_type": "rubiksnet", got {kind!r}')
    if content.get("format_version") != 1:
        raise InputError(
            f"{path} has format_version {content.get('format_version')!r}, but this version of rubiks reads 1; "
            f"install rubiks {content.get('rubiks_version')} or later"
        )
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise InputError(f"{path}: {_first(error)}") from None


def describe(**facts: Any) -> Config:
    """The description of a network that is to be saved.

    Raises:
        InputError: a fact is not what config.json has, for example because there are too few class names.
    """
    try:
        return Config(**facts)
    except ValidationError as error:
        raise InputError(f"the network cannot be saved: {_first(error)}") from None


def write(folder: str | os.PathLike, config: Config, weights: Mapping[str, Tensor], parameters: int) -> None:
    """Write a saved network, completely or not at all; one that is there is replaced.

    Args:
        folder: new, empty, or a saved network.
        config: its description; `weights_sha256` is filled in.
        weights: the state dict.
        parameters: how many the network has, for the model card.

    Raises:
        InputError: the folder has other files, or cannot be written.
    """
    folder = Path(folder)
    check_replaceable(folder)

    def fill(temporary: Path) -> None:
        content = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
        (temporary / WEIGHTS).write_bytes(safetensors.torch.save(content, metadata={"format": "pt"}))
        full = config.model_copy(update={"weights_sha256": sha256(temporary / WEIGHTS)})
        text = json.dumps(full.model_dump(), indent=2, ensure_ascii=False) + "\n"
        # Class names that come from files may not be text: as an escape they are still JSON.
        (temporary / CONFIG).write_text(text, encoding="utf-8", errors="backslashreplace")
        card = model_card.text(folder.resolve().name, full.model_dump(), full.preprocessing.resized, parameters)
        (temporary / CARD).write_text(card, encoding="utf-8", errors="backslashreplace")

    write_folder(folder, fill)


def check_replaceable(folder: Path) -> None:
    """Raise InputError unless a folder is new, empty, or a saved network and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give a new folder, or a file name that ends in .pth.tar")
    names = set(os.listdir(folder))
    if others := sorted(names - {CONFIG, WEIGHTS, CARD}):
        raise InputError(
            f"{folder} has other files than those of a saved network ({', '.join(others[:3])}), which would be lost; "
            "give a new folder"
        )
    if names:
        try:
            _read_config(folder / CONFIG)
        except InputError as error:
            raise InputError(f"{folder} is not replaced, as it may not be a saved network: {error}") from None


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)


def _first(error: ValidationError) -> str:
    """The first of the errors: the key, what is wrong, and what came."""
    first = error.errors()[0]
    key, came = ".".join(map(str, first["loc"])), repr(first["input"])
    return f"{key}: {first['msg']}, got {came[:60]}" if key else first["msg"]
