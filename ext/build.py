"""Builds the compiled operators: the only place that knows their sources, compilers and flags.

Used when the package is installed (setup.py), at first use (rubiks/ops/library.py) and by hand (`python ext/build.py`).
It compiles every source in the folders beside this file. Needs PyTorch and a C++ compiler, and nvcc for the CUDA
kernels. The result is a plain C++ library against PyTorch's stable ABI: one build serves every Python and every PyTorch
from 2.10 on.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
LIBRARY, FACTS = "librubiks.so", "librubiks.json"
CPU_SOURCES = sorted(HERE.glob("*/*.cpp"))
CUDA_SOURCES = sorted(HERE.glob("*/*.cu"))
HEADERS = sorted([*HERE.glob("*/*.h"), *HERE.glob("*/*.cuh")])
FILES = (HERE / "build.py", *HEADERS, *CPU_SOURCES, *CUDA_SOURCES)  # what the library depends on
SM90A_SOURCES = ("conv1x1_sm90.cu",)  # those with instructions that only compute capability 9.0 has

TORCH = Path(torch.__file__).resolve().parent
INCLUDE = [f"-I{HERE}", "-isystem", str(TORCH / "include")]
COMMON = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
CXX_FLAGS = [*COMMON, "-fPIC", "-fopenmp-simd", "-Wall", "-Wextra"]
NVCC_FLAGS = [*COMMON, "-Xcompiler=-fPIC", "-DUSE_CUDA", "--threads=0"]
# The CUDA runtime is linked in, so that the library does not depend on the version that PyTorch brings.
LINK_FLAGS = ["-shared", f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
CUDA_LINK_FLAGS = [*LINK_FLAGS, "-ltorch_cuda", "--cudart=static"]
DEFAULT_ARCHITECTURES = "8.0;9.0+PTX"


class BuildError(Exception):
    """The library, or its CUDA part, cannot be built; the message says why."""


def source_hash() -> str:
    """Identifies the sources and flags at hand; a library that records another is stale."""
    digest = hashlib.sha256()
    for path in FILES:
        digest.update(str(path.relative_to(HERE)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def cache_key() -> str:
    """Names the build that this machine and environment ask for.

    The compilers found are not part of it: on a cluster, machines without compilers use what another has built.
    """
    choices = [os.environ.get("CXX", ""), architectures(), str(torch.version.cuda is not None)]
    system = [platform.machine(), *platform.libc_ver()]
    return hashlib.sha256("\0".join([source_hash(), *choices, *system]).encode()).hexdigest()[:16]


def architectures() -> str:
    """The GPU architectures to compile for, in PyTorch's notation: "8.0;9.0+PTX"."""
    return ";".join(re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())) or DEFAULT_ARCHITECTURES


def find_cxx() -> list[str]:
    """The command of the C++ compiler, from CXX or PATH."""
    if sys.platform != "linux":
        raise BuildError(f"the compiled operator is for Linux, this is {sys.platform}")
    if words := shlex.split(os.environ.get("CXX", "")):
        return words
    for name in ("g++", "clang++", "c++"):
        if path := shutil.which(name):
            return [path]
    raise BuildError("no C++ compiler: expected g++ or clang++ on PATH, or its command in CXX")


def find_nvcc() -> str:
    """The path of nvcc. A GPU need not be there: libraries are often built on machines without one."""
    if torch.version.cuda is None:
        raise BuildError(f"PyTorch {torch.__version__} is built without CUDA")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if variable in os.environ:  # decides alone, also for no CUDA at all
            if path := shutil.which("nvcc", path=os.path.join(os.environ[variable], "bin")):
                return path
            raise BuildError(f"no bin/nvcc in {variable}={os.environ[variable]}")
    if path := shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc"):
        return path
    raise BuildError("no nvcc: expected in CUDA_HOME, CUDA_PATH or /usr/local/cuda, or on PATH")


