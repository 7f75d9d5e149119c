"""One labelled video of a data set."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """A video file, or a folder with one image per frame, and its label.

    Attributes:
        path: the video file, or the folder of frames.
        label: index of the class, from 0.
        num_frames: frame folders: the count that the list gives. None for video files, whose reader counts.
        pattern: frame folders: how frame files are named, e.g. "{:06d}.jpg", numbered from 1. None for video files.
    """

    path: str
    label: int
    num_frames: int | None = None
    pattern: str | None = None

    @property
    def name(self) -> str:
        """The video's name in reports and predictions: the file name without its extension, or the folder's name."""
        name = os.path.basename(os.path.normpath(self.path))
        return name if self.pattern is not None else os.path.splitext(name)[0]
