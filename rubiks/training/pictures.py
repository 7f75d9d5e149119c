"""Pictures of what the shifts of a network have learned."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from rubiks.files import write_atomically
from rubiks.models import RubiksNet
from rubiks.models.shifts import UNITS, Moves, axes_of, moves, offsets


def pictures(net: RubiksNet, initial: Mapping[str, Tensor]) -> Iterator[tuple[str, Figure]]:
    """Names and pictures of what the network has: temporal moves, learned offsets, their change from the initial ones.

    `initial` comes from `offsets`, or is empty if not known.
    """
    if counts := moves(net):
        yield "temporal_moves", draw_moves(counts)
    if learned := offsets(net):
        known = learned.keys() == initial.keys()
        yield "offsets", draw_histograms("learned shift" + ", line: at the start" * known, learned, initial)
        if known:
            changes = {stage: learned[stage] - initial[stage] for stage in learned}
            yield "changes", draw_histograms("change of the learned shift", changes, {})


def draw_moves(counts: Mapping[str, Moves]) -> Figure:
    """Bars for every stage: how many channels shift back, stay, shift ahead."""
    figure = Figure(figsize=(2.4 * len(counts), 2.6))
    figure.subplots_adjust(left=0.07, right=0.99, wspace=0.4)
    for axes, (stage, own) in zip(figure.subplots(1, len(counts), squeeze=False)[0], counts.items(), strict=True):
        axes.bar_label(axes.bar(own._fields, own, color=("C0", "0.7", "C1")), fontsize=8)
        axes.set_title(f"{stage}, {1 - own.stay / sum(own):.1%} shifted", fontsize=9)
        axes.margins(y=0.15)
    figure.supylabel("channels", fontsize=9)
    return figure


def draw_histograms(title: str, values: Mapping[str, Tensor], outlines: Mapping[str, Tensor]) -> Figure:
    """A row for every stage and a column for every axis: the distribution over the channels.

    The rows of a column share one set of axes, which is far quicker to draw than one for each.
    """
    names = axes_of(next(iter(values.values())))
    figure = Figure(figsize=(3 * len(names), 1.1 * len(values) + 0.8))
    figure.subplots_adjust(left=0.3 / len(names), right=0.98, top=0.93, bottom=0.1, wspace=0.05)
    stages = list(values)[::-1]  # the first at the top
    for column, (name, axes) in enumerate(zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)):
        shown = [own[column] for own in (*values.values(), *outlines.values())]
        limit = max(0.1, *(own.abs().max().item() for own in shown))
        bins = np.linspace(-limit, limit, 42)
        for base, stage in enumerate(stages):
            own = [values[stage][column], *([outlines[stage][column]] if stage in outlines else [])]
            counts = [np.histogram(offsets, bins)[0] for offsets in own]
            heights = [base + 0.9 * count / max(count.max() for count in counts) for count in counts]
            axes.stairs(heights[0], bins, baseline=base, fill=True, color="C0")
            for height in heights[1:]:
                axes.stairs(height, bins, baseline=base, color="black")
        axes.set_ylim(0, len(stages))
        axes.set_yticks([])
        axes.tick_params(labelsize=7)
        axes.set_xlabel(f"{name}, {UNITS[name]}", fontsize=9)
        if column == 0:
            axes.set_yticks(np.arange(len(stages)) + 0.4, stages, fontsize=9, rotation=90, va="center")
    figure.suptitle(title, fontsize=10)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG."""
    write_atomically(path, lambda temporary: FigureCanvasAgg(figure).print_png(temporary))


class ShiftPictures(Callback):
    """Draws what the shifts have learned, into a folder and for Weights & Biases.

    It draws after each validation if Weights & Biases is in use, otherwise after the last.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @rank_zero_only
    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        loggers = [logger for logger in trainer.loggers if isinstance(logger, WandbLogger)]
        last = trainer.current_epoch + 1 == trainer.max_epochs
        if trainer.sanity_checking or not (loggers or last):
            return
        for name, figure in pictures(module.net, module.initial_shifts):  # type: ignore[arg-type]
            path = self.folder / f"{name}.png"
            save(figure, path)
            for logger in loggers:
                logger.log_image(f"shifts/{name}", [str(path)], step=trainer.global_step)
