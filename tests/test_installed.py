"""The wheel is complete: its commands work in an empty folder, without a checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import ROOT
from with_torch import WithTorch

import rubiks

pytestmark = pytest.mark.slow

# As `python -m rubiks`, with the wheel's files before those of a checkout.
COMMAND = """
import runpy, sys
sys.path.insert(0, {installed!r})
sys.argv = ["rubiks", *{words!r}]
runpy.run_module("rubiks", run_name="__main__", alter_sys=True)
"""
SLOW_TO_IMPORT = ("hydra", "matplotlib.pyplot", "pytorch_lightning", "torchmetrics.classification", "torchvision")
QUICK = (
    "device=cpu", "data.workers=0", "data.train_videos=24", "data.val_videos=8", "data.size=32", "data.num_frames=4",
    "recipe.epochs=1",
)  # fmt: skip


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel's files, without a compiled operator, which other tests cover."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".*", "outputs", "build", "librubiks.*"))
    environment = os.environ | {"CXX": "false", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--target"]
    subprocess.run([*pip, str(folder / "installed"), str(folder / "source")], env=environment, check=True)
    return folder / "installed"


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """Runs a command of the installed package in an initially empty folder; returns stdout."""
    server, folder = WithTorch(*SLOW_TO_IMPORT), tmp_path_factory.mktemp("empty")
    plain = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    plain |= {"RUBIKS_REFERENCE": "1", "WANDB_MODE": "disabled"}

    def command(*words: str, status: int = 0, environment: Mapping[str, str] | None = None) -> str:
        script = COMMAND.format(installed=str(installed), words=words)
        process = server.start(script, folder, plain | (environment or {}))
        out, err = process.communicate(timeout=180)
        assert process.returncode == status, err
        return out if status == 0 else err

    command.folder = folder
    yield command
    server.close()


def test_the_version_is_told(run):
    assert run("--version") == f"rubiks {rubiks.__version__}\n"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("rubiks ch", ["check-cluster", "check"]),
        ("rubiks rep", ["report "]),
        ("rubiks report --o", ["--out "]),
        ("rubiks train tier=", ["tier=large", "tier=medium", "tier=small", "tier=tiny"]),
        ("rubiks eval protocol=t", ["protocol=two_clip "]),
    ],
)
def test_a_shell_completes_commands_and_presets(line, wanted, run, tmp_path):
    place = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "|"}
    run("train", environment=place | {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "completions")})
    assert (tmp_path / "completions").read_text().split("|") == wanted


def test_a_network_is_trained_evaluated_reported_and_used_and_the_data_is_checked(run):
    output = run("train", *QUICK, "run=first")
    (line,) = [line for line in output.splitlines() if line.startswith("To evaluate: ")]
    assert line.startswith("To evaluate: rubiks eval protocol=two_clip ")
    output = run("eval", *line.split()[4:], "data.workers=0")
    results = json.loads(next(run.folder.glob("outputs/eval-*/results.json")).read_text())
    assert results["videos"] == 8
    assert results["protocol"] == "two_clip"
    assert "Results in " in output

    # The report is written again from the files.
    (report,) = run.folder.glob("outputs/eval-*/report.html")
    before = report.read_bytes()
    report.unlink()
    assert run("report", report.parent.name) == f"Report in {report.relative_to(run.folder)}\n"
    assert report.read_bytes() == before

    (videos,) = run.folder.glob("data/builtin/*/20bn-something-something-v2")
    lists = "".join(f"{path},{number % 2}\n" for number, path in enumerate(sorted(videos.iterdir())[:4]))
    (run.folder / "list.csv").write_text(lists)
    (run.folder / "list.txt").write_text("".join(f"{path}\n" for path in sorted(videos.iterdir())[:4]))
    output = run("check", "data=csv", "data.train_list=list.csv", "data.val_list=list.csv", "data.num_classes=2")
    assert "rubiks-manifest.jsonl" in output

    lines = run("predict", "outputs/first", "list.txt", "--json", "--workers", "0", "--device", "cpu").splitlines()
    assert [len(json.loads(line)["predictions"]) for line in lines] == [5] * 4


def test_published_networks_are_known_and_have_presets(installed, run):
    assert (installed / "rubiks/evaluation/zoo.csv").read_bytes() == (ROOT / "rubiks/evaluation/zoo.csv").read_bytes()
    facts = json.loads(run("info", "experiment=kinetics_tiny", "--json"))
    assert (facts["tier"], facts["num_classes"]) == ("tiny", 400)


def test_help_and_mistakes(run):
    assert "rubiks train tier=large" in run("train", "--help")
    assert run("train", "tier=huge", status=2).startswith("error: ")
    assert "recipe.lr must be a number" in run("train", "recipe.lr=fast", status=2)
