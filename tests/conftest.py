"""What tests share. Large reference data may lie in ../shared beside the checkout; tests that need it skip without."""

from __future__ import annotations

import gc
import logging
import signal
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import av  # noqa: F401  before any test imports decord, whose older libvpx PyAV's encoder would then find
import hypothesis
import pytest
import pytorch_lightning as pl
import torch
from browser import browser, chromium  # noqa: F401  fixtures
from pytorch_lightning.utilities import rank_zero_only

from rubiks.cli import main
from rubiks.data import builtin
from rubiks.data.workers import cores
from rubiks.errors import InputError
from rubiks.models.tiers import TIERS, Tier
from rubiks.ops import fused, operator

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
OFFICIAL = Path(__file__).parent / "official"  # numbers computed with the official code

SMALL_TIER = Tier(18, (1, 1, 1, 1))  # one narrow block in each stage

sys.path[:0] = [str(ROOT), str(OFFICIAL)]  # for train.py and eval.py, and what the official code gave

hypothesis.settings.register_profile("tests", deadline=None)  # machines are slow at times
hypothesis.settings.load_profile("tests")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and what they start, ignore it


@pytest.fixture
def shared() -> Path:
    """The folder of the large reference data."""
    if not SHARED.is_dir():
        pytest.skip("needs the reference data in ../shared")
    return SHARED


@pytest.fixture
def commands(monkeypatch, capsys, tmp_path):
    """train.py and eval.py in this process, in the test's own folder."""
    from commands import Commands  # it takes ROOT from here

    return Commands(monkeypatch, capsys, tmp_path)


class Fits(list):
    """The calls of Lightning's fit, in order; `during` is what happens in each, given the call."""

    during = staticmethod(lambda call: None)


@pytest.fixture
def fits(monkeypatch):
    """What train.py passes to Lightning's fit, which trains nothing here."""
    calls = Fits()
    ours = logging.getLogger("rubiks")
    level = ours.level

    def fit(trainer, module, data, **options) -> None:
        calls.append(SimpleNamespace(trainer=trainer, module=module, data=data, options=options))
        calls[-1].seed = torch.initial_seed()
        calls[-1].log_levels = ours.level, logging.getLogger().level
        calls.during(calls[-1])

    monkeypatch.setattr(pl.Trainer, "fit", fit)
    yield calls
    ours.setLevel(level)


def watch_flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects a captured stdout whenever it is flushed, so that a pipe's reader gets it at once."""
    texts: list[str] = []
    stream = sys.stdout
    monkeypatch.setattr(stream, "flush", lambda: texts.append(stream.getvalue()))
    return texts


@pytest.fixture(scope="session")
def builtin_data(tmp_path_factory) -> str:
    """The choice of a small built-in data set: 24 training and 8 validation videos of the plain level."""
    root = tmp_path_factory.mktemp("builtin")
    builtin.generate(root, "plain", 24, 8, 0, progress=False)
    return f"data.root={root}"


@pytest.fixture
def rubiks_command(monkeypatch, capsys):
    """Runs `rubiks` in this process; exit status, stdout and stderr."""

    def command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["rubiks", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            main.main()
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return command


@pytest.fixture(scope="module")
def small_network():
    """Makes tier=tiny a network of one narrow block per stage, for tests of what happens around a network."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(TIERS, "tiny", SMALL_TIER)
        yield


def assert_rejected(action, *parts: str) -> None:
    """The InputError's message holds all parts, on one line."""
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def fused_kernels() -> None:
    """The compiled kernels of the fused blocks."""
    operator.prepare()
    if not fused.available(torch.device("cuda")):
        pytest.skip("needs the compiled library and compute capability 8.0")


@pytest.fixture(autouse=True)
def _as_in_a_new_process() -> None:
    torch.manual_seed(0)
    rank_zero_only.rank = 0  # Lightning keeps the last trainer's


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more process than cores, since many tests wait for a server, a signal or other processes."""
    return cores() + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


def pytest_collection_finish() -> None:
    """Keep what has been imported by now out of garbage collections."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many tests were skipped, and why."""
    reasons = Counter(str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []))
    for reason, count in reasons.most_common():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")
