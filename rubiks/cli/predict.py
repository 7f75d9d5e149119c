"""`rubiks predict`: what videos show, by a trained network."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rubiks.cli import timelines
from rubiks.errors import InputError

if TYPE_CHECKING:
    from rubiks.predict.predictor import Prediction


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "classify videos with a trained network"
    parser = commands.add_parser("predict", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument(
        "ckpt", metavar="CKPT", help="a checkpoint, ours or official, a run's or a saved folder, or an exported file"
    )
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="a video, a folder, a pattern, or a .txt list with a path per line"
    )
    parser.add_argument("--protocol", default="one_clip", help="one_clip, two_clip or dense_10x3; default: %(default)s")
    parser.add_argument("--topk", type=int, metavar="K", help="classes per video; default: 5")
    parser.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="videos or windows per batch; default: %(default)s"
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read videos; default: the cores left")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--save-video", type=Path, metavar="FOLDER", help="write the videos with the class drawn on")
    parser.add_argument(
        "--window", metavar="TIME", help="give a timeline of each video, from windows of this length: 2.5s or 500ms"
    )
    parser.add_argument("--stride", metavar="TIME", help="time from window to window; default: half of --window")
    parser.add_argument(
        "--min-score", type=float, metavar="P", help="probability that a class in a timeline has at least; default: 0.3"
    )
    parser.add_argument("--save-picture", type=Path, metavar="FOLDER", help="draw each timeline as a picture")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print a JSON object per line and video")
    form.add_argument("--csv", action="store_true", help="print CSV")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Classify, print, and exit with 1 if a video cannot be read."""
    if arguments.window is not None:
        timelines.run(arguments)
        return
    for name in ("stride", "min_score", "save_picture"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name.replace('_', '-')} is for timelines; add --window, such as --window 2.5s")
    topk = 5 if arguments.topk is None else arguments.topk
    from rubiks.predict import sources  # imports PyTorch, which takes seconds
    from rubiks.predict.drawing import Drawn
    from rubiks.predict.predictor import Predictor

    predictor = Predictor(arguments.ckpt, arguments.protocol, topk, arguments.device)
    records = sources.find(arguments.sources)
    drawn = None if arguments.save_video is None else Drawn(arguments.save_video, [record.path for record in records])
    predictions = predictor.records(records, arguments.batch_size, arguments.workers)
    found = _shown(predictions, len(records), arguments)
    if drawn is not None:
        found = map(drawn.write, found)
    if arguments.json:
        bad = _print_json(found, predictor.path, predictor.protocol.name)
    elif arguments.csv:
        bad = _print_csv(found, predictor.topk)
    else:
        bad = _print_table(found)
    if bad:
        print(f"{bad:,} of {len(records):,} videos cannot be read", file=sys.stderr)
        sys.exit(1)


def _shown(found: Iterable[Prediction], total: int, arguments: argparse.Namespace) -> Iterator[Prediction]:
    """The predictions, with a progress bar."""
    with timelines.progress_bar(arguments) as bar:
        yield from bar.track(found, total, description="Classifying")


def _print_json(found: Iterable[Prediction], model: str, protocol: str) -> int:
    """Print a line per video, as soon as it is known; returns how many cannot be read."""
    bad = 0
    for own in found:
        line: dict[str, object] = {"source": own.source}
        if own.error is None:
            line["predictions"] = [vars(one) for one in own.predictions]
        else:
            line["error"] = own.error
            bad += 1
        print(json.dumps({**line, "model": model, "protocol": protocol}, ensure_ascii=False), flush=True)
    return bad


def _print_csv(found: Iterable[Prediction], topk: int) -> int:
    bad = 0
    writer = csv.writer(sys.stdout, lineterminator="\n")
    columns = [f"{what}{place}" for place in range(1, topk + 1) for what in ("class", "score")]
    writer.writerow(["source", "error", *columns])
    for own in found:
        cells = [cell for one in own.predictions for cell in (one.label, f"{one.score:.6g}")]
        writer.writerow([own.source, own.error or "", *cells, *[""] * (len(columns) - len(cells))])
        bad += own.error is not None
    return bad


def _print_table(found: Iterable[Prediction]) -> int:
    table = Table("video", "class", "%")
    everything = list(found)
    for own in everything:
        if own.error is not None:
            table.add_row(escape(own.source), f"[red]{escape(own.error)}[/red]", "")
        for place, one in enumerate(own.predictions):
            table.add_row(escape(own.source) if place == 0 else "", escape(one.label), f"{100 * one.score:.1f}")
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return sum(own.error is not None for own in everything)
