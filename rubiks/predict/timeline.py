"""What a long video shows when: it is scored in overlapping windows, which become a timeline of segments."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from rubiks.data.containers import check_whole
from rubiks.data.decode import VideoFile
from rubiks.data.timing import SECOND, frame_times
from rubiks.errors import InputError
from rubiks.predict import windows
from rubiks.predict.predictor import Predictor

LIMITS = {"window": (0.01, 1e6), "stride": (0.001, 1e6)}  # seconds


@dataclass(frozen=True)
class Segment:
    """A part of a video that shows one class.

    Attributes:
        start, end: seconds from the video's first frame.
        label: the class's name; its number if the network does not know the names.
        index: its number.
        score: its mean probability during the segment, 0 to 1.
    """

    start: float
    end: float
    label: str
    index: int
    score: float


@dataclass(frozen=True, eq=False)  # arrays have no single answer
class Timeline:
    """What a video shows when.

    Attributes:
        source: the video.
        segments: in order; none where no class is likely enough, and for an unreadable video.
        spans: float64 (spans + 1,), the seconds between which the scores are constant.
        scores: float64 (spans, classes), the mean probabilities over the windows that contain a span.
        error: why the video cannot be read; None if it can.
    """

    source: str
    segments: list[Segment]
    spans: np.ndarray = field(default_factory=lambda: np.zeros(1))
    scores: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    error: str | None = None


def timeline(
    predictor: Predictor,
    video: str | os.PathLike,
    window: float = 2.5,
    stride: float | None = None,
    min_score: float = 0.3,
    batch_size: int = 16,
    progress: Callable[[float], object] = lambda share: None,
) -> Timeline:
    """Find what a video shows when.

    The frames first shown within a window are scored as if they were a video, by the predictor's protocol; a window
    without any has the frame that is still shown. At any moment the probability of a class is its mean over the windows
    that contain the moment. A segment lasts as long as the most probable class is the same and has at least
    `min_score`. The last window is moved back to end with the video; a video shorter than a window is one window.

    Args:
        predictor: classifies the windows.
        video: the file. It is decoded once, in order, with PyAV; memory does not grow with its length.
        window: seconds, the length of a window; best that of the videos that the network was trained on.
        stride: seconds from one window's start to the next one's, at most the window; None: half a window.
        min_score: the probability, 0 to 1, below which nothing is shown.
        batch_size: windows that are scored at a time.
        progress: called after each batch with the share of the video that has been read, 0 to 1.

    Raises:
        VideoError: the video cannot be read, or is damaged anywhere.
        InputError: an argument is wrong.
    """
    stride = window / 2 if stride is None else stride
    check(window, stride, min_score, batch_size)
    path = os.fspath(video)
    with VideoFile(path, "pyav") as file:
        check_whole(path)
        times = frame_times(file)
    spread = windows.spread(times, round(window * SECOND), round(stride * SECOND))
    # Where nothing moves, a variable frame rate leaves windows with the same frames.
    frames, which = np.unique(windows.frames_within(times, spread), axis=0, return_inverse=True)
    rng = np.random.default_rng(0)  # protocols draw nothing
    clips = [first + predictor.protocol.frame_indices(stop - first, rng) for first, stop in frames.tolist()]
    views = windows.views(file, clips, predictor.protocol)
    logits: list[Tensor] = []
    while batch := list(itertools.islice(views, batch_size)):
        logits += predictor.score(torch.stack(batch))
        progress(len(logits) / len(clips))
    scores = torch.stack(logits).double().softmax(1).numpy()[which.ravel()]
    spans, means = _overlaid(spread, scores)
    return Timeline(path, _segments(spans, means, predictor.classes, min_score), spans, means)


def check(window: float, stride: float, min_score: float, batch_size: int) -> None:
    """Raise InputError for wrong arguments of `timeline`."""
    for name, value in (("window", window), ("stride", stride)):
        least, most = LIMITS[name]
        if not least <= value <= most:
            raise InputError(f"{name} must be {least:g} to {most:,.0f} seconds, got {value:g}")
    if stride > window:
        raise InputError(
            f"stride must be at most the window, {window:g} seconds, since frames between windows would be skipped; "
            f"got {stride:g}"
        )
    if not 0 <= min_score <= 1:
        raise InputError(f"min_score must be a probability, 0 to 1, got {min_score:g}")
    if batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, got {batch_size}")


def clock(seconds: float, decimals: int = 2) -> str:
    """A time as it is shown: 1:02:03.45; hours only if there are some."""
    whole = round(seconds * 10**decimals)
    minutes, rest = divmod(whole, 60 * 10**decimals)
    hours, minutes = divmod(minutes, 60)
    width = 2 + (decimals + 1 if decimals else 0)
    text = f"{rest / 10**decimals:0{width}.{decimals}f}"
    return f"{hours}:{minutes:02}:{text}" if hours else f"{minutes}:{text}"


def _overlaid(spread: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The seconds (spans + 1,) at which windows start or end, and the mean scores (spans, classes) of the windows that
    contain each span."""
    starts, ends = spread.T
    spans = np.unique(spread)
    first, stop = np.searchsorted(ends, spans[:-1], "right"), np.searchsorted(starts, spans[:-1], "right")
    return spans / SECOND, np.stack([scores[a:b].mean(0) for a, b in zip(first, stop, strict=True)])


def _segments(spans: np.ndarray, scores: np.ndarray, classes: list[str], min_score: float) -> list[Segment]:
    best = scores.argmax(1)
    best[scores.max(1) < min_score] = -1
    segments, start = [], 0
    for index, run in itertools.groupby(best.tolist()):
        stop = start + len(list(run))
        if index >= 0:
            score = np.average(scores[start:stop, index], weights=np.diff(spans[start : stop + 1])).item()
            segments.append(Segment(spans[start].item(), spans[stop].item(), classes[index], index, score))
        start = stop
    return segments
