"""Where a run stands, counted in videos, and how it resumes with other batches."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from rubiks.data.dataset import EpochSampler
from rubiks.training.position import Epoch, Position

EPOCHS = st.builds(
    Epoch,
    st.integers(8, 80),
    st.integers(1, 9),
    st.integers(1, 4),
    st.integers(1, 4),
    st.one_of(st.just(1.0), st.integers(1, 9)),
)


def trained_videos(epoch: Epoch, start: int, batches: int) -> list[int]:
    """The videos that all processes get in their next batches of one epoch, from the sampler."""
    seen = []
    for rank in range(epoch.processes):
        sampler = EpochSampler(epoch.videos, True, 0, rank, epoch.processes)
        sampler.start_at(0, start)
        own = [index for _, index, _ in sampler]
        size = epoch.videos_of(1) // epoch.processes
        assert len(own) >= batches * size
        seen += own[: batches * size]
    return seen


@given(EPOCHS, st.data())
def test_the_same_batches_go_on_where_they_stood(epoch, data):
    steps = data.draw(st.integers(0, epoch.steps))
    batches = min(epoch.batches, steps * epoch.accumulate)
    position = Position(2, epoch.videos_of(batches), 100)
    assert epoch.batches_of(position) == batches
    assert epoch.scheduled_steps(position) == 2 * epoch.steps + steps
    whole = trained_videos(epoch, 0, epoch.batches)
    parts = trained_videos(epoch, 0, batches) + trained_videos(epoch, position.videos, epoch.batches - batches)
    assert sorted(parts) == sorted(whole)


@given(EPOCHS, st.integers(1, 9), st.integers(1, 4), st.integers(1, 4), st.data())
def test_other_batches_repeat_no_video_and_leave_out_less_than_a_step(epoch, batch_size, processes, accumulate, data):
    batches = min(epoch.batches, epoch.accumulate * data.draw(st.integers(0, epoch.steps)))
    position = Position(0, epoch.videos_of(batches), 100)
    other = Epoch(epoch.videos, batch_size, processes, accumulate)
    done = other.batches_of(position)
    assert done % accumulate == 0 or done == other.batches
    rest = trained_videos(other, position.videos, other.batches - done) if done < other.batches else []
    before = trained_videos(epoch, 0, batches)
    assert not {*rest} & {*before}
    left_out = epoch.videos - len(before) - len(rest)
    assert left_out < other.videos_of(accumulate) + other.videos_of(1)
    settled = other.settle(position)
    assert settled.validation_due == (bool(position.videos) and done == other.batches)


@given(EPOCHS, st.integers(2, 4))
def test_fewer_processes_that_accumulate_take_the_same_steps(few, factor):
    few = dataclasses.replace(few, accumulate=few.accumulate * factor, limit=1.0)
    many = dataclasses.replace(few, processes=few.processes * factor, accumulate=few.accumulate // factor)
    if many.videos // many.processes < many.batch_size:
        return

    def videos(epoch: Epoch, step: int) -> set[int]:
        before = epoch.videos_of(step * epoch.accumulate)
        return set(trained_videos(epoch, before, epoch.accumulate))

    for step in range(many.batches // many.accumulate):  # the last step may be smaller
        assert videos(few, step) == videos(many, step)


@given(EPOCHS)
def test_what_is_left_out_of_an_epoch(epoch):
    whole = dataclasses.replace(epoch, limit=1.0)
    assert epoch.left_out == epoch.videos - len(trained_videos(whole, 0, whole.batches))
    assert epoch.left_out < max(whole.videos_of(1), epoch.processes)
