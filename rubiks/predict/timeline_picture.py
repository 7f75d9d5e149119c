"""The picture of a timeline: classes against time."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from rubiks.files import write_atomically
from rubiks.predict.timeline import Timeline, clock

ROWS = 30  # classes at most
NAME = 48  # characters of a class name at most


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
    figure = Figure(figsize=(12, 1.4 + 0.3 * max(1, len(rows))), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, index in enumerate(rows):
        scores = found.scores[:, index][None]
        image = axes.pcolormesh(found.spans, [row - 0.4, row + 0.4], scores, cmap="Greys", vmin=0, vmax=1)
        own = [(one.start, one.end - one.start) for one in found.segments if one.index == index]
        axes.broken_barh(own, (row + 0.2, 0.2), color=f"C{row % 10}")
    if rows:
        figure.colorbar(image, ax=axes, label="probability", pad=0.01)
    axes.set_xlim(0, max(found.spans[-1], 1e-3))
    axes.set_ylim(max(1, len(rows)) - 0.5, -0.5)  # the first at the top
    axes.set_yticks(range(len(rows)), [_short(names[index]) for index in rows], fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 3, 6, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: clock(seconds, 0 if found.spans[-1] > 20 else 1)))
    axes.grid(axis="x", color="0.85", linewidth=0.5)
    axes.set_axisbelow(True)
    hidden = len(lengths) - len(rows)
    note = f"; {hidden} more classes with shorter segments" if hidden else ""
    count = len(found.segments)
    title = f"{_short(Path(found.source).name)}: {count} segment{'s' * (count != 1)}{note}"
    axes.set_title(title, fontsize=10, loc="left")
    return figure


def _short(name: str) -> str:
    name = name.encode(errors="backslashreplace").decode()  # file names may not be text
    name = name if len(name) <= NAME else f"{name[: NAME - 1]}…"
    return name.replace("$", r"\$")  # not mathematics
