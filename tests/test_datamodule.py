"""Batches: the same for any number of workers, exact division among processes, unreadable videos counted."""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset
from videos import decode_in_order, moving_square, write_video

from rubiks.data.augment import Augment
from rubiks.data.batches import Loader, PinnedCollate, SharedBatch, collate
from rubiks.data.datamodule import VideoDataModule
from rubiks.data.dataset import EpochSampler, VideoDataset
from rubiks.data.records import Span, VideoRecord
from rubiks.data.views import TrainingViews
from rubiks.errors import InputError, VideoError
from rubiks.evaluation.protocols import Protocol


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for number in range(7):
        write_video(folder / f"{number}.mp4", moving_square(10 + 3 * number, height=48, width=64))
    return [VideoRecord(str(folder / f"{number}.mp4"), number % 3) for number in range(7)]


# Everything that draws random numbers for a sample.
ALL = TrainingViews(
    4,
    32,
    (1.0,),
    flip=[1, 0, 2],
    clips=2,
    window=9,
    augment=Augment((0.3, 1.0), color_jitter=0.4, rand_augment=2, random_erasing=0.5, temporal_jitter=True),
)


def data_module(train, val=(), workers=0, views=None, **options) -> VideoDataModule:
    views = views or TrainingViews(4, 32, (1.0, 0.875, 0.75), flip=[0, 1, 2])
    return VideoDataModule(train, val, views, Protocol("one_clip", 1, 1, 4, 32), 2, 3, workers, seed=5, **options)


def batches(data: VideoDataModule, epoch: int) -> list[dict]:
    data.start_at(epoch, 0)
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


