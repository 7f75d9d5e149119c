"""Batches: the same for any number of workers, exact division among processes, unreadable videos counted."""

from __future__ import annotations

import os
import time
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from videos import decode_in_order, moving_square, write_video

from rubiks.data import datamodule
from rubiks.data.augment import Augment
from rubiks.data.batches import Loader, PinnedCollate, SharedBatch, collate
from rubiks.data.datamodule import Loading, VideoDataModule, default_workers
from rubiks.data.dataset import VideoDataset
from rubiks.data.limits import WorkerCollate, start_worker
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


# Everything that uses random numbers for a sample.
ALL = TrainingViews(
    4,
    32,
    (1.0,),
    flip=[1, 0, 2],
    clips=2,
    window=9,
    augment=Augment(
        random_resized_crop=(0.3, 1.0), color_jitter=0.4, rand_augment=2, random_erasing=0.5, temporal_jitter=True
    ),
)


def data_module(train, val=(), workers=0, views=None, seed=5, balanced=False, **options) -> VideoDataModule:
    views = views or TrainingViews(4, 32, (1.0, 0.875, 0.75), flip=[0, 1, 2])
    loading = Loading(workers=workers, **options)
    return VideoDataModule(train, val, views, Protocol("one_clip", 1, 1, 4, 32), 2, 3, loading, seed, 1, balanced)


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
    """Samples whose views are filled with their number; every fifth cannot be read, and late ones are larger."""

    def __len__(self) -> int:
        return 90

    def __getitem__(self, number: int) -> dict | VideoError:
        if number % 5 == 4:
            return VideoError(f"{number}.mp4", "broken")
        side = 16 if number < 60 else 32
        views = torch.full((1, 2, side, side, 3), number, dtype=torch.uint8).movedim(-1, 2)
        return {"views": views, "label": [number], "index": number, "reader": "none"}


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
        now += 100.0  # the user's own time
    assert waited == [3.0 + 4.0, 5.0 + 6.0]


def test_evaluation_batches_hold_every_video_once_in_order(records):
    data = data_module([], records, balanced=True)  # which is only for training
    for loader in (data.val_dataloader(), data.predict_dataloader()):
        found = list(loader)
        assert [batch["index"].tolist() for batch in found] == [[0, 1, 2], [3, 4, 5], [6]]
        assert [batch["label"].tolist() for batch in found] == [[[0], [1], [2]], [[0], [1], [2]], [[0]]]
        assert [batch["views"].shape for batch in found] == [(count, 1, 4, 3, 32, 32) for count in (3, 3, 1)]


@pytest.mark.parametrize("seed", [0, 5])
def test_order_and_samples_follow_from_the_seed(records, seed):
    data = data_module(records, records, seed=seed)
    order = np.random.default_rng((seed, 1)).permutation(7)[:6].tolist()
    dataset = VideoDataset(records, data.views["train"], seed)
    found = batches(data, epoch=1)
    assert [index for batch in found for index in batch["index"].tolist()] == order
    for batch, indices in zip(found, (order[:2], order[2:4], order[4:]), strict=True):
        assert torch.equal(batch["views"], torch.stack([dataset[1, index, 0]["views"] for index in indices]))
    data.views["val"] = data.views["train"]  # random: evaluation may draw too
    samples = VideoDataset(records, data.views["train"], seed)
    assert torch.equal(next(iter(data.val_dataloader()))["views"][1], samples[0, 1, 0]["views"])


def test_what_holds_unless_told_otherwise(records):
    views = TrainingViews(2, 32, (1.0,))
    data = VideoDataModule(records, records, views, views, 2, 3, Loading(workers=0))
    dataset = data.train_dataloader().dataset
    assert (dataset.seed, dataset.reader, dataset.timeout) == (0, "auto", 120)
    assert [index for batch in data.train_dataloader() for index in batch["index"].tolist()] == (
        np.random.default_rng((0, 0)).permutation(7)[:6].tolist()
    )


