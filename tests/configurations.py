"""Configurations for tests: composed once for the same choices, since Hydra takes its time, then changed in a copy."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import hydra
import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from rubiks.cli.entry import compose, plain
from rubiks.experiment import Training


@functools.cache
def _composed(choices: tuple[str, ...]) -> DictConfig:
    return compose(list(choices))


def training(*choices: str, **changes: object) -> Training:
    """What train.py makes of `configuration`."""
    return Training(**plain(configuration(*choices, **changes)))


def configuration(*choices: str, **changes: object) -> DictConfig:
    """What train.py gets with these choices, and then with other values of keys, data__root=... for data.root."""
    cfg = copy.deepcopy(_composed(choices))
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


@functools.cache
def _composed_with_hydra(name: str, groups: tuple[str, ...]) -> DictConfig:
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return hydra.compose(name, list(groups), return_hydra_config=True)


def command_line(monkeypatch: pytest.MonkeyPatch, name: str, *choices: str, job: int | None = None) -> DictConfig:
    """What train.py or eval.py gets with these choices, which Hydra then also tells of as its own; `job`: of -m."""
    parsed = OverridesParser.create().parse_overrides(list(choices))
    groups = [one.input_line for one in parsed if (ROOT / "conf" / one.key_or_group).is_dir()]
    cfg = copy.deepcopy(_composed_with_hydra(name, tuple(groups)))
    OmegaConf.set_readonly(cfg, False)
    cfg.hydra.overrides.task = list(choices)
    cfg.hydra.mode = RunMode.RUN if job is None else RunMode.MULTIRUN
    if job is not None:
        cfg.hydra.job.num = job
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.masked_copy(cfg, "hydra"))
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    OmegaConf.set_struct(own, True)
    for one in parsed:
        if one.input_line not in groups:
            OmegaConf.update(own, one.key_or_group, one.value())
    return own


def leaves(node: DictConfig) -> Iterator[str]:
    """The keys of a configuration that are no sections."""

    def walk(tree: dict, prefix: str) -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}"

    return walk(OmegaConf.to_container(node, resolve=False), "")
