"""Evaluations that are named on the command line."""

from __future__ import annotations

from pathlib import Path

from rubiks.errors import InputError


def evaluation(name: str) -> Path:
    """The file or folder of this name, or the run of this name in outputs.

    Raises:
        InputError: there is neither.
    """
    from rubiks.runs import OUTPUTS  # imports PyTorch, which takes seconds

    place = next((place for place in (Path(name), OUTPUTS / name) if place.exists()), None)
    if place is None:
        raise InputError(
            f"there is no {name}, here or in {OUTPUTS}; give the folder of an evaluation, one of its files, or the "
            "name of a run"
        )
    return place
