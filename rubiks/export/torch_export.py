"""Files of torch.export, which PyTorch alone runs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.export import ExportedProgram

from rubiks.export.description import Description, Loaded, from_values
from rubiks.export.quiet import quiet

METADATA = "metadata.json"  # an extra file within the file


def write(program: ExportedProgram, path: Path, description: Description) -> None:
    """Write a file with the description as JSON in it."""
    torch.export.save(program, path, extra_files={METADATA: description.model_dump_json()})


def load(path: Path) -> Loaded:
    """Read a file. PyTorch may unpickle parts of it, so the description is read first."""
    with zipfile.ZipFile(path) as archive:
        name = next((name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}")), None)
        if name is None:
            raise ValueError(f"it has no {METADATA}")
        description = from_values(json.loads(archive.read(name)))
    with quiet():
        module = torch.export.load(path).module()
    return lambda *inputs: as_outputs(module(*inputs)), description


def as_outputs(result: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    """What a program with one output, or with several, returns."""
    return (result,) if isinstance(result, Tensor) else result
