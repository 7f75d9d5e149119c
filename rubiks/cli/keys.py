"""Command-line keys that the configuration does not have, and what to write instead."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rubiks.errors import InputError
from rubiks.settings import did_you_mean


def check_form(choices: list[str], config_folder: Path, config_name: str) -> None:
    """Raise InputError for GROUP= without a name, for ~KEY, and for +GROUP=; Hydra's own keys are fine."""
    for choice in choices:
        sign, key, value = _parts(choice)
        if key.startswith("hydra"):
            continue
        if not sign:
            if key and "=" in choice and (config_folder / key).is_dir():
                _check_name(choice, config_folder / key)
            continue
        if sign == "~":
            raise InputError(
                f"{choice}: keys cannot be removed, since all are needed; set {key} to another value instead"
            )
        if not key or (config_folder / key.partition("@")[0]).is_dir():
            known = _known(config_folder, config_name, [])
            if key in known and key in _chosen(config_folder, config_name):
                raise InputError(f"{choice}: {key} is already a group; write {key}={value}, without {sign}")
            raise InputError(_unknown(key or choice, known))


def _check_name(choice: str, group: Path) -> None:
    """Raise InputError if a group's choice is null, a number or a section, and not the name of a file."""
    value = OverridesParser.create().parse_override(choice).value()
    values = value.list if isinstance(value, ChoiceSweep) else value if isinstance(value, list) else [value]
    if any(one == "" or isinstance(one, (int, float, dict, type(None))) for one in values):
        names = ", ".join(sorted(path.stem for path in group.glob("*.yaml")))
        raise InputError(f"{choice}: {group.name} must be one of {names}, the files in {group}")


def check_added(cfg: DictConfig, config_name: str, choices: list[str]) -> None:
    """Raise InputError for a key added by +KEY=VALUE that nothing would read.

    Lightning's Trainer takes more arguments than are listed here; they are checked when it is constructed.
    """
    if not any(choice.startswith("+") for choice in choices):
        return
    known = _composed_keys(config_name, [choice for choice in choices if not choice.startswith("+")])
    unknown = [key for key in _keys(cfg) if key not in known and not key.startswith("trainer.")]
    if unknown:
        typed = (_parts(choice)[1] for choice in choices)
        raise InputError(_unknown(next((key for key in typed if key in unknown), unknown[0]), known))


def _parts(choice: str) -> tuple[str, str, str]:
    """+KEY=VALUE split into "+", "++", "~" or nothing; the key; the value."""
    left, _, value = choice.partition("=")
    key = left.lstrip("+~")
    return left.removesuffix(key), key, value


def explain(error: Exception, config_folder: Path, config_name: str, choices: list[str]) -> str:
    """Hydra's message; for an unknown key or choice of a group, one that names the valid ones."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        listed = ", ".join(error.options)
        return f"{group}={name}: there is no such preset.{did_you_mean(name, error.options)} The choices are {listed}"
    lines = [line for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if isinstance(cause, OmegaConfBaseException) and cause.msg and cause.msg.splitlines()[0] not in lines[0]:
        lines.append(cause.msg.splitlines()[0])
    message = "\n".join(lines)
    if present := re.search(r"An item is already at '([^']+)'", message):
        return f"+{present.group(1)}: this key already exists; set it without +"
    unknown = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is not in struct|does not exist)", message)
    if unknown is None:
        return message
    key = unknown.group(1) or unknown.group(2)
    with contextlib.suppress(HydraException, OmegaConfBaseException):
        others = [choice for choice in choices if _parts(choice)[1] != key]
        return _unknown(key, _known(config_folder, config_name, others))
    return message


def _unknown(key: str, known: list[str]) -> str:
    """The message for an unknown key, with a similar key and the valid keys of its section."""
    if key in known:  # a section, which has presets in another command
        own = [other for other in known if other.startswith(f"{key}.")]
        leaves = [one for one in own if not any(other.startswith(f"{one}.") for other in own)]
        return f"{key} has no presets here; set its keys: {', '.join(leaves)}"
    section = [other for other in known if other.rpartition(".")[0] == key.rpartition(".")[0]]
    listed = ", ".join(sorted(section or {other.partition(".")[0] for other in known}))
    return f"{key} is not a key of the configuration.{did_you_mean(key, known)} The keys are {listed}"


def _known(config_folder: Path, config_name: str, choices: list[str]) -> list[str]:
    """Every key of the configuration, given the choices of groups among these choices."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder.resolve()), version_base="1.3"):
        groups = {path.name for path in config_folder.iterdir() if path.is_dir()}
        return _composed_keys(config_name, [choice for choice in choices if choice.partition("=")[0] in groups])


def _chosen(config_folder: Path, config_name: str) -> list[str]:
    """The groups that have a choice."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_folder.resolve()), version_base="1.3"):
        return list(hydra.compose(config_name, return_hydra_config=True).hydra.runtime.choices)


def _composed_keys(config_name: str, choices: list[str]) -> list[str]:
    """Every key of the configuration with these choices, and the groups without a choice."""
    cfg = hydra.compose(config_name, choices, return_hydra_config=True)
    keys = [key for key in _keys(cfg) if key.partition(".")[0] != "hydra"]
    return keys + [group for group in cfg.hydra.runtime.choices if "/" not in group and group not in keys]


def _keys(cfg: DictConfig) -> list[str]:
    """Every key of a configuration, sections included."""
    tree = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(tree, dict)
    keys: list[str] = []

    def walk(node: dict, prefix: str) -> None:
        for name, value in node.items():
            keys.append(f"{prefix}{name}")
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")

    walk(tree, "")
    return keys
