"""Exported files as networks, which score videos in place of checkpoints."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from rubiks.errors import InputError
from rubiks.export.description import StreamDescription
from rubiks.export.formats import FORMATS, format_of
from rubiks.models import RubiksNet, checkpoint
from rubiks.models.checkpoint import SavedNetwork
from rubiks.models.preprocessing import Preprocessing
from rubiks.models.scoring import PixelNet
from rubiks.nn import Normalize


class ExportedFile:
    """A file that `rubiks export` has written.

    Args:
        path: of the file.

    Attributes:
        path: of the file.
        format: one of FORMATS.
        run: the file as a function from its inputs to its outputs, on the CPU.
        description: its metadata.

    Raises:
        InputError: the runtime is missing, or the file is something else, or damaged.
    """

    def __init__(self, path: str) -> None:
        form = format_of(Path(path))
        if form is None:
            raise InputError(f"{path} is not an exported file, which ends in {', '.join(SUFFIXES)}")
        self.path, self.format = path, form
        FORMATS[form].check_installed(path)
        try:
            if os.path.getsize(path) == 0:
                raise ValueError("it is empty")
            self.run, self.description = FORMATS[form].load(Path(path))
        except ValidationError as error:
            raise _not_ours(path, f"its metadata has no valid {error.errors()[0]['loc'][0]}") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
        except Exception as error:  # the runtimes raise many kinds
            raise _not_ours(path, (str(error).strip() or repr(error)).splitlines()[0]) from None

    def facts(self) -> dict[str, Any]:
        """What results state besides the file's path and hash."""
        package = FORMATS[self.format].package
        return {
            "format": self.format,
            "runtime": f"{FORMATS[self.format].runtime} {importlib.metadata.version(package)}",
            "input": self.description.preprocessing.input,
            "source_sha256": self.description.source_sha256,
        }


class ExportedNetwork(PixelNet):
    """The network of an exported file, which takes clips, run by its runtime on the CPU.

    Args:
        path: of the file.

    Attributes:
        path, file: of the file.
        description: its metadata.
        facts: what results state besides the file's path and hash.
        tier, variant, num_classes, classes: of the network.
        preprocessing: the input that it expects.

    Raises:
        InputError: as `ExportedFile`, or the file takes single frames.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        own = ExportedFile(path)
        if isinstance(own.description, StreamDescription):
            raise InputError(
                f"{path} is a stream's file, which takes one frame at a time (rubiks info describes it), so it cannot "
                "score videos; export the network without --stream, or use the checkpoint"
            )
        self.path = self.file = path
        self._run, self.description, self.facts = own.run, own.description, own.facts
        known = self.description
        self.tier, self.variant = known.tier, known.variant
        self.num_classes, self.classes = known.num_classes, known.classes
        clip = known.preprocessing
        self.preprocessing = Preprocessing(clip.num_frames, min(clip.size), clip.short_side, clip.sampling, clip.window)
        self.normalize = nn.Identity() if clip.input == "uint8" else Normalize()

    def forward(self, pixels: Tensor) -> Tensor:
        """Clips uint8 (N, T, 3, H, W), whatever the input of the file -> logits (N, classes)."""
        return self._run(self.normalize(pixels))[0]

    def check(self, device: str, num_frames: int, size: int) -> None:
        """Raise InputError unless the file scores square clips like these, on the CPU."""
        if device == "gpu":
            raise InputError(f"device=gpu, but {self.path} is an exported file, which runs on the CPU; use device=cpu")
        own = self.description.preprocessing
        if not own.min_frames <= num_frames <= own.max_frames or own.size != (size, size):
            height, width = own.size
            frames = (
                f"{own.min_frames}" if own.min_frames == own.max_frames else f"{own.min_frames} to {own.max_frames}"
            )
            raise InputError(
                f"{self.path} takes clips of {frames} frames of {height}x{width} pixels, but the protocol has clips of "
                f"{num_frames} frames of {size}x{size}; choose another protocol, or export the network with "
                f"--frames {num_frames} --size {size}"
            )


SUFFIXES = sorted({form.suffix for form in FORMATS.values()})


def read(path: str | os.PathLike) -> SavedNetwork | ExportedNetwork:
    """Read a network that scores videos: an exported file, or what `checkpoint.read` reads.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = os.fspath(path)
    return ExportedNetwork(path) if is_exported(path) else checkpoint.read(path)


def is_exported(path: str) -> bool:
    """Whether it is an exported file, by its name."""
    return os.path.isfile(path) and format_of(Path(path)) is not None


def network(saved: SavedNetwork | ExportedNetwork) -> RubiksNet | ExportedNetwork:
    """The network of what `read` has read."""
    return saved if isinstance(saved, ExportedNetwork) else RubiksNet.from_saved(saved)


def _not_ours(path: str, why: str) -> InputError:
    return InputError(f"{path} is not a network that rubiks export has written, or is damaged: {why}")
