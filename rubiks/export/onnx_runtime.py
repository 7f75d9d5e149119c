"""ONNX files, and how ONNX Runtime runs them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from rubiks.export.description import Description, Loaded, from_texts
from rubiks.export.quiet import quiet


def write(program: ExportedProgram, path: Path, description: Description) -> None:
    """Write a file with the description as its metadata."""
    inputs = description.inputs()
    axes = {0: "batch", 1: "frames"}  # names of those that are dynamic; all inputs share them
    with quiet():
        exported = torch.onnx.export(
            program,
            (),
            input_names=inputs,
            output_names=description.outputs(),
            dynamic_shapes=(axes, *[None] * (len(inputs) - 1)),
            dynamo=True,
            verbose=False,
        )
    assert exported is not None
    exported.model.metadata_props.update(description.texts())
    exported.save(path, external_data=False)


def load(path: Path) -> Loaded:
    """Read a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal: errors are raised
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    description = from_texts(session.get_modelmeta().custom_metadata_map)
    names, wanted = description.inputs(), description.outputs()

    def run(*inputs: Tensor) -> list[Tensor]:
        given = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
        return [torch.from_numpy(np.asarray(one)) for one in session.run(wanted, given)]

    return run, description
