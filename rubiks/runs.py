"""The folders of training runs: what is in them, which is the newest, which can go on.

outputs/NAME/config.yaml             the whole configuration
outputs/NAME/checkpoints/best.ckpt   best validation top-1
outputs/NAME/checkpoints/last.ckpt   newest, to go on from
outputs/NAME/finished.json           how training ended; missing while it has not
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Run:
    """One training run's folder."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def finished(self) -> Path:
        return self.folder / "finished.json"

    def epochs_finished(self) -> int | None:
        """Epochs of the run if it came to its end, else None."""
        return json.loads(self.finished.read_text())["epochs"] if self.finished.is_file() else None

    def matches(self, data: str, **chosen: str) -> bool:
        """Whether the run was trained on this data set, with the tier and variant chosen, where they are."""
        if not self.config.is_file():
            return False
        try:
            config = yaml.safe_load(self.config.read_text(encoding="utf-8"))
            return all(config[key]["name"] == name for key, name in {"data": data, **chosen}.items())
        except (yaml.YAMLError, KeyError, TypeError):
            return False

    def checkpoint(self) -> Path | None:
        """The checkpoint to evaluate: the best, or the last where training ended before a validation."""
        return next((path for path in (self.best, self.last) if path.is_file()), None)


def newest(data: str, outputs: Path = OUTPUTS, **chosen: str) -> Run | None:
    """The run of this data set, and of the tier and variant chosen, whose checkpoint was written last."""
    folders = [path for path in outputs.iterdir() if path.is_dir()] if outputs.is_dir() else []
    written = {}
    for run in map(Run, folders):
        path = run.checkpoint()
        if path is not None and run.matches(data, **chosen):
            written[run] = path.stat().st_mtime
    return max(written, key=lambda run: written[run], default=None)
