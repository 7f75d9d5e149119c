"""Find the compiled operator's library, or build it at first use, and load it into the process.

Tried in order: the library that was installed with the package, the one in the user's cache, a new one built into the
cache. If none is available, the PyTorch reference runs, and one warning says why. RUBIKS_REFERENCE=1 selects the
reference; RUBIKS_NO_BUILD=1 prevents building; RUBIKS_CACHE names the cache's folder (default ~/.cache/rubiks).
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import stat
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TextIO

import torch

HERE = Path(__file__).resolve().parent


class UnusableError(Exception):
    """A library is missing or does not suit this machine; the message says which and why."""


class Library(NamedTuple):
    """A compiled library and how it was built."""

    path: Path
    facts: dict[str, Any]


class Status(NamedTuple):
    """What `load` did."""

    library: Library | None  # None: the PyTorch reference runs
    reasons: tuple[str, ...]  # why no better one was loaded

    def compiled(self, device: str) -> bool:
        """Whether the library, not the reference, runs on "CPU" or "CUDA"."""
        return self.library is not None and (device == "CPU" or self.library.facts["cuda"])


@functools.cache
def load() -> Status:
    """Load the best library, building it if necessary; at most one per process, since it defines the operators."""
    if hasattr(torch.ops.rubiks, "shift"):
        return Status(None, ("the operator was already registered by other code",))
    if _set("RUBIKS_REFERENCE"):
        return Status(None, ("RUBIKS_REFERENCE is set",))
    reasons: list[str] = []
    status = Status(_load_first(_candidates(reasons, build=True), reasons), tuple(reasons))
    if not status.compiled("CPU"):
        _warn("the compiled shift operator is not available", status.reasons)
    elif _gpu_visible() and not status.compiled("CUDA"):
        _warn("the compiled shift operator has no CUDA kernels here", status.reasons)
    return status


def ready() -> bool:
    """Whether `load` finds the best library at once, without building."""
    if hasattr(torch.ops.rubiks, "shift") or _set("RUBIKS_REFERENCE"):
        return True
    library = next(_candidates([], build=False), None)
    return library is not None and _suits(library)


def _candidates(reasons: list[str], build: bool) -> Iterator[Library]:
    """The libraries that can be loaded, best first. Adds to `reasons` why others cannot."""
    without_cuda = []
    for find in (_installed, functools.partial(_cached, build)):
        try:
            library = find()
        except (UnusableError, OSError) as error:
            reasons.append(str(error))
            continue
        if _suits(library):
            yield library
        else:
            reasons.append(f"{library.path} has no CUDA kernels: {library.facts['cuda_error']}")
            without_cuda.append(library)
    yield from without_cuda


def _load_first(libraries: Iterator[Library], reasons: list[str]) -> Library | None:
    for library in libraries:
        try:
            torch.ops.load_library(str(library.path))
            return library
        except OSError as error:
            reasons.append(f"{library.path} cannot be loaded: {error.__cause__ or error}")
    return None


def _installed() -> Library:
    return _read(HERE, "installed with the package")


def _cached(build: bool) -> Library:
    """The library in the cache; if there is none and `build` is true, a new one."""
    builder = _builder()
    reasons = []
    for root in _cache_folders():
        try:
            _check(root)
            return _current(root / builder.cache_key())
        except (UnusableError, OSError) as error:
            reasons.append(str(error))
    if not build:
        raise UnusableError(reasons[0])
    if _set("RUBIKS_NO_BUILD"):
        raise UnusableError(f"{reasons[0]}; RUBIKS_NO_BUILD prevents building one")
    try:
        return _build()
    except builder.BuildError as error:
        raise UnusableError(f"{reasons[0]}; building one failed: {error}") from None


def _build() -> Library:
    """A new library in the first cache folder that can be written, unless another process is faster."""
    builder = _builder()
    builder.find_cxx()  # fail early without a compiler
    problem: OSError | None = None
    for root in _cache_folders():
        folder = root / builder.cache_key()
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            _check(root)
            folder.mkdir(exist_ok=True)
            lock = open(folder / "lock", "a")  # noqa: SIM115
        except OSError as error:
            problem = error
            continue
        with lock:
            _wait_for(lock)
            with contextlib.suppress(UnusableError):
                return _current(folder)
            print(
                f"rubiks: building the compiled operators in {folder}; this happens once and takes a minute or two",
                file=sys.stderr,
            )
            builder.build(folder)
            return _current(folder)
    raise UnusableError(f"no cache folder can be written: {problem}")


def _wait_for(lock: TextIO) -> None:
    """Let one process build while others wait. The system frees the lock when the process ends.

    Files are replaced whole, so without locks a few processes just build the same library.
    """
    import fcntl  # not on Windows, where there is nothing to build

    with contextlib.suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX)


def _current(folder: Path) -> Library:
    """The cache's library, unless one without CUDA could be replaced now that nvcc is there."""
    library = _read(folder, "in the cache")
    builder = _builder()
    if not library.facts["cuda"]:
        with contextlib.suppress(builder.BuildError):
            if builder.find_nvcc() != library.facts.get("nvcc"):
                raise UnusableError(f"{library.path} was built without nvcc")
    return library


