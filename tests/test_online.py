"""`rubiks online`: which frames are scored, what is shown and recorded, and how it ends."""

from __future__ import annotations

import errno
import functools
import http.server
import io
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.device import DeviceInfo
from conftest import assert_rejected
from generated import FILES
from networks import decisive, save_checkpoint
from PIL import Image
from torch import Tensor
from videos import decode_in_order, moving_square, write_video

from rubiks import Predictor, RubiksNet
from rubiks.data.decode import open_video
from rubiks.data.records import VideoRecord
from rubiks.errors import InputError
from rubiks.models.activation_maps import frame_logits
from rubiks.models.preprocessing import Preprocessing
from rubiks.nn import Normalize
from rubiks.predict import capture, live_source, online
from rubiks.predict.capture import Capture, Every, Mailbox
from rubiks.predict.live_page import LivePage
from rubiks.predict.live_source import LiveSource
from rubiks.predict.live_view import LiveView, Recording

pytestmark = pytest.mark.usefixtures("small_network")

NAMES = ["wave", "jump & run", "[bold]sit", "zoë", "e", "f"]
PATIENCE = 60  # seconds after which a test gives up


class Hand:
    """A clock that only moves when someone sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_network):
    """A video of 40 frames at 12.5 frames a second and one four times as fast, and a checkpoint."""
    folder = tmp_path_factory.mktemp("online")
    write_video(folder / "v.mp4", moving_square(40, 54, 70), fps=Fraction(25, 2))
    write_video(folder / "fast.mp4", moving_square(40, 54, 70), fps=50)
    save_checkpoint(decisive(5, 6), folder / "net.ckpt", NAMES, 48)
    return folder


@pytest.fixture
def predictor(folder):
    return Predictor(folder / "net.ckpt", device="cpu")


def everything(path, period: float = 0.0) -> tuple[list[capture.Frame], Capture]:
    """The due frames of a file that is played as fast as possible, and what played it."""
    played = Capture(live_source.find(str(path)), period, 10**6, clock=Hand())
    return list(itertools.chain(*played)), played


def one_by_one(path, method: online.Method) -> list[list[capture.Frame]]:
    """The frames for a network that is always in time."""
    return [[frame] for frame in everything(path, method.period)[0]]


# ---- which frames are scored


def every_window(path, predictor, interval: float, stride: float, rate: float) -> list[tuple[float, Tensor]]:
    """Time and probabilities by definition: every frame is there, and each clip has those next to the wanted times.

    Frames are taken, and scores given, at the first frame of each period.
    """
    frames = torch.from_numpy(decode_in_order(path)).permute(0, 3, 1, 2)
    views = predictor.protocol(frames[None], 0, np.random.default_rng(0))[0][0]
    period = interval / max(1, -(-interval // stride))
    numbers = range(len(frames))
    taken = [n for n in numbers if n == 0 or int(n / rate / period + 1e-6) > int((n - 1) / rate / period + 1e-6)]
    found, last = [], -1
    for newest in taken:
        now = newest / rate
        if now < 2.5 * interval or int(now / stride + 1e-6) == last:
            continue
        last = int(now / stride + 1e-6)
        past = [n for n in taken if n <= newest]
        clip = [min(past, key=lambda n, back=back: abs(n / rate - (now - back * interval))) for back in (3, 2, 1, 0)]
        logits = predictor.net(Normalize()(views[clip])[None])[0]
        found.append((now, logits.detach().double().softmax(0)))
    return found


@pytest.mark.parametrize(
    ("interval", "stride"), [(0.25, 0.25), (0.32, 0.32), (0.32, 0.08), (0.32, 0.2), (0.24, 1.0), (0.05, 0.05)]
)
def test_a_window_is_scored_as_its_frames_would_be_alone(interval, stride, folder, predictor):
    wanted = every_window(folder / "v.mp4", predictor, interval, stride, 12.5)
    method = online.SlidingWindow(predictor, interval, stride)
    found = list(online.predictions(predictor, method, one_by_one(folder / "v.mp4", method), 0, Hand()))
    assert len(wanted) > 1
    assert [one.time for one in found] == pytest.approx([seconds for seconds, _ in wanted])
    for one, (_, scores) in zip(found, wanted, strict=True):
        assert [best.index for best in one.predictions] == scores.sort(descending=True).indices[:5].tolist()
        assert [best.score for best in one.predictions] == pytest.approx(
            scores.sort(descending=True).values[:5], abs=1e-5
        )
        assert all(best.label == NAMES[best.index] for best in one.predictions)


def test_a_source_shorter_than_a_window_is_one_clip(folder, predictor):
    # 40 frames: of those taken, each 0.64 s apart, the first and the last are 2.56 s apart.
    method = online.SlidingWindow(predictor, 10, 0.64)
    (found,) = online.predictions(predictor, method, one_by_one(folder / "v.mp4", method), 0, Hand())
    frames = torch.from_numpy(decode_in_order(folder / "v.mp4")).permute(0, 3, 1, 2)
    views = predictor.protocol(frames[None], 0, np.random.default_rng(0))[0][0]
    period = method.period
    taken = [n for n in range(40) if n == 0 or int(n * 0.08 / period + 1e-6) > int((n - 1) * 0.08 / period + 1e-6)]
    clip = [min(taken, key=lambda n, share=share: abs(n - taken[-1] * share)) for share in (0, 1 / 3, 2 / 3, 1)]
    scores = predictor.net(Normalize()(views[clip])[None])[0].detach().double().softmax(0)
    assert found.time == pytest.approx(taken[-1] * 0.08)
    assert [best.score for best in found.predictions] == pytest.approx(
        scores.sort(descending=True).values[:5], abs=1e-5
    )


@pytest.mark.parametrize("name", ["h264 turned.mp4", "h264 two sizes.mkv", "vp9 odd height.webm"])
def test_frames_are_prepared_as_in_evaluation(name, tmp_path, predictor):
    path = tmp_path / name
    FILES[name](path)
    with open_video(VideoRecord(str(path), 0)) as video:
        wanted = predictor.protocol(video.frames(range(len(video)))[None], 0, np.random.default_rng(0))[0][0]
    view = online.View(predictor)
    found = torch.stack([view(frame) for frame in everything(path)[0]])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize(
    ("changes", "choices", "interval"),
    [
        ({}, (None, None, None), 2.5 / 4),
        ({}, (1.0, None, None), 0.25),
        ({}, (None, 5.0, None), 0.2),
        ({"sampling": "dense", "window": 64}, (None, None, None), 16 / 25),
        ({"sampling": "dense", "window": 64}, (2.0, None, None), 0.5),
    ],
)
def test_the_networks_frame_rate_follows_from_its_training(changes, choices, interval, predictor):
    predictor.net.preprocessing = predictor.net.preprocessing.__class__(4, 48, **changes)
    method = online.method_for(predictor, *choices)
    assert method.period == pytest.approx(interval)
    assert f"4 frames over {4 * interval:.3g} s" in str(method)


@pytest.mark.parametrize("constant", [0.0, 0.5])
def test_scores_are_smoothed_over_time(constant):
    smooth = online.Smoother(constant)
    mean, before = 1.0, 0.0
    for seconds, score in ((0.0, 1.0), (0.1, 0.0), (0.6, 0.5), (5.0, 0.25)):
        keep = np.exp(-(seconds - before) / constant) if constant else 0.0
        mean, before = keep * mean + (1 - keep) * score, seconds
        found = smooth(torch.tensor([score, 1 - score], dtype=torch.float64), seconds)
        assert found.tolist() == pytest.approx([mean, 1 - mean])


# ---- causal networks


def test_a_causal_network_goes_frame_by_frame(folder, tmp_path):
    torch.manual_seed(6)
    net = RubiksNet("tiny", 6, num_frames=4, causal=True).eval()
    net.new_fc.weight.data.mul_(30)
    net.preprocessing = Preprocessing(4, size=48)
    net.save_pretrained(tmp_path / "net")
    predictor = Predictor(tmp_path / "net", topk=6)
    method = online.method_for(predictor, None, 6.25, None)
    assert "frame by frame, 6.25 frames/s" in str(method)
    found = list(online.predictions(predictor, method, one_by_one(folder / "v.mp4", method), 0, Hand()))
    frames = torch.from_numpy(decode_in_order(folder / "v.mp4")).permute(0, 3, 1, 2)
    views = predictor.protocol(frames[None], 0, np.random.default_rng(0))[0][0][::2]
    assert [one.time for one in found] == pytest.approx([0.16 * number for number in range(20)])
    logits = frame_logits(net, Normalize()(views)[None])[0]
    assert logits.std(0).max() > 0.1
    for one, own in zip(found, logits.double().softmax(1), strict=True):
        expected = dict(enumerate(own.tolist()))
        assert {best.index: best.score for best in one.predictions} == pytest.approx(expected, abs=1e-5)
    assert_rejected(lambda: online.method_for(predictor, None, None, 0.5), "causal", "no stride")


# ---- a network that is slower than the source


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_frames_are_used_and_the_others_counted(keep, folder):
    played = Capture(live_source.find(str(folder / "v.mp4")), 0.16, keep, clock=Hand())
    played._thread.join(PATIENCE)  # the network is busy until the file has ended
    assert [[round(frame.time / 0.16) for frame in frames] for frames in played] == [list(range(20 - keep, 20))]
    assert (played.frames, played.dropped) == (40, 20 - keep)


def test_a_slow_network_scores_the_newest_frame(folder, predictor):
    """Each score takes as long as ten frames; every prediction is of the frame that came last."""
    clock, box = Hand(), Mailbox(1)
    frames = everything(folder / "v.mp4")[0]

    class Slow:
        period, keep = 0.0, 1

        def __call__(self, taken):
            scored.append((taken[-1].time, clock.now))
            clock.sleep(0.8)
            while waiting and waiting[0].time <= clock.now - 100 + 1e-6:
                box.put(waiting.pop(0))
            if not waiting:
                box.close()
            return torch.zeros(6)

    waiting, scored = list(frames), []
    box.put(waiting.pop(0))
    found = list(online.predictions(predictor, Slow(), iter(box.take, None), 0.5, clock))
    assert [one.time for one in found] == pytest.approx([0, 0.8, 1.6, 2.4, 3.12], abs=0.01)
    assert all(clock - 100 - seconds < 0.09 for seconds, clock in scored)
    assert all(one.latency == pytest.approx(0.85, abs=0.06) for one in found)
    assert box.dropped == 40 - len(found)


def test_one_of_each_period_is_due():
    due = Every(0.25)
    assert [seconds for seconds in np.arange(0, 1.5, 0.1).round(1) if due(seconds)] == [0, 0.3, 0.5, 0.8, 1.0, 1.3]
    assert not due(0.0)
    assert all(map(Every(0.0), (0.0, 0.0, 0.1)))


def test_a_mailbox_gives_what_is_left_before_the_error():
    box: Mailbox[int] = Mailbox(2)
    assert box.take(0.01) == []
    for number in range(5):
        box.put(number)
    box.close(InputError("broke off"))
    assert (box.take(), box.dropped) == ([3, 4], 3)
    with pytest.raises(InputError, match="broke off"):
        box.take()


# ---- time


def test_a_file_is_played_at_its_own_rate(folder):
    clock = Hand()
    played = Capture(live_source.find(str(folder / "v.mp4")), 0.0, 100, clock=clock)
    frames = list(itertools.chain(*played))
    assert [frame.time for frame in frames] == pytest.approx([0.08 * number for number in range(40)])
    assert [frame.arrived for frame in frames] == pytest.approx([100 + frame.time for frame in frames])
    assert clock.now == pytest.approx(100 + 39 * 0.08)
    assert played.rate.value == pytest.approx(12.5)


@pytest.mark.parametrize("name", ["h264 joined.ts", "h264 times out of order.mp4", "h264 late.mp4", "h264 uneven.mkv"])
def test_odd_time_stamps_do_not_stop_it(name, tmp_path):
    path = tmp_path / name
    FILES[name](path)
    frames, played = everything(path)
    steps = np.diff([frame.time for frame in frames])
    assert len(frames) == len(decode_in_order(path))
    assert ((steps >= 0) & (steps < 1)).all()
    assert played._clock.now - 100 == pytest.approx(frames[-1].time, abs=0.01)


def test_a_camera_sets_the_time(folder):
    """Whatever its time stamps say."""
    source = LiveSource("camera 0", str(folder / "v.mp4"))
    clock = Hand()
    played = Capture(source, 0.0, 100, [lambda frame: clock.sleep(0.5)], clock=clock)
    frames = list(itertools.chain(*played))
    assert [frame.time for frame in frames] == pytest.approx([0.5 * number for number in range(40)])


def test_damaged_packets_are_skipped_and_counted(folder, tmp_path):
    content = bytearray((folder / "v.mp4").read_bytes())
    with av.open(str(folder / "v.mp4")) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        place = packets[14].pos
    content[place : place + packets[14].size] = b"\xff" * packets[14].size
    (tmp_path / "damaged.mp4").write_bytes(content)
    frames, played = everything(tmp_path / "damaged.mp4")
    assert played.damaged >= 1
    assert 40 > len(frames) >= 30


# ---- sources


@pytest.mark.parametrize(
    ("platform", "source", "opened"),
    [
        ("linux", "0", ("/dev/video0", "v4l2", "camera 0", True)),
        ("linux", "/dev/video2", ("/dev/video2", "v4l2", "camera /dev/video2", True)),
        ("darwin", "1", ("1", "avfoundation", "camera 1", True)),
        ("win32", "1", ("video=Second", "dshow", "camera 1", True)),
        ("linux", "rtsp://me:s3%2Fcret@host/door?a=b@c", (..., None, "rtsp://host/door?a=b@c", True)),
        ("linux", "http://host/live.ts", (..., None, "http://host/live.ts", False)),
        ("linux", "udp://@239.0.0.1:5000", (..., None, "udp://239.0.0.1:5000", True)),
    ],
)
def test_sources(platform, source, opened, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    named = (("First", "video"), ("Microphone", "audio"), ("Second", "video"))
    devices = [DeviceInfo(name, name, False, [media]) for name, media in named]
    monkeypatch.setattr(av, "enumerate_input_devices", lambda kind: devices)
    found = live_source.find(source)
    address = source if opened[0] is ... else opened[0]
    assert (found.address, found.format, found.name, found.live) == (address, *opened[1:])
    assert not found.is_file
    if platform == "win32":
        assert_rejected(lambda: live_source.find("2"), "camera 2", "Windows lists 2")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (av.error.FileNotFoundError(errno.ENOENT, "No such file or directory"), "there is no such camera; found"),
        (av.error.PermissionError(errno.EACCES, "Permission denied"), "permission denied; on Linux"),
        (av.error.OSError(errno.EBUSY, "Device or resource busy"), "another program uses it"),
        (av.error.OSError(errno.ENOTTY, "Inappropriate ioctl for device"), "Inappropriate ioctl for device"),
    ],
)
def test_cameras_that_cannot_be_opened(error, words, monkeypatch):
    def refuse(*words, **options):
        raise error

    monkeypatch.setattr(av, "open", refuse)
    assert_rejected(lambda: list(Capture(live_source.find("0"), 0, 1)), "camera 0 cannot be opened: ", words)


@pytest.fixture
def served(folder, tmp_path):
    """An address that serves the files of a folder, in which there is live.ts."""
    write_video(tmp_path / "live.ts", moving_square(25), fps=50)
    (tmp_path / "text.ts").write_text("no video\n" * 100)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *words) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def silent():
    """The port of a server that accepts connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_stream_over_http(served, folder, rubiks_command):
    words = ("online", folder / "net.ckpt", f"{served}/live.ts", "--fps", 20, "--device", "cpu", "--json")
    status, out, err = rubiks_command(*words)
    assert (status, "25 frames" in err) == (0, True)
    assert json.loads(out.splitlines()[-1])["source"] == f"{served}/live.ts"


