"""Lightning's Trainer and its callbacks follow the configuration."""

from __future__ import annotations

import datetime

import pytest
import pytorch_lightning as pl
import torch
from configurations import configuration, training
from made import Made
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

from rubiks import tracking, trainers
from rubiks.runs import Run
from rubiks.stopping import Stop
from rubiks.trainers import TrainerSettings
from rubiks.training.checkpointing import AtomicCheckpointIO, Checkpoints
from rubiks.training.distributed import AveragedGradients


def trainer_of(*choices, **changes) -> pl.Trainer:
    return Made(configuration("device=cpu", *choices, **changes)).trainer


def test_a_rehearsal():
    assert trainer_of(trainer__fast_dev_run=True).fast_dev_run
    assert not trainer_of().fast_dev_run


def test_what_no_key_decides():
    trainer = trainer_of()
    assert trainer.precision == "32-true"
    assert trainer.num_sanity_val_steps == 1
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    assert trainer.loggers == []


def test_who_starts_the_processes(monkeypatch):
    assert not trainers.starts_processes(trainer_of())
    two = trainer_of(trainer__devices=2)
    assert trainers.starts_processes(two)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    assert not trainers.starts_processes(two)


def test_deterministic_algorithms():
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        trainer_of(trainer__deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_batch_norm_is_synchronised_only_if_asked_for():
    for wanted in (False, True):
        strategy = trainer_of(trainer__strategy="ddp", trainer__sync_batchnorm=wanted).strategy
        assert (strategy._layer_sync is not None) == wanted


def test_other_arguments_of_lightning_can_be_added():
    assert trainer_of("+trainer.detect_anomaly=true")._detect_anomaly


@pytest.mark.parametrize(
    ("device", "there", "gpu"),
    [("auto", True, True), ("auto", False, False), ("cpu", True, False), ("gpu", True, True)],
)
def test_the_device(device, there, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert training(device=device).on_gpu is gpu


@pytest.mark.parametrize(("devices", "several"), [(1, False), ("1", False), ("auto", False), (2, True), ("2", True)])
def test_several_processes_average_gradients_and_wait_as_long_as_said(devices, several):
    trainer = trainer_of(trainer__devices=devices, process_timeout=34)
    assert isinstance(trainer.strategy, AveragedGradients) == several
    if several:
        assert trainer.num_devices == 2
        assert trainer.strategy._timeout == datetime.timedelta(seconds=34)


def test_steps_do_not_end_training_for_lightning_which_would_schedule_otherwise():
    trainer = trainer_of(trainer__max_steps=5)
    assert (trainer.max_steps, trainer.max_epochs) == (-1, 3)
    assert trainers.checkpoints(trainer).max_steps == 5
    for none in (-1, None):
        assert trainers.checkpoints(trainer_of(trainer__max_steps=none)).max_steps is None


def test_callbacks_know_the_run_and_the_signals(tmp_path):
    saving, stop, run = training(checkpoint__every_n_steps=None).checkpoint, Stop(), Run(tmp_path)
    for keep_best in (True, False):
        callbacks = trainers.training_callbacks(run, stop, saving, TrainerSettings(), keep_best=keep_best)
        (found,) = [callback for callback in callbacks if isinstance(callback, Checkpoints)]
        assert (found.run, found.stop, found.keep_best) == (run, stop, keep_best)
        assert (found.every_n_steps, found.every_n_epochs) == (None, None)
        assert found.non_finite in callbacks
        assert not any(isinstance(callback, EarlyStopping) for callback in callbacks)


def test_patience_is_with_the_validation_top1():
    (early,) = [c for c in trainer_of(patience=4).callbacks if isinstance(c, EarlyStopping)]
    assert (early.monitor, early.mode, early.patience, early.keep_best) == ("val/top1", "max", 4, True)


@pytest.mark.parametrize(("csv", "tensorboard"), [(True, False), (False, True), (True, True), (False, False)])
def test_loggers(csv, tensorboard, tmp_path):
    settings = training("logger=csv", logger__csv=csv, logger__tensorboard=tensorboard).logger
    kinds = [type(logger) for logger in tracking.loggers(settings, Run(tmp_path), {}, True)]
    assert kinds == [kind for kind, on in ((CSVLogger, csv), (TensorBoardLogger, tensorboard)) if on]
