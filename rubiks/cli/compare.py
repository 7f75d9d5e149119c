"""`rubiks compare`: which of two evaluations on the same videos is better, how sure that is, and where they differ."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rubiks.cli import places

if TYPE_CHECKING:
    from rubiks.evaluation.compare import ClassChange, Comparison, Difference, VideoChange

SHOWN = 10  # classes and videos of each kind that are printed


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "compare two evaluations of the same videos: which is better, how sure that is, and where they differ"
    parser = commands.add_parser("compare", help=about, description=about[0].upper() + about[1:] + ".")
    help_of_place = "a folder of rubiks eval, a file in it, a run in outputs, or the file of save_predictions="
    parser.add_argument("a", metavar="A", help=help_of_place)
    parser.add_argument("b", metavar="B", help="the same")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="also write compare.html, compare_classes.csv, compare_videos.csv"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Compare, print, and write the page if there is a place for it."""
    from rubiks.evaluation import compare_files, outcomes  # imports PyTorch, which takes seconds
    from rubiks.evaluation.compare import compare

    a, b = (outcomes.read(places.evaluation(place)) for place in (arguments.a, arguments.b))
    found = compare(a, b)
    page = None if arguments.out is None else compare_files.write(arguments.out, found)
    if arguments.json:
        print(json.dumps(found.facts(), indent=1, ensure_ascii=False, allow_nan=False))
    else:
        _print(found)
    if page is not None:
        print(f"Comparison in {page}", file=sys.stderr if arguments.json else sys.stdout)


def _print(found: Comparison) -> None:
    for letter, own in (("A", found.a), ("B", found.b)):
        print(f"{letter}: {own.path}" + (f" ({own.about})" if own.about else ""))
    table = Table("", "A, %", "B, %", "B - A, points", "95% interval", "only A right", "only B right", "p")
    table.add_row("top-1", *_row(found.top1))
    if found.top5 is not None:
        table.add_row("top-5", *_row(found.top5))
    _show(table)
    print(f"{found.videos:,} videos; both right {found.both:,}, both wrong {found.neither:,}.")
    print(found.verdict())
    _print_classes("gained", found.most_gained(SHOWN))
    _print_classes("lost", found.most_lost(SHOWN))
    _print_videos("gained", "wrong in A, right in B", found.gained)
    _print_videos("lost", "right in A, wrong in B", found.lost)


def _row(own: Difference) -> list[str]:
    low, high = own.interval
    interval = f"{low:+.2f} to {high:+.2f}"
    shares = f"{own.a:.2f}", f"{own.b:.2f}", f"{own.difference:+.2f}"
    return [*shares, interval, f"{own.only_a:,}", f"{own.only_b:,}", f"{own.p:.2g}"]


def _print_classes(verb: str, classes: list[ClassChange]) -> None:
    if not classes:
        return
    table = Table(f"class that {verb} most", "videos", "recall in A, %", "in B, %", "change")
    for own in classes:
        table.add_row(escape(own.name), f"{own.videos:,}", f"{own.a:.1f}", f"{own.b:.1f}", f"{own.change:+.1f}")
    _show(table)


def _print_videos(verb: str, meaning: str, videos: list[VideoChange]) -> None:
    if not videos:
        return
    title = f"{len(videos):,} {verb}, {meaning}" + (f", the first {SHOWN}" if len(videos) > SHOWN else "")
    table = Table("video", "class", "taken for in A", "taken for in B", title=title, title_justify="left")
    for own in videos[:SHOWN]:
        taken = (escape(f"{name} {100 * score:.0f}%") for name, score in (own.a, own.b))
        table.add_row(escape(own.name), escape(own.label), *taken)
    _show(table)


def _show(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 120).print(table)