def test_motion_jpeg_over_http_has_no_times_of_its_own(page):
    """As network cameras, and --show, send it."""

    def show() -> None:
        for number in itertools.count():
            if ended.wait(0.01):
                return
            page.show(np.full((48, 64, 3), number % 200, np.uint8))

    ended, clock = threading.Event(), Hand()
    shown = threading.Thread(target=show)
    shown.start()
    source = live_source.find(f"{page.address}live.mjpeg")
    played = Capture(source, 0.0, 10**6, [lambda frame: clock.sleep(0.5)], clock=clock)
    batches = iter(played)
    frames = next(batches)
    while len(frames) < 20:
        frames += next(batches)
    ended.set()
    shown.join()
    played.close()
    assert [frame.time for frame in frames] == pytest.approx([0.5 * number for number in range(len(frames))])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("{served}/none.ts", ("cannot be opened", "404")),
        ("{served}/text.ts", ("cannot be opened", "Invalid data")),
        ("http://127.0.0.1:{silent}/x.ts", ("is silent: nothing came in 0.3 seconds",)),
        ("rtsp://user:secret@127.0.0.1:{silent}/x", ("rtsp://127.0.0.1:", "is silent: nothing came in 0.3 seconds")),
        ("http://127.0.0.1:{free}/x.ts", ("cannot be opened: Connection refused",)),
        ("rtsp://127.0.0.1:{free}/x.ts", ("cannot be opened: Connection refused",)),
        ("telepathy://x", ("cannot be opened: Protocol not found",)),
    ],
)
def test_addresses_that_give_nothing(address, words, served, silent, folder, rubiks_command):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    timeout = "300ms" if "silent" in address else "30s"
    address = address.format(served=served, silent=silent, free=free)
    status, out, err = rubiks_command(
        "online", folder / "net.ckpt", address, "--device", "cpu", "--timeout", timeout, "--json"
    )
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert all(word in line for word in words), line
    assert "secret" not in err


