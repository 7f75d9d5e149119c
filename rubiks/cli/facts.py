"""What `rubiks info` reports about the machine and the installation."""

from __future__ import annotations

import platform
import warnings
from typing import Any

import torch

import rubiks
from rubiks.ops import fused, library, operator


def collect() -> dict[str, dict[str, str | list[str]]]:
    """Facts by section and name: what runs the operator, how its library was built, versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # its reasons are among the facts
        operator.prepare()
    status = library.load()
    facts: dict[str, dict[str, str | list[str]]] = {
        "operator": {device: _implementation(device, status) for device in operator.DEVICES}
    }
    facts["network"] = _network()
    if status.reasons:
        facts["operator"]["reasons"] = list(status.reasons)
    if status.library:
        facts["build"] = _build(status.library.facts)
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    facts["versions"] = {
        "rubiks": rubiks.__version__,
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "none, PyTorch was built without it",
        "Python": platform.python_version(),
        "system": platform.platform(),
        "GPUs": [_gpu(index) for index in gpus],
    }
    return facts


def _implementation(device: str, status: library.Status) -> str:
    if status.library and status.compiled(device):
        return f"compiled, {status.library.path}"
    return "PyTorch reference"


def _network() -> dict[str, str | list[str]]:
    """How the network is trained and evaluated: with kernels for whole blocks, or module by module."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    served = [str(gpu) for gpu in gpus if fused.available(torch.device("cuda", gpu))]
    if not served:
        reason = "need the compiled CUDA kernels" if gpus else "need a GPU"
        return {"fused blocks": f"no: they {reason}" + (" on a GPU such as A100 or H100" if gpus else "")}
    where = f"GPU {', '.join(served)}"
    frames = " or ".join(map(str, fused.FRAMES))
    return {
        "fused blocks": f"in bfloat16 on {where}, for clips of {frames} frames, recorded as CUDA graphs in training; "
        "the modules run elsewhere, and for quantized shifts and synchronised or frozen batch norm"
    }


def _build(facts: dict[str, Any]) -> dict[str, str | list[str]]:
    build: dict[str, str | list[str]] = {
        "PyTorch": f"{facts['torch']}, CUDA {facts['torch_cuda'] or 'none'}",
        "compiler": facts["compiler"],
        "flags": " ".join(facts["flags"]),
    }
    if not facts["cuda"]:
        return build | {"without CUDA": facts["cuda_error"]}
    return build | {
        "nvcc": f"{facts['nvcc']}, {facts['nvcc_version']}",
        "nvcc flags": " ".join(facts["cuda_flags"]),
        "architectures": facts["architectures"],
    }


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"