def build(folder: Path) -> dict[str, Any]:
    """Build the library and put it with its facts into the folder, each file whole or not at all.

    Without CUDA where that part cannot be built; the facts say why.

    Returns:
        the facts, as in the JSON file beside the library.

    Raises:
        BuildError: the library cannot be built.
        OSError: the folder cannot be written.
    """
    cxx = find_cxx()
    facts: dict[str, Any] = {
        "sources": source_hash(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "compiler": _version(cxx),
        "flags": CXX_FLAGS,
        "cuda": False,
    }
    with tempfile.TemporaryDirectory(prefix="rubiks-build-") as temporary, ThreadPoolExecutor() as pool:
        work = Path(temporary)
        cuda_objects = pool.submit(_compile_cuda, cxx, work, facts)
        objects = list(pool.map(lambda source: _compile([*cxx, *CXX_FLAGS], source, work), CPU_SOURCES))
        library = str(work / LIBRARY)
        try:
            with_cuda = [*objects, *cuda_objects.result()]
            _run([facts["nvcc"], *_host(cxx), "-o", library, *with_cuda, *CUDA_LINK_FLAGS])
            facts["cuda"] = True
        except BuildError as error:
            facts["cuda_error"] = str(error)
            _run([*cxx, "-o", library, *objects, *LINK_FLAGS])
        facts["sha256"] = hash_of(work / LIBRARY)
        (work / FACTS).write_text(json.dumps(facts, indent=2) + "\n")
        folder.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, FACTS):  # facts last: they vouch for the library
            aside = shutil.copy(work / name, folder / f".{name}.{os.getpid()}")
            os.replace(aside, folder / name)
    return facts


def hash_of(library: Path) -> str:
    """A truncated library would crash the process that loads it, so its hash is compared with its facts first."""
    return hashlib.sha256(library.read_bytes()).hexdigest()


def _compile_cuda(cxx: list[str], work: Path, facts: dict[str, Any]) -> list[str]:
    nvcc = find_nvcc()
    flags = [*NVCC_FLAGS, *_code(architectures())]
    facts |= {"nvcc": nvcc, "architectures": architectures(), "cuda_flags": flags, "nvcc_version": _version([nvcc])}

    def compile_one(source: Path) -> str:
        chosen = architectures()
        if source.name in SM90A_SOURCES:
            chosen = re.sub(r"9\.0(?!a)", "9.0a", chosen)
        return _compile([nvcc, *_host(cxx), *NVCC_FLAGS, *_code(chosen)], source, work)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(compile_one, CUDA_SOURCES))


def _code(architectures: str) -> list[str]:
    """nvcc's flags for a list of architectures: machine code for each, and PTX where asked for."""
    flags = []
    for name in architectures.split(";"):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", name)
        if match is None:
            raise BuildError(f'TORCH_CUDA_ARCH_LIST: expected numbers as in "8.0;9.0+PTX", got {name!r}')
        number = match[1] + match[2]
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def _host(cxx: list[str]) -> list[str]:
    """nvcc's flags for the host compiler; nvcc takes one word, so a longer command is left to its default."""
    return [f"-ccbin={cxx[0]}"] if len(cxx) == 1 else []


def _compile(command: list[str], source: Path, work: Path) -> str:
    target = work / f"{source.parent.name}-{source.name}.o"
    _run([*command, *INCLUDE, "-c", str(source), "-o", str(target)])
    return str(target)


def _version(command: list[str]) -> str:
    """The line of the compiler's --version that holds the number."""
    lines = _run([*command, "--version"]).splitlines()
    return next((line for line in lines if re.search(r"\d+\.\d+", line)), "unknown")


def _run(command: list[str]) -> str:
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise BuildError(f"{command[0]} cannot be run: {error.strerror}") from None
    if result.returncode:
        last = "\n".join(result.stdout.splitlines()[-30:])
        raise BuildError(f"this command failed with status {result.returncode}:\n{shlex.join(command)}\n{last}")
    return result.stdout


def main() -> None:
    """Build the library into the package of this checkout."""
    folder = HERE.parent / "rubiks" / "ops"
    print(f"Building {folder / LIBRARY} with PyTorch {torch.__version__}")
    try:
        facts = build(folder)
    except (BuildError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"CPU: {facts['compiler']}")
    if facts["cuda"]:
        print(f"CUDA: {facts['nvcc_version']}, {facts['architectures']}")
    else:
        print(f"No CUDA: {facts['cuda_error']}")


if __name__ == "__main__":
    main()
