"""From a configuration to Lightning's Trainer, and what it is to do besides the steps."""

from __future__ import annotations

import datetime
import inspect
import sys
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.callbacks import Callback, EarlyStopping, RichProgressBar
from pytorch_lightning.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from rubiks import launched, processes
from rubiks.assemble import on_gpu, one_of, plain, whole_number
from rubiks.errors import InputError
from rubiks.runs import Run
from rubiks.stopping import Stop
from rubiks.training.callbacks import ProgressLines, Throughput
from rubiks.training.checkpointing import AtomicCheckpointIO, Checkpoints
from rubiks.training.nonfinite import SkipNonFinite
from rubiks.training.pictures import ShiftPictures


def trainer(cfg: DictConfig, callbacks: list[Callback], stop: Stop, **extra: Any) -> pl.Trainer:
    """Lightning's Trainer with the configured arguments, without loggers; `stop` handles the signals."""
    gpu = on_gpu(cfg)
    arguments = plain(cfg.trainer)
    elsewhere = {"accelerator", "callbacks", "logger", "max_epochs", "precision", "plugins"}  # other keys decide
    known = [key for key in inspect.signature(pl.Trainer).parameters if key not in elsewhere]
    for key in arguments:
        one_of("a key of trainer", key, tuple(known))
    arguments.pop("max_steps", None)  # `Checkpoints` stops then; Lightning would schedule otherwise
    several = arguments["num_nodes"] > 1 or _several(arguments["devices"], gpu)
    if arguments["strategy"] == "ddp" or (arguments["strategy"] == "auto" and several):
        # Each process keeps its own batch statistics; validation uses those of the first (VideoClassifier).
        known_to_ddp = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in known_to_ddp else "broadcast_buffers"  # before 2.15
        options: dict[str, Any] = {name: False}
        # The parent of the processes looks for those that hang; NCCL itself takes long over it, and prints much.
        patience = process_timeout(cfg) + (300 if gpu else 0)
        arguments["strategy"] = DDPStrategy(timeout=datetime.timedelta(seconds=patience), **options)
    bar = sys.stdout.isatty()
    try:
        made = pl.Trainer(
            **arguments,
            accelerator="gpu" if gpu else "cpu",
            precision=("bf16-mixed" if gpu else "32-true") if cfg.precision == "auto" else cfg.precision,
            benchmark=gpu,
            use_distributed_sampler=False,  # EpochSampler divides the list
            num_sanity_val_steps=1,
            enable_model_summary=False,
            enable_progress_bar=bar,
            callbacks=[
                *([_Tell()] if processes.is_child() else []),
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
    # Lightning's handler of SIGTERM sends to the other processes and waits for them, within the handler, which hangs;
    # and its look for signals waits in every step for all processes and their GPUs.
    made._signal_connector.register_signal_handlers = stop.install  # type: ignore[method-assign]
    made.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return made


def _several(devices: Any, gpu: bool) -> bool:
    """Whether trainer.devices means more than one, in any way that Lightning knows to write it."""
    if devices in ("auto", -1, "-1"):
        return gpu and torch.cuda.device_count() > 1
    if isinstance(devices, (list, tuple)):
        return len(devices) > 1
    return devices != 1 and devices != "1"


class _Tell(Callback):
    """Tells the parent of several processes that this one fails, before it waits for others that wait for it."""

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        processes.report(exception)


def process_timeout(cfg: DictConfig) -> float:
    """Seconds that processes wait for one another."""
    value = cfg.process_timeout
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1_000_000:
        raise InputError(f"process_timeout must be a number of seconds above 0 and at most 1,000,000, got {value!r}")
    return value


def starts_processes(trainer: pl.Trainer) -> bool:
    """Whether this process is to start others that train, and not to train itself."""
    return trainer.num_devices > 1 and not launched.environment().creates_processes_externally


def training_callbacks(cfg: DictConfig, run: Run, stop: Stop, keep_best: bool) -> list[Callback]:
    """What happens in a training besides the steps; for `keep_best` see `Checkpoints`."""
    every: dict[str, int | None] = {}
    for key in ("every_n_steps", "every_n_epochs"):
        value = cfg.checkpoint[key]
        every[key] = None if value is None else whole_number(f"checkpoint.{key}", value, 1)
    non_finite = SkipNonFinite()
    callbacks: list[Callback] = [
        Throughput(),
        ProgressLines(bar=sys.stdout.isatty()),
        ShiftPictures(run.folder / "shifts"),
        non_finite,
        Checkpoints(run, stop, non_finite, max_steps=max_steps(cfg), keep_best=keep_best, **every),
    ]
    if cfg.patience is not None:
        patience = whole_number("patience", cfg.patience, 1)
        callbacks.append(EarlyStopping("val/top1", mode="max", patience=patience, verbose=False))
    return callbacks


def max_steps(cfg: DictConfig) -> int | None:
    """Optimiser steps after which training stops."""
    steps = cfg.trainer.max_steps
    return None if steps in (-1, None) else whole_number("trainer.max_steps", steps, 1)


def checkpoints(trainer: pl.Trainer) -> Checkpoints:
    """The trainer's callback that saves its state."""
    found = trainer.checkpoint_callback
    assert isinstance(found, Checkpoints)
    return found


def reason(cfg: DictConfig, trainer: pl.Trainer) -> str:
    """Why training has stopped before its last epoch, as a key of the configuration."""
    limit = max_steps(cfg)
    if limit is not None and trainer.global_step >= limit:
        return f" (trainer.max_steps={limit})"
    early = trainer.early_stopping_callback
    if early is not None and early.stopped_epoch:
        return f" (patience={cfg.patience}: validation top-1 has not risen for so many epochs)"
    return "" if cfg.trainer.max_time is None else f" (trainer.max_time={cfg.trainer.max_time})"
