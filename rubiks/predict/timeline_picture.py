"""The picture of a timeline: classes against time."""

from __future__ import annotations

import textwrap
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rubiks.files import write_atomically
from rubiks.predict.timeline import Timeline, clock

ROWS = 30  # classes at most
NAME = 48  # characters in a line of a class name, which has two at most
TICKS = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400]  # seconds


def write(path: Path, found: Timeline) -> Timeline:
    """Draw a row for each class that a segment has, in order of their first segments: grey for its probability, and a
    coloured line for its segments. Of more than ROWS classes those with the longest segments are shown. A video that
    cannot be read gets no picture. Returns the timeline.

    Raises:
        InputError: the file cannot be written.
    """
    if found.error is not None:
        return found
    figure = _draw(found)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # drawn as boxes
        write_atomically(path, lambda temporary: FigureCanvasAgg(figure).print_png(temporary))
    return found


def _draw(found: Timeline) -> Figure:
    lengths: defaultdict[int, float] = defaultdict(float)
    for one in found.segments:
        lengths[one.index] += one.end - one.start
    longest = set(sorted(lengths, key=lambda index: -lengths[index])[:ROWS])
    rows = [index for index in lengths if index in longest]  # in order of their first segments
    names = {one.index: one.label for one in found.segments}
    height = 1.4 + 0.32 * max(1, len(rows))  # inches
    figure = Figure(figsize=(12, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, index in enumerate(rows):
        scores = found.scores[:, index][None]
        image = axes.pcolormesh(found.spans, [row - 0.4, row + 0.4], scores, cmap="Greys", vmin=0, vmax=1)
        own = [(one.start, one.end - one.start) for one in found.segments if one.index == index]
        axes.broken_barh(own, (row + 0.2, 0.2), color=f"C{row % 10}")
    if rows:
        figure.colorbar(image, ax=axes, label="probability", pad=0.01, aspect=6 * height)
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)  # the first at the top
    axes.set_yticks(range(len(rows)), [_wrapped(names[index]) for index in rows], fontsize=8)
    end = found.spans[-1]
    step = next((step for step in TICKS if end <= 10 * step), end / 10)
    axes.set_xlim(0, end)
    axes.set_xticks(np.arange(0, end + step / 100, step))
    axes.xaxis.set_major_formatter(lambda seconds, _: clock(seconds, decimals=int(step < 1)))
    axes.grid(axis="x", color="0.5", alpha=0.4, linewidth=0.5)
    count, hidden = len(found.segments), len(lengths) - len(rows)
    note = f"; {hidden} more classes with shorter segments" if hidden else ""
    title = f"{_plain(Path(found.source).name)}: {count} segment{'s' * (count != 1)}{note}"
    axes.set_title(textwrap.fill(title, 100), fontsize=10, loc="left")
    return figure


def _wrapped(name: str) -> str:
    return "\n".join(textwrap.wrap(_plain(name), NAME, max_lines=2, placeholder=" …"))


def _plain(name: str) -> str:
    name = name.encode(errors="backslashreplace").decode()  # file names may not be text
    return name.replace("$", r"\$")  # not mathematics
