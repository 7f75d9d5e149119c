"""Batches: the same for any number of workers, exact division among processes, unreadable videos counted."""

from __future__ import annotations

import os
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from videos import moving_square, write_video

from rubiks.data.datamodule import VideoDataModule
from rubiks.data.dataset import EpochSampler
from rubiks.data.records import Span, VideoRecord
from rubiks.data.views import TrainingViews
from rubiks.errors import InputError
from rubiks.evaluation.protocols import Protocol


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        write_video(folder / f"{number}.mp4", moving_square(10 + 3 * number, height=48, width=64))
    return [VideoRecord(str(folder / f"{number}.mp4"), number % 3) for number in range(7)]


def data_module(train, val=(), workers=0, **options) -> VideoDataModule:
    views = TrainingViews(4, 32, (1.0, 0.875, 0.75), flip=True)
    return VideoDataModule(train, val, views, Protocol("one_clip", 1, 1, 4, 32), 2, 3, workers, seed=5, **options)


def batches(data: VideoDataModule, epoch: int) -> list[dict]:
    data.load_state_dict({"epoch": epoch, "batch": 0})
    return list(data.train_dataloader())


def test_batches_do_not_depend_on_the_number_of_workers(records):
    reference = batches(data_module(records), epoch=1)
    assert len(reference) == 3  # the seventh video would be a batch of its own
    assert reference[0]["views"].shape == (2, 1, 4, 3, 32, 32)
    assert reference[0]["views"].dtype == torch.uint8
    for workers in (1, 2):
        for expected, actual in zip(reference, batches(data_module(records, workers=workers), epoch=1), strict=True):
            assert torch.equal(expected["index"], actual["index"])
            assert torch.equal(expected["views"], actual["views"])
    other = batches(data_module(records), epoch=2)
    assert any(not torch.equal(a["index"], b["index"]) for a, b in zip(reference, other, strict=True))


def test_evaluation_batches_hold_every_video_once_in_order(records):
    loader = data_module([], records).val_dataloader()
    assert [index for batch in loader for index in batch["index"].tolist()] == list(range(7))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
def test_processes_share_the_list(length, world_size, epoch):
    def shares(training):
        samplers = [EpochSampler(length, training, 3, rank, world_size) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        lists = [[index for _, index in sampler] for sampler in samplers]
        assert [len(sampler) for sampler in samplers] == [len(part) for part in lists]
        return lists

    evaluation = shares(training=False)
    assert sorted(chain.from_iterable(evaluation)) == list(range(length))
    training = shares(training=True)
    seen = list(chain.from_iterable(training))
    assert len({len(part) for part in training}) == 1
    assert len(set(seen)) == len(seen)
    assert len(seen) > length - world_size


def test_a_resumed_epoch_leaves_out_what_was_seen():
    sampler = EpochSampler(20, training=True, seed=1)
    sampler.set_epoch(3)
    whole = list(sampler)
    sampler.set_epoch(0)
    sampler.resume(3, 8)
    assert list(sampler) == whole[8:]
    assert [epoch for epoch, _ in sampler] == [0] * 20


@pytest.fixture
def damaged(records, tmp_path):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video")
    bad = [VideoRecord(str(tmp_path / name), 0) for name in ("empty.mp4", "text.mp4", "gone.mp4")]
    return records[:3] + bad + records[3:]


class Stage:
    """Stands for the trainer where only the stage is asked for."""

    def __init__(self, training: bool) -> None:
        self.training = training


def pass_all(data: VideoDataModule, loader) -> list[dict]:
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


def test_unreadable_videos_are_left_out_counted_and_named(damaged, caplog):
    data = data_module([], damaged, on_error="skip", max_bad=0.5)
    loader = data.val_dataloader()
    data.trainer = Stage(training=False)
    seen = pass_all(data, loader)
    assert sorted(index for batch in seen for index in batch["index"].tolist()) == [0, 1, 2, 6, 7, 8, 9]
    assert len(seen[1]["label"]) == 0  # all three of the second batch
    assert {np.char.rpartition(path, "/")[-1].item() for path in data.bad["val"]} == {
        "empty.mp4",
        "text.mp4",
        "gone.mp4",
    }
    assert "empty.mp4" in caplog.text
    pass_all(data, loader)
    assert len(data.bad["val"]) == 3  # each counts once


def test_too_many_unreadable_videos_end_the_run(damaged):
    data = data_module([], damaged, on_error="skip", max_bad=0.25)
    loader = data.val_dataloader()
    data.trainer = Stage(training=False)
    with pytest.raises(InputError, match=r"3 of the 10 val videos.*data\.max_bad=0\.25"):
        pass_all(data, loader)


def test_with_raise_the_first_unreadable_video_ends_the_run(damaged):
    data = data_module([], damaged, on_error="raise")
    loader = data.val_dataloader()
    data.trainer = Stage(training=False)
    with pytest.raises(InputError, match=r"empty\.mp4: is empty.*data\.on_error=skip"):
        pass_all(data, loader)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_video_that_hangs_is_given_up_and_named(records, tmp_path, workers):
    # Opening a pipe that nobody writes to blocks for ever, within the operating system.
    os.mkfifo(tmp_path / "pipe")
    stuck = VideoRecord("stuck.mp4", 0, span=Span(str(tmp_path / "pipe"), 0, 100))
    listed = [records[0], stuck, *records[1:]]
    data = data_module([], listed, workers, on_error="skip", max_bad=0.2, timeout=0.5)
    loader = data.val_dataloader()
    data.trainer = Stage(training=False)
    seen = [index for batch in pass_all(data, loader) for index in batch["index"].tolist()]
    assert sorted(seen) == [0, 2, 3, 4, 5, 6, 7]
    assert list(data.bad["val"]) == ["stuck.mp4"]
    assert "data.timeout=0.5" in data.bad["val"]["stuck.mp4"]
    data.on_error = "raise"
    with pytest.raises(InputError, match=r"stuck\.mp4: was not read within data\.timeout"):
        pass_all(data, loader)
