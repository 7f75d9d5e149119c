"""Lightning's Trainer: its settings and callbacks."""

from __future__ import annotations

import datetime
import inspect
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytorch_lightning as pl
import torch
from pydantic import ConfigDict, Field, model_validator
from pytorch_lightning.callbacks import Callback, RichProgressBar
from pytorch_lightning.profilers import AdvancedProfiler, Profiler, SimpleProfiler
from typing_extensions import Self

from rubiks import launched, processes
from rubiks.errors import InputError
from rubiks.runs import Run
from rubiks.settings import Count, Expected, Settings, unknown
from rubiks.stopping import Interrupted, Stop
from rubiks.training.callbacks import ProgressLines, Throughput
from rubiks.training.checkpointing import AtomicCheckpointIO, Checkpoints
from rubiks.training.distributed import AveragedGradients
from rubiks.training.nonfinite import SkipNonFinite
from rubiks.training.patience import Patience
from rubiks.training.pictures import ShiftPictures
from rubiks.training.profiling import StepProfile

PROFILE = "profile"  # the folder within a run's

# Lightning's arguments that other keys set.
_ELSEWHERE = ("self", "accelerator", "callbacks", "logger", "max_epochs", "precision", "plugins")


class TrainerSettings(Settings, section="trainer"):
    """Arguments of Lightning's Trainer. Others can be added: +trainer.detect_anomaly=true"""

    model_config = ConfigDict(extra="allow")

    devices: Any = Field(
        1,
        description="number of GPUs, or of processes on a CPU; or a list of GPUs; auto: all GPUs, or as many processes "
        "as torchrun or srun has started on each machine",
    )
    num_nodes: Count | None = Field(
        None, description="machines; null: as many as torchrun or srun has started processes on, else 1"
    )
    strategy: Any = Field(
        "auto", description="how several processes train; auto and ddp: with the mean of their gradients"
    )
    fast_dev_run: Any = Field(False, description="true: one batch of training and validation, nothing written")
    log_every_n_steps: Any = Field(10, description="optimiser steps between points of the curves")
    limit_train_batches: Any = Field(1.0, description="share or number of an epoch's batches to train on")
    limit_val_batches: Any = Field(1.0, description="the same for validation")
    check_val_every_n_epoch: Count = Field(1, description="epochs between validations; the last epoch is validated too")
    val_check_interval: Annotated[
        Count | Annotated[float, Field(gt=0, le=1)],
        Expected("a number of optimiser steps, or a share of an epoch above 0 and at most 1.0"),
    ] = Field(
        1.0,
        description="validate within an epoch too: every so many optimiser steps (a whole number), or after this share "
        "of it (0.25: four times); 1.0: at its end only",
    )
    max_steps: Literal[-1] | Count | None = Field(-1, description="stop after this many optimiser steps; -1: no limit")
    max_time: Any = Field(None, description="stop after this time, counted from each start: DD:HH:MM:SS")
    sync_batchnorm: Any = Field(False, description="true: batch statistics over all processes")
    deterministic: Any = Field(False, description="true: only deterministic algorithms")
    profiler: Literal["simple", "advanced", "pytorch"] | None = Field(
        None,
        description="where the time goes, in profile/ of the run's folder. simple: steps and hooks; advanced: Python "
        "functions; pytorch: operators and kernels of a few training batches, and a trace for ui.perfetto.dev",
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = [key for key in inspect.signature(pl.Trainer.__init__).parameters if key not in _ELSEWHERE]
        for key in self.model_extra or {}:
            if key not in known:
                raise InputError(unknown(self.section, key, known))
        return self

    def check_interval(self, steps: int) -> None:
        """Raise InputError if validation would wait for more optimiser steps than an epoch has."""
        if isinstance(self.val_check_interval, int) and self.val_check_interval > steps:
            raise InputError(
                f"trainer.val_check_interval must be at most the {steps:,} optimiser steps of an epoch, got "
                f"{self.val_check_interval}; to validate less often, set trainer.check_val_every_n_epoch"
            )

    def limit(self) -> int | None:
        """Optimiser steps after which training stops."""
        return None if self.max_steps == -1 else self.max_steps


class CheckpointSettings(Settings, section="checkpoint"):
    """When the state of training is saved, besides the end of each epoch."""

    every_n_steps: Count | None = Field(
        1000,
        description="optimiser steps between saves of the state within an epoch, the most that a power cut costs; "
        "null: only save at the end of epochs",
    )
    every_n_epochs: Count | None = Field(
        None,
        description="also keep the state after every so many epochs, as checkpoints/epoch-0010.ckpt and so on",
    )


def trainer(
    settings: TrainerSettings,
    gpu: bool,
    precision: Any,
    process_timeout: float,
    callbacks: list[Callback],
    stop: Stop,
    folder: Path | None = None,
    **extra: Any,
) -> pl.Trainer:
    """Lightning's Trainer, without loggers.

    Args:
        settings: its arguments.
        gpu: train on a GPU.
        precision: any of Lightning's, or auto: bf16-mixed on a GPU, 32-true on a CPU.
        process_timeout: seconds that processes wait for one another.
        callbacks: Lightning callbacks.
        stop: handles the signals.
        folder: of the run, for its profile; None: there is none.
        extra: further arguments of the Trainer.
    """
    arguments = dict(settings)
    # By `Checkpoints`: Lightning's own max_steps changes its schedule, and its interval may end within a step.
    for name in ("max_steps", "val_check_interval"):
        arguments.pop(name, None)
    arguments["profiler"] = _profiler(settings, folder)
    arguments["devices"], arguments["num_nodes"] = launched.counts(settings.devices, settings.num_nodes)
    if gpu:
        launched.check_gpus(torch.cuda.device_count())
    several = arguments["num_nodes"] > 1 or _several(arguments["devices"], gpu)
    if arguments["strategy"] == "ddp" or (arguments["strategy"] == "auto" and several):
        # The parent looks for processes that hang; NCCL's check is slow and prints a lot.
        patience = process_timeout + (300 if gpu else 0)
        arguments["strategy"] = AveragedGradients(timeout=datetime.timedelta(seconds=patience))
    bar = sys.stdout.isatty()
    try:
        made = pl.Trainer(
            **arguments,
            accelerator="gpu" if gpu else "cpu",
            precision=("bf16-mixed" if gpu else "32-true") if precision == "auto" else precision,
            benchmark=gpu,
            use_distributed_sampler=False,  # EpochSampler divides the list
            num_sanity_val_steps=1,
            enable_model_summary=False,
            enable_progress_bar=bar,
            callbacks=[
                *([_Tell()] if processes.member() else []),
                *callbacks,
                *([RichProgressBar()] if bar else []),
            ],
            logger=False,
            plugins=[AtomicCheckpointIO(), launched.environment()],
            **extra,
        )
    except (TypeError, ValueError, pl.utilities.exceptions.MisconfigurationException) as error:
        raise InputError(f"trainer, device or precision: {error}") from None
    launched.check(made.num_devices, made.num_nodes)
    # Lightning's SIGTERM handler sends to the other processes and waits for them inside the handler, which hangs;
    # and its check for signals waits for all processes and their GPUs in every step.
    made._signal_connector.register_signal_handlers = stop.install  # type: ignore[method-assign]
    made.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return made


def _profiler(settings: TrainerSettings, folder: Path | None) -> Profiler | None:
    """Lightning's own profilers; `StepProfile` is a callback."""
    kind = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}.get(settings.profiler or "")
    return None if kind is None or folder is None else kind(folder / PROFILE, settings.profiler)


