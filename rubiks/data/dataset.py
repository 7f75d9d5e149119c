"""From records to samples and batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate

from rubiks.data.decode import open_video
from rubiks.data.records import VideoRecord
from rubiks.errors import VideoError


class Views(Protocol):
    """Chooses frames of a video and makes views of them: `TrainingViews`, or an evaluation protocol."""

    def frame_indices(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """(clips, T) frame numbers for a video of `length` frames."""

    def __call__(self, clips: Tensor, rng: np.random.Generator) -> Tensor:
        """Decoded frames uint8 (clips, T, 3, H, W) -> views uint8 (V, T, 3, S, S)."""


class VideoDataset(Dataset):
    """Samples of a list of videos. Items are asked for by (epoch, index), as `EpochSampler` gives them.

    Every random choice follows from seed, epoch and index, so batches do not depend on the number of workers. A video
    that cannot be read gives its `VideoError` as the item; the data module decides what that means.

    Args:
        reader: what reads video files, one of `readers.READERS`.
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

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | VideoError:
        epoch, index = key
        record = self.records[index]
        rng = np.random.default_rng((self.seed, epoch, index))
        try:
            clips = self._read(record, rng) if self.timeout is None else self._read_in_time(record, rng)
        except VideoError as error:
            return error
        return {"views": self.views(clips, rng), "label": record.label, "index": index}

    def _read(self, record: VideoRecord, rng: np.random.Generator) -> Tensor:
        """Decoded frames uint8 (clips, T, 3, H, W)."""
        with open_video(record, self.reader) as video:
            indices = self.views.frame_indices(len(video), rng)
            return video.frames(indices.ravel().tolist()).unflatten(0, indices.shape)

    def _read_in_time(self, record: VideoRecord, rng: np.random.Generator) -> Tensor:
        """`_read` in a thread, which can be left behind: neither a stuck decoder nor a stuck disk can be interrupted.

        Raises:
            VideoError: also where it takes longer than `timeout`.
        """
        outcome: list[Tensor | Exception] = []

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


def collate(samples: list[dict[str, Any] | VideoError]) -> dict[str, Any]:
    """Batch: views uint8 (B, V, T, 3, H, W), label and index int64 (B,), and the videos that could not be read.

    Unreadable videos make the batch smaller; nothing takes their place. If none could be read, `views` is [].

    The views stay channels last in memory, as decoders and resizing leave them: turning them around here would add a
    fifth to the time of reading a prepared video. A worker's batch is made in shared memory, and copied no more.
    """
    good = [sample for sample in samples if not isinstance(sample, VideoError)]
    views = [sample["views"].movedim(2, -1) for sample in good]
    return {
        "views": default_collate(views).movedim(-1, 3) if views else [],
        "label": torch.tensor([sample["label"] for sample in good], dtype=torch.int64),
        "index": torch.tensor([sample["index"] for sample in good], dtype=torch.int64),
        "bad": [(sample.path, sample.reason) for sample in samples if isinstance(sample, VideoError)],
    }


class EpochSampler(Sampler[tuple[int, int]]):
    """(epoch, index) of the videos of one process, in an order that follows from seed and epoch alone.

    In training all processes get equally many videos, so the last few of the epoch's order may be left out. In
    evaluation every video goes to exactly one process.

    Args:
        length: videos in the list.
        training: shuffle, and give every process the same number.
        seed: of the order.
        rank, world_size: this process, and how many there are.
    """

    def __init__(self, length: int, training: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length = length
        self.training = training
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self._resume_at: tuple[int, int] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before each epoch."""
        self.epoch = epoch

    def resume(self, epoch: int, done: int) -> None:
        """Begin with this epoch, whatever `set_epoch` says, without its first `done` videos: they have been seen."""
        self._resume_at = epoch, done

    def __len__(self) -> int:
        spare = 0 if self.training else self.world_size - 1 - self.rank
        return (self.length + spare) // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, done = self._resume_at or (self.epoch, 0)
        self._resume_at = None
        order = np.arange(self.length)
        if self.training:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.length)
        mine = order[self.rank :: self.world_size][: len(self)]
        for index in mine[done:]:
            yield epoch, int(index)
