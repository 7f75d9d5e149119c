"""The formats of exported networks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch.export import ExportedProgram

from rubiks.errors import InputError
from rubiks.export import aotinductor, onnx_runtime, openvino_runtime, torch_export
from rubiks.export.description import Description, Loaded


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffix: of its files.
        runtime: what they are run with.
        write: writes a program with its description.
        load: reads a file, to be run on the CPU; ValueError if it has no description.
        beside: the suffix of a second file that belongs to each.
        package: that has the runtime.
        writing: packages that writing needs besides.
        extra: of this package, which has them.
    """

    suffix: str
    runtime: str
    write: Callable[[ExportedProgram, Path, Description], None]
    load: Callable[[Path], Loaded]
    beside: str | None = None
    package: str = "torch"
    writing: tuple[str, ...] = ()
    extra: str = ""

    def files(self, path: Path) -> list[Path]:
        """All files of the one that is named."""
        return [path] if self.beside is None else [path, path.with_suffix(self.beside)]

    def check_installed(self, what: str, *packages: str) -> None:
        """Raise InputError if a package, or the runtime, is missing; `what` needs it."""
        missing = [name for name in (*packages, self.package) if importlib.util.find_spec(name) is None]
        if missing:
            raise InputError(f"{what} needs {', '.join(missing)}; install with: pip install 'rubiks[{self.extra}]'")


FORMATS = {
    "onnx": Format(
        ".onnx",
        "ONNX Runtime",
        onnx_runtime.write,
        onnx_runtime.load,
        package="onnxruntime",
        writing=("onnx", "onnxscript"),
        extra="export",
    ),
    "pt2": Format(".pt2", "torch.export", torch_export.write, torch_export.load),
    "aoti": Format(".pt2", "AOTInductor", aotinductor.write, aotinductor.load),
    "openvino": Format(
        ".xml",
        "OpenVINO",
        openvino_runtime.write,
        openvino_runtime.load,
        beside=".bin",
        package="openvino",
        writing=("onnx", "onnxscript"),
        extra="openvino",
    ),
}


def format_of(path: Path) -> str | None:
    """The format of a file by its name, and of a .pt2 file by its content; None if it is not an exported file."""
    found = [name for name, form in FORMATS.items() if form.suffix == path.suffix.lower()]
    if len(found) > 1:
        return "aoti" if aotinductor.is_one(path) else "pt2"
    return found[0] if found else None
