"""`rubiks info`: which implementation of the operator runs here, and versions; what a checkpoint's shifts learned."""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

import rubiks
from rubiks.ops import fused, library, operator


def add_to(commands) -> None:
    """Add the subcommand to the parser's."""
    about = (
        "tell which implementation of the operator serves CPU and CUDA, how it was built, and versions; "
        "or with --shifts what the shifts of a checkpoint have learned"
    )
    parser = commands.add_parser("info", help=about, description=about[0].upper() + about[1:] + ".")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print JSON")
    what.add_argument("--shifts", metavar="CKPT", help="a checkpoint, ours or official: print a table, write pictures")
    parser.add_argument("--out", metavar="FOLDER", default="shifts", help="where pictures go, default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print what `collect` tells, or what a checkpoint's shifts have learned."""
    if arguments.shifts is not None:
        from rubiks.cli import shifts  # with Lightning and matplotlib it takes seconds to import

        shifts.describe(arguments.shifts, Path(arguments.out))
        return
    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for title, entries in facts.items():
        print(title)
        for name, value in entries.items():
            text = "\n".join(value) if isinstance(value, list) else value
            for line in text.splitlines() or ["none"]:
                print(f"  {name:<14}{line}")
                name = ""


def collect() -> dict[str, dict[str, str | list[str]]]:
    """Facts by section and name: what serves the operator, how its library was built, versions."""
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
        "CUDA": torch.version.cuda or "not in this PyTorch",
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
    """What trains and evaluates the network: kernels for whole blocks, or module by module."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    served = [str(gpu) for gpu in gpus if fused.available(torch.device("cuda", gpu))]
    if not served:
        reason = "need the compiled CUDA kernels" if gpus else "need a GPU"
        return {"fused blocks": f"no: they {reason}" + (" on a GPU such as A100 or H100" if gpus else "")}
    where = f"GPU {', '.join(served)}"
    frames = " or ".join(map(str, fused.FRAMES))
    return {
        "fused blocks": f"in bfloat16 on {where}, for clips of {frames} frames, recorded as CUDA graphs in training; "
        "elsewhere, and for quantized shifts and synchronised or frozen batch norm, the modules"
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
