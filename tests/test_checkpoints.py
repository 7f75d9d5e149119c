"""When a training's state is saved: the hooks one by one, between two optimiser steps and nowhere else."""

from __future__ import annotations

import itertools
import signal
from types import SimpleNamespace

import pytest

from rubiks.errors import InputError
from rubiks.runs import Run
from rubiks.stopping import Interrupted, Stop
from rubiks.training.checkpointing import Checkpoints


@pytest.fixture
def hooks(tmp_path, monkeypatch):
    """`Checkpoints` whose saves only record the optimiser step; settings as keywords."""

    def make(**settings) -> Checkpoints:
        made = Checkpoints(Run(tmp_path), Stop(), SimpleNamespace(check=lambda *_: None), **settings)
        made.saved = []

        def save(trainer, module, epoch_over=False, validates=False):
            made.saved.append(trainer.global_step)
            made._saved_at = trainer.global_step

        monkeypatch.setattr(made, "_save_last", save)
        return made

    return make


MODULE = SimpleNamespace(start=None)


def state(**values) -> SimpleNamespace:
    """A trainer as the hooks see it: an epoch of ten batches, two a step."""
    batches = values.pop("batches", (4, 4))  # begun, done
    progress = SimpleNamespace(current=SimpleNamespace(started=batches[0], completed=batches[1]))
    defaults = {
        "accumulate_grad_batches": 2,
        "num_training_batches": 10,
        "global_step": 5,
        "world_size": 1,
        "training": True,
        "sanity_checking": False,
        "should_stop": False,
        "current_epoch": 1,
        "max_epochs": 3,
        "check_val_every_n_epoch": 2,
    }
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    return SimpleNamespace(fit_loop=loop, **defaults | values)


def test_an_error_leaves_a_state_only_where_it_is_exact(hooks):
    """With one process, in training, between two steps, and only if there is something new."""
    for world_size, training, patient, step, (begun, done), per_step in itertools.product(
        (1, 2), (True, False), (True, False), (3, 4, 5), ((4, 4), (5, 4), (5, 5), (11, 11), (9, 9), (10, 10)), (1, 2, 3)
    ):
        made = hooks()
        made._saved_at, made.stop.patient = 4, patient
        last = done >= 10  # the epoch's end also ends a step, however few batches it has
        exact = begun == done and (done % per_step == 0 or last)
        trainer = state(
            world_size=world_size, training=training, global_step=step, batches=(begun, done),
            accumulate_grad_batches=per_step,
        )  # fmt: skip
        made.on_exception(trainer, None, ValueError())
        wanted = [step] if world_size == 1 and training and patient and step == 5 and exact else []
        assert made.saved == wanted, (world_size, training, patient, step, begun, done, per_step)
        assert made.stop.patient is False


def test_an_error_in_saving_does_not_hide_the_first(hooks, monkeypatch):
    made = hooks()
    made.stop.patient = True

    def fail(*_):
        raise InputError("the disk is full")

    monkeypatch.setattr(made, "_save_last", fail)
    made.on_exception(state(), None, ValueError())
    assert made.stop.patient is False


def test_the_state_is_saved_every_so_many_steps_at_the_beginning_of_a_step(hooks):
    made = hooks(every_n_steps=3)
    made.on_train_start(state(global_step=100), MODULE)
    for batch in range(20):  # two batches a step
        made.on_train_batch_start(state(global_step=100 + batch // 2), None, None, batch)
    assert made.saved == [103, 106, 109]
    never = hooks(every_n_steps=None)
    for batch in range(20):
        never.on_train_batch_start(state(global_step=5000 + batch), None, None, batch)
    assert never.saved == []


def test_a_signal_waits_for_the_step(hooks):
    made = hooks()
    made.on_train_start(state(), MODULE)
    assert made.stop.patient is True  # from here on, signals are only noted
    made.stop.signal = signal.SIGTERM
    made.on_train_batch_start(state(), None, None, 3)  # within a step of two batches
    assert made.saved == []
    with pytest.raises(Interrupted) as caught:
        made.on_train_batch_start(state(global_step=7), None, None, 4)
    assert (made.saved, caught.value.signal) == ([7], signal.SIGTERM)
    made.on_train_end(state(), None)
    assert made.stop.patient is False  # and no longer


@pytest.mark.parametrize("sanity_checking", [True, False])
@pytest.mark.parametrize("number", [None, signal.SIGUSR1])
def test_a_signal_ends_a_validation_at_once(number, sanity_checking, hooks):
    made = hooks()
    made.stop.signal = number
    act = lambda: made.on_validation_batch_start(state(sanity_checking=sanity_checking), None, None, 0)  # noqa: E731
    if number is None or sanity_checking:
        act()
    else:
        with pytest.raises(Interrupted):
            act()
    assert made.saved == []


def test_the_state_before_a_validation_is_saved_between_steps(hooks):
    for done, sanity_checking, wanted in ((4, False, [5]), (5, False, []), (10, False, [5]), (4, True, [])):
        made = hooks()
        made.on_validation_start(state(batches=(done, done), sanity_checking=sanity_checking), None)
        assert made.saved == wanted


def test_training_stops_at_the_end_of_a_step(hooks):
    for max_steps, asked, batch, wanted in (
        (5, False, 3, True),  # four batches, two steps
        (6, False, 3, False),
        (None, False, 3, False),
        (5, False, 2, False),  # within a step
        (None, True, 2, False),
        (None, True, 3, True),
        (None, True, 9, True),
    ):
        trainer = state(should_stop=asked)
        hooks(max_steps=max_steps).on_train_batch_end(trainer, None, None, None, batch)
        assert trainer.should_stop is wanted, (max_steps, asked, batch)


@pytest.mark.parametrize(("epoch", "every"), [(0, 2), (1, 2), (2, 1)])
def test_the_last_epoch_is_validated(epoch, every, hooks):
    for hook in ("on_train_start", "on_train_epoch_start"):
        trainer = state(current_epoch=epoch)
        getattr(hooks(), hook)(trainer, MODULE)
        assert trainer.check_val_every_n_epoch == every