def test_balanced_epochs_take_each_class_equally_often(records):
    rare = [VideoRecord(record.path, int(number == 6)) for number, record in enumerate(records)]
    for balanced, counts in ((False, [7, 1]), (True, [4, 4])):
        data = data_module([*rare, rare[0]], balanced=balanced)
        labels = [label for batch in batches(data, 0) for label in batch["label"].flatten().tolist()]
        assert [labels.count(0), labels.count(1)] == counts


@pytest.mark.parametrize(("videos", "sizes"), [(1, [1]), (2, [2]), (3, [2]), (4, [2, 2])])
def test_a_last_small_batch_is_dropped_in_training_unless_it_is_the_only_one(records, videos, sizes):
    assert [len(batch["index"]) for batch in batches(data_module(records[:videos]), 0)] == sizes


def trainer(rank=0, world_size=1, device="cpu") -> SimpleNamespace:
    strategy = SimpleNamespace(root_device=torch.device(device))
    return SimpleNamespace(global_rank=rank, world_size=world_size, strategy=strategy)


def test_processes_load_different_parts(records):
    data = data_module(records, records)
    evaluated, trained = [], []
    for rank in range(2):
        data.trainer = trainer(rank, 2)
        evaluated.append([index for batch in data.val_dataloader() for index in batch["index"].tolist()])
        trained.append([index for batch in data.train_dataloader() for index in batch["index"].tolist()])
    assert evaluated == [[0, 2, 4, 6], [1, 3, 5]]
    order = np.random.default_rng((5, 0)).permutation(7).tolist()
    assert trained == [order[0:3:2], order[1:4:2]]


