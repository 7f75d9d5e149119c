"""`rubiks report`: writes report.html of an evaluation again, from the files in its folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from rubiks.errors import InputError


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "write report.html of an evaluation, from the files that rubiks eval has written"
    parser = commands.add_parser("report", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("place", metavar="RUN", help="a folder, its results.json, or the name of a run in outputs")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the HTML file, default: report.html in the folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the report."""
    from rubiks.evaluation import report  # imports PyTorch, which takes seconds
    from rubiks.runs import OUTPUTS

    places = Path(arguments.place), OUTPUTS / arguments.place
    place = next((place for place in places if place.exists()), None)
    if place is None:
        raise InputError(
            f"there is no {arguments.place}, here or in {OUTPUTS}; give the folder of an evaluation, its results.json, "
            "or the name of a run"
        )
    print(f"Report in {report.write(place, arguments.out)}")
