"""ONNX files, and how ONNX Runtime runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from rubiks.export.description import INPUT, OUTPUT, Description
from rubiks.export.quiet import quiet


def write(program: ExportedProgram, path: Path, description: Description) -> None:
    """Write a file with the description as its metadata."""
    with quiet():
        exported = torch.onnx.export(
            program, (), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
        )
    assert exported is not None
    exported.model.metadata_props.update(description.texts())
    exported.save(path, external_data=False)


def load(path: Path) -> tuple[Callable[[Tensor], Tensor], Description]:
    """Read a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: errors are raised
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(pixels: Tensor) -> Tensor:
        (logits,) = session.run([OUTPUT], {INPUT: pixels.numpy()})
        return torch.from_numpy(np.asarray(logits))

    return run, Description.from_texts(session.get_modelmeta().custom_metadata_map)
