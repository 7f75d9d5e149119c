"""The order of an epoch, its split among processes, and classes with equal numbers of videos."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rubiks.data.dataset import EpochSampler, balanced_order


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


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (0, 2), (4, 2)])
def test_the_order_follows_from_seed_and_epoch(seed, epoch):
    sampler = EpochSampler(50, True, seed)
    sampler.set_epoch(epoch)
    order = np.random.default_rng((seed, epoch)).permutation(50)
    assert list(sampler) == [(epoch, index, 0) for index in order.tolist()]
    if seed == 0:
        default = EpochSampler(50, True)
        default.set_epoch(epoch)
        assert list(default) == list(sampler)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 60))
def test_any_number_of_processes_goes_on_with_what_is_left(length, world_size, done):
    """Seen by any number of processes before; the last few may be skipped."""
    done = min(done, length)
    order = np.random.default_rng((3, 2)).permutation(length).tolist()
    parts = []
    for rank in range(world_size):
        sampler = EpochSampler(length, True, 3, rank, world_size)
        sampler.start_at(2, done)
        parts.append([index for _, index, _ in sampler])
    together = list(chain.from_iterable(zip(*parts, strict=True)))
    assert together == order[done:][: len(together)]
    assert length - done - len(together) < world_size


def test_where_nothing_is_left_of_an_epoch_the_next_one_is_whole():
    def epochs(*announced):
        sampler = EpochSampler(6, True, 1)
        sampler.start_at(3, 4)
        for epoch in announced:
            sampler.set_epoch(epoch)
        return [epoch for epoch, _, _ in sampler]

    assert epochs() == epochs(0) == epochs(3) == epochs(0, 1, 2, 3) == [3, 3]
    assert epochs(4) == [4] * 6
    assert epochs(0, 9) == [9] * 6


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
        assert len(set(epoch)) == 60  # no sample occurs twice: repeats of a video differ in their last number
        for index, count in Counter(index for _, index, _ in epoch).items():
            assert sorted(repeat for _, i, repeat in epoch if i == index) == list(range(count))
            assert count in {0: (1,), 2: (6, 7), 5: (1, 2)}[labels[index]]
    assert len({tuple(index for _, index, _ in epoch) for epoch in epochs}) == 3
    assert [part[7:] for part in keys(2)] == keys(2, done=7 * world_size)


def test_balanced_classes_that_do_not_divide_the_list():
    sampler = EpochSampler(8, True, 0, labels=[0, 0, 0, 0, 0, 0, 1, 2])
    assert sorted(Counter([0, 0, 0, 0, 0, 0, 1, 2][index] for _, index, _ in sampler).values()) == [2, 3, 3]


class Unshuffled:
    """Replaces a random generator."""

    def permutation(self, x: int | np.ndarray) -> np.ndarray:
        return np.arange(x) if isinstance(x, int) else x


def test_a_class_goes_through_all_its_videos_before_one_repeats():
    """In the list's order without shuffling; the remaining places go to the first classes."""
    labels = [7, 3, 3, 9] * 10 + [9]
    own = {label: [index for index, one in enumerate(labels) if one == label] for label in (3, 7, 9)}
    expected = []
    for label, count in ((3, 14), (7, 14), (9, 13)):
        for place in range(count):
            expected.append((own[label][place % len(own[label])], place // len(own[label])))
    indices, repeats = balanced_order(labels, Unshuffled())
    assert list(zip(indices.tolist(), repeats.tolist(), strict=True)) == expected


def test_balanced_classes_are_mixed_and_each_is_shuffled():
    """The remaining places go to other classes in other epochs."""
    labels = [0] * 30 + [1] * 30 + [2] * 4
    favoured = set()
    for seed in range(20):
        indices, _ = balanced_order(labels, np.random.default_rng(seed))
        counts = Counter(labels[index] for index in indices)
        favoured.add(max(counts, key=counts.__getitem__))
        assert max(counts.values()) == 22
        assert len({labels[index] for index in indices[:12]}) == 3
        for label in (0, 1):
            videos = [index for index in indices.tolist() if labels[index] == label]
            assert videos != sorted(videos)
            assert len(set(videos)) == len(videos)
    assert favoured == {0, 1, 2}
