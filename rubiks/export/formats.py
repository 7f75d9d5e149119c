"""The formats of exported networks: how a file is written, and how its runtime runs it."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rubiks.errors import InputError

INPUT, OUTPUT = "pixel_values", "logits"
METADATA = "metadata.json"  # within a .pt2 file
LOGGERS = ("onnx_ir", "onnxscript", "torch.onnx")

Metadata = Mapping[str, Any]  # values that JSON can hold
Axes = Mapping[int, Any]  # the input's axes that may have any length, or one in a range: each a torch.export.Dim
Runtime = Callable[[Tensor], Tensor]  # from pixels to logits


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        runtime: what its files are checked with.
        write: writes a module for input like the example, but for these axes, with metadata.
        load: reads a file back, to be run.
        packages: what it needs besides PyTorch.
    """

    runtime: str
    write: Callable[[nn.Module, Tensor, Axes, Path, Metadata], None]
    load: Callable[[Path], Runtime]
    packages: tuple[str, ...] = ()

    def check_installed(self, name: str) -> None:
        """Raise InputError if a package is missing."""
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise InputError(f"--to {name} needs {', '.join(missing)}; install with: pip install 'rubiks[export]'")


def _write_onnx(module: nn.Module, example: Tensor, axes: Axes, path: Path, metadata: Metadata) -> None:
    with _quiet():
        program = torch.onnx.export(
            module,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: axes},
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    # Strings stay as they are, everything else is JSON.
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    program.model.metadata_props.update(texts)
    program.save(path, external_data=False)


def _load_onnx(path: Path) -> Runtime:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: pixels.numpy()})
        return torch.from_numpy(np.asarray(logits))

    return run


def _write_pt2(module: nn.Module, example: Tensor, axes: Axes, path: Path, metadata: Metadata) -> None:
    program = torch.export.export(module, (example,), dynamic_shapes={INPUT: axes})
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={METADATA: json.dumps(metadata)})


def _load_pt2(path: Path) -> Runtime:
    with path.open("rb") as file, _quiet():
        return torch.export.load(file).module()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings that PyTorch 2.11 gives about its own code, and the thousand lines that exporting logs."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec", FutureWarning)
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        try:
            for logger in loggers:
                logger.setLevel(logging.WARNING)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


FORMATS = {
    "onnx": Format("ONNX Runtime", _write_onnx, _load_onnx, ("onnx", "onnxscript", "onnxruntime")),
    "pt2": Format("torch.export", _write_pt2, _load_pt2),
}
