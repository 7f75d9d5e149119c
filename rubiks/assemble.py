"""From settings to objects."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from rubiks import launched, trainers
from rubiks.data.datamodule import VideoDataModule
from rubiks.data.records import VideoRecord
from rubiks.data.videos import mirrored
from rubiks.data.views import TrainingViews
from rubiks.errors import InputError
from rubiks.evaluation.protocols import Protocol
from rubiks.experiment import Evaluation, Experiment, Training
from rubiks.files import check_writable
from rubiks.runs import Run
from rubiks.stopping import Stop
from rubiks.training.mixing import Mixing


def training_views(settings: Training, classes: Sequence[str]) -> TrainingViews:
    """How a training video is turned into views."""
    sampling = settings.data.sampling
    return TrainingViews(
        sampling.num_frames,
        sampling.size,
        settings.recipe.crop_scales,
        mirrored(sampling.flip, classes),
        sampling.clips_per_video,
        sampling.span,
        settings.augment,
    )


def training_data(
    settings: Training, train: Sequence[VideoRecord], val: Sequence[VideoRecord], views: TrainingViews
) -> VideoDataModule:
    """The data loaders for training."""
    settings.check_batch_statistics(len(train))
    batch_size, loading = settings.recipe.batch_size, settings.data.loading
    return VideoDataModule(
        train,
        val,
        views,
        settings.protocol_for(settings.data.sampling),
        batch_size,
        batch_size,
        loading,
        settings.seed,
        launched.share_of_cores(settings.processes[0]),
        loading.balanced,
    )


def evaluation_data(settings: Evaluation, videos: Sequence[VideoRecord], views: Protocol) -> VideoDataModule:
    """The data loader for evaluation."""
    size, loading = settings.batch_size, settings.data.loading
    sharing = launched.share_of_cores(settings.processes[0])
    return VideoDataModule([], videos, views, views, size, size, loading, settings.seed, sharing)


def trainer(settings: Experiment, callbacks: list[Callback], stop: Stop, **extra: Any) -> pl.Trainer:
    """Lightning's Trainer, without loggers; `extra` are further arguments of it."""
    return trainers.trainer(
        settings.trainer,
        settings.on_gpu,
        settings.precision,
        settings.process_timeout,
        callbacks,
        stop,
        **extra,
    )


def training_callbacks(settings: Training, run: Run, stop: Stop, keep_best: bool = True) -> list[Callback]:
    """What happens during training besides the steps; for `keep_best` see `Checkpoints`."""
    return trainers.training_callbacks(run, stop, settings.checkpoint, settings.trainer, settings.patience, keep_best)


def mixing(settings: Training, num_classes: int) -> Mixing | None:
    """What mixes the clips of a training batch; None if mixing is off."""
    chosen = settings.augment
    if not chosen.mixup and not chosen.cutmix:
        return None
    return Mixing(chosen.mixup, chosen.cutmix, num_classes, settings.seed)


def predictions_file(settings: Evaluation) -> Path | None:
    """Where an evaluation's scores go, if anywhere."""
    name = settings.save_predictions
    if name is None:
        return None
    if Path(name).suffix != ".npz":
        raise InputError(f"save_predictions must be the name of an .npz file, for example scores.npz; got {name!r}")
    check_writable(name)
    return Path(name)