def _read(folder: Path, where: str) -> Library:
    builder = _builder()
    path = folder / builder.LIBRARY
    try:
        facts = json.loads((folder / builder.FACTS).read_bytes())
        intact = facts["sha256"] == builder.hash_of(path)
    except FileNotFoundError:
        raise UnusableError(f"no library {where} ({path})") from None
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise UnusableError(f"{path} is damaged: it does not match {builder.FACTS} next to it; delete both")
    if facts["sources"] != builder.source_hash():
        raise UnusableError(f"{path} is stale: the sources in {builder.HERE} have changed since it was built")
    if facts["cuda"] and torch.version.cuda is None:
        raise UnusableError(f"{path} needs PyTorch with CUDA; PyTorch here is {torch.__version__}")
    return Library(path, facts)


@functools.cache
def _builder() -> ModuleType:
    """The module ext/build.py: inside the installed package, or next to it in a checkout."""
    package = HERE.parent
    for folder in (package / "ext", package.parent / "ext"):
        if (folder / "build.py").is_file():
            spec = importlib.util.spec_from_file_location("rubiks_build", folder / "build.py")
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise UnusableError(f"the operator's sources are missing: expected in {package / 'ext'}; install rubiks again")


def _cache_folders() -> Iterator[Path]:
    """The user's cache, and a temporary folder in case that cannot be written."""
    if folder := os.environ.get("RUBIKS_CACHE"):
        yield Path(folder).absolute()
    elif folder := os.environ.get("XDG_CACHE_HOME"):
        yield Path(folder).absolute() / "rubiks"
    else:
        with contextlib.suppress(RuntimeError):  # no home folder
            yield Path.home() / ".cache" / "rubiks"
    yield _temporary()


def _temporary() -> Path:
    return Path(tempfile.gettempdir()) / f"rubiks-{_user()}"


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _check(root: Path) -> None:
    """Refuse a temporary folder that others can write: loading a library from it would run their code."""
    if root == _temporary():
        found = root.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != _user() or found.st_mode & 0o022:
            raise PermissionError(f"{root} is not a folder that only this user can write")


def _suits(library: Library) -> bool:
    return library.facts["cuda"] or not _gpu_visible()


def _gpu_visible() -> bool:
    return torch.cuda.device_count() > 0  # unlike is_available, leaves CUDA uninitialised, so processes can fork


def _set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def _warn(problem: str, reasons: tuple[str, ...]) -> None:
    message = (
        f"{problem}; the PyTorch reference runs instead, which is several times slower.\n"
        + "".join(f"- {reason}\n" for reason in reasons)
        + "To get it, install g++ and, for GPUs, the CUDA toolkit (nvcc), then start again: it is built at first use. "
        "RUBIKS_REFERENCE=1 uses the reference without this warning."
    )
    warnings.warn(message, RuntimeWarning, stacklevel=3)
