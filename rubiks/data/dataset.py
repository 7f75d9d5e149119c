"""From records to samples and batches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from rubiks.data.decode import open_video
from rubiks.data.records import OpenVideo, VideoRecord
from rubiks.errors import VideoError


class Views(Protocol):
    """Chooses frames of a video and turns them into views: `TrainingViews`, or an evaluation protocol."""

    def frame_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(clips, T) frame numbers for a video of `length` frames."""

    def __call__(self, clips: Tensor, label: int, rng: np.random.Generator) -> tuple[Tensor, list[int]]:
        """Decoded frames uint8 (clips, T, 3, H, W) of a video of class `label` -> views uint8 (V, T, 3, S, S), and
        the class of each view, which mirroring may change."""


def read_clips(
    record: VideoRecord,
    views: Views,
    reader: str,
    rng: np.random.Generator,
    stage: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
) -> tuple[OpenVideo, Tensor]:
    """Open a video and decode the frames that the views need.

    Args:
        record: the video.
        views: chooses the frames.
        reader: the library that seeks, one of `readers.Reader`.
        rng: for random frames.
        stage: entered with "open" and with "decode" while that is done, to time it.

    Returns:
        The video, closed, and its frames uint8 (clips, T, 3, H, W).

    Raises:
        VideoError: it cannot be read.
    """
    with stage("open"):
        video = open_video(record, reader)
    with stage("decode"), video:
        indices = views.frame_indices(len(video), rng)
        return video, video.frames(indices.ravel().tolist()).unflatten(0, indices.shape)


class VideoDataset(Dataset):
    """Samples of a list of videos. Items are indexed by (epoch, index, repeat), as `EpochSampler` yields them.

    Every random choice depends only on the seed and this index, so batches do not depend on the number of workers. An
    unreadable video returns its `VideoError` as the item; the data module decides how to handle it.

    Args:
        reader: the library that reads video files, one of `readers.Reader`.
        timeout: seconds after which a video that is still being read counts as unreadable; None for no limit.
    """

    def __init__(
        self,
        records: Sequence[VideoRecord],
        views: Views,
        seed: int,
        reader: str = "auto",
        timeout: float | None = None,
    ) -> None:
        self.records = records
        self.views = views
        self.seed = seed
        self.reader = reader
        self.timeout = timeout

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: tuple[int, int, int]) -> dict[str, Any] | VideoError:
        epoch, index, repeat = key
        record = self.records[index]
        rng = np.random.default_rng((self.seed, epoch, index, repeat))
        try:
            video, clips = self._read(record, rng) if self.timeout is None else self._read_in_time(record, rng)
        except VideoError as error:
            return error
        views, label = self.views(clips, record.label, rng)
        return {"views": views, "label": label, "index": index, "reader": video.reader}

    def _read(self, record: VideoRecord, rng: np.random.Generator) -> tuple[OpenVideo, Tensor]:
        return read_clips(record, self.views, self.reader, rng)

    def _read_in_time(self, record: VideoRecord, rng: np.random.Generator) -> tuple[OpenVideo, Tensor]:
        """`_read` in a thread that can be abandoned, as neither a stuck decoder nor a stuck disk can be interrupted.

        Raises:
            VideoError: also if it takes longer than `timeout`.
        """
        outcome: list[tuple[OpenVideo, Tensor] | Exception] = []

        def work() -> None:
            try:
                outcome.append(self._read(record, rng))
            except Exception as error:  # raised below, in the thread that asked
                outcome.append(error)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(self.timeout)
        if not outcome:
            raise VideoError(
                record.path,
                f"was not read within data.timeout={self.timeout:g} seconds: the decoder or the disk hangs; if it is "
                "only slow, raise data.timeout",
            )
        if isinstance(outcome[0], Exception):
            raise outcome[0]
        return outcome[0]


class EpochSampler(Sampler[tuple[int, int, int]]):
    """(epoch, index, repeat) of the videos of one process, in an order that depends only on seed and epoch.

    In training all processes get the same number of videos, so the last few of the epoch's order may be left out. In
    evaluation every video goes to exactly one process. `repeat` is how often the video has already come in this epoch:
    0, unless classes are balanced.

    Args:
        length: videos in the list.
        training: shuffle, and give every process the same number.
        seed: for the order.
        rank, world_size: this process, and how many there are.
        labels: the videos' classes, to give each class the same share of a training epoch (`balanced_order`); None
            to take every video once.
    """

    def __init__(
        self,
        length: int,
        training: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        labels: Sequence[int] | None = None,
    ) -> None:
        self.length = length
        self.training = training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.labels = labels
        self.epoch = 0
        self._start: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch
        if self._start is not None and epoch > self._start[0]:  # that epoch had nothing left
            self._start = None

    def start_at(self, epoch: int, done: int) -> None:
        """Start with this epoch, whatever `set_epoch` says, and skip the first `done` videos of its order, which all
        processes together have already seen."""
        self._start = epoch, done

    def __len__(self) -> int:
        spare = 0 if self.training else self.world_size - 1 - self.rank
        return (self.length + spare) // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        epoch, done = self._start or (self.epoch, 0)
        self._start = None
        order, repeats = np.arange(self.length), np.zeros(self.length, dtype=np.int64)
        if self.training:
            rng = np.random.default_rng((self.seed, epoch))
            if self.labels is None:
                order = rng.permutation(self.length)
            else:
                order, repeats = balanced_order(self.labels, rng)
        mine = slice(done + self.rank, None, self.world_size)
        count = (self.length - done) // self.world_size if self.training else len(self)
        for index, repeat in list(zip(order[mine], repeats[mine], strict=True))[:count]:
            yield epoch, int(index), int(repeat)


def balanced_order(labels: Sequence[int], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A random order of as many videos as there are labels, with the same number from each class, or one more.

    A class with too few videos uses all of them before any repeats; a class with too many leaves some out.

    Returns:
        The videos' indices and how often each has come before, both int64 (len(labels),).
    """
    present, sizes = np.unique(labels, return_counts=True)
    videos = np.split(np.argsort(labels, kind="stable"), np.cumsum(sizes)[:-1])
    places = np.full(len(present), len(labels) // len(present))
    places[rng.permutation(len(present))[: len(labels) % len(present)]] += 1
    indices, repeats = [], []
    for own, count in zip(videos, places, strict=True):
        rounds = -(-count // len(own))
        indices.append(np.concatenate([rng.permutation(own) for _ in range(rounds)])[:count])
        repeats.append(np.arange(count) // len(own))
    order = rng.permutation(len(labels))
    return np.concatenate(indices)[order], np.concatenate(repeats)[order]