def test_a_stream_that_falls_silent(folder, tmp_path, rubiks_command):
    write_video(tmp_path / "live.ts", moving_square(200), fps=200)
    ended = threading.Event()

    def serve() -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(10_000)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + (tmp_path / "live.ts").read_bytes())
            ended.wait(PATIENCE)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}/live.ts"
        words = ("online", folder / "net.ckpt", address, "--device", "cpu", "--timeout", "3s")
        status, _, err = rubiks_command(*words)
        ended.set()
        thread.join()
    assert status == 2
    assert int(err.splitlines()[1].split()[0]) > 100
    assert f"error: {address} is silent: nothing came in 3 seconds" in err


def test_a_camera_whose_driver_blocks_is_silent(monkeypatch):
    for_ever = threading.Event()
    monkeypatch.setattr(av, "open", lambda *words, **options: for_ever.wait(PATIENCE))
    assert_rejected(lambda: list(Capture(live_source.find("0"), 0, 1, timeout=0.2)), "camera 0 is silent")
    for_ever.set()


def test_a_camera_that_is_unplugged(folder, monkeypatch):
    """What came before is scored."""

    def packets(container, stream):
        yield from itertools.islice(container.demux(stream), 8)
        raise av.error.OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(capture, "packets_with_data", packets)
    source = LiveSource("camera 0", str(folder / "v.mp4"), live=False)
    found, seen = iter(Capture(source, 0.0, 100, clock=Hand())), []
    with pytest.raises(InputError, match="camera 0 broke off: No such device"):
        seen.extend(found)
    assert sum(map(len, seen)) >= 4


