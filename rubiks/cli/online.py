"""`rubiks online`: what a camera, a stream or a file shows, live."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from rubiks.cli import timelines
from rubiks.errors import InputError

if TYPE_CHECKING:
    from rubiks.predict.capture import Capture
    from rubiks.predict.online import LivePrediction

LONGEST = 3600.0  # seconds


def add_to(commands) -> None:
    """Add the subcommand to the parser."""
    about = "classify live video with a trained network"
    parser = commands.add_parser("online", help=about, description=about[0].upper() + about[1:] + ".")
    parser.add_argument("ckpt", metavar="CKPT", help="a checkpoint, ours or official, a run's or a saved folder")
    parser.add_argument("source", metavar="SOURCE", help="a camera's number, a video file, or an rtsp or http address")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--window", metavar="TIME", help="time that the network's frames span; default: as it was trained, mostly 2.5s"
    )
    speed.add_argument("--fps", type=float, metavar="N", help="frames per second for the network, instead of --window")
    parser.add_argument(
        "--stride", metavar="TIME", help="time from score to score; default: whenever there is a new frame"
    )
    parser.add_argument(
        "--smoothing", default="0.5s", metavar="TIME", help="time constant of the mean of scores; default: %(default)s"
    )
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes with --json; default: %(default)s")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument(
        "--timeout",
        default="10s",
        metavar="TIME",
        help="time that a camera or address may be silent; default: %(default)s",
    )
    parser.add_argument("--save-video", type=Path, metavar="FILE", help="record the frames with the class, as .mp4")
    parser.add_argument("--show", action="store_true", help="show the frames with the class on a page of this computer")
    parser.add_argument("--json", action="store_true", help="print a JSON object per line and prediction")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Classify until the source ends or Ctrl-C, the usual end."""
    window, stride = (
        None if text is None else _seconds(f"--{name}", text)
        for name, text in (("window", arguments.window), ("stride", arguments.stride))
    )
    smoothing = _seconds("--smoothing", arguments.smoothing, may_be_0=True)
    timeout = _seconds("--timeout", arguments.timeout)
    if arguments.fps is not None and not 1 / LONGEST <= arguments.fps <= 1000:
        raise InputError(f"--fps must be {1 / LONGEST:.4f} to 1000 frames per second, got {arguments.fps:g}")
    from rubiks.predict import live_source, online  # imports PyTorch, which takes seconds
    from rubiks.predict.capture import Capture
    from rubiks.predict.live_page import LivePage
    from rubiks.predict.live_view import LiveView, Recording
    from rubiks.predict.predictor import Predictor

    source = live_source.find(arguments.source)
    target = arguments.save_video
    if target is not None and source.is_file and target.exists() and os.path.samefile(target, source.address):
        raise InputError(f"--save-video {target} is the source; choose another file")
    recording = None if target is None else Recording(target)
    predictor = Predictor(arguments.ckpt, topk=arguments.topk, device=arguments.device)
    method = online.method_for(predictor, window, arguments.fps, stride)
    _say(f"Scores {method}; Ctrl-C ends")
    page = LivePage(f"{source.name} - rubiks online") if arguments.show else None
    if page is not None:
        _say(f"Live picture: {page.address}")
    view = None if recording is None and page is None else LiveView(recording, page)
    start, count = time.monotonic(), 0
    with _terminated_like_interrupted():
        watch = [] if view is None else [view.add]
        capture = Capture(source, method.period, method.keep, watch, timeout)
        try:
            with _output(arguments, capture, {"source": source.name, "model": predictor.path}) as show:
                for one in online.predictions(predictor, method, capture, smoothing):
                    count += 1
                    show(one)
                    if view is not None:
                        view.check()
                        view.caption = f"{one.predictions[0].label}  {one.predictions[0].score:.0%}"
        except KeyboardInterrupt:
            pass
        finally:
            capture.close()
            if page is not None:
                page.close()
            if capture.frames:
                _say(_summary(capture, count, time.monotonic() - start))
            if view is not None:
                view.close()
                if recording is not None and recording.frames:
                    _say(f"{target} has {recording.frames:,} frames; {view.dropped:,} could not be drawn in time")


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt, so that a recording is finished."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _output(
    arguments: argparse.Namespace, capture: Capture, shared: dict[str, str]
) -> Iterator[Callable[[LivePrediction], None]]:
    """Shows predictions: JSON lines, one line that changes on a terminal, otherwise a line each second of video."""
    from rubiks.predict.capture import Every, Rate

    scored, each_second = Rate(), Every(1.0)
    terminal = not arguments.json and sys.stdout.isatty()

    def show(one: LivePrediction) -> None:
        scored.note(time.monotonic())
        frames, predictions, dropped = capture.rate.value, scored.value, capture.dropped
        if arguments.json:
            line = {
                "time": round(one.time, 3),
                "predictions": [vars(best) for best in one.predictions],
                "latency": round(one.latency, 3),
                "frames_per_second": round(frames, 2),
                "predictions_per_second": round(predictions, 2),
                "dropped": dropped,
                **shared,
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)
            return
        best = one.predictions[0]
        counts = f"{frames:.1f} frames/s, {predictions:.1f} predictions/s, {dropped:,} dropped"
        text = f"{one.time:.1f}s  {best.label}  {best.score:.0%}  ({counts})"
        if live is not None:
            live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)
        elif each_second(one.time):
            print(text, flush=True)

    with Live(console=Console(), auto_refresh=False) if terminal else contextlib.nullcontext() as live:
        yield show


def _summary(capture: Capture, predictions: int, seconds: float) -> str:
    damaged = f", {capture.damaged:,} damaged packets were skipped" if capture.damaged else ""
    return (
        f"{capture.frames:,} frames and {predictions:,} predictions in {seconds:.1f} s; the network had no time for "
        f"{capture.dropped:,} frames{damaged}"
    )


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _seconds(option: str, text: str, may_be_0: bool = False) -> float:
    """The seconds of 2.5s, 500ms or 2.5; raises InputError for other texts, and for times that make no sense."""
    seconds = timelines.seconds(option, text)
    if not (0.001 <= seconds <= LONGEST or (may_be_0 and seconds == 0)):
        least = "0" if may_be_0 else "1ms"
        raise InputError(f"{option} must be a time from {least} to {LONGEST:g}s such as 2.5s or 500ms, got {text!r}")
    return seconds
