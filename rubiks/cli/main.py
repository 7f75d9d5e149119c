"""The `rubiks` command."""

from __future__ import annotations

import argparse
import io
import os
import sys

from rubiks.cli import bench_data, check, info, prepare, shard
from rubiks.errors import InputError


def main() -> None:
    """Run the subcommand named on the command line."""
    parser = argparse.ArgumentParser(prog="rubiks", description="Tools beside train.py and eval.py.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    bench_data.add_to(commands)
    info.add_to(commands)
    shard.add_to(commands)
    check.add_to(commands)
    prepare.add_to(commands)
    arguments = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be text
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("Interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
