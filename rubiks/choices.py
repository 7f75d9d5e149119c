"""The choices given on a command line."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CommandLine:
    """What was typed after train.py or eval.py.

    Attributes:
        choices: the KEY=VALUE arguments, in order.
        job: which one of several runs of --multirun this is, from 0; None for a single run.
    """

    choices: list[str]
    job: int | None = None

    def sets(self, key: str) -> bool:
        """Whether one of the choices is KEY=..."""
        return any(choice.startswith(f"{key}=") for choice in self.choices)

    def for_evaluation(self) -> list[str]:
        """The choices of a training command that evaluating its run also needs."""
        shared = ("data", "device", "experiment", "precision")  # tier and variant come from the checkpoint
        training = ("data.clips_per_video", "data.balanced")  # keys that eval.py does not have
        keys = [(choice, choice.split("=")[0].lstrip("+")) for choice in self.choices]
        return [choice for choice, key in keys if key.split(".")[0] in shared and key not in training]


def program(name: str) -> list[str]:
    """The command for `train` or `eval`, as this process was started: as a script, or as a `rubiks` subcommand."""
    script = Path(sys.argv[0]).suffix == ".py" and Path(sys.argv[0]).name != "__main__.py"
    return ["python", f"{name}.py"] if script else ["rubiks", name]


def presets() -> Path:
    """The folder of presets: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    return next(place for place in (package / "conf", package.parent / "conf") if place.is_dir())


def text_of(value: object) -> str:
    """A value as it is written on a command line and in YAML."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def setting(key: str, value: object) -> str:
    """key=value as a choice that Hydra understands, quoted if the value has spaces, braces and the like."""
    text = text_of(value)
    if re.fullmatch(r"[\w./+-]+", text):
        return f"{key}={text}"
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key}="{escaped}"'
