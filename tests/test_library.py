"""The compiled operator's library: built once, found again, and no obstacle if it cannot be built."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from with_torch import Process, WithTorch

pytestmark = pytest.mark.slow

# Runs the operator after `{setup}` and prints which one ran. Moving every channel by one frame checks the result.
PROGRAM = """
import json, warnings, torch
{setup}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from rubiks.ops import library, operator, shift3d
    ready = library.ready()
    x = torch.rand(2, 3, 4, 5, 5, requires_grad=True)
    shift = torch.tensor([1.0, 0.0, 0.0])[:, None].repeat(1, 4).requires_grad_()
    out = shift3d(x, shift)
    out.square().sum().backward()
assert torch.equal(out[:, :-1], x[:, 1:]) and not out[:, -1].any()
assert torch.equal(x.grad[:, 1:], 2 * x[:, 1:]) and not x.grad[:, 0].any()
assert shift.grad.isfinite().all() and shift.grad[0].all()
schemas = [torch._C.parse_schema("rubiks::" + schema) for schema in operator.SCHEMAS]
status = library.load()
print(json.dumps({{
    "library": status.library and str(status.library.path),
    "facts": status.library and status.library.facts,
    "compiled": [status.compiled("CPU"), status.compiled("CUDA")],
    "reasons": status.reasons,
    "ready": ready,
    "warnings": [str(w.message) for w in caught if "shift operator" in str(w.message)],
    "schemas": schemas == [torch.ops.rubiks.shift.default._schema, torch.ops.rubiks.shift_backward.default._schema],
}}))
"""
NO_COMPILER = {"PATH": "", "CXX": ""}

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)


class Checkout:
    """A copy of the operator with its sources, nothing installed, and a separate environment and cache."""

    def __init__(self, folder: Path, with_torch: WithTorch) -> None:
        self.folder, self.with_torch = folder, with_torch
        self.ops = folder / "rubiks" / "ops"
        self.cache = folder / "cache"
        (folder / "rubiks").mkdir(parents=True)
        (folder / "rubiks" / "__init__.py").touch()  # the rest of the package is slow to import
        shutil.copytree(ROOT / "rubiks/ops", self.ops, ignore=shutil.ignore_patterns("librubiks.*", "__pycache__"))
        shutil.copytree(ROOT / "ext", folder / "ext", ignore=shutil.ignore_patterns("__pycache__"))
        (folder / "tmp").mkdir()
        ours = ("RUBIKS_", "TORCH_CUDA_ARCH_LIST", "PYTHONPATH")
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        self.environment |= {"RUBIKS_CACHE": str(self.cache), "TMPDIR": str(folder / "tmp"), "CUDA_HOME": "/nowhere"}

    def start(self, setup: str = "", **environment: str) -> Process:
        return self.with_torch.start(PROGRAM.format(setup=setup), self.folder, self.environment | environment)

    def finish(self, process: Process) -> dict:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        return json.loads(out) | {"stderr": err}

    def run(self, setup: str = "", **environment: str) -> dict:
        return self.finish(self.start(setup, **environment))

    def install(self, built: Path, **changes) -> None:
        """Put a built library next to the package, with changed facts."""
        shutil.copy(built / "librubiks.so", self.ops)
        facts = json.loads((built / "librubiks.json").read_text()) | changes
        (self.ops / "librubiks.json").write_text(json.dumps(facts))

    def compiler(self, built: Path, *, before: str = "") -> str:
        """A command for CXX that counts its links and gives the built library; quick."""
        script = self.folder / "compiler"
        script.write_text(
            f"#!/bin/sh\n{before}\n"
            'for word; do test "$previous" = -o && target=$word; previous=$word; done\n'
            f'case "$target" in *.so) cp {built}/librubiks.so "$target"; echo x >> {self.folder}/links;; '
            '"") echo compiler 1.0;; *) touch "$target";; esac\n'
        )
        script.chmod(0o755)
        return str(script)

    def links(self) -> int:
        return len((self.folder / "links").read_text().split())


@pytest.fixture(scope="module")
def with_torch():
    server = WithTorch()
    yield server
    server.close()


@pytest.fixture
def checkout(tmp_path, with_torch):
    return Checkout(tmp_path / "checkout", with_torch)


@pytest.fixture(scope="module")
def first_use(tmp_path_factory, with_torch):
    """A checkout in which three processes started at once with an empty cache, and their output."""
    checkout = Checkout(tmp_path_factory.mktemp("library") / "checkout", with_torch)
    processes = [checkout.start() for _ in range(3)]
    return checkout, [checkout.finish(process) for process in processes]


@pytest.fixture(scope="module")
def built(first_use):
    """The folder of a library and its facts."""
    return Path(first_use[1][0]["library"]).parent


@needs_compiler
def test_first_use_builds_once_for_processes_that_start_together(first_use):
    checkout, results = first_use
    for result in results:
        assert result["compiled"] == [True, False]
        assert result["schemas"]
        assert result["warnings"] == []
        assert Path(result["library"]).is_relative_to(checkout.cache)
    assert sum(result["stderr"].count("rubiks: building") for result in results) == 1
    assert not list((checkout.folder / "tmp").glob("rubiks*"))


@needs_compiler
def test_later_processes_take_it_from_the_cache_also_where_there_is_no_compiler(first_use):
    checkout, _ = first_use
    result = checkout.run(**NO_COMPILER)
    assert (result["compiled"], result["ready"], result["stderr"]) == ([True, False], True, "")
    assert result["warnings"] == []


@needs_compiler
def test_the_installed_library_comes_first_and_a_stale_one_is_not_used(first_use, built, checkout):
    checkout.install(built)
    result = checkout.run(RUBIKS_CACHE=str(first_use[0].cache))
    assert result["library"] == str(checkout.ops / "librubiks.so")
    assert (result["ready"], result["reasons"]) == (True, [])
    with open(checkout.folder / "ext" / "shift" / "shift.h", "a") as header:
        header.write("// changed\n")
    result = checkout.run(RUBIKS_CACHE=str(first_use[0].cache), RUBIKS_NO_BUILD="1")
    assert result["library"] is None
    assert "is stale" in result["warnings"][0]
    assert "RUBIKS_NO_BUILD" in result["warnings"][0]


def test_without_a_compiler_the_reference_runs_and_one_warning_says_why(checkout):
    result = checkout.run(**NO_COMPILER)
    assert (result["library"], result["ready"]) == (None, False)
    (warning,) = result["warnings"]
    for words in ("no library installed with the package", "no C++ compiler", "install g++", "RUBIKS_REFERENCE=1"):
        assert words in warning, warning
    assert result["stderr"] == ""


def test_the_reference_on_request_is_no_reason_to_warn(checkout):
    result = checkout.run(RUBIKS_REFERENCE="1")
    assert (result["library"], result["ready"], result["warnings"]) == (None, True, [])
    assert result["schemas"]


@needs_compiler
def test_a_failed_build_quotes_the_compiler(checkout):
    header = checkout.folder / "ext" / "shift" / "shift.h"
    header.write_text("#error this cannot be compiled\n" + header.read_text())
    (warning,) = checkout.run()["warnings"]
    assert "no library installed with the package" in warning
    assert "this command failed with status 1" in warning
    assert "this cannot be compiled" in warning


@needs_compiler
def test_a_library_that_cannot_be_used_is_left_alone(built, with_torch, tmp_path):
    contents = (built / "librubiks.so").read_bytes()
    started = []
    for name, library, changes, words in (
        ("truncated", contents[:-5000], {}, "is damaged"),
        ("other file", b"text", {"sha256": hashlib.sha256(b"text").hexdigest()}, "cannot be loaded: "),
        ("of CUDA", contents, {"cuda": True}, "needs PyTorch with CUDA; PyTorch here is"),
        ("without facts", contents, None, "is damaged"),
    ):
        checkout = Checkout(tmp_path / name, with_torch)
        checkout.install(built, **(changes or {}))
        (checkout.ops / "librubiks.so").write_bytes(library)
        if changes is None:
            (checkout.ops / "librubiks.json").write_text("{")
        process = checkout.start("torch.version.cuda = None", **NO_COMPILER)
        started.append((checkout, process, words))
    for checkout, process, words in started:
        (warning,) = checkout.finish(process)["warnings"]
        assert f"{checkout.ops / 'librubiks.so'} {words}" in warning


@needs_compiler
def test_a_damaged_library_in_the_cache_is_built_again(built, checkout):
    cxx = checkout.compiler(built)
    library = Path(checkout.run(CXX=cxx)["library"])
    library.write_bytes(library.read_bytes()[:100_000])
    result = checkout.run(CXX=cxx)
    assert (result["library"], result["warnings"], checkout.links()) == (str(library), [], 2)


@needs_compiler
def test_a_cache_that_cannot_be_written_is_replaced_by_a_private_temporary_one(built, checkout):
    (checkout.folder / "file").touch()
    environment = {"RUBIKS_CACHE": str(checkout.folder / "file" / "cache"), "CXX": checkout.compiler(built)}
    for _ in range(2):
        result = checkout.run(**environment)
        assert result["warnings"] == []
    assert checkout.links() == 1
    (temporary,) = (checkout.folder / "tmp").glob("rubiks*")
    assert Path(result["library"]).is_relative_to(temporary)
    assert stat.S_IMODE(temporary.stat().st_mode) == 0o700
    temporary.chmod(0o777)  # others might have put a library in it
    (warning,) = checkout.run(**environment)["warnings"]
    assert "is not a folder that only this user can write" in warning


@needs_compiler
def test_a_killed_builder_keeps_nobody_waiting(built, checkout):
    cxx = checkout.compiler(built, before="if mkdir slow 2>/dev/null; then sleep 100; fi")
    first = checkout.start(CXX=cxx)
    while not (checkout.folder / "slow").exists():
        time.sleep(0.1)
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=60)
    result = checkout.run(CXX=cxx)
    assert (result["compiled"][0], checkout.links()) == (True, 1)


@needs_compiler
@pytest.mark.skipif(torch.version.cuda is None, reason="needs PyTorch with CUDA")
def test_a_gpu_without_cuda_kernels_gets_one_warning_and_the_compiled_operator_on_the_cpu(built, checkout):
    visible = "torch.cuda.device_count = lambda: 1"
    (checkout.folder / "cuda" / "bin").mkdir(parents=True)
    nvcc = checkout.folder / "cuda" / "bin" / "nvcc"
    nvcc.write_text("#!/bin/sh\necho release 1.0\ncase $* in *--version*) ;; *) echo no such GPU; exit 1;; esac\n")
    nvcc.chmod(0o755)
    environment = {"CXX": checkout.compiler(built)}
    for home, words in (("/nowhere", "no bin/nvcc in CUDA_HOME=/nowhere"), (str(nvcc.parents[1]), "no such GPU")):
        result = checkout.run(visible, CUDA_HOME=home, **environment)
        assert result["compiled"] == [True, False]
        (warning,) = result["warnings"]
        assert "no CUDA kernels here" in warning
        assert words in warning
    checkout.run(visible, CUDA_HOME=home, **environment)
    assert checkout.links() == 2  # once more when nvcc appeared, and not again after it failed


@needs_compiler
def test_info_tells_what_serves_and_why(first_use):
    checkout, _ = first_use
    environment = checkout.environment | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "rubiks.cli.main", "info"]

    def info(*arguments: str, **more: str) -> str:
        result = subprocess.run(
            [*command, *arguments],
            cwd=checkout.folder / "tmp",
            env=environment | more,
            capture_output=True,
            text=True,
            check=True,
        )
        return result.stdout

    facts = json.loads(info("--json"))
    assert facts["operator"]["CPU"].startswith("compiled, ")
    assert facts["versions"]["PyTorch"] == torch.__version__
    assert "-O3" in facts["build"]["flags"]
    text = info(RUBIKS_REFERENCE="1")
    assert "PyTorch reference" in text
    assert "RUBIKS_REFERENCE is set" in text
