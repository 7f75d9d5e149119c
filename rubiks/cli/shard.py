"""`rubiks shard`: a data set's videos in a few large tar files."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

from rubiks.errors import InputError

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "write a data set's videos to tar files for data=shards, which is faster where opening files is slow"
    parser = commands.add_parser("shard", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("choices", nargs="*", metavar="KEY=VALUE", help="as for train.py, e.g. data=ssv2 data.root=...")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True)
    parser.add_argument("--size", default="1GB", help="size of a tar file; default: %(default)s")
    parser.add_argument("--splits", nargs="+", choices=("train", "val"), default=["train", "val"])
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the shards, and print the choices to train with."""
    size = size_in_bytes(arguments.size)
    from rubiks.choices import setting
    from rubiks.cli.entry import recipe_name, training  # imports Lightning, which takes seconds
    from rubiks.data import shards, videos

    data = training(arguments.choices).data
    manifest, source = videos.manifest_of(data.source), data.source.ready()
    count = len(videos.class_names(source))
    splits = {split: videos.records(source, data.loading, split, count, manifest) for split in arguments.splits}
    for line in shards.write(arguments.out, splits, source.classes, size):
        print(line, flush=True)
    sampling = data.sampling
    kept = {"root": arguments.out, "name": source.name, "num_frames": sampling.num_frames}
    kept |= {"size": sampling.size, "flip": sampling.flip}
    if source.classes is None:
        kept["num_classes"] = count
    choices = [setting(f"data.{key}", value) for key, value in kept.items()]
    choices.append(f"recipe={recipe_name(arguments.choices)}")
    print("To train: python train.py data=shards", shlex.join(choices))


def size_in_bytes(text: str) -> int:
    """From "500MB" to 500000000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    if match is None or not float(match[1]):
        raise InputError(f"--size: expected a size such as 500MB or 1GB, got {text!r}")
    return round(float(match[1]) * _UNITS[match[2]])
