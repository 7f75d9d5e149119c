"""Which folder a command's run goes to."""

from __future__ import annotations

import re

from rubiks import launched, processes, runs
from rubiks.choices import CommandLine
from rubiks.errors import InputError
from rubiks.models.checkpoint import SavedNetwork


def run_of(name: object, command: CommandLine, rehearsal: bool) -> runs.Run:
    """The run's folder: the one that run=NAME names on the command line, otherwise a new one.

    Args:
        name: the setting `run`.
        command: the command line.
        rehearsal: nothing is written (trainer.fast_dev_run).
    """
    given = processes.given_run()
    if given is not None:
        return runs.Run(given)
    named = named_run(name, command)
    if named is not None:
        return named
    if rehearsal or not launched.is_first():  # nothing is written
        return runs.Run(runs.OUTPUTS / str(name))
    return runs.new(_folder_name(name, command))


def named_run(name: object, command: CommandLine) -> runs.Run | None:
    """The run that run=NAME names on the command line."""
    folder = _folder_name(name, command)
    return runs.Run(runs.OUTPUTS / folder) if command.sets("run") else None


def _folder_name(name: object, command: CommandLine) -> str:
    if not re.fullmatch(r"[\w.,=+-]+", str(name)) or set(str(name)) <= {"."}:
        raise InputError(f"run must be a folder name of letters, digits and ._,=+-; got {name!r}")
    return str(name) if command.job is None else f"{name}-{command.job}"


def unfinished(run: runs.Run, epochs: int) -> SavedNetwork | None:
    """The state from which a training of so many epochs resumes; None for a new run."""
    done = run.epochs_finished()
    if done is not None and done >= epochs:
        raise InputError(
            f"{run.folder} contains a finished run of {done} epochs; choose another run=, raise recipe.epochs to "
            "continue, or remove the folder"
        )
    return run.read_last()
