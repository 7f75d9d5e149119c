"""From a checkpoint to a file that runs without this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import rubiks
from rubiks.errors import InputError
from rubiks.export import openvino_runtime
from rubiks.export.description import INPUT, ClipDescription, ClipInput
from rubiks.export.formats import FORMATS, Format
from rubiks.export.graph import ExportNet
from rubiks.export.quiet import quiet
from rubiks.files import check_writable, sha256, write_files
from rubiks.models import RubiksNet
from rubiks.models.checkpoint import SavedNetwork
from rubiks.nn import Normalize

TOLERANCE = 1e-4  # of the largest logit
FEWEST, MOST = 4, 256  # frames, if their number is dynamic; PyTorch's export treats smaller numbers differently


@dataclass(frozen=True)
class Exported:
    """What has been written.

    Attributes:
        difference: the largest of the logits from PyTorch's, as a share of the largest logit: on random clips, or of
            int8 on the clips of its calibration.
        clip: T, H and W; of a stream H and W of its frames.
        agreement: of int8, for which share of these clips the highest class is PyTorch's.
    """

    difference: float
    clip: tuple[int, ...]
    agreement: float | None = None


def export(
    saved: SavedNetwork,
    to: str,
    out: Path,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    uint8: bool = False,
    dynamic_frames: bool = False,
    calibration: Sequence[Tensor] | None = None,
) -> Exported:
    """Write a network as a file for another runtime, and check it there.

    The file has an input `pixel_values` (batch, frames, 3, height, width) and an output `logits` (batch, classes), for
    any batch. It is run on random clips and kept only if its logits are those of the network.

    Args:
        saved: the network.
        to: one of FORMATS.
        out: the file, with the format's suffix.
        frames: of a clip; None: as trained.
        size: height and width; None: as trained.
        uint8: the input is RGB from 0 to 255; otherwise float32, normalised as by `rubiks.nn.Normalize`.
        dynamic_frames: take any number of frames from FEWEST to MOST.
        calibration: for OpenVINO, quantise to int8 with the ranges of the activations on these clips, each uint8
            (T, 3, H, W). The logits then differ more.

    Raises:
        InputError: a package is missing, the network's weights are not finite, the clips have too few or too many
            frames, the file cannot be written, or its logits differ.
    """
    form = checked_format(saved, to, out, *([] if calibration is None else ["nncf"]))
    net = RubiksNet.from_saved(saved)
    clip = clip_shape(saved, frames, size)
    axes, longest, shortest = {0: torch.export.Dim("batch")}, clip, clip
    if dynamic_frames:
        if not FEWEST <= clip[0] <= MOST:
            raise InputError(f"--dynamic-frames: expected clips of {FEWEST} to {MOST} frames, got {clip[0]}")
        axes[1] = torch.export.Dim("frames", min=FEWEST, max=MOST)
        longest, shortest = (MOST, *clip[1:]), (FEWEST, *clip[1:])
    module = ExportNet(net, *longest, uint8=uint8)
    with quiet():  # a batch of one would be taken as a constant
        program = torch.export.export(module, (_pixels(2, clip, uint8),), dynamic_shapes={INPUT: axes})
    description = _description(saved, clip, (shortest[0], longest[0]), uint8)
    exported = Exported(0.0, clip)

    def prepare(pixels: Tensor) -> Tensor:
        return (pixels if uint8 else Normalize()(pixels))[None]

    def write(folder: Path) -> None:
        nonlocal exported
        path = folder / out.name
        form.write(program, path, description)
        run, _ = form.load(path)
        inputs = [_pixels(*shape, uint8) for shape in ((1, clip), (3, shortest))]
        difference = max(difference_of(run(pixels)[0], _expected(net, pixels)) for pixels in inputs)
        check_difference(difference, saved, form, out)
        exported = Exported(difference, clip)
        if calibration is not None:
            openvino_runtime.quantize(path, calibration, prepare, description.model_copy(update={"precision": "int8"}))
            run, _ = form.load(path)
            logits, expected = (
                torch.cat([compute(prepare(pixels)) for pixels in calibration])
                for compute in (lambda pixels: run(pixels)[0], lambda pixels: _expected(net, pixels))
            )
            agreement = (logits.argmax(1) == expected.argmax(1)).float().mean().item()
            exported = Exported(difference_of(logits, expected), clip, agreement)

    write_files(form.files(out), write)
    return exported


def checked_format(saved: SavedNetwork, to: str, out: Path, *packages: str) -> Format:
    """The format, with which the network can be written to this file; InputError if it cannot."""
    form = FORMATS[to]
    if out.suffix != form.suffix:
        raise InputError(f"--out {out}: expected a file name that ends in {form.suffix}, as --to is {to}")
    form.check_installed(f"--to {to}", *form.writing, *packages)
    for path in form.files(out):
        check_writable(path)
    for name, value in saved.weights.items():
        if not value.isfinite().all():
            raise InputError(f"{saved.path} cannot be exported: {name} contains values that are not finite")
    return form


def check_difference(difference: float, saved: SavedNetwork, form: Format, out: Path) -> None:
    """Raise InputError if the logits differ by more than TOLERANCE."""
    if not difference <= TOLERANCE:  # also NaN
        raise InputError(
            f"{saved.path} cannot be exported: in {form.runtime} its logits differ from PyTorch's by "
            f"{difference:.1e} of the largest, more than {TOLERANCE:.0e}; {out} has not been written"
        )


def difference_of(logits: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest logit."""
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def clip_shape(saved: SavedNetwork, frames: int | None, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """T, H and W of the input; as trained where nothing else is chosen."""
    trained = saved.preprocessing
    return frames or trained.num_frames, *(size or (trained.size, trained.size))


def _description(
    saved: SavedNetwork, clip: tuple[int, int, int], range_of_frames: tuple[int, int], uint8: bool
) -> ClipDescription:
    frames, *size = clip
    return ClipDescription(
        tier=saved.tier,
        variant=saved.variant,
        num_classes=saved.num_classes,
        classes=saved.classes,
        preprocessing=ClipInput(
            num_frames=frames,
            min_frames=range_of_frames[0],
            max_frames=range_of_frames[1],
            size=size,
            short_side=round(min(size) * 256 / 224),
            sampling=saved.preprocessing.sampling,
            window=saved.preprocessing.window,
            input="uint8" if uint8 else "normalized",
        ),
        source_sha256=sha256(saved.file),
        rubiks_version=rubiks.__version__,
    )


def _pixels(batch: int, clip: tuple[int, int, int], uint8: bool) -> Tensor:
    """Random input."""
    frames, height, width = clip
    pixels = torch.randint(256, (batch, frames, 3, height, width), dtype=torch.uint8)
    return pixels if uint8 else Normalize()(pixels)


@torch.no_grad()
def _expected(net: RubiksNet, pixels: Tensor) -> Tensor:
    """PyTorch's logits."""
    return net(pixels if pixels.is_floating_point() else Normalize()(pixels))
