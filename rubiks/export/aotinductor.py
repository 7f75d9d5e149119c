"""Packages of AOTInductor: a network compiled to a native library, which PyTorch loads."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import torch
from torch.export import ExportedProgram

from rubiks.errors import InputError
from rubiks.export.description import Description, Loaded, from_texts
from rubiks.export.quiet import quiet
from rubiks.export.torch_export import as_outputs

LIBRARIES = "/data/aotinductor/"  # a folder within each package


def is_one(path: Path) -> bool:
    """Whether a file is such a package."""
    return zipfile.is_zipfile(path) and bool(_names(path))


def _names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [name for name in archive.namelist() if LIBRARIES in name]


def write(program: ExportedProgram, path: Path, description: Description) -> None:
    """Compile a program, with the description as the package's metadata.

    Raises:
        InputError: there is no C++ compiler.
    """
    from torch._inductor import cpp_builder, exc

    with quiet():
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler:
            raise InputError("--to aoti needs a C++ compiler; install g++ or clang++, or set CXX to one") from None
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(path),
            inductor_configs={"aot_inductor.metadata": description.texts()},
        )


def load(path: Path) -> Loaded:
    """Read a package. Its library is code, so the description is read first."""
    with zipfile.ZipFile(path) as archive:
        name = next(name for name in archive.namelist() if LIBRARIES in name and name.endswith("_metadata.json"))
        texts = json.loads(archive.read(name))
        description = from_texts(texts)
        if archive.testzip() is not None:
            raise ValueError("it is damaged")
    package = torch._inductor.aoti_load_package(str(path))
    # It reads other strides without an error, but wrongly.
    return lambda *inputs: as_outputs(package(*(one.contiguous() for one in inputs))), description
