"""Classifies live video: what the last seconds show, again and again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rubiks.data.screen import Screen
from rubiks.errors import InputError
from rubiks.models import RubiksNet
from rubiks.models.stream import StreamState
from rubiks.nn import Normalize
from rubiks.predict.capture import Capture, Clock, Every, Frame
from rubiks.predict.predictor import ClassScore, Predictor


@dataclass(frozen=True)
class LivePrediction:
    """What a source shows at a moment.

    Attributes:
        time: of the newest frame that was scored, in seconds since the source's first.
        latency: seconds from that frame's arrival to its score.
        predictions: the classes with the highest smoothed probabilities, highest first.
    """

    time: float
    latency: float
    predictions: list[ClassScore]


class Method(Protocol):
    """How a network scores frames that keep coming.

    Attributes:
        period: seconds of video of which it takes one frame.
        keep: how many frames it can use at once.
    """

    period: float
    keep: int

    def __call__(self, frames: Sequence[Frame]) -> Tensor | None:
        """Take frames, oldest first; logits (classes,) if it is time for them."""

    def rest(self) -> Tensor:
        """The logits (classes,) of a source that ended before the first ones."""

    def __str__(self) -> str: ...


class SlidingWindow:
    """Scores T frames spread over the last seconds, the newest of them the last.

    Args:
        predictor: whose network scores.
        interval: seconds between the frames of a clip.
        stride: seconds between scores.
    """

    def __init__(self, predictor: Predictor, interval: float, stride: float) -> None:
        self._predictor = predictor
        self._view = View(predictor)
        self._length = predictor.protocol.num_frames
        self._interval, self._stride = interval, stride
        denser = max(1, math.ceil(interval / stride - 1e-6))
        self.period = interval / denser
        self.keep = self._length * denser
        self._kept: deque[tuple[float, Tensor]] = deque(maxlen=self.keep + 1)
        self._scoring = Every(stride)
        size = predictor.protocol.size
        predictor.score(torch.zeros(1, 1, self._length, 3, size, size, dtype=torch.uint8))  # the first time is slow

    def __str__(self) -> str:
        seconds = self._length * self._interval
        return (
            f"a sliding window of {self._length} frames over {seconds:.3g} s, scored every {self._stride:.3g} s "
            "(the network is not causal)"
        )

    def __call__(self, frames: Sequence[Frame]) -> Tensor | None:
        for frame in frames:
            self._kept.append((frame.time, self._view(frame)))
        newest = frames[-1].time
        full = newest >= (self._length - 1.5) * self._interval
        return self._score(self._interval) if full and self._scoring(newest) else None

    def rest(self) -> Tensor:
        """The clip of all frames: the source is shorter than a window."""
        spanned = self._kept[-1][0] - self._kept[0][0]
        return self._score(spanned / max(1, self._length - 1))

    def _score(self, interval: float) -> Tensor:
        times = np.array([seconds for seconds, _ in self._kept])
        wanted = times[-1] - interval * np.arange(self._length - 1, -1, -1)
        nearest = np.abs(times - wanted[:, None]).argmin(1)
        clip = torch.stack([self._kept[place][1] for place in nearest])
        return self._predictor.score(clip[None, None])[0]


class FrameByFrame:
    """Scores each frame by a causal network, which remembers what came before.

    Args:
        predictor: prepares frames.
        net: its network, which is causal.
        interval: seconds between frames.
    """

    keep = 1

    def __init__(self, predictor: Predictor, net: RubiksNet, interval: float) -> None:
        self._view = View(predictor)
        self._stream = net.stream()
        self._device = net.new_fc.weight.device
        self._normalize = Normalize().to(self._device)
        self._state: StreamState | None = None
        self.period = interval
        size = predictor.protocol.size
        self._stream.step(torch.zeros(1, 3, size, size, device=self._device))  # the first time is slow

    def __str__(self) -> str:
        return f"frame by frame, {1 / self.period:.3g} frames/s (the network is causal)"

    @torch.inference_mode()
    def __call__(self, frames: Sequence[Frame]) -> Tensor:
        for frame in frames:
            view = self._normalize(self._view(frame).to(self._device))
            _, self._state = self._stream.step(view[None], self._state)
        assert self._state is not None
        return self._state.own[0].cpu()  # of the newest frame, not the mean over all frames

    def rest(self) -> Tensor:
        raise AssertionError("every frame is scored")


class View:
    """A frame as evaluation prepares it for the protocol's central view."""

    def __init__(self, predictor: Predictor) -> None:
        self._protocol = predictor.protocol
        self._screen = Screen()
        self._rng = np.random.default_rng(0)  # protocols draw nothing

    def __call__(self, frame: Frame) -> Tensor:
        """uint8 (3, S, S)."""
        image = np.ascontiguousarray(self._screen.image(frame.picture))
        clips = torch.from_numpy(image).permute(2, 0, 1)[None, None]
        return self._protocol(clips, 0, self._rng)[0][self._protocol.central_view, 0]


def method_for(predictor: Predictor, window: float | None, fps: float | None, stride: float | None) -> Method:
    """How the predictor's network scores a live source.

    Args:
        predictor: with the network.
        window: seconds that T frames span.
        fps: frames per second for the network, instead of `window`. Without either it follows from how the network was
            trained: with dense sampling its window at 25 frames a second, otherwise 2.5 seconds.
        stride: seconds between scores; None: whenever there is a new frame.

    Raises:
        InputError: a stride for a causal network.
    """
    if fps is not None:
        interval = 1 / fps
    elif window is not None:
        interval = window / predictor.protocol.num_frames
    else:
        interval = predictor.net.preprocessing.interval
    net = predictor.net
    if isinstance(net, RubiksNet) and net.causal:
        if stride is not None:
            raise InputError("a causal network scores each frame and has no stride; leave it out, or choose fps")
        return FrameByFrame(predictor, net, interval)
    return SlidingWindow(predictor, interval, interval if stride is None else stride)


class Smoother:
    """Exponential mean of probabilities over time.

    Args:
        constant: time constant in seconds; 0: no smoothing.
    """

    def __init__(self, constant: float) -> None:
        self._constant = constant
        self._mean: Tensor | None = None
        self._time = 0.0

    def __call__(self, scores: Tensor, seconds: float) -> Tensor:
        """The mean (classes,) after these scores (classes,) of this time, later than the time before."""
        if self._mean is not None and self._constant:
            share = -math.expm1((self._time - seconds) / self._constant)
            scores = self._mean + (scores - self._mean) * share
        self._mean, self._time = scores, seconds
        return scores


def predictions(
    predictor: Predictor, method: Method, capture: Capture, smoothing: float, clock: Clock = time
) -> Iterator[LivePrediction]:
    """Classify until the source ends.

    Args:
        predictor: names the classes.
        method: scores the frames.
        capture: gives the frames.
        smoothing: time constant in seconds of the mean of probabilities; 0: none.
        clock: for the latency.

    Raises:
        InputError: the source cannot be opened, is silent, or breaks off.
    """
    smooth = Smoother(smoothing)

    def prediction(logits: Tensor, frame: Frame) -> LivePrediction:
        scores = smooth(logits.double().softmax(0), frame.time)
        return LivePrediction(frame.time, clock.monotonic() - frame.arrived, predictor.ranked(scores.log()))

    newest, scored = None, False
    for frames in capture:
        newest = frames[-1]
        logits = method(frames)
        if logits is not None:
            scored = True
            yield prediction(logits, newest)
    if newest is not None and not scored:
        yield prediction(method.rest(), newest)
