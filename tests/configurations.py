"""Configurations for tests: composed once for the same choices, since Hydra is slow, then changed in a copy."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

from conftest import ROOT
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from rubiks.cli.entry import compose, plain
from rubiks.experiment import Training


@functools.cache
def _composed(name: str, choices: tuple[str, ...]) -> DictConfig:
    return compose(list(choices), name)


def training(*choices: str, **changes: object) -> Training:
    """What train.py makes of `configuration`."""
    return Training(**plain(configuration(*choices, **changes)))


def configuration(*choices: str, **changes: object) -> DictConfig:
    """What train.py gets with these choices, and then with other values of keys, data__root=... for data.root."""
    cfg = copy.deepcopy(_composed("train", choices))
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


def command_line(name: str, *choices: str) -> DictConfig:
    """What train.py or eval.py gets with these choices; composed once for the same groups."""
    parsed = OverridesParser.create().parse_overrides(list(choices))
    groups = [one.input_line for one in parsed if (ROOT / "conf" / one.key_or_group).is_dir()]
    cfg = copy.deepcopy(_composed(name, tuple(groups)))
    for one in parsed:
        if one.input_line not in groups:
            OmegaConf.update(cfg, one.key_or_group, one.value())
    return cfg


def leaves(node: DictConfig) -> Iterator[str]:
    """The keys of a configuration that are not sections."""

    def walk(tree: dict, prefix: str) -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    return walk(OmegaConf.to_container(node, resolve=False), "")
