"""From a checkpoint to a file that runs without this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rubiks
from rubiks.errors import InputError
from rubiks.export.formats import FORMATS, Runtime
from rubiks.export.graph import ExportNet
from rubiks.files import check_writable, sha256, write_atomically
from rubiks.models import RubiksNet
from rubiks.models.checkpoint import SavedNetwork
from rubiks.nn import Normalize
from rubiks.nn.normalize import IMAGENET_MEAN, IMAGENET_STD

TOLERANCE = 1e-4  # of the largest logit
FEWEST, MOST = 4, 256  # frames, if their number is dynamic; PyTorch's export treats smaller numbers differently


@dataclass(frozen=True)
class Exported:
    """What has been written.

    Attributes:
        difference: the largest of the logits from PyTorch's, as a share of the largest logit.
        clip: T, H and W.
    """

    difference: float
    clip: tuple[int, int, int]


def export(
    saved: SavedNetwork,
    to: str,
    out: Path,
    frames: int | None = None,
    size: tuple[int, int] | None = None,
    uint8: bool = False,
    dynamic_frames: bool = False,
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

    Raises:
        InputError: a package is missing, the network's weights are not finite, the clips have too few or too many
            frames, the file cannot be written, or its logits differ.
    """
    form = FORMATS[to]
    if out.suffix != f".{to}":
        raise InputError(f"--out {out}: expected a file name that ends in .{to}, as --to is {to}")
    form.check_installed(to)
    check_writable(out)
    for name, value in saved.weights.items():
        if not value.isfinite().all():
            raise InputError(f"{saved.path} cannot be exported: {name} contains values that are not finite")
    net = RubiksNet.from_saved(saved)
    trained = saved.preprocessing
    clip = frames or trained.num_frames, *(size or (trained.size, trained.size))
    metadata = _metadata(saved, clip, uint8)
    axes, shortest = {0: torch.export.Dim("batch")}, clip
    if dynamic_frames:
        if not FEWEST <= clip[0] <= MOST:
            raise InputError(f"--dynamic-frames: expected clips of {FEWEST} to {MOST} frames, got {clip[0]}")
        axes[1] = torch.export.Dim("frames", min=FEWEST, max=MOST)
        shortest = FEWEST, *clip[1:]
    module = ExportNet(net, MOST if dynamic_frames else clip[0], *clip[1:], uint8=uint8)
    difference = 0.0

    def write(path: Path) -> None:
        nonlocal difference
        # A batch of one would be taken as a constant.
        form.write(module, _pixels(2, clip, uint8), axes, path, metadata)
        run = form.load(path)
        difference = max(_difference(net, run, _pixels(*shape, uint8)) for shape in ((1, clip), (3, shortest)))
        if not difference <= TOLERANCE:  # also NaN
            raise InputError(
                f"{saved.path} cannot be exported: in {form.runtime} its logits differ from PyTorch's by "
                f"{difference:.1e} of the largest, more than {TOLERANCE:.0e}; {out} has not been written"
            )

    write_atomically(out, write)
    return Exported(difference, clip)


def _metadata(saved: SavedNetwork, clip: tuple[int, int, int], uint8: bool) -> dict[str, Any]:
    """What the file says about its network and the input that it expects."""
    frames, height, width = clip
    return {
        "tier": saved.tier,
        "variant": saved.variant,
        "classes": saved.classes,  # None if they are not known
        "preprocessing": {
            "num_frames": frames,
            "size": [height, width],
            "short_side": round(min(height, width) * 256 / 224),
            "sampling": saved.preprocessing.sampling,
            "window": saved.preprocessing.window,
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "input": "uint8" if uint8 else "normalized",
        },
        "source_sha256": sha256(saved.file),
        "rubiks_version": rubiks.__version__,
    }


def _pixels(batch: int, clip: tuple[int, int, int], uint8: bool) -> Tensor:
    """Random input."""
    frames, height, width = clip
    pixels = torch.randint(256, (batch, frames, 3, height, width), dtype=torch.uint8)
    return pixels if uint8 else Normalize()(pixels)


@torch.no_grad()
def _difference(net: RubiksNet, run: Runtime, pixels: Tensor) -> float:
    """The largest difference of a file's logits from the network's, as a share of the largest logit."""
    expected = net(pixels if pixels.is_floating_point() else Normalize()(pixels))
    return ((run(pixels) - expected).abs().max() / expected.abs().max()).item()
