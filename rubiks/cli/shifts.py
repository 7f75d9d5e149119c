"""`rubiks info CKPT --shifts`: what the shifts of a checkpoint have learned."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from rubiks.models import RubiksNet, checkpoint
from rubiks.models.shifts import Moves, axes_of, describe_moves, moves, offsets
from rubiks.training.pictures import pictures, save


def describe(path: str, folder: Path) -> None:
    """Print tables of a checkpoint's shifts by stage, and write the pictures that training draws to a folder.

    Raises:
        InputError: the checkpoint cannot be read, or the folder cannot be written.
    """
    saved = checkpoint.read(path)
    net = RubiksNet.from_saved(saved)
    if learned := offsets(net):
        title = "learned shifts: T in frames, H and W in pixels"
        table = Table("stage", "channels", "axis", "mean", "std", "min", "max", "change", title=title)
        for stage, values in learned.items():
            initial = saved.initial_shifts.get(stage)
            for row, axis in enumerate(axes_of(values)):
                own = values[row]
                change = "" if initial is None else f"{(own - initial[row]).abs().mean():.3f}"
                numbers = (f"{number:.3f}" for number in (own.mean(), own.std(), own.min(), own.max()))
                table.add_row(*((stage, f"{len(own):,}") if row == 0 else ("", "")), axis, *numbers, change)
        Console().print(table)
        known = (
            "mean distance from the start of training"
            if saved.initial_shifts
            else "unknown, since the file does not contain the initial shifts"
        )
        print(f"change: {known}")
    else:
        print(f"The shifts of variant {net.variant} are fixed, not learned")
    if by_stage := moves(net):
        hard = net.temporal_share() is not None
        title = "whole-frame shifts in time" if hard else "soft temporal attention, channels by the frame with the most"
        table = Table("stage", *Moves._fields, "shifted", title=title)
        for stage, counts in by_stage.items():
            table.add_row(stage, *(f"{count:,}" for count in counts), f"{1 - counts.stay / sum(counts):.2%}")
        Console().print(table)
        if hard:
            print(describe_moves(net))
    for name, figure in pictures(net, saved.initial_shifts):
        save(figure, folder / f"{name}.png")
        print(f"{folder / name}.png")
