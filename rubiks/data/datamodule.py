"""Batches of views for training, validation and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
from pydantic import Field, model_validator
from typing_extensions import Self

from rubiks.data.batches import Loader, PinnedCollate, collate
from rubiks.data.dataset import EpochSampler, VideoDataset, Views
from rubiks.data.limits import WorkerCollate, start_worker
from rubiks.data.readers import Reader, check_reader
from rubiks.data.records import VideoRecord
from rubiks.data.workers import LONGEST, cores
from rubiks.errors import InputError
from rubiks.settings import MOST, Expected, Settings, Share

log = logging.getLogger(__name__)

PREFETCH = 2  # batches under way in each worker; for a GPU one more is kept in shared memory


def default_workers(processes: int) -> int:
    """Loader processes for each of `processes` training processes on this machine: the cores that are left."""
    return max(1, min(16, cores() // processes - 1))


class Loading(Settings, section="data"):
    """How videos are read, and what happens to unreadable ones."""

    workers: Literal["auto"] | Annotated[int, Field(ge=0, le=MOST)] = Field(
        "auto", description="loader processes per training process; auto: the remaining cores"
    )
    reader: Reader = Field(
        "auto", description="library that seeks in video files; auto: decord if it is installed, else PyAV"
    )
    timeout: (
        Annotated[float, Field(gt=0, le=LONGEST), Expected(f"a number of seconds above 0 and at most {LONGEST:,}")]
        | None
    ) = Field(
        120, description="seconds after which a video that is still being read counts as unreadable; null: no limit"
    )
    on_error: Literal["raise", "skip"] = Field(
        "raise",
        description="skip: unreadable videos are skipped, counted and listed; raise: the first one stops the run",
    )
    max_bad: Share = Field(
        0.01, description="share of a list's videos that may be unreadable or missing with on_error=skip"
    )

    @model_validator(mode="after")
    def _installed(self) -> Self:
        check_reader(self.reader)
        return self


class TrainingLoading(Loading):
    """How training videos are read."""

    on_error: Literal["raise", "skip"] = Field("skip", description=Loading.model_fields["on_error"].description)
    balanced: bool = Field(
        False, description="each epoch has the same number of videos from each class; videos of rare classes repeat"
    )


class VideoDataModule(pl.LightningDataModule):
    """Loads a data set's videos.

    Batches are dictionaries of ``views`` uint8 (B, V, T, 3, H, W), ``label`` int64 (B, V), and
    ``index`` int64 (B,).

    An unreadable video is never replaced by another. With ``on_error="raise"`` the first one stops the run; with
    ``"skip"`` it is left out, counted and named, and more than `max_bad` of a list stop the run.

    Args:
        train, val: the lists; either may be empty when it is not used.
        train_views, val_views: how a video is turned into views.
        batch_size: videos in a training batch of one process.
        eval_batch_size: videos in a validation or evaluation batch of one process.
        loading: how videos are read.
        seed: for order, frames and crops.
        processes: how many training processes share this machine's cores.
        balanced: give every class the same share of a training epoch.

    Attributes:
        workers: loader processes of each training process; 0 loads in the process itself.
        bad: the unreadable videos met so far, path to reason, for "train" and "val".
    """

    def __init__(
        self,
        train: Sequence[VideoRecord],
        val: Sequence[VideoRecord],
        train_views: Views,
        val_views: Views,
        batch_size: int,
        eval_batch_size: int,
        loading: Loading,
        seed: int = 0,
        processes: int = 1,
        balanced: bool = False,
    ) -> None:
        super().__init__()
        self.records = {"train": train, "val": val}
        self.views = {"train": train_views, "val": val_views}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.loading = loading
        self.workers = default_workers(processes) if loading.workers == "auto" else loading.workers
        self.seed = seed
        self.balanced = balanced
        self.bad: dict[str, dict[str, str]] = {"train": {}, "val": {}}
        self._start = 0, 0

    def start_at(self, epoch: int, videos: int) -> None:
        """Start training within this epoch, after this many videos of its order, counted over all processes."""
        self._start = epoch, videos

    def train_dataloader(self) -> Loader:
        loader = self._loader("train")
        assert isinstance(loader.sampler, EpochSampler)
        # Lightning makes the first iterator before it restores its own count of epochs.
        loader.sampler.start_at(*self._start)
        return loader

    def val_dataloader(self) -> Loader:
        return self._loader("val")

    def predict_dataloader(self) -> Loader:
        return self._loader("val")

    def dataset(self, split: str) -> VideoDataset:
        """What the loaders read from: the samples of "train" or "val"."""
        loading = self.loading
        return VideoDataset(self.records[split], self.views[split], self.seed, loading.reader, loading.timeout)

    def _loader(self, split: str) -> Loader:
        training = split == "train"
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        dataset = self.dataset(split)
        labels = [record.label for record in self.records[split]] if self.balanced else None
        sampler = EpochSampler(len(dataset), training, self.seed, rank, world_size, labels)
        batch_size = self.batch_size if training else self.eval_batch_size
        pinned = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        own_collate = PinnedCollate(PREFETCH) if pinned and self.workers > 0 else collate
        return Loader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            # A small last batch would give poor batch statistics; a list smaller than one batch is used whole.
            drop_last=training and len(sampler) >= batch_size,
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            prefetch_factor=PREFETCH if self.workers > 0 else None,
            pin_memory=pinned,
            collate_fn=WorkerCollate(own_collate) if self.workers > 0 else own_collate,
            worker_init_fn=start_worker,
        )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        assert self.trainer is not None
        bad = batch.pop("bad")
        if bad:
            self._note_bad("train" if self.trainer.training else "val", bad)
        if not len(batch["label"]) and self.trainer.training:
            path, reason = bad[0]
            raise InputError(f"none of the videos in a training batch can be read; the first is {path}: {reason}")
        return batch

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Convert the views to the network's memory order, which takes a GPU almost no time."""
        if len(batch["label"]):
            batch["views"] = batch["views"].contiguous()
        return batch

    def _note_bad(self, split: str, bad: list[tuple[str, str]]) -> None:
        known = self.bad[split]
        for path, reason in bad:
            if self.loading.on_error == "raise":
                raise InputError(f"{path}: {reason}. data.on_error=skip skips unreadable videos and counts them")
            if path not in known:
                known[path] = reason
                log.warning("skipped %s: %s", path, reason)
        total = len(self.records[split])
        if len(known) > self.loading.max_bad * total:
            path, reason = next(iter(known.items()))
            raise InputError(
                f"{len(known)} of the {total} {split} videos cannot be read, more than "
                f"data.max_bad={self.loading.max_bad:g} of the list; the first is {path}: {reason}"
            )
