"""What `--help` prints of train and eval: every key with its value, allowed values and meaning."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from rubiks.choices import program, text_of
from rubiks.data.catalog import SOURCES
from rubiks.experiment import Evaluation, Training
from rubiks.settings import Settings, expectation, section_of


def print_help(about: str, model: type[Training | Evaluation], config: Mapping[str, Any], folder: Path) -> None:
    """Print the help of a command.

    Args:
        about: what it does, and examples.
        model: its settings.
        config: the configuration with the choices of the command line; values that must be given are "???".
        folder: the folder of presets, with a file for each choice of a group.
    """
    print(re.sub(r"rubiks (train|eval)", lambda found: " ".join(program(found[1])), about.strip()))
    print("\nChoices, GROUP=CHOICE; each is a commented file, GROUP/CHOICE.yaml, in", folder)
    for group in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "hydra"):
        print(f"  {group.name + ':':12}", ", ".join(sorted(path.stem for path in group.glob("*.yaml"))))
    print("\nValues, KEY=VALUE; shown with the other choices of this command line applied")
    width = min(120, shutil.get_terminal_size((100, 24)).columns)
    for key, field in _fields(model, config):
        print(f"  {key}={text_of(_value(config, key))}")
        text = str(field.description) + ("" if field.annotation is Any else f" [{expectation(field)}]")
        print(textwrap.fill(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))


def _fields(model: type[Settings], config: Mapping[str, Any]) -> Iterator[tuple[str, FieldInfo]]:
    """Every key that the configuration has with its field; the keys of the root first, then section by section."""
    sections: list[tuple[str, type[Settings]]] = []
    for name, field in model.model_fields.items():
        section = section_of(field)
        if name == "data":
            source = SOURCES[config["data"]["format"]]
            sections += [("data", part) for part in (source, *model.DATA)]  # type: ignore[attr-defined]
        elif section is not None:
            sections.append((name, section))
        elif name in config:
            yield model.key(name), field
    for name, section in sections:
        if isinstance(config.get(name), Mapping):
            yield from ((key, field) for key, field in _fields(section, config[name]) if not key.endswith(".format"))


def _value(config: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        config = config[part]
    return config