def profiles(folder: Path) -> list[Path]:
    """The tables that profilers have written in a run's folder, one for each process and kind."""
    return sorted((folder / PROFILE).glob("*.txt"))


def _several(devices: Any, gpu: bool) -> bool:
    """Whether trainer.devices means more than one, in any form that Lightning accepts."""
    if devices in ("auto", -1, "-1"):
        return gpu and torch.cuda.device_count() > 1
    if isinstance(devices, (list, tuple)):
        return len(devices) > 1
    return devices != 1 and devices != "1"


class _Tell(Callback):
    """Tells the other processes that this one fails, before it waits for others that wait for it."""

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        member = processes.member()
        # Only our parent passes a signal on; otherwise its message is still to come.
        if member is not None and (processes.is_child() or not isinstance(exception, Interrupted)):
            member.report(exception)


def starts_processes(trainer: pl.Trainer) -> bool:
    """Whether this process starts others that train, instead of training itself."""
    return trainer.num_devices > 1 and not launched.environment().creates_processes_externally


def training_callbacks(
    run: Run,
    stop: Stop,
    saving: CheckpointSettings,
    settings: TrainerSettings,
    patience: int | None = None,
    keep_best: bool = True,
) -> list[Callback]:
    """The callbacks of a training.

    Args:
        run: the run.
        stop: handles the signals.
        saving: when the state is saved.
        settings: when training stops, and when it is validated.
        patience: validations in a row without a better one after which training stops; None: no limit.
        keep_best: see `Checkpoints`.
    """
    non_finite = SkipNonFinite()
    callbacks: list[Callback] = [
        Throughput(),
        ProgressLines(bar=sys.stdout.isatty()),
        ShiftPictures(run.folder / "shifts"),
        non_finite,
        Checkpoints(
            run,
            stop,
            non_finite,
            max_steps=settings.limit(),
            val_check_interval=settings.val_check_interval,
            keep_best=keep_best,
            **dict(saving),
        ),
    ]
    if settings.profiler == "pytorch":
        callbacks.append(StepProfile(run.folder / PROFILE))
    if patience is not None:
        callbacks.append(Patience(patience, keep_best))
    return callbacks


def checkpoints(trainer: pl.Trainer) -> Checkpoints:
    """The trainer's callback that saves the state."""
    found = trainer.checkpoint_callback
    assert isinstance(found, Checkpoints)
    return found


def reason(settings: TrainerSettings, trainer: pl.Trainer) -> str:
    """Which key of the configuration stopped training before its last epoch."""
    limit = settings.limit()
    if limit is not None and trainer.global_step >= limit:
        return f" (trainer.max_steps={limit})"
    early = trainer.early_stopping_callback
    if isinstance(early, Patience) and early.exhausted:
        return f" (patience={early.patience}: validation top-1 has not risen for so many validations)"
    return "" if settings.max_time is None else f" (trainer.max_time={settings.max_time})"
