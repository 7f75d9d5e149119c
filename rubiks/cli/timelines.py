"""`rubiks predict --window`: what long videos show when."""

from __future__ import annotations

import argparse
import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from rubiks.errors import InputError, VideoError

if TYPE_CHECKING:
    from rubiks.predict.timeline import Timeline


def seconds(name: str, text: str) -> float:
    """The seconds of 2.5s, 500ms or 2.5.

    Raises:
        InputError: the option `name` has another text.
    """
    found = re.fullmatch(r"([+-]?(?:\d+\.?\d*|\.\d+))\s*(s|ms|)", text.strip(), re.ASCII)
    if found is None:
        raise InputError(f"{name} must be a time such as 2.5s or 500ms, got {text!r}")
    return float(found[1]) / (1000 if found[2] == "ms" else 1)


def run(arguments: argparse.Namespace) -> None:
    """Print and draw the timelines, and exit with 1 if a video cannot be read."""
    for name in ("topk", "workers"):
        if getattr(arguments, name) is not None:
            raise InputError(f"--{name} is for whole videos; leave it out with --window")
    window = seconds("--window", arguments.window)
    stride = window / 2 if arguments.stride is None else seconds("--stride", arguments.stride)
    min_score = 0.3 if arguments.min_score is None else arguments.min_score
    from rubiks.predict import sources, timeline, timeline_picture  # imports PyTorch, which takes seconds
    from rubiks.predict.drawing import Drawn, targets
    from rubiks.predict.predictor import Predictor

    timeline.check(window, stride, min_score, arguments.batch_size)
    predictor = Predictor(arguments.ckpt, arguments.protocol, device=arguments.device)
    records = sources.find(arguments.sources)
    paths = [record.path for record in records]

    bar = progress_bar(arguments)

    def look(path: str) -> Timeline:
        task = bar.add_task(escape(path), total=1)
        own = window, stride, min_score, arguments.batch_size
        try:
            return timeline.timeline(predictor, path, *own, lambda share: bar.update(task, completed=share))
        except VideoError as error:
            return timeline.Timeline(path, [], error=error.reason)
        finally:
            bar.remove_task(task)

    found = _beside(bar, map(look, paths))
    if arguments.save_video is not None:
        found = map(Drawn(arguments.save_video, paths).write, found)
    if arguments.save_picture is not None:
        pictures = targets(arguments.save_picture, paths, ".png")
        found = (timeline_picture.write(pictures[own.source], own) for own in found)
    if arguments.json:
        shared = {"model": predictor.path, "protocol": predictor.protocol.name}
        bad = _print_json(found, {**shared, "window": window, "stride": stride, "min_score": min_score})
    elif arguments.csv:
        bad = _print_csv(found)
    else:
        bad = _print_table(found, timeline.clock)
    if bad:
        print(f"{bad:,} of {len(records):,} videos cannot be read", file=sys.stderr)
        sys.exit(1)


def progress_bar(arguments: argparse.Namespace) -> Progress:
    """A bar on a terminal's standard error; disabled if lines printed on the same terminal show the progress."""
    console = Console(stderr=True)
    disabled = not console.is_terminal or ((arguments.json or arguments.csv) and sys.stdout.isatty())
    return Progress(console=console, disable=disabled, redirect_stdout=False)  # redirected lines go to standard error


def _beside(bar: Progress, found: Iterable[Timeline]) -> Iterator[Timeline]:
    with bar:
        yield from found


def _print_json(found: Iterable[Timeline], shared: dict[str, object]) -> int:
    """Print a line per video, as soon as it is known; returns how many cannot be read."""
    bad = 0
    for own in found:
        line: dict[str, object] = {"source": own.source}
        if own.error is None:
            line |= {"segments": [vars(one) for one in own.segments], "duration": own.spans[-1].item()}
        else:
            line["error"] = own.error
            bad += 1
        print(json.dumps(line | shared, ensure_ascii=False), flush=True)
    return bad


def _print_csv(found: Iterable[Timeline]) -> int:
    bad = 0
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["source", "start", "end", "label", "score", "error"])
    for own in found:
        for one in own.segments:
            writer.writerow([own.source, one.start, one.end, one.label, f"{one.score:.6g}", ""])
        if own.error is not None:
            writer.writerow([own.source, "", "", "", "", own.error])
            bad += 1
    return bad


def _print_table(found: Iterable[Timeline], clock: Callable[[float], str]) -> int:
    table, bad = Table("video", "from", "to", "class", "%"), 0
    for own in found:
        source = escape(own.source)
        if own.error is not None:
            table.add_row(source, "", "", f"[red]{escape(own.error)}[/red]", "")
            bad += 1
        elif not own.segments:
            table.add_row(source, clock(0), clock(own.spans[-1]), "[dim]no class is likely enough[/dim]", "")
        for place, one in enumerate(own.segments):
            shown = clock(one.start), clock(one.end), escape(one.label), f"{100 * one.score:.1f}"
            table.add_row(source if place == 0 else "", *shown)
        table.add_section()
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return bad
