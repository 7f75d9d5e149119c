"""Moving previews of videos as they are, and of the views that training makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rubiks.data.dataset import Views, read_clips
from rubiks.data.records import VideoRecord
from rubiks.data.workers import work
from rubiks.errors import VideoError
from rubiks.files import write_atomically
from rubiks.pages.previews import animation

FRAMES = 8  # of a preview


class Spread:
    """`Views` of a whole video: the centres of FRAMES equal segments, each frame once, as decoded."""

    def frame_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(1, T) frame numbers; T is FRAMES, or less for a shorter video."""
        centres = (np.arange(FRAMES) + 0.5) * length / FRAMES
        return np.unique(centres.astype(np.int64))[None]

    def __call__(self, clips: Tensor, label: int, rng: np.random.Generator) -> tuple[Tensor, list[int]]:
        """The frames and the label as they are."""
        return clips, [label]


@dataclass(frozen=True)
class Job:
    """A preview to be made.

    Attributes:
        record: the video.
        views: of which the first is shown.
        seed: of the views' random choices, as `VideoDataset` makes them: its seed, epoch, index and repeat.
        reader: the library that reads video files.
        out: the WebP file.
    """

    record: VideoRecord
    views: Views
    seed: tuple[int, int, int, int]
    reader: str
    out: Path


def make(
    jobs: Sequence[Job], processes: int, seconds: float, advance: Callable[[], object] = lambda: None
) -> dict[Path, int | VideoError]:
    """Write previews in separate processes.

    Args:
        jobs: what to make.
        processes: how many at once.
        seconds: the time limit of one.
        advance: called for each that is done.

    Returns:
        For each file the class that the view shows, which mirroring may change, or why the video cannot be read.

    Raises:
        InputError: a file cannot be written.
    """
    made = {}
    for job, result in work(_make, jobs, lambda job: job.record.path, processes, seconds):
        made[job.out] = result
        advance()
    return made


def _make(job: Job) -> int:
    torch.set_num_threads(1)  # there are as many processes as cores
    rng = np.random.default_rng(job.seed)
    _, clips = read_clips(job.record, job.views, job.reader, rng)
    views, labels = job.views(clips, job.record.label, rng)
    write_atomically(job.out, partial(Path.write_bytes, data=animation(views[0])))
    return labels[0]
