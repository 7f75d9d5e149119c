"""One labelled video of a data set."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from rubiks.errors import VideoError


class Span(NamedTuple):
    """Where a file's content lies within a larger file, in bytes."""

    file: str
    offset: int
    size: int


# How any frame of a video file can be reached: by any library that seeks, only by this package's own seeking, or only
# by decoding all frames before it.
Seek = Literal["any", "pyav", "none"]


class CheckedFile(NamedTuple):
    """What a manifest says about a video: its bytes and frames and, for a file, from how many frames decoding can start
    and how any frame can be reached."""

    size: int
    frames: int
    key_frames: int
    seek: Seek


@dataclass(frozen=True, slots=True)
class VideoRecord:
    """A video file, a folder with one image per frame, or a still image, and its label.

    Attributes:
        path: the video file, the folder of frames, or the image.
        label: index of the class, from 0.
        num_frames: frame folders: the count in the list. None if the reader counts, as for video files.
        pattern: frame folders: how frame files are named, e.g. "{:06d}.jpg". None for video files.
        image: whether it is a still image, a video of one frame.
        span: videos and images in a shard: where their bytes are; `path` is then only a name. None for loose files.
        checked: what `rubiks check` found, so that the reader need not count frames.
        first_frame: frame folders: number of the first frame's file, 1 or 0.
        listed: the video's id or path in the data set's list. None if it has neither: then `path` is used.
    """

    path: str
    label: int
    num_frames: int | None = None
    pattern: str | None = None
    image: bool = False
    span: Span | None = None
    checked: CheckedFile | None = None
    first_frame: int = 1
    listed: str | None = None

    @property
    def name(self) -> str:
        """The video's name in predictions, different for each video of a list."""
        return self.path if self.listed is None else self.listed

    @property
    def files(self) -> Iterator[str]:
        """The file, or a folder's frame files in order; VideoError if they must be counted and cannot be."""
        if self.pattern is None:
            yield self.path
            return
        count = self.num_frames
        if count is None:
            count = count_frames(self.path, self.pattern, self.first_frame)
        for number in range(count):  # one by one: a wrong list may give any number
            yield os.path.join(self.path, self.pattern.format(self.first_frame + number))


Opened = TypeVar("Opened", bound="OpenVideo")


class OpenVideo:
    """An open record of any kind: a context manager with `frames` and a length.

    Attributes:
        reader: the library that reads it; for video files, the one that has read the latest frames.
    """

    reader = "pillow"

    def close(self) -> None:
        """Release what is open; the object cannot be used afterwards. Here nothing stays open between reads."""

    def __enter__(self: Opened) -> Opened:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden and so never data, such as the `._name` that macOS adds to each file."""
    return name.startswith(".")


def count_frames(folder: str, pattern: str, first_frame: int = 1) -> int:
    """Count the frames in a folder, if no list gives their number.

    Args:
        folder: the folder.
        pattern: how frame files are named, e.g. "{:05d}.jpg".
        first_frame: number of the first frame's file, 1 or 0.

    Raises:
        VideoError: there is no such folder, it holds no frames, or their numbers have gaps.
    """
    first, extension = pattern.format(first_frame), os.path.splitext(pattern)[1]
    try:
        names = {name for name in os.listdir(folder) if name.endswith(extension) and not is_hidden(name)}
    except OSError as error:
        raise VideoError(folder, f"is not a folder of frames: {error.strerror}") from error
    if not names:
        raise VideoError(folder, f"contains no frames, expected {first} and so on; unpack it again")
    expected = [pattern.format(first_frame + number) for number in range(len(names))]
    missing = next((name for name in expected if name not in names), None)
    if missing is not None:
        other = pattern.format(1 - first_frame)
        from_other = other in names and (first_frame == 1 or missing == first)
        remedy = first_frame_hint(1 - first_frame) if from_other else "unpack it again"
        raise VideoError(
            folder,
            f"has {len(names)} {extension} files but not {missing}, expected {first} to {expected[-1]} without gaps; "
            f"{remedy}",
        )
    return len(names)


def first_frame_hint(number: int) -> str:
    """What to do if frames are numbered from a different number than configured."""
    return f"its frames are numbered from {number}; set data.first_frame={number}"


def checked_indices(indices: Sequence[int], length: int) -> list[int]:
    """The indices as plain numbers; an index out of range is the caller's bug, not a fault of the video."""
    numbers = [operator.index(index) for index in indices]
    if not numbers:
        raise ValueError("no frame indices")
    if not 0 <= min(numbers) <= max(numbers) < length:
        raise IndexError(f"frame indices {numbers} of a video with {length} frames")
    return numbers


def as_tensor(frames: np.ndarray) -> Tensor:
    """uint8 (T, H, W, 3) -> uint8 (T, 3, H, W), not copied."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)