class Numbers(Dataset):
    """Samples whose views are full of their number; every fifth cannot be read, and late ones are larger."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, number: int) -> dict | VideoError:
        if number % 5 == 4:
            return VideoError(f"{number}.mp4", "broken")
        side = 16 if number < 60 else 32
        views = torch.full((1, 2, side, side, 3), number, dtype=torch.uint8).movedim(-1, 2)
        return {"views": views, "label": [number], "index": number}


def numbers(collate_fn, workers: int = 2, prefetch: int = 2) -> DataLoader:
    return DataLoader(
        Numbers(), 3, num_workers=workers, prefetch_factor=prefetch, persistent_workers=True, collate_fn=collate_fn
    )


@pytest.mark.parametrize("breaks_off", [False, True])
def test_memory_that_workers_use_again_holds_each_batch_until_it_is_copied(monkeypatch, breaks_off):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(SharedBatch, "_mapped", defaultdict(dict))
    expected = list(numbers(collate))
    loader = numbers(PinnedCollate(2))
    if breaks_off:  # and begins again, with batches under way
        next(iter(loader))
    found = []
    for number, batch in enumerate(loader):
        time.sleep(0.02 * (number % 3 == 0))  # so that workers are ahead
        found.append(batch.pin_memory())
    for ours, theirs in zip(found, expected, strict=True):
        assert ours["bad"] == theirs["bad"]
        assert all(torch.equal(ours[name], theirs[name]) for name in ("views", "label", "index"))
        assert ours["views"].stride() == theirs["views"].stride()
    assert len(SharedBatch._mapped) == 2
    assert all(len(slots) == 3 for slots in SharedBatch._mapped.values())


def test_memory_of_workers_that_have_ended_is_let_go(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(SharedBatch, "_mapped", defaultdict(dict))
    workers = []
    for _ in range(2):
        loader = numbers(PinnedCollate(2), workers=1)
        workers += {batch.worker for batch in loader if batch.pin_memory()}
        del loader
    assert list(SharedBatch._mapped) == workers[1:]


def test_waiting_is_the_time_that_making_a_batch_takes(monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    class Slow(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            nonlocal now
            now += 3.0 + index
            return index

    loader = Loader(Slow(), batch_size=2)
    waited = []
    for _ in loader:
        waited.append(loader.waited)
        now += 100.0  # what its user does with the batch
    assert waited == [3.0 + 4.0, 5.0 + 6.0]


def test_evaluation_batches_hold_every_video_once_in_order(records):
    loader = data_module([], records).val_dataloader()
    assert [index for batch in loader for index in batch["index"].tolist()] == list(range(7))


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3))
def test_processes_share_the_list(length, world_size, epoch):
    def shares(training):
        samplers = [EpochSampler(length, training, 3, rank, world_size) for rank in range(world_size)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        lists = [[index for _, index, _ in sampler] for sampler in samplers]
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
    sampler.start_at(3, 8)
    assert list(sampler) == whole[8:]
    assert [epoch for epoch, _, _ in sampler] == [0] * 20


@pytest.mark.parametrize("world_size", [1, 3])
def test_balanced_epochs_have_each_class_equally_often(world_size):
    labels = [0] * 40 + [2] * 3 + [5] * 17  # 60 videos of three classes
    order = np.random.default_rng(0).permutation(60)
    labels = [labels[i] for i in order]

    def keys(epoch, done=0):
        samplers = [EpochSampler(60, True, 1, rank, world_size, labels) for rank in range(world_size)]
        for sampler in samplers:
            sampler.start_at(epoch, done)
        return [list(sampler) for sampler in samplers]

    epochs = [list(chain.from_iterable(keys(epoch))) for epoch in range(3)]
    for epoch in epochs:
        assert Counter(labels[index] for _, index, _ in epoch) == {0: 20, 2: 20, 5: 20}
        assert len(set(epoch)) == 60  # no sample comes twice: repeats of a video differ in their last number
        for index, count in Counter(index for _, index, _ in epoch).items():
            assert sorted(repeat for _, i, repeat in epoch if i == index) == list(range(count))
            assert count in {0: (1,), 2: (6, 7), 5: (1, 2)}[labels[index]]
    assert len({tuple(index for _, index, _ in epoch) for epoch in epochs}) == 3
    assert [part[7:] for part in keys(2)] == keys(2, done=7 * world_size)


def test_balanced_classes_that_do_not_divide_the_list():
    sampler = EpochSampler(8, True, 0, labels=[0, 0, 0, 0, 0, 0, 1, 2])
    assert sorted(Counter([0, 0, 0, 0, 0, 0, 1, 2][index] for _, index, _ in sampler).values()) == [2, 3, 3]


def same(batches, others) -> bool:
    return len(batches) == len(others) and all(
        torch.equal(batch[key], other[key])
        for batch, other in zip(batches, others, strict=True)
        for key in ("index", "label", "views")
    )


def test_every_augmentation_is_the_same_for_any_number_of_workers(records):
    reference = batches(data_module(records, views=ALL, balanced=True), epoch=1)
    assert reference[0]["views"].shape == (2, 2, 4, 3, 32, 32)
    assert reference[0]["label"].shape == (2, 2)
    for workers in (1, 2):
        torch.manual_seed(workers)  # what happened before has no part in it
        assert same(batches(data_module(records, workers=workers, views=ALL, balanced=True), epoch=1), reference)
    assert not same(batches(data_module(records, views=ALL, balanced=True), epoch=2), reference)


def test_an_epoch_goes_on_inside_with_the_same_samples(records):
    data = data_module(records, workers=1, views=ALL, balanced=True)
    whole = batches(data, epoch=1)
    data.start_at(1, 2)
    assert same(list(data.train_dataloader()), whole[1:])


def test_a_sample_follows_from_seed_epoch_index_and_repeat(records):
    """Also those of recipes without balanced classes, of which this is the rule: numpy pads keys by zeros."""
    for views, key in ((TrainingViews(4, 32, (1.0, 0.75), flip=[0, 1, 2]), (3, 2)), (ALL, (3, 2, 1))):
        rng = np.random.default_rng((5, *key))
        video = decode_in_order(records[2].path)
        indices = views.frame_indices(len(video), rng)
        clips = torch.from_numpy(video[indices.ravel()]).permute(0, 3, 1, 2).unflatten(0, indices.shape)
        expected, labels = views(clips, records[2].label, rng)
        sample = VideoDataset(records, views, 5)[(*key, 0)[:3]]
        assert torch.equal(sample["views"], expected)
        assert sample["label"] == labels
    repeated = VideoDataset(records, ALL, 5)
    assert not torch.equal(repeated[3, 2, 0]["views"], repeated[3, 2, 1]["views"])


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
