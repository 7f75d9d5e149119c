"""Compiles the operator while the package is built, if PyTorch and a compiler are there; the rest is in pyproject.toml.

Without them the package is still built, and rubiks/ops/library.py compiles the operator at first use.
"""

import importlib.util
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

EXT = Path(__file__).resolve().parent / "ext"


def compile_into(folder: Path) -> bool:
    """Build the library into the folder; returns whether that worked."""
    try:
        spec = importlib.util.spec_from_file_location("rubiks_build", EXT / "build.py")
        builder = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(builder)
        facts = builder.build(folder)
    except Exception as error:  # whatever the error, the package works without the library
        hint = " (pip install --no-build-isolation uses the one installed)" if isinstance(error, ImportError) else ""
        print(f"rubiks: the operator is not compiled now, but at first use: {error}{hint}")
        return False
    print(f"rubiks: compiled the operator {'with' if facts['cuda'] else 'without'} CUDA: {facts.get('cuda_error', '')}")
    return True


class BuildPackage(build_py):
    """The modules, the operator's sources as rubiks/ext, the presets as rubiks/conf, and the operator's library in
    rubiks/ops."""

    compiled = False

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            self.compiled = compile_into(EXT.parent / "rubiks" / "ops")
            return
        package = Path(self.build_lib) / "rubiks"
        for leftover in (package / "ops").glob("librubiks.*"):  # from an earlier build
            leftover.unlink()
        for name in ("ext", "conf"):
            shutil.rmtree(package / name, ignore_errors=True)
            shutil.copytree(EXT.parent / name, package / name, ignore=shutil.ignore_patterns("__pycache__"))
        self.compiled = compile_into(package / "ops")


class Wheel(bdist_wheel):
    """A wheel for one platform with the library, for any platform without it; for every Python in both cases."""

    def run(self) -> None:
        self.run_command("build_py")
        if self.get_finalized_command("build_py").compiled:
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel})
