"""The README.md of a saved network: what it is, how good it is, how to use it, and what it cannot do."""

from __future__ import annotations

import shlex
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from rubiks.choices import setting
from rubiks.models.tiers import VARIANTS

PROTOCOLS = ("one_clip", "two_clip", "dense_10x3")  # those that rubiks eval knows by name
NAMED = 12  # classes that the card lists; config.json has all


def text(name: str, config: dict[str, Any], short_side: int, parameters: int) -> str:
    """The card, in Markdown with the YAML header of model hubs.

    Args:
        name: of the folder.
        config: the content of config.json.
        short_side: pixels of the short side before cropping.
        parameters: how many the network has.
    """
    header = {
        "library_name": "rubiks",
        "pipeline_tag": "video-classification",
        "tags": ["rubiksnet", "action-recognition", f"rubiksnet-{config['tier']}", config["variant"]],
    }
    environment = Environment(
        loader=PackageLoader("rubiks.models", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"commas": "{:,}".format}
    classes = [" ".join(one.split()) for one in config["classes"] or []]  # on one line each
    source, evaluation = config["source"], config["source"]["evaluation"]
    protocol = evaluation["protocol"] if evaluation else source["protocol"]
    return environment.get_template("model_card.md").render(
        config,
        header=yaml.safe_dump(header, sort_keys=False, allow_unicode=True),
        about=VARIANTS[config["variant"]].about,
        parameters=parameters,
        short_side=short_side,
        named=classes[:NAMED],
        evaluation=evaluation,
        python=repr(name),
        shell=shlex.quote(name),
        ckpt=shlex.quote(setting("ckpt", name)),
        init=shlex.quote(setting("init", name)),
        data=source["format"] or "NAME",
        protocol=protocol if protocol in PROTOCOLS else "one_clip",
    )
