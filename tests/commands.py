"""Running the project's commands inside the test process, which saves seconds of imports for each."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import omegaconf
import pytest
import pytorch_lightning as pl
import yaml
from hydra._internal.hydra import Hydra
from pytorch_lightning.loggers import WandbLogger

from rubiks.cli import train as cli_train
from rubiks.cli.check_cluster import check_cluster
from rubiks.cli.entry import launch
from rubiks.cli.evaluate import evaluate
from rubiks.experiment import Evaluation, Training
from rubiks.training.pictures import ShiftPictures


class Captured:
    """Captures stdout and stderr, where pytest's fixtures for it are not available."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._streams = io.StringIO(), io.StringIO()
        for name, stream in zip(("stdout", "stderr"), self._streams, strict=True):
            monkeypatch.setattr(sys, name, stream)

    def readouterr(self) -> tuple[str, ...]:
        """What was written since the last call."""
        texts = tuple(stream.getvalue() for stream in self._streams)
        for stream in self._streams:
            stream.seek(0)
            stream.truncate()
        return texts


@contextlib.contextmanager
def commands_in(folder: Path, pictures: bool = False) -> Iterator[Commands]:
    """`Commands` for a fixture that several tests share."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield Commands(monkeypatch, Captured(monkeypatch), folder, pictures)


_yaml_loader = functools.cache(omegaconf._utils.get_yaml_loader)
_load_yaml = functools.cache(yaml.load)


def _load_once(stream: IO[str] | str, Loader: type) -> Any:  # noqa: N803  PyYAML's name
    return copy.copy(_load_yaml(stream if isinstance(stream, str) else stream.read(), Loader))


def _logs_images(trainer: pl.Trainer) -> bool:
    return any(isinstance(logger, WandbLogger) for logger in trainer.loggers)


class Commands:
    """train.py and eval.py as a user types them, in a separate folder.

    Pictures of the shifts are only drawn for tests that ask for them or log them, since they take longer than a small
    training. So does collecting the tests' garbage: train.py's calls of `gc` are only recorded.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str] | Captured,
        folder: Path,
        pictures: bool = False,
    ) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys
        self.folder = folder
        self.gc: list[str] = []
        monkeypatch.chdir(folder)
        if not pictures:
            draw = ShiftPictures.on_validation_end
            monkeypatch.setattr(
                ShiftPictures,
                "on_validation_end",
                lambda self, trainer, module: draw(self, trainer, module) if _logs_images(trainer) else None,
            )

    def start(self, name: str, arguments: tuple[str, ...]) -> None:
        """Run train.py or eval.py, which prints and may exit."""
        self.monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        # Hydra composes the configuration twice, first to learn hydra.mode alone, which nobody sets here, and reads
        # each of its files twice.
        self.monkeypatch.setattr(Hydra, "get_mode", lambda *_, **__: None)
        self.monkeypatch.setattr(omegaconf._utils, "get_yaml_loader", _yaml_loader)
        self.monkeypatch.setattr(yaml, "load", _load_once)
        if name == "train":
            noted = {word: functools.partial(self.gc.append, word) for word in ("collect", "freeze", "unfreeze")}
            self.monkeypatch.setattr(cli_train, "gc", SimpleNamespace(**noted))
        launch(*ENTRIES[name])

    def run(self, name: str, arguments: tuple[str, ...]) -> tuple[int, str, str]:
        """Exit status, stdout and stderr of train.py or eval.py."""
        self.capsys.readouterr()
        status = 0
        try:
            self.start(name, arguments)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        out, err = self.capsys.readouterr()
        return status, out, err

    def train(self, *arguments: str) -> str:
        """Output of a run of train.py that must succeed."""
        status, out, err = self.run("train", (*BASE, "logger=csv", *arguments))
        assert status == 0, err
        return out

    def evaluate(self, *arguments: str) -> str:
        status, out, err = self.run("eval", (*BASE, *arguments))
        assert status == 0, err
        return out

    def refused(self, name: str, *arguments: str) -> str:
        """The message of a run that must end with exit status 2 and one error, leaving no run's folder."""
        before = sorted(self.folder.rglob("outputs/*"))
        status, _, err = self.run(name, (*BASE, *arguments))
        assert status == 2, err
        assert err.startswith("error: "), err
        assert "Traceback" not in err
        assert sorted(self.folder.rglob("outputs/*")) == before
        return err


BASE = ("device=cpu", "data.workers=0")
# Lightning's warnings about runs as small as those of tests.
SMALL_RUNS = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*number of training batches.*")
ENTRIES = {
    "train": (cli_train.train, Training),
    "eval": (evaluate, Evaluation),
    "check-cluster": (check_cluster, Training),
}