def test_a_camera_without_a_frame_yet_is_asked_again(folder, monkeypatch):
    original, calls = capture.packets_with_data, itertools.count()

    def packets(container, stream):
        if next(calls) < 3:
            raise av.error.BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return original(container, stream)

    monkeypatch.setattr(capture, "packets_with_data", packets)
    assert len(everything(folder / "v.mp4")[0]) == 40


# ---- what is printed


def test_a_line_of_json_for_each_prediction(folder, rubiks_command):
    words = ("online", folder / "net.ckpt", folder / "fast.mp4", "--window", "200ms", "--device", "cpu", "--topk", 2)
    status, out, err = rubiks_command(*words, "--json")
    assert status == 0
    lines = [json.loads(line) for line in out.splitlines()]
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert 0.12 <= times[0] <= times[-1] <= 0.78
    for line in lines:
        assert [NAMES[one["index"]] for one in line["predictions"]] == [one["label"] for one in line["predictions"]]
        assert len(line["predictions"]) == 2
        assert line["latency"] >= 0
        assert line["dropped"] >= 0
        assert (line["source"], line["model"]) == (str(folder / "fast.mp4"), str(folder / "net.ckpt"))
    first, last = err.splitlines()
    assert first.startswith("Scores a sliding window of 4 frames over 0.2 s, scored every 0.05 s")
    assert re.fullmatch(
        rf"40 frames and {len(lines)} predictions in \S+ s; the network had no time for \d+ frames", last
    )


