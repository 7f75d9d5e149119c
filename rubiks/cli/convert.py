"""`rubiks convert`: writes a network in another form: a saved folder, or a file in the official format."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rubiks.errors import InputError


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "write a network as a folder that describes itself, or as a file in the official format"
    parser = commands.add_parser("convert", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument(
        "source", metavar="SOURCE", help="a checkpoint, ours or official, or a run's or a saved network's folder"
    )
    parser.add_argument(
        "dest",
        type=Path,
        metavar="DEST",
        help="a folder, which gets config.json, model.safetensors and README.md; or FILE.pth.tar, the official format",
    )
    parser.add_argument("--force", action="store_true", help="replace DEST, if it is a file or a saved network")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Convert the network."""
    from rubiks.models import RubiksNet, rubiksnet  # imports PyTorch, which takes seconds

    dest: Path = arguments.dest
    if dest.exists() and not arguments.force:
        raise InputError(f"{dest} exists; add --force to replace it, or give another name")
    net = RubiksNet.load_pretrained(arguments.source)
    net.save_pretrained(dest)
    if net.classes is not None and dest.name.endswith(rubiksnet.OFFICIAL):
        print("An official file has neither class names nor preprocessing: they are left out", file=sys.stderr)
    files = sorted(dest.iterdir()) if dest.is_dir() else [dest]
    size = sum(file.stat().st_size for file in files)
    print(f"{dest}: tier {net.tier}, variant {net.variant}, {net.num_classes:,} classes, {size / 1e6:,.1f} MB")