@pytest.mark.parametrize("device", [None, "cpu", "cuda"])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_loader_is_made_with(records, monkeypatch, workers, device):
    monkeypatch.setattr(datamodule, "PREFETCH", 5)
    data = data_module(records, records, workers, reader="pyav", timeout=7.5)
    data.trainer = device and trainer(device=device)
    for loader, views in ((data.train_dataloader(), data.views["train"]), (data.val_dataloader(), data.views["val"])):
        assert (loader.num_workers, loader.persistent_workers) == (workers, workers > 0)
        assert loader.prefetch_factor == (5 if workers else None)
        assert loader.pin_memory == (device == "cuda")
        assert (loader.dataset.reader, loader.dataset.timeout, loader.dataset.views) == ("pyav", 7.5, views)
        if workers:
            assert isinstance(loader.collate_fn, WorkerCollate)
            assert isinstance(loader.collate_fn.collate, PinnedCollate) == (device == "cuda")
            assert device != "cuda" or len(loader.collate_fn.collate._slots) == 6  # one more than are under way
            assert loader.worker_init_fn is start_worker
        else:
            assert loader.collate_fn is collate


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(1, 1, 1), (2, 1, 1), (3, 1, 2), (8, 1, 7), (8, 2, 3), (8, 8, 1), (17, 1, 16), (18, 1, 16), (64, 4, 15)],
)
def test_as_many_workers_as_cores_are_left_and_sixteen_at_most(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(datamodule, "cores", lambda: cores)
    assert default_workers(processes) == workers


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
        torch.manual_seed(workers)  # what happened before does not matter
        assert same(batches(data_module(records, workers=workers, views=ALL, balanced=True), epoch=1), reference)
    assert not same(batches(data_module(records, views=ALL, balanced=True), epoch=2), reference)


def test_an_epoch_goes_on_inside_with_the_same_samples(records):
    data = data_module(records, workers=1, views=ALL, balanced=True)
    whole = batches(data, epoch=1)
    data.start_at(1, 2)
    assert same(list(data.train_dataloader()), whole[1:])


def test_a_sample_follows_from_seed_epoch_index_and_repeat(records):
    """Also without a repeat: numpy pads keys with zeros, so repeat 0 changes nothing."""
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
    """Replaces the trainer where only the stage is used."""

    def __init__(self, training: bool) -> None:
        self.training = training


def pass_all(data: VideoDataModule, loader) -> list[dict]:
    return [data.on_before_batch_transfer(batch, 0) for batch in loader]


def test_unreadable_videos_are_left_out_counted_and_named(damaged, caplog):
    data = data_module([], damaged, on_error="skip", max_bad=0.3)  # as many as are allowed
    loader = data.val_dataloader()
    data.trainer = Stage(training=False)
    seen = pass_all(data, loader)
    assert sorted(index for batch in seen for index in batch["index"].tolist()) == [0, 1, 2, 6, 7, 8, 9]
    assert len(seen[1]["label"]) == 0  # all three of the second batch
    assert {os.path.basename(path): reason.partition(":")[0] for path, reason in data.bad["val"].items()} == {
        "empty.mp4": "is empty, 0 bytes",
        "text.mp4": "cannot be opened as a video",
        "gone.mp4": "cannot be opened",
    }
    assert data.bad["train"] == {}
    assert "empty.mp4" in caplog.text
    pass_all(data, loader)
    assert len(data.bad["val"]) == 3  # each counts once


def bad_batch(good: int, *bad: str) -> dict:
    views, labels = torch.zeros(good, 1, 2, 3, 8, 8, dtype=torch.uint8), torch.zeros(good, dtype=torch.int64)
    return {"views": views if good else [], "label": labels, "index": labels, "bad": [(path, "broken") for path in bad]}


def test_unreadable_videos_of_training_and_validation_are_kept_apart(records):
    data = data_module(records[:4], records, on_error="skip", max_bad=0.5)
    for training, batch in ((True, bad_batch(1, "a", "b")), (False, bad_batch(0, "c"))):
        data.trainer = Stage(training)
        assert "bad" not in data.on_before_batch_transfer(batch, 0)
    assert data.bad == {"train": {"a": "broken", "b": "broken"}, "val": {"c": "broken"}}
    data.trainer = Stage(training=True)
    with pytest.raises(InputError, match=r"^3 of the 4 train videos cannot be read, .* the first is a: broken$"):
        data.on_before_batch_transfer(bad_batch(1, "d"), 0)


def test_a_training_batch_without_a_readable_video_ends_the_run(records):
    data = data_module(records, records, on_error="skip", max_bad=1.0)
    data.trainer = Stage(training=True)
    with pytest.raises(
        InputError, match=r"^none of the videos in a training batch can be read; the first is a: broken$"
    ):
        data.on_before_batch_transfer(bad_batch(0, "a", "b"), 0)
    assert len(data.on_before_batch_transfer(bad_batch(1), 0)["label"]) == 1


def test_too_many_unreadable_videos_end_the_run(damaged):
    data = data_module([], damaged, on_error="skip", max_bad=0.25)
    loader = data.val_dataloader()
    data.trainer = Stage(training=False)
    with pytest.raises(InputError, match=r"3 of the 10 val videos.*data\.max_bad=0\.25"):
        pass_all(data, loader)


def test_unless_told_otherwise_the_first_unreadable_video_or_more_than_a_hundredth_end_the_run(records):
    strict, lenient = data_module([], records[:1] * 100), data_module([], records[:1] * 100, on_error="skip")
    strict.trainer = lenient.trainer = Stage(training=False)
    lenient.on_before_batch_transfer(bad_batch(2, "a"), 0)
    for data, path in ((strict, "a"), (lenient, "b")):
        with pytest.raises(InputError):
            data.on_before_batch_transfer(bad_batch(2, path), 0)


def test_with_raise_the_first_unreadable_video_ends_the_run(damaged):
    data = data_module([], damaged, on_error="raise")
    loader = data.val_dataloader()
    data.trainer = Stage(training=False)
    with pytest.raises(InputError, match=r"empty\.mp4: is empty.*data\.on_error=skip"):
        pass_all(data, loader)


def test_views_are_turned_to_the_networks_order_where_they_are_used(records):
    data = data_module(records)
    (batch, *_) = batches(data, 0)
    before = batch["views"]
    assert before.movedim(3, -1).is_contiguous()  # as decoders return them
    after = data.on_after_batch_transfer(batch, 0)["views"]
    assert after.is_contiguous()
    assert torch.equal(after, before)
    assert data.on_after_batch_transfer(bad_batch(0, "a"), 0)["views"] == []


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_video_that_hangs_is_given_up_and_named(records, tmp_path, workers):
    # Opening a pipe that nobody writes to blocks forever, in the operating system.
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
