"""From the checkpoint of a causal network to a file that takes a frame at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import rubiks
from rubiks.errors import InputError
from rubiks.export.description import State, StreamDescription, StreamInput
from rubiks.export.export import Exported, check_difference, checked_format, difference_of
from rubiks.export.quiet import quiet
from rubiks.export.stream_graph import StreamNet
from rubiks.files import sha256, write_files
from rubiks.models import RubiksNet
from rubiks.models.checkpoint import SavedNetwork
from rubiks.models.stream import FrameStream
from rubiks.nn import Normalize


def export_stream(
    saved: SavedNetwork, to: str, out: Path, size: tuple[int, int] | None = None, uint8: bool = False
) -> Exported:
    """Write a causal network as a file for another runtime that takes a frame at a time, and check it there.

    The file has inputs `pixel_values` (batch, 3, height, width) and `state_0`, ..., and outputs `logits` (batch,
    classes) of this frame alone and `next_state_0`, ..., for any batch. States are float32 and begin with zeros. It is
    run on random frames and kept only if its logits are those of `RubiksNet.stream`.

    Args:
        saved: the network.
        to: one of FORMATS.
        out: the file, with the format's suffix.
        size: height and width; None: as trained.
        uint8: the input is RGB from 0 to 255; otherwise float32, normalised as by `rubiks.nn.Normalize`.

    Raises:
        InputError: the network reads later frames, or for a reason of `rubiks.export.export.export`.
    """
    form = checked_format(saved, to, out)
    net = RubiksNet.from_saved(saved)
    try:
        stream = net.stream()
    except ValueError:
        raise InputError(
            f"{saved.path} cannot be exported with --stream: the network reads later frames; train one with "
            "causal=true, or export it for clips, without --stream"
        ) from None
    height, width = size or (saved.preprocessing.size,) * 2
    module = StreamNet(net, height, width, uint8)
    states = module.states
    batch = {0: torch.export.Dim("batch")}
    shapes = {"pixel_values": batch, **({"states": (batch,) * len(states)} if states else {})}
    with quiet():  # a batch of one would be taken as a constant
        program = torch.export.export(
            module,
            (_frame(2, height, width, uint8), *zeros(states, 2)),
            dynamic_shapes=shapes,
        )
    description = StreamDescription(
        tier=saved.tier,
        variant=saved.variant,
        num_classes=saved.num_classes,
        classes=saved.classes,
        preprocessing=StreamInput(
            size=(height, width),
            short_side=round(min(height, width) * 256 / 224),
            input="uint8" if uint8 else "normalized",
            frames_per_second=round(1 / saved.preprocessing.interval, 2),
        ),
        states=states,
        source_sha256=sha256(saved.file),
        rubiks_version=rubiks.__version__,
    )
    longest = max((state.shape[1] for state in states if len(state.shape) == 4), default=1)
    difference = 0.0

    def write(folder: Path) -> None:
        nonlocal difference
        form.write(program, folder / out.name, description)
        run, _ = form.load(folder / out.name)
        for batch in (1, 3):
            frames = [_frame(batch, height, width, uint8) for _ in range(longest + 2)]
            difference = max(difference, _difference(run, stream, frames, zeros(states, batch)))
        check_difference(difference, saved, form, out)

    write_files(form.files(out), write)
    return Exported(difference, (height, width))


def zeros(states: Sequence[State], batch: int) -> list[Tensor]:
    """The states before the first frame."""
    return [torch.zeros(batch, *state.shape) for state in states]


def _frame(batch: int, height: int, width: int, uint8: bool) -> Tensor:
    """Random input."""
    pixels = torch.randint(256, (batch, 3, height, width), dtype=torch.uint8)
    return pixels if uint8 else Normalize()(pixels)


def _difference(
    run: Callable[..., Sequence[Tensor]], stream: FrameStream, frames: Sequence[Tensor], states: Sequence[Tensor]
) -> float:
    """The largest difference of a file's logits from those of PyTorch's stream, as a share of the largest."""
    found, expected, state = [], [], None
    for frame in frames:
        logits, *states = run(frame, *states)
        found.append(logits)
        _, state = stream.step(frame if frame.is_floating_point() else Normalize()(frame), state)
        expected.append(state.own)
    return difference_of(torch.cat(found), torch.cat(expected))
