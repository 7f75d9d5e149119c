"""`rubiks explain`: what a trained network sees in a video."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "show what a trained network sees in a video: activation maps, each frame's logits, the role of their order"
    parser = commands.add_parser("explain", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint, ours or official, a run's or a saved folder")
    parser.add_argument("video", metavar="VIDEO", help="a video file")
    parser.add_argument("--class", dest="label", metavar="CLASS", help="name or number; default: the predicted class")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="for the files; default: explain-NAME, by the video")
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes shown; default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the numbers and write the files."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from rubiks.predict import explained  # imports PyTorch, which takes seconds
    from rubiks.predict.explanation import explain
    from rubiks.predict.predictor import Predictor

    predictor = Predictor(arguments.ckpt, topk=arguments.topk, device=arguments.device)
    found = explain(predictor, arguments.video, arguments.label)
    folder = arguments.out or Path(f"explain-{Path(arguments.video).stem}")
    paths = explained.write(folder, found, predictor.classes)
    table = Table("class", "%")
    for one in found.predictions:
        table.add_row(escape(one.label), f"{100 * one.score:.1f}")
    Console().print(table)
    print(f"{found.shown.label}: {found.shown.score:.1%}; with the frames reversed {found.reversed:.1%}")
    low, high = found.shuffled.min(), found.shuffled.max()
    orders = f"{low:.1%} to {high:.1%} in {len(found.shuffled)} orders"
    print(f"with the frames shuffled {found.shuffled.mean():.1%} ({orders})")
    print("Files:", ", ".join(map(str, paths)))
