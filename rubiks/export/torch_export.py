"""Files of torch.export, which PyTorch alone runs."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from rubiks.export.description import Description
from rubiks.export.quiet import quiet

METADATA = "metadata.json"  # an extra file within the file


def write(program: ExportedProgram, path: Path, description: Description) -> None:
    """Write a file with the description as JSON in it."""
    torch.export.save(program, path, extra_files={METADATA: description.model_dump_json()})


def load(path: Path) -> tuple[Callable[[Tensor], Tensor], Description]:
    """Read a file. PyTorch may unpickle parts of it, so the description is read first."""
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}")), None)
        if name is None:
            raise ValueError(f"it has no {METADATA}")
        description = Description.model_validate_json(archive.read(name))
    with quiet():
        module = torch.export.load(path).module()
    return lambda pixels: module(pixels), description
