"""`rubiks info`: which implementation of the operator runs here, and versions; what a checkpoint's shifts learned."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = (
        "tell which implementation of the operator serves CPU and CUDA, how it was built, and versions; "
        "or with --shifts what the shifts of a checkpoint have learned"
    )
    parser = commands.add_parser("info", help=about, description=about[0].upper() + about[1:] + ".")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print JSON")
    what.add_argument("--shifts", metavar="CKPT", help="a checkpoint, ours or official: print a table, write pictures")
    parser.add_argument("--out", metavar="FOLDER", default="shifts", help="where pictures go, default: %(default)s")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print facts, or what a checkpoint's shifts have learned."""
    if arguments.shifts is not None:
        from rubiks.cli import shifts  # imports Lightning and matplotlib, which takes seconds

        shifts.describe(arguments.shifts, Path(arguments.out))
        return
    from rubiks.cli.facts import collect  # imports PyTorch, which takes seconds

    facts = collect()
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return
    for title, entries in facts.items():
        print(title)
        for name, value in entries.items():
            text = "\n".join(value) if isinstance(value, list) else value
            for line in text.splitlines() or ["none"]:
                print(f"  {name:<14}{line}")
                name = ""
