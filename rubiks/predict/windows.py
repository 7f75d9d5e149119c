"""The windows of a long video, and their views from one decode of the video."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from av.video.frame import VideoFrame
from torch import Tensor

from rubiks.data.decode import VideoFile
from rubiks.data.screen import Screen
from rubiks.errors import VideoError
from rubiks.evaluation.protocols import Protocol


def spread(times: np.ndarray, window: int, stride: int) -> np.ndarray:
    """The windows of a video: one every `stride` until one contains the last frame, which is moved back to end with the
    video. A video shorter than a window has one window, all of it.

    Args:
        times: when each frame is shown, and the end, from `frame_times`.
        window, stride: lengths in the same unit, microseconds.

    Returns:
        int64 (windows, 2): start and end of each.
    """
    last, end = times[-2:]
    count = 1 + max(0, (last - window) // stride + 1)
    starts = np.arange(count) * stride
    starts[-1] = min(starts[-1], max(0, end - window))
    ends = starts + window
    ends[-1] = end
    return np.stack([starts, ends], axis=1)


def frames_within(times: np.ndarray, windows: np.ndarray) -> np.ndarray:
    """The frames that each window consists of: those first shown in it; if there are none, the one that is shown then.

    Returns:
        int64 (windows, 2): the first, and the one after the last.
    """
    first, stop = np.searchsorted(times[:-1], windows).T
    return np.stack([np.minimum(first, stop - 1), stop], axis=1)


def views(video: VideoFile, clips: Sequence[np.ndarray], protocol: Protocol) -> Iterator[Tensor]:
    """Views of each window. Every frame is decoded once; those that a window needs are resized and kept until the last
    window that needs them.

    Args:
        clips: (clips, T) for each window in order, the numbers of its frames.

    Yields:
        uint8 (V, T, 3, S, S), as soon as the window has been read.

    Raises:
        VideoError: the video is damaged somewhere before the window's last frame, or, at the end, anywhere.
    """
    last_use = {number: window for window, numbers in enumerate(clips) for number in numbers.ravel().tolist()}
    rng = np.random.default_rng(0)  # protocols draw nothing
    kept: dict[int, Tensor] = {}
    screen, window = Screen(), 0
    for number, frame in enumerate(_intact(video)):
        if number == 0 or number in last_use:  # the first gives the size
            image = np.ascontiguousarray(screen.image(frame))
            kept[number] = protocol.resize(torch.from_numpy(image).permute(2, 0, 1)[None])[0]
        while window < len(clips) and clips[window].max() <= number:
            numbers = clips[window]
            frames = torch.stack([kept[number] for number in numbers.ravel().tolist()])
            yield protocol(frames.unflatten(0, numbers.shape), 0, rng)[0]
            window += 1
            kept = {number: image for number, image in kept.items() if last_use.get(number, 0) >= window}


def _intact(video: VideoFile) -> Iterator[VideoFrame]:
    """Every frame in order; raises VideoError for a damaged one, and if they are not those that the packets promise."""
    stamps, number = video.stamps, -1
    for number, frame in enumerate(video.decoded()):
        if number >= len(stamps) or frame.pts != stamps[number]:
            raise VideoError(video.path, f"is damaged: frame {number} is not the one that its packets announce")
        if frame.is_corrupt:
            seconds = (frame.pts or 0) * (frame.time_base or 0)
            raise VideoError(video.path, f"is damaged at frame {number}, time stamp {float(seconds):.2f} seconds")
        yield frame
    if number + 1 < len(stamps):
        raise VideoError(video.path, f"is broken or cut off: it ends after {number + 1} of its {len(stamps)} frames")
