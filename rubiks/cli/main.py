"""The `rubiks` command."""

from __future__ import annotations

import argparse

from rubiks.cli import info


def main() -> None:
    """Run the subcommand named on the command line."""
    parser = argparse.ArgumentParser(prog="rubiks", description="Tools beside train.py and eval.py.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    info.add_to(commands)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
