"""Samples: their random choices, how they are read, and what happens to videos that cannot be read in time."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from videos import decode_in_order, moving_square, write_video

from rubiks.data import dataset
from rubiks.data.dataset import VideoDataset
from rubiks.data.records import VideoRecord
from rubiks.errors import VideoError


class FirstFrames:
    """Views: this many clips of the first frames, unchanged; arguments are recorded. `before` is called first."""

    def __init__(self, clips: int = 2, frames: int = 3, before=lambda: None) -> None:
        self.clips, self.frames, self.before = clips, frames, before
        self.numbers = []

    def frame_indices(self, length, rng):
        self.before()
        self.numbers.append(rng.random())
        self.length = length
        return np.arange(self.clips * self.frames).reshape(self.clips, self.frames)

    def __call__(self, clips, label, rng):
        self.numbers.append(rng.random())
        return clips, label


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("clips") / "a.mp4"
    write_video(path, moving_square(9, 32, 48))
    return VideoRecord(str(path), 4)


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_a_sample_is_the_frames_that_were_chosen(record, timeout):
    views = FirstFrames()
    sample = VideoDataset([record, record], views, 3, timeout=timeout)[5, 1, 0]
    frames = torch.from_numpy(decode_in_order(record.path)[:6]).permute(0, 3, 1, 2)
    assert torch.equal(sample["views"], frames.unflatten(0, (2, 3)))
    assert (sample["label"], sample["index"], views.length) == (4, 1, 9)
    rng = np.random.default_rng((3, 5, 1, 0))  # one generator for frames and views, by seed, epoch, index and repeat
    assert views.numbers == [rng.random(), rng.random()]


def test_each_part_of_the_key_and_the_seed_change_what_is_drawn(record):
    numbers = set()
    for seed, *key in ((3, 5, 1, 2), (4, 5, 1, 2), (3, 6, 1, 2), (3, 5, 0, 2), (3, 5, 1, 3)):
        views = FirstFrames()
        VideoDataset([record, record], views, seed)[tuple(key)]
        numbers.add(tuple(views.numbers))
    assert len(numbers) == 5


@pytest.mark.parametrize(("options", "reader"), [({}, "auto"), ({"reader": "pyav"}, "pyav")])
def test_the_chosen_reader_reads(record, monkeypatch, options, reader):
    asked = []
    open_video = dataset.open_video
    monkeypatch.setattr(dataset, "open_video", lambda *what: asked.append(what) or open_video(*what))
    VideoDataset([record], FirstFrames(), 0, **options)[0, 0, 0]
    assert asked == [(record, reader)]


@pytest.mark.parametrize("timeout", [None, 60.0])
def test_unreadable_videos_are_given_as_errors_and_defects_raised(record, timeout):
    found = VideoDataset([VideoRecord("gone.mp4", 0)], FirstFrames(), 0, timeout=timeout)[0, 0, 0]
    assert isinstance(found, VideoError)
    assert (found.path, found.reason) == ("gone.mp4", "cannot be opened: No such file or directory")
    with pytest.raises(ZeroDivisionError):
        VideoDataset([record], FirstFrames(before=lambda: 1 / 0), 0, timeout=timeout)[0, 0, 0]


def test_a_video_that_is_not_read_in_time_is_left_behind(record):
    end = threading.Event()
    try:
        found = VideoDataset([record], FirstFrames(before=lambda: end.wait(20)), 0, timeout=0.25)[0, 0, 0]
        others = [thread for thread in threading.enumerate() if thread is not threading.main_thread()]
        assert all(thread.daemon for thread in others)  # the process does not wait for it at exit
    finally:
        end.set()
    assert isinstance(found, VideoError)
    assert str(found) == (
        f"{record.path}: was not read within data.timeout=0.25 seconds: the decoder or the disk hangs; if it is only "
        "slow, raise data.timeout"
    )


@pytest.mark.parametrize(("timeout", "same"), [(None, True), (60.0, False)])
def test_only_a_limit_takes_a_thread(record, timeout, same):
    """Without a time limit no video is ever abandoned."""
    threads = []
    views = FirstFrames(before=lambda: threads.append(threading.current_thread()))
    assert VideoDataset([record], views, 0, timeout=timeout)[0, 0, 0]["label"] == 4
    assert threads == [threading.current_thread()] if same else threading.current_thread() not in threads