@pytest.mark.parametrize("terminal", [False, True])
def test_a_line_for_people(terminal, folder, rubiks_command, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    words = ("online", folder / "net.ckpt", folder / "v.mp4", "--window", "400ms", "--device", "cpu")
    status, out, _ = rubiks_command(*words)
    assert status == 0
    label = "|".join(map(re.escape, NAMES))
    line = rf"\d\.\ds  (?:{label})  \d+%  \([\d.]+ frames/s, [\d.]+ predictions/s, \d+ dropped\)"
    if terminal:
        assert re.search(line, out)
    else:
        assert 1 <= len(out.splitlines()) <= 4  # of 3.2 seconds
        assert all(re.fullmatch(line, printed) for printed in out.splitlines())


# ---- how it ends


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_finishes_the_recording(number, folder, tmp_path, rubiks_command):
    write_video(tmp_path / "long.mp4", moving_square(1500, 54, 70), fps=25)
    target = tmp_path / "drawn" / "live.mp4"
    before = signal.getsignal(signal.SIGTERM)

    def kill() -> None:
        give_up = time.monotonic() + PATIENCE
        while not (target.exists() and target.stat().st_size) and time.monotonic() < give_up:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=kill)
    thread.start()
    words = ("online", folder / "net.ckpt", tmp_path / "long.mp4", "--save-video", target, "--device", "cpu")
    status, _, err = rubiks_command(*words)
    thread.join()
    assert status == 0
    *_, summary, recorded = err.splitlines()
    count = int(re.match(r"([\d,]+) frames and", summary)[1].replace(",", ""))
    assert 0 < count < 1500
    assert recorded.startswith(f"{target} has ")
    assert 0 < len(decode_in_order(target)) <= count
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ckpt": "none.ckpt"}, "none.ckpt"),
        ({"source": "none.mp4"}, "none.mp4: no such file; a live source is a camera's number, a file, or an address"),
        ({"source": "text.mp4"}, "text.mp4 cannot be opened: Invalid data"),
        ({"source": "empty.mp4"}, "empty.mp4 cannot be opened: "),
        ({"source": "folder"}, "folder cannot be opened: Is a directory"),
        ({"source": "sound.wav"}, "sound.wav contains no video that FFmpeg can decode"),
        ({"source": "987"}, "camera 987 cannot be opened: there is no such camera"),
        ({"--window": "0s"}, "--window must be a time from 1ms to 3600s such as 2.5s or 500ms, got '0s'"),
        ({"--window": "soon"}, "--window must be"),
        ({"--stride": "2h"}, "--stride must be"),
        ({"--smoothing": "nan"}, "--smoothing must be a time such as 2.5s or 500ms"),
        ({"--timeout": "0"}, "--timeout must be"),
        ({"--fps": "0"}, "--fps must be"),
        ({"--fps": "nan"}, "--fps must be"),
        ({"--topk": "0"}, "topk must be"),
        ({"--save-video": "drawn.mkv"}, "drawn.mkv cannot be recorded: the name must end in .mp4"),
        ({"--save-video": "folder.mp4"}, "folder.mp4 cannot be written: Is a directory"),
        ({"--save-video": "text.mp4/x.mp4"}, "text.mp4/x.mp4 cannot be written: Not a directory"),
        ({"--save-video": "v.mp4"}, "--save-video v.mp4 is the source; choose another file"),
    ],
)
def test_wrong_input_is_one_line(changes, words, folder, tmp_path, rubiks_command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("net.ckpt", "v.mp4"):
        os.link(folder / name, name)
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.mp4").mkdir()
    with av.open("sound.wav", "w") as sound:
        stream = sound.add_stream("pcm_s16le", rate=8000, layout="mono")
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        samples.sample_rate = 8000
        sound.mux([*stream.encode(samples), *stream.encode()])
    chosen = {"ckpt": "net.ckpt", "source": "v.mp4", "--device": "cpu"} | changes
    options = [word for name, value in chosen.items() if name.startswith("--") for word in (name, value)]
    before = sorted(tmp_path.rglob("*"))
    status, out, err = rubiks_command("online", chosen["ckpt"], chosen["source"], *options)
    assert (status, out) == (2, "")
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in err
    assert sorted(tmp_path.rglob("*")) == before


# ---- the recording


def test_the_class_is_recorded_with_the_frames(folder, tmp_path):
    recording = Recording(tmp_path / "new" / "drawn.mp4")
    view = LiveView(recording, None)
    frames = everything(folder / "v.mp4")[0]
    for frame in frames[:16]:
        view.add(frame)
    while recording.frames < 16:
        view.check()
        time.sleep(0.01)
    view.caption = "jump & run  93%"
    for frame in frames[16:32]:
        view.add(frame)
    view.close()
    drawn, original = decode_in_order(tmp_path / "new" / "drawn.mp4"), decode_in_order(folder / "v.mp4")[:32]
    assert drawn.shape == original.shape
    changed = np.abs(drawn.astype(int) - original)[:, :8, :40].mean((1, 2, 3))
    assert changed[:16].max() < 12 < 25 < changed[16:].min()
    with av.open(str(tmp_path / "new" / "drawn.mp4")) as file:
        times = [frame.time for frame in file.decode(video=0)]
    assert times == pytest.approx([frame.time for frame in frames[:32]], abs=0.001)


def test_a_recording_can_be_played_before_it_ends(tmp_path):
    recording = Recording(tmp_path / "drawn.mp4")
    for number, image in enumerate(moving_square(150, 55, 71)):
        recording.add(image, 0.04 * number)
    (tmp_path / "now.mp4").write_bytes((tmp_path / "drawn.mp4").read_bytes())
    recording.close()
    assert decode_in_order(tmp_path / "now.mp4").shape[1:] == (54, 70, 3)
    assert 50 <= len(decode_in_order(tmp_path / "now.mp4")) < 150 == len(decode_in_order(tmp_path / "drawn.mp4"))


def test_frames_of_one_moment_are_all_recorded(tmp_path):
    recording = Recording(tmp_path / "drawn.mp4")
    for image in moving_square(5):
        recording.add(image, 1.0)
    recording.close()
    assert len(decode_in_order(tmp_path / "drawn.mp4")) == 5


def test_an_earlier_recording_is_kept_until_there_is_a_frame(folder, tmp_path, rubiks_command):
    (tmp_path / "drawn.mp4").write_text("earlier")
    words = ("online", folder / "net.ckpt", "987", "--save-video", tmp_path / "drawn.mp4", "--device", "cpu")
    assert rubiks_command(*words)[0] == 2
    assert (tmp_path / "drawn.mp4").read_text() == "earlier"


def test_a_recording_that_cannot_be_written_ends_it(folder, tmp_path, rubiks_command, monkeypatch):
    def full(self, frame) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Recording, "_encode", full)
    words = ("online", folder / "net.ckpt", folder / "v.mp4", "--save-video", tmp_path / "drawn.mp4", "--device", "cpu")
    status, _, err = rubiks_command(*words)
    assert status == 2
    assert f"error: {tmp_path}/drawn.mp4 cannot be written: No space left on device" in err


