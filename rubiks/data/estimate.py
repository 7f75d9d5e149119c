"""Estimates from a few videos what preparing a data set would gain: space, and time to read a clip."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
from av.video.frame import VideoFrame

from rubiks.data.decode import VideoFile, open_video
from rubiks.data.manifest import stamp
from rubiks.data.prepare import Job
from rubiks.data.records import OpenVideo, VideoRecord
from rubiks.data.workers import work
from rubiks.data.writers import writer

_FRAMES = 8  # of a clip
_VIDEOS = 5  # to measure
_LOOKED_AT = 50  # videos to try, at most
_SECONDS = 20.0  # time limit of one video


class Estimate(NamedTuple):
    """Measurements on the videos that were tried.

    Attributes:
        videos: how many.
        before, after: bytes of the originals and of the prepared copies.
        rate_before, rate_after: videos per second that one core opens and reads a clip of 8 frames from.
    """

    videos: int
    before: int
    after: float
    rate_before: float
    rate_after: float


class _Trial(NamedTuple):
    record: VideoRecord
    form: str
    short_side: int
    reader: str
    from_start: bool


def estimate(
    records: Sequence[VideoRecord], form: str, short_side: int = 256, reader: str = "auto", from_start: bool = False
) -> Estimate | None:
    """Write a clip of some videos as `rubiks prepare` would, and read both, in a separate process that may crash.

    Args:
        records: the videos; some are tried, spread over the list.
        form: of the prepared video, jpeg or frames: those that store each frame separately.
        short_side: maximum of the shorter side, in pixels.
        reader: the library that reads video files.
        from_start: count only videos that are decoded from their start (`is_decoded_from_start`).

    Returns:
        None if no video that counts can be read.
    """
    trials = [_Trial(record, form, short_side, reader, from_start) for record in _spread(records, _LOOKED_AT)]
    results: list[tuple[float, ...]] = []
    for _, found in work(_try, trials, lambda trial: trial.record.path, 1, _SECONDS):
        if isinstance(found, tuple):  # errors are reported when the videos are actually used
            results.append(found)
        if len(results) == _VIDEOS:
            break
    if not results:
        return None
    before, after, *seconds = (sum(column) for column in zip(*results, strict=True))
    rate_before, rate_after = (len(results) / each for each in seconds)
    return Estimate(len(results), int(before), after, rate_before, rate_after)


def _try(trial: _Trial) -> tuple[float, float, float, float] | None:
    """Bytes and seconds of the original and of its copy; None for a video that does not count."""
    record, form, short_side, reader, from_start = trial
    with open_video(record, reader) as video:
        if from_start and not is_decoded_from_start(video):
            return None
        length = len(video)
    clip = [(2 * place + 1) * length // (2 * _FRAMES) for place in range(_FRAMES)]
    with tempfile.TemporaryDirectory() as folder:
        copy = _written(record, clip, Path(folder), form, short_side)
        before = stamp(record)[0] if record.span is None else record.span.size
        after = stamp(copy)[0] * length / _FRAMES
        return before, after, _seconds(record, clip, reader), _seconds(copy, range(_FRAMES), reader)


def is_decoded_from_start(video: OpenVideo) -> bool:
    """Whether reading a clip decodes all frames before it too."""
    return isinstance(video, VideoFile) and not video.can_seek and len(video) > 1


def describe_decoding_from_start(single: int, others: int, total: int, cost: Estimate | None) -> str:
    """One line for the user on what it costs that some videos cannot be read by seeking.

    Args:
        single: how many videos have a single key frame.
        others: in how many more seeking is not proven exact.
        total: how many videos there are.
        cost: measured on some of those; None if unknown.
    """
    reasons = [f"{single:,} with a single key frame"] if single else []
    reasons += [f"{others:,} in which seeking is not proven exact"] if others else []
    text = f"{single + others:,} of {total:,} videos are decoded from their start for every clip ({', '.join(reasons)})"
    if cost is not None:
        text += (
            f": {cost.rate_before:.0f} videos/s per core, {cost.rate_after:.0f} after `rubiks prepare` "
            f"(measured on {cost.videos})"
        )
    return text


def _spread(records: Sequence[VideoRecord], most: int) -> Iterator[VideoRecord]:
    """At most `most` of the records, in an order that puts the first ones far apart."""
    count = min(most, len(records))
    for place in np.random.default_rng(0).permutation(count).tolist():
        yield records[place * len(records) // count]


def _written(record: VideoRecord, clip: Sequence[int], folder: Path, form: str, short_side: int) -> VideoRecord:
    """A copy of some frames of a video."""
    with open_video(record) as video:
        images = video.frames(clip).permute(0, 2, 3, 1).numpy()
    target = folder if form == "frames" else folder / "clip.mp4"
    writing = writer(target, form, short_side)
    for image in images:
        writing.add(VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"), Fraction(30))
    writing.close()
    return Job(record, target, "", form, short_side).written(len(images))


def _seconds(record: VideoRecord, clip: Sequence[int], reader: str) -> float:
    """The lowest CPU time of three tries to open a video and read a clip."""

    def once() -> float:
        start = time.process_time()
        with open_video(record, reader) as video:
            video.frames(clip)
        return time.process_time() - start

    return min(once() for _ in range(3))
