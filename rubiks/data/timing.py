"""When the frames of a video file are shown."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from av.video.stream import VideoStream

from rubiks.data.decode import VideoFile

SECOND = 1_000_000  # times are in whole microseconds, in which decimal seconds are exact
_RATE = Fraction(25)  # frames per second where a file tells neither times nor a rate


def frame_rate(stream: VideoStream) -> Fraction:
    """Frames per second, of a constant rate: players' guess, and not the average, which some containers get wrong."""
    rate = stream.guessed_rate or stream.average_rate or _RATE
    return Fraction(rate.numerator, rate.denominator)  # PyAV 19 and later return their own type


def frame_times(video: VideoFile) -> np.ndarray:
    """When each frame is shown, from the first frame's 0 on, and when the last one ends.

    These are the file's presentation times. If some are missing or they do not increase, frames are taken to follow
    each other at the file's rate. The last frame gets the median duration of the others.

    Returns:
        int64 (frames + 1,), in microseconds, increasing.

    Raises:
        VideoError: the file cannot be decoded, which is necessary if its packets do not tell the times.
    """
    container, stream = video.open()
    with container:
        unit, usual = float(SECOND * (stream.time_base or 0)), float(SECOND / frame_rate(stream))
    stamps = np.array([np.nan if stamp is None else stamp for stamp in video.stamps])
    times = np.rint((stamps - stamps[0]) * unit)
    if not (np.diff(times) > 0).all():  # also for NaN
        times = np.rint(np.arange(len(stamps)) * usual)
    last = np.rint(np.median(np.diff(times))) if len(times) > 1 else usual
    return np.append(times, times[-1] + last).astype(np.int64)
