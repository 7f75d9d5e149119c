"""The settings of training and evaluation, composed from the settings of their parts and checked together."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, InstanceOf, model_validator
from typing_extensions import Self

from rubiks import launched
from rubiks.data.augment import Augment
from rubiks.data.catalog import Data, data_settings
from rubiks.data.datamodule import Loading, TrainingLoading
from rubiks.data.sampling import AsTrained, Sampling, TrainingSampling
from rubiks.errors import InputError
from rubiks.evaluation.protocols import Protocol, ProtocolSettings
from rubiks.evaluation.scorer import FrameOrder
from rubiks.models import TIERS, VARIANTS
from rubiks.models.inflation import RULES
from rubiks.models.rubiksnet import STRIDE
from rubiks.settings import MOST, Count, Expected, Name, Settings
from rubiks.tracking import EvaluationLoggerSettings, LoggerSettings
from rubiks.trainers import CheckpointSettings, TrainerSettings
from rubiks.training.aq import AttentionSchedule
from rubiks.training.recipe import Recipe


class TierSettings(Settings, section="tier"):
    """The size of the network."""

    name: Literal[tuple(TIERS)] = Field(description="larger is better and slower")  # type: ignore[valid-type]


class VariantSettings(Settings, section="variant"):
    """The kind of shifts in the network."""

    name: Literal[tuple(VARIANTS)] = Field(description="how channels are shifted")  # type: ignore[valid-type]


class Experiment(Settings):
    """The settings that training and evaluation share."""

    run: Any = Field(description="name of the run's folder, outputs/RUN")
    protocol: ProtocolSettings
    trainer: TrainerSettings = TrainerSettings()
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="auto: a GPU if there is one")
    precision: Any = Field(
        "auto", description="auto: bf16-mixed on a GPU, 32-true on a CPU; or any precision of Lightning's Trainer"
    )
    seed: Annotated[int, Field(ge=0, le=MOST)] = Field(0, description="seed of weights, order, frames and augmentation")
    process_timeout: Annotated[
        float, Field(gt=0, le=1_000_000), Expected("a number of seconds above 0 and at most 1,000,000")
    ] = Field(600, description="with several processes: seconds to wait for one that hangs before all are stopped")

    connect_timeout: Annotated[
        float, Field(gt=0, le=1_000_000), Expected("a number of seconds above 0 and at most 1,000,000")
    ] = Field(120, description="with several processes: seconds for all to connect, and for a first all-reduce")

    @property
    def on_gpu(self) -> bool:
        """Whether to run on a GPU."""
        if self.device == "gpu" and not torch.cuda.is_available():
            raise InputError("device=gpu, but PyTorch finds no GPU; use device=cpu or install PyTorch for CUDA")
        return self.device != "cpu" and torch.cuda.is_available()

    @property
    def processes(self) -> tuple[int, int]:
        """Processes on each machine, and machines."""
        devices, nodes = launched.counts(self.trainer.devices, self.trainer.num_nodes)
        return max(1, devices if isinstance(devices, int) else torch.cuda.device_count()), nodes

    def protocol_for(self, sampling: Sampling) -> Protocol:
        """The protocol for a network whose clips are sampled this way; InputError if they do not fit together."""
        return self.protocol.protocol(sampling.num_frames, sampling.size, sampling.sampling, sampling.window)


class Training(Experiment):
    """All settings of train.py."""

    NAME: ClassVar = "train"
    DATA: ClassVar = (TrainingSampling, TrainingLoading)  # what the section `data` has besides its source

    tier: TierSettings
    variant: VariantSettings
    causal: bool = Field(
        False, description="no shift reads a later frame, so that the network can classify frame by frame (net.stream)"
    )
    aq: AttentionSchedule | None = None
    data: Annotated[InstanceOf[Data], BeforeValidator(lambda values: data_settings(values, *Training.DATA))]
    recipe: Recipe
    augment: Augment = Augment()
    logger: LoggerSettings = LoggerSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    patience: Count | None = Field(
        None,
        description="stop when validation top-1 has not risen for this many validations in a row; with aq, only those "
        "after the choice count",
    )
    init: Name | None = Field(
        None,
        description="network to start from: as for ckpt of rubiks eval, without latest; gets a new classifier if the "
        "classes differ",
    )
    init_temporal: Literal[RULES] = Field(  # type: ignore[valid-type]
        "tsm",
        description="initial temporal shifts, if init is a rubiks2d network and the variant is not. tsm: an eighth of "
        "the channels one frame back, an eighth one frame ahead; uniform: small random shifts; zero: none",
    )
    cuda_graphs: bool = Field(
        True,
        description="on a GPU, record a training step's kernels and launch them together, if the fused blocks run; "
        "false: launch them one by one, which uses less memory between steps",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        sampling = self.data.sampling
        self.protocol_for(sampling)
        if sampling.span is None and self.augment.temporal_jitter:
            raise InputError(
                "augment.temporal_jitter=true needs data.sampling=dense; data.sampling=uniform takes a random frame "
                "from each segment anyway. Change one of them"
            )
        if self.recipe.ema_decay is not None and str(self.precision) in ("16-true", "bf16-true"):
            raise InputError(
                f"recipe.ema_decay needs weights of 32 bits, as precision=bf16-mixed has them, got "
                f"precision={self.precision}, in which the small steps of the average would be rounded away"
            )
        return self

    def check_batch_statistics(self, videos: int) -> None:
        """Raise InputError if a batch of so many training videos leaves batch norm a single value per channel.

        One value has no variance. This happens only in the last stage, for a batch of one clip of one frame.
        """
        sampling, processes = self.data.sampling, math.prod(self.processes)
        if processes > 1 and self.trainer.sync_batchnorm:
            return
        batch = min(self.recipe.batch_size, videos // processes)
        if batch * sampling.clips_per_video * sampling.num_frames == 1 and sampling.size <= STRIDE:
            of = f" (of {videos:,} videos, on {processes} processes)" if batch < self.recipe.batch_size else ""
            raise InputError(
                f"data.size={sampling.size}, data.num_frames=1, data.clips_per_video=1 and "
                f"recipe.batch_size={self.recipe.batch_size}{of} leave batch norm a single value per channel in the "
                f"last stage, too few to train on; raise data.size above {STRIDE}, or one of the others above 1"
            )


class Evaluation(Experiment):
    """All settings of eval.py. Tier and variant come from the checkpoint."""

    NAME: ClassVar = "eval"
    DATA: ClassVar = (AsTrained, Loading)

    tier: TierSettings | None = None
    variant: VariantSettings | None = None
    aq: AttentionSchedule | None = None  # comes with variant=rubiks3d-aq; only training uses it
    data: Annotated[InstanceOf[Data], BeforeValidator(lambda values: data_settings(values, *Evaluation.DATA))]
    ckpt: Name | None = Field(
        "latest",
        description="a checkpoint, ours or official, a run's or a saved network's folder, an exported file, or latest",
    )
    logger: EvaluationLoggerSettings = EvaluationLoggerSettings()
    batch_size: Count = Field(16, description="videos per batch")
    frame_order: FrameOrder = Field("natural", description="order of the frames in time; another one is no score")
    temporal: bool = Field(
        False,
        description="also score each video with its frames reversed and shuffled: how much of the score is time?",
    )
    report: bool = Field(True, description="write report.html, with previews of notable videos")
    save_predictions: Annotated[str, Expected("the name of an .npz file, for example scores.npz")] | None = Field(
        None, description="FILE.npz to write: logits (videos, classes), labels, and names as in the list"
    )

    @property
    def orders(self) -> tuple[FrameOrder, ...]:
        """The orders of frames in which videos are scored; the first gives the score."""
        return ("natural", "reversed", "shuffled") if self.temporal else (self.frame_order,)

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.temporal and self.frame_order != "natural":
            raise InputError(
                f"temporal=true scores frames in all orders, and frame_order={self.frame_order} in one; leave one out"
            )
        if self.trainer.profiler is not None:
            raise InputError(f"trainer.profiler={self.trainer.profiler} is for training; leave it out")
        return self
