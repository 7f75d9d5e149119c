"""OpenVINO files, FILE.xml with FILE.bin, in float32 or quantised to int8."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from rubiks.export import onnx_runtime
from rubiks.export.description import Description, Loaded, from_texts
from rubiks.export.quiet import quiet
from rubiks.files import sha256

PLACE = "rubiks"  # in the file's rt_info
WEIGHTS = "weights_sha256"  # of FILE.bin, so that the files of two exports cannot be mixed


def write(program: ExportedProgram, path: Path, description: Description) -> None:
    """Write both files with the description in the rt_info of FILE.xml."""
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "net.onnx"
        onnx_runtime.write(program, onnx, description)
        _save(openvino.Core().read_model(onnx), path, description)


def quantize(
    path: Path, clips: Sequence[Tensor], prepare: Callable[[Tensor], Tensor], description: Description
) -> None:
    """Quantise the weights and activations of files that `write` has written.

    Args:
        path: FILE.xml.
        clips: by which the ranges of the activations are chosen.
        prepare: makes the network's input of one.
        description: of the quantised files.
    """
    os.environ.setdefault("NNCF_CI", "1")  # otherwise NNCF reports its use over the network
    with quiet(), contextlib.redirect_stdout(sys.stderr):
        import nncf
        import openvino

        core = openvino.Core()
        core.set_property({"ENABLE_MMAP": False})  # FILE.bin is written again below
        dataset = nncf.Dataset(clips, lambda clip: prepare(clip).numpy())
        model = nncf.quantize(core.read_model(path), dataset, subset_size=len(clips))
    _save(model, path, description)


def load(path: Path) -> Loaded:
    """Read both files."""
    import openvino

    weights = path.with_suffix(".bin")
    if not weights.is_file():
        raise ValueError(f"{weights} is missing beside it")
    core = openvino.Core()
    model = core.read_model(path)
    if not model.has_rt_info([PLACE]):
        raise ValueError(f"its rt_info has no {PLACE}")
    known = model.get_rt_info([PLACE]).value
    texts = {key: model.get_rt_info([PLACE, key]).astype(str) for key in known}
    description = from_texts(texts)
    if texts.get(WEIGHTS) != sha256(weights):
        raise ValueError(f"{weights} is damaged or belongs to another file")
    threads = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(model, "CPU", threads)

    def run(*inputs: Tensor) -> list[Tensor]:
        return [torch.from_numpy(one) for one in compiled([one.numpy() for one in inputs]).to_tuple()]

    return run, description


def _save(model: Any, path: Path, description: Description) -> None:
    import openvino

    for key, text in description.texts().items():
        model.set_rt_info(text, [PLACE, key])
    openvino.save_model(model, path, compress_to_fp16=False)
    model.set_rt_info(sha256(path.with_suffix(".bin")), [PLACE, WEIGHTS])
    openvino.save_model(model, path, compress_to_fp16=False)