# ---- the page


@pytest.fixture
def page():
    page = LivePage("a <b> & c")
    yield page
    page.close()


def test_the_page_shows_the_newest_image(page):
    with urllib.request.urlopen(page.address, timeout=PATIENCE) as answer:
        text = answer.read().decode()
    assert "<title>a &lt;b&gt; &amp; c</title>" in text
    with urllib.request.urlopen(f"{page.address}live.mjpeg", timeout=PATIENCE) as answer:
        assert answer.headers.get_content_type() == "multipart/x-mixed-replace"
        boundary = answer.headers.get_param("boundary")
        for colour in ((250, 20, 20), (20, 20, 250)):
            page.show(np.full((48, 64, 3), colour, np.uint8))
            assert answer.readline().decode() == f"--{boundary}\r\n"
            assert answer.readline() == b"Content-Type: image/jpeg\r\n"
            size = int(answer.readline().partition(b":")[2])
            answer.readline()
            part = io.BytesIO(answer.read(size))
            answer.readline()
            assert np.abs(np.asarray(Image.open(part))[24, 32].astype(int) - colour).max() < 8
        page.close()
        assert answer.read() == b""


def test_only_who_knows_the_address_sees_the_picture(page):
    root = page.address.split("/", 3)
    for path in ("", "live.mjpeg", "../../etc/passwd", "x" * 16 + "/live.mjpeg"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen("/".join([*root[:3], path]), timeout=PATIENCE)
    assert root[2].startswith("127.0.0.1:")


def test_a_browser_shows_the_live_picture(page, browser, tmp_path):
    (tmp_path / "page.html").write_text("<!DOCTYPE html>")
    tab = browser.open(tmp_path / "page.html")
    tab.call("Page.navigate", url=page.address)
    give_up = time.monotonic() + PATIENCE
    size = (
        "(() => { const i = document.querySelector('img'); return i ? [i.naturalWidth, i.naturalHeight] : [0, 0] })()"
    )
    while tab.run(size) != [64, 48]:
        assert time.monotonic() < give_up
        page.show(np.full((48, 64, 3), 200, np.uint8))
        time.sleep(0.05)


def test_the_command_serves_the_page(folder, tmp_path, rubiks_command, monkeypatch):
    """From the first line on standard error until the end."""
    seen = []
    address = re.compile(r"http://127\.0\.0\.1:\d+/\S+/")

    def show(self, image: np.ndarray) -> None:
        original(self, image)
        if not seen:
            with urllib.request.urlopen(f"{self.address}live.mjpeg", timeout=PATIENCE) as answer:
                seen.append((self.address, answer.read(100)))

    original = LivePage.show
    monkeypatch.setattr(LivePage, "show", show)
    status, _, err = rubiks_command("online", folder / "net.ckpt", folder / "fast.mp4", "--show", "--device", "cpu")
    assert status == 0
    ((shown, begin),) = seen
    assert address.search(err)[0] == shown
    assert b"image/jpeg" in begin
