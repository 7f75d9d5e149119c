"""The files of an explanation: overlay.mp4, sheet.png, frames.csv and explanation.json."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

import av
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from rubiks.files import write_atomically, write_text
from rubiks.pages.previews import with_map
from rubiks.predict.explanation import Explanation

RATE = 3  # frames per second of the overlay
COLUMNS = 8  # frames in a row of the sheet


def write(folder: Path, found: Explanation, classes: Sequence[str]) -> list[Path]:
    """Write the files; returns their paths.

    Raises:
        InputError: a file cannot be written.
    """
    over = with_map(found.frames, found.maps)
    sheet = _sheet(found, over)
    paths = [folder / name for name in ("overlay.mp4", "sheet.png", "frames.csv", "explanation.json")]
    write_atomically(paths[0], lambda temporary: _video(temporary, over))
    write_atomically(paths[1], lambda temporary: FigureCanvasAgg(sheet).print_png(temporary))
    write_text(paths[2], _table(found, classes))
    write_text(paths[3], _numbers(found))
    return paths


def _video(path: Path, frames: Tensor) -> None:
    height, width = (side // 2 * 2 for side in frames.shape[-2:])  # H.264 needs even sides
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "16"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames[..., :height, :width].permute(0, 2, 3, 1).contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _sheet(found: Explanation, over: Tensor) -> Figure:
    """The frames, the same with the map over them, and the logits of the frames."""
    count = len(found.frames)
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(1.5 * min(count, COLUMNS) + 1, 3.1 * rows + 2.8), layout="constrained")
    grid = figure.add_gridspec(2 * rows + 1, min(count, COLUMNS), height_ratios=[1] * (2 * rows) + [1.6])
    for number in range(count):
        for row, images in enumerate((found.frames, over)):
            axes = figure.add_subplot(grid[2 * (number // COLUMNS) + row, number % COLUMNS])
            axes.imshow(images[number].permute(1, 2, 0).numpy())
            axes.set_axis_off()
            if row == 0:
                axes.set_title(f"{number + 1}", fontsize=8)
    axes = figure.add_subplot(grid[2 * rows, :])
    for one in found.predictions:
        shown = one.index == found.shown.index
        label = one.label.replace("$", r"\$")  # not mathematics
        axes.plot(range(1, count + 1), found.frame_logits[:, one.index], label=label, linewidth=2.5 if shown else 1)
    axes.set_xlabel("frame", fontsize=8)
    axes.set_ylabel("logit", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    title = f"{found.shown.label}, {found.shown.score:.1%}".replace("$", r"\$")
    figure.suptitle(f"{title}; blue: least evidence, red: most", fontsize=9)
    return figure


def _table(found: Explanation, classes: Sequence[str]) -> str:
    text = io.StringIO()
    rows = ([number, *row] for number, row in enumerate(found.frame_logits.tolist(), 1))
    csv.writer(text, lineterminator="\n").writerows([["frame", *classes], *rows])
    return text.getvalue()


def _numbers(found: Explanation) -> str:
    content = {
        "predictions": [vars(one) for one in found.predictions],
        "shown": vars(found.shown),
        "frame_logits": found.frame_logits[:, found.shown.index].tolist(),
        "maps": found.maps.tolist(),
        "score_reversed": found.reversed,
        "scores_shuffled": found.shuffled.tolist(),
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
