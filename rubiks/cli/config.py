"""The configuration for commands that take the same choices as train.py."""

from __future__ import annotations

from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from rubiks.errors import InputError

ROOT = Path(__file__).resolve().parents[2]  # of the checkout, which holds conf/


def compose(choices: list[str]) -> DictConfig:
    """The configuration of train.py with choices such as data=ssv2 data.root=/data/ssv2.

    Raises:
        InputError: there is no conf folder, or a choice is wrong.
    """
    if not (ROOT / "conf").is_dir():
        raise InputError(f"{ROOT / 'conf'}: no such folder; this command needs the checkout (pip install -e .)")
    try:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return hydra.compose("train", choices)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(str(error)) from error
