"""The clips of the built-in data set: the list of them, and how each is drawn and written."""

import contextlib
import errno
import io
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rubiks.data import scenes
from rubiks.data.actions import class_names
from rubiks.data.scenes import FPS, LEVELS
from rubiks.errors import InputError

VIDEO_FOLDER = "20bn-something-something-v2"
TEMPORARY = ".unfinished-"

# One thread and no random number or date in the file: the same frames always give the same bytes.
_ENCODER = {"deadline": "realtime", "cpu-used": "8", "crf": "24", "b": "0", "lag-in-frames": "0", "threads": "1"}


class Clip(NamedTuple):
    """One video of the data set."""

    video_id: int  # unique over both splits
    split: int  # 0 for training, 1 for validation
    number: int  # in its split, from 0
    label: int


class Plan(NamedTuple):
    """What determines the content of the data set."""

    level: str
    seed: int
    train_videos: int
    val_videos: int

    def clips(self) -> list[Clip]:
        """All clips: in each split the same number of each class, or one more, in random order."""
        clips: list[Clip] = []
        for split, count in enumerate((self.train_videos, self.val_videos)):
            labels = self._generator(split, 0).permutation(np.arange(count) % len(class_names(self.level)))
            clips += [Clip(len(clips) + 1 + i, split, i, label) for i, label in enumerate(labels.tolist())]
        return clips

    def rng(self, clip: Clip) -> np.random.Generator:
        """A separate generator for each clip, so that it is the same whichever process draws it."""
        return self._generator(clip.split, 1 + clip.number)

    def _generator(self, split: int, key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, LEVELS.index(self.level), split, key])


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns the operating system's errors in writing to path into an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            what, remedy = "the disk is full", "Free some space and run again: it continues where it stopped"
        else:
            what, remedy = error.strerror or str(error), "Make that folder writable"
        raise InputError(
            f"data.root: expected a folder to write the built-in data set to, but cannot write {path.name} "
            f"in {path.parent}: {what}. {remedy}, or set data.root to another folder."
        ) from error


def write(path: Path, content: bytes) -> None:
    """Writes a file atomically: never half of it.

    Raises:
        InputError: the file cannot be written.
    """
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    with disk_errors(path):
        while True:
            try:
                temporary.write_bytes(content)
                os.replace(temporary, path)
                return
            except FileNotFoundError:
                # A second process making the same data set removed the file as a leftover: write it again.
                if not path.parent.is_dir():
                    raise
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


def remove_temporary(folder: Path) -> None:
    """Removes what killed processes left."""
    for path in (*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{VIDEO_FOLDER}/{TEMPORARY}*")):
        path.unlink(missing_ok=True)


def is_made(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0  # a power cut can leave a file empty


def _encode(frames: scenes.Frames) -> bytes:
    """A VP9 webm file of RGB frames (frames, height, width, 3)."""
    import av  # only here, in the worker processes: see `rubiks.data.builtin_workers`

    file = io.BytesIO()
    with av.open(file, "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libvpx-vp9", rate=FPS, options={**_ENCODER, "flags": "+bitexact"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()


def make(videos: Path, plan: Plan, clips: Iterable[Clip], advance: Callable[[], None]) -> None:
    """Draws and writes the clips that are not there yet."""
    for clip in clips:
        path = videos / f"{clip.video_id}.webm"
        if not is_made(path):
            write(path, _encode(scenes.draw(plan.rng(clip), plan.level, clip.label)))
        advance()
