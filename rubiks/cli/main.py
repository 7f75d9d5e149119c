"""The `rubiks` command."""

# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import argparse
import io
import os
import sys

import rubiks
from rubiks.cli import (
    bench_data,
    browse,
    check,
    compare,
    convert,
    demo,
    explain,
    export,
    info,
    online,
    predict,
    prepare,
    report,
    shard,
)
from rubiks.cli.completion import complete, preset_choices
from rubiks.errors import InputError


def main() -> None:
    """Run the subcommand named on the command line."""
    complete(make_parser)
    if sys.argv[1:2] in (["train"], ["eval"], ["check-cluster"]):
        _run_hydra(sys.argv.pop(1))
        return
    arguments = make_parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may not be text
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


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; the arguments of these three are Hydra's."""
    parser = argparse.ArgumentParser(prog="rubiks", description="Efficient video action recognition.")
    parser.add_argument("--version", action="version", version=f"rubiks {rubiks.__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, about in (
        ("train", "train a network"),
        ("eval", "evaluate a network"),
        ("check-cluster", "check that several processes can train together"),
    ):
        command = commands.add_parser(name, help=f"{about}: rubiks {name} --help")
        command.add_argument("choices", nargs="*").completer = preset_choices  # type: ignore[attr-defined]
    predict.add_to(commands)
    online.add_to(commands)
    explain.add_to(commands)
    demo.add_to(commands)
    bench_data.add_to(commands)
    convert.add_to(commands)
    export.add_to(commands)
    info.add_to(commands)
    report.add_to(commands)
    compare.add_to(commands)
    shard.add_to(commands)
    check.add_to(commands)
    browse.add_to(commands)
    prepare.add_to(commands)
    return parser


def _run_hydra(name: str) -> None:
    """Run a command whose arguments Hydra reads."""
    from rubiks.cli.entry import launch  # imports Lightning, which takes seconds

    if name == "train":
        from rubiks.cli.train import train
        from rubiks.experiment import Training

        launch(train, Training)
    elif name == "check-cluster":
        from rubiks.cli.check_cluster import check_cluster
        from rubiks.experiment import Training

        launch(check_cluster, Training)
    else:
        from rubiks.cli.evaluate import evaluate
        from rubiks.experiment import Evaluation

        launch(evaluate, Evaluation)


if __name__ == "__main__":
    main()
