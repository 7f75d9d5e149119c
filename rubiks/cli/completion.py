"""Completion of command lines in a shell: eval "$(register-python-argcomplete rubiks)"."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from rubiks.choices import presets


def complete(make_parser: Callable[[], argparse.ArgumentParser]) -> None:
    """Print the completions and end the process, if a shell asks for them."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(make_parser())


def preset_choices(prefix: str, **_: object) -> list[str]:
    """GROUP=CHOICE for every preset; a data set's folder comes next, so `data=` is followed by `data.root=`."""
    groups = [path for path in presets().iterdir() if path.is_dir() and path.name != "hydra"]
    found = [f"{group.name}={choice.stem}" for group in groups for choice in group.glob("*.yaml")]
    return sorted(choice for choice in [*found, "data.root="] if choice.startswith(prefix))
