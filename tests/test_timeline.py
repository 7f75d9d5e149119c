"""`rubiks predict --window` and timeline: what a long video shows when, and what is refused."""

from __future__ import annotations

import csv
import io
import itertools
import json
import weakref
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import assert_rejected
from generated import FILES, RATE, encoded, remuxed
from PIL import Image
from torchvision.transforms.v2 import functional as tv
from videos import decode_in_order, moving_square, write_video

from rubiks import Predictor, RubiksNet
from rubiks.cli.timelines import seconds
from rubiks.data.decode import VideoFile
from rubiks.data.index import decode
from rubiks.data.screen import Screen
from rubiks.data.timing import frame_times
from rubiks.errors import VideoError
from rubiks.evaluation.protocols import Protocol
from rubiks.nn import Normalize
from rubiks.predict.timeline import Segment, timeline

pytestmark = pytest.mark.usefixtures("small_network")

NAMES = ["red", "[b]green & so on, a class with a very long name that says all it can say", "zoë 青"]
COLOURS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)


@pytest.fixture(scope="module")
def network(tmp_path_factory, small_network) -> Path:
    """A checkpoint with random weights, whose scores differ from window to window."""
    path = tmp_path_factory.mktemp("network") / "net.ckpt"
    torch.manual_seed(3)
    net = RubiksNet("tiny", 3, num_frames=4)
    net.new_fc.weight.data.mul_(40)
    clips = torch.from_numpy(moving_square(60)[:, 8:40, 8:40]).permute(0, 3, 1, 2).unflatten(0, (15, 4))
    with torch.no_grad():
        net.new_fc.bias -= net.eval()(Normalize()(clips)).mean(0)  # no class is the best everywhere
    described = {"tier": "tiny", "variant": "rubiks3d", "num_classes": 3, "num_frames": 4, "classes": NAMES}
    config = {"data": {"size": 32, "sampling": "uniform", "window": 16}}
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "rubiks": {**described, "config": config, "epoch": 3}}, path)
    return path


@pytest.fixture
def predictor(network) -> Predictor:
    return Predictor(network, device="cpu")


@pytest.fixture
def by_colour(monkeypatch) -> None:
    """Scores clips by their mean colour: a clip of one colour of COLOURS has its class almost for sure."""

    def score(self: Predictor, views: torch.Tensor) -> torch.Tensor:
        return views.float().mean((1, 2, 4, 5)) / 10

    monkeypatch.setattr(Predictor, "score", score)


def coloured(path: Path, *parts: tuple[int, float], rate: int = RATE, grey: int = 3) -> Path:
    """A video of parts of one colour, each a class (or `grey`) and its seconds."""
    colours = [*COLOURS, np.array((90, 90, 90), np.uint8)]
    frames = [np.full((48, 64, 3), colours[label]) for label, length in parts for _ in range(round(length * rate))]
    write_video(path, np.stack(frames), fps=rate)
    return path


# ---- truth


def brute_force(path, predictor, window, stride, min_score, times) -> list[Segment]:
    """A timeline by plain loops over the decoded frames, whose times are exact fractions of seconds."""
    with av.open(str(path)) as container:
        screen = Screen()
        frames = [torch.from_numpy(screen.image(frame).copy()).permute(2, 0, 1) for frame in container.decode(video=0)]
    assert len(frames) == len(times)
    steps = sorted(b - a for a, b in itertools.pairwise(times))
    end = times[-1] + (steps[(len(steps) - 1) // 2] + steps[len(steps) // 2]) / 2
    windows, start = [], Fraction(0)
    while start + window <= times[-1]:
        windows.append((start, start + window))
        start += stride
    windows.append((max(Fraction(0), min(start, end - window)), end))

    scores = []
    for start, stop in windows:
        own = [frame for frame, time in zip(frames, times, strict=True) if start <= time < stop]
        own = own or [frames[max(number for number, time in enumerate(times) if time <= start)]]
        tick = len(own) / 4
        clip = torch.stack([own[int(tick / 2 + tick * i)] for i in range(4)])
        clip = tv.center_crop(tv.resize(clip, [round(32 * 256 / 224)], antialias=True), [32, 32])
        with torch.inference_mode():
            scores.append(predictor.net(Normalize()(clip)[None])[0].double().softmax(0).numpy())

    places = sorted({place for window in windows for place in window})
    segments: list[Segment] = []
    for a, b in itertools.pairwise(places):
        mean = np.mean([score for score, (c, d) in zip(scores, windows, strict=True) if c <= a and b <= d], axis=0)
        index = int(mean.argmax())
        if mean[index] < min_score:
            continue
        if segments and segments[-1].end == a and segments[-1].index == index:
            last = segments.pop()
            mean[index] = (last.score * (a - last.start) + mean[index] * float(b - a)) / float(b - last.start)
            a = last.start
        segments.append(Segment(a, b, NAMES[index], index, mean[index]))
    return segments


EXTRA = {
    "one long still.mp4": encoded("h264", times=[*range(20), *range(200, 240)]),
    "no times.h264": encoded("h264", b_frames=0),
}


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("h264 closed.mkv", None),
        ("h264 late.mp4", None),
        ("h264 uneven.mp4", None),
        ("h264 two sizes.mkv", None),
        ("h264 turned.mp4", None),
        ("h264 interlaced.mp4", None),
        ("vp9 hidden frames.webm", None),
        ("mpeg2.ts", None),
        ("gif.gif", None),
        ("one long still.mp4", None),
        # Without usable times:
        ("h264 closed.avi", 12),
        ("h264 negative times.mkv", 12),
        ("h264 swapped times.mkv", 12),
        ("no times.h264", 24),
    ],
)
def test_a_timeline_is_that_of_plain_loops(name, rate, predictor, tmp_path):
    path = tmp_path / name
    (FILES | EXTRA)[name](path)
    with av.open(str(path)) as container:
        if rate is None:
            times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
            times = [time - times[0] for time in times]
        else:
            times = [Fraction(number, rate) for number, _ in enumerate(container.decode(video=0))]
    several = 0
    for window, stride in (("1", "0.5"), ("1.3", "0.4"), ("0.7", "0.7"), ("0.05", "0.05"), ("60", "1")):
        if name == "one long still.mp4" and window == "0.05":
            continue  # hundreds of windows
        found = timeline(predictor, path, float(window), float(stride), min_score=0.5)
        truth = brute_force(path, predictor, Fraction(window), Fraction(stride), 0.5, times)
        assert [one.index for one in found.segments] == [one.index for one in truth]
        for own, other in zip(found.segments, truth, strict=True):
            assert (own.start, own.end) == pytest.approx((float(other.start), float(other.end)), abs=2e-6)
            assert own.score == pytest.approx(other.score, abs=1e-5)
            assert own.label == NAMES[own.index]
        several += len(truth) > 1
    assert several


@pytest.mark.parametrize("protocol", ["one_clip", "two_clip", "dense_10x3"])
def test_a_video_that_is_not_longer_than_a_window_has_the_score_of_predict(protocol, network, tmp_path):
    predictor = Predictor(network, protocol, topk=3, device="cpu")
    write_video(tmp_path / "a.mp4", moving_square(30))
    (best, *_) = predictor(tmp_path / "a.mp4").predictions
    for window in (2.5, 100):
        (own,) = timeline(predictor, tmp_path / "a.mp4", window, min_score=0).segments
        assert own == Segment(0, 2.5, best.label, best.index, pytest.approx(best.score, rel=1e-12))


def test_a_single_frame_has_a_timeline(predictor, tmp_path):
    write_video(tmp_path / "a.mp4", moving_square(1))
    (own,) = timeline(predictor, tmp_path / "a.mp4", min_score=0).segments
    assert (own.start, own.end) == (0, pytest.approx(1 / 12, abs=1e-6))


@pytest.mark.parametrize("window", [1, 2.5])
@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.ts"])
def test_joined_parts_are_found_at_their_seconds(name, window, predictor, by_colour, tmp_path):
    path = coloured(tmp_path / name, (0, 4), (1, 3), (2, 5.5))
    found = timeline(predictor, path, window, 0.5, min_score=0.6).segments
    assert [one.index for one in found] == [0, 1, 2]
    assert [one.label for one in found] == NAMES
    assert [one.start for one in found] == pytest.approx([0, 4, 7], abs=0.5)
    assert [one.end for one in found] == pytest.approx([4, 7, 12.5], abs=0.5)
    assert found[0].start == 0
    assert found[-1].end == pytest.approx(12.5, abs=1e-3)
    assert all(one.score > 0.6 for one in found)


def test_windows_side_by_side_give_exact_seconds(predictor, by_colour, tmp_path):
    path = coloured(tmp_path / "a.mp4", (0, 4), (1, 3), (2, 5))
    found = timeline(predictor, path, 1, 1).segments
    assert [(one.start, one.end, one.index) for one in found] == [(0, 4, 0), (4, 7, 1), (7, 12, 2)]
    assert [one.score for one in found] == pytest.approx([1, 1, 1], abs=1e-3)


def test_what_is_unlikely_is_left_out(predictor, by_colour, tmp_path):
    path = coloured(tmp_path / "a.mp4", (3, 3), (0, 3))
    assert [one.index for one in timeline(predictor, path, 1, 1, min_score=0.4).segments] == [0]
    assert timeline(predictor, path, 1, 1, min_score=1).segments == []
    assert timeline(predictor, path, 1, 1, min_score=0).segments[0].start == 0


def test_every_frame_is_decoded_once_and_few_are_kept(predictor, tmp_path, monkeypatch):
    decoded, converted, most, kept = [], [], [0], weakref.WeakSet()
    resize, image = Protocol.resize, Screen.image

    def counted(container, stream):
        for frame in decode(container, stream):
            decoded.append(frame.pts)
            yield frame

    def watched(self, frames):
        small = resize(self, frames)
        if len(frames) == 1:
            kept.add(small.untyped_storage())
            most[0] = max(most[0], len(kept))
        return small

    monkeypatch.setattr("rubiks.data.decode.decode", counted)
    monkeypatch.setattr(Screen, "image", lambda self, frame: (converted.append(frame.pts), image(self, frame))[1])
    monkeypatch.setattr(Protocol, "resize", watched)
    for length in (20, 60):
        write_video(tmp_path / "a.mp4", moving_square(length * 12, 48, 64))
        for numbers in (decoded, converted):
            numbers.clear()
        most[0] = 0
        timeline(predictor, tmp_path / "a.mp4", 2, 1, batch_size=4)
        assert len(decoded) == len(set(decoded)) == length * 12
        # Four of 24 frames are needed for each window, and no others are converted but the first.
        assert len(converted) == len(set(converted)) <= 1 + 4 * (length - 1)
        assert most[0] <= 2 * 4 + 1


# ---- damage


def noisy(frames: int = 60) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 60, (frames, 64, 80, 3), dtype=np.uint8)
    return moving_square(frames) // 2 + noise


def garbled(packets: list[av.Packet]) -> list[av.Packet]:
    """The 31st packet has other bytes."""
    old = packets[30]
    packets[30] = new = av.Packet(bytes(old)[:6] + np.random.default_rng(1).bytes(old.size - 6))
    new.pts, new.dts, new.time_base = old.pts, old.dts, old.time_base
    return packets


def cut_off(path: Path) -> None:
    encoded("h264", images=noisy())(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def only_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])


BAD = {
    "missing.mp4": (lambda path: None, "No such file"),
    "empty.mp4": (lambda path: path.touch(), "is empty"),
    "text.mp4": (lambda path: path.write_text("no video"), "cannot be opened as a video"),
    "folder.mp4": (lambda path: path.mkdir(), "is a folder"),
    "sound.m4a": (only_sound, "contains no video"),
    "cut.mp4": (cut_off, "cannot be opened as a video"),
    "cut.mkv": (cut_off, "bytes that its container announces are missing"),
    "cut.ts": (cut_off, "is damaged at frame"),
    "middle.mp4": (remuxed(encoded("h264", images=noisy()), garbled), "is broken or cut off and cannot be decoded"),
    "middle.webm": (remuxed(encoded("vp9", images=noisy()), garbled), "is broken or cut off and cannot be decoded"),
    "middle.avi": (remuxed(encoded("mpeg4", b_frames=0, images=noisy()), garbled), "is damaged at frame 30"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_damaged_video_is_one_error(name, predictor, tmp_path):
    write, words = BAD[name]
    write(tmp_path / name)
    with pytest.raises(VideoError, match=words) as caught:
        timeline(predictor, tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def test_frames_that_the_packets_did_not_announce_are_an_error(predictor, tmp_path, monkeypatch):
    write_video(tmp_path / "a.mp4", moving_square(60))
    everything = VideoFile.decoded
    for chosen, words in ((slice(40), "ends after 40 of its 60 frames"), (slice(1, None), "frame 0 is not the one")):
        monkeypatch.setattr(VideoFile, "decoded", lambda self, own=chosen: iter(list(everything(self))[own]))
        with pytest.raises(VideoError, match=words):
            timeline(predictor, tmp_path / "a.mp4")


@pytest.mark.parametrize(
    "name", ["h264 closed.mp4", "h264 joined.ts", "h264 equal times.mkv", "mpeg4 packed b-frames.avi", "flv1.flv"]
)
def test_times_increase_and_start_at_0(name, tmp_path):
    FILES[name](tmp_path / name)
    with VideoFile(str(tmp_path / name)) as video:
        times = frame_times(video)
        assert len(times) == len(video) + 1
    assert times[0] == 0
    assert (np.diff(times) > 0).all()
    assert times[-1] == pytest.approx(5_000_000, rel=0.01)


# ---- the command


@pytest.fixture
def folder(network, by_colour, tmp_path, monkeypatch) -> Path:
    """A video with three parts, one without any, a damaged one, and the network."""
    coloured(tmp_path / "a [1] ü.mp4", (0, 4), (1, 3), (2, 5))
    coloured(tmp_path / "grey.mkv", (3, 3))
    cut_off(tmp_path / "cut.mkv")
    (tmp_path / "net.ckpt").symlink_to(network)
    monkeypatch.chdir(tmp_path)
    return tmp_path


WORDS = ("predict", "net.ckpt", "a [1] ü.mp4", "grey.mkv", "cut.mkv", "--device", "cpu", "--window", "1s")


def test_the_same_in_three_forms(folder, rubiks_command):
    words = (*WORDS, "--stride", "1000ms", "--min-score", "0.5")
    status, out, err = rubiks_command(*words, "--json")
    assert status == 1
    assert "1 of 3 videos cannot be read" in err
    good, grey, bad = map(json.loads, out.splitlines())
    assert [line["source"] for line in (good, grey, bad)] == ["a [1] ü.mp4", "grey.mkv", "cut.mkv"]
    for line in (good, grey, bad):
        shared = {key: line[key] for key in ("model", "protocol", "window", "stride", "min_score")}
        assert shared == {"model": "net.ckpt", "protocol": "one_clip", "window": 1, "stride": 1, "min_score": 0.5}
    places = [(one["start"], one["end"], one["label"], one["index"]) for one in good["segments"]]
    assert places == [(0, 4, NAMES[0], 0), (4, 7, NAMES[1], 1), (7, 12, NAMES[2], 2)]
    assert good["duration"] == 12
    assert grey["segments"] == []
    assert grey["duration"] == pytest.approx(3, abs=1e-3)
    assert "bytes that its container announces" in bad["error"]
    assert "segments" not in bad

    status, out, _ = rubiks_command(*words, "--csv")
    assert status == 1
    header, *rows = csv.reader(io.StringIO(out))
    assert header == ["source", "start", "end", "label", "score", "error"]
    assert [(float(row[1]), float(row[2]), row[3]) for row in rows[:3]] == [place[:3] for place in places]
    assert [float(row[4]) for row in rows[:3]] == pytest.approx([one["score"] for one in good["segments"]], rel=1e-5)
    assert rows[3:] == [["cut.mkv", "", "", "", "", bad["error"]]]

    status, out, _ = rubiks_command(*words)
    assert status == 1
    for text in ("a [1] ü.mp4", "0:04.00", "0:07.00", "0:12.00", "[b]green & so on", "zoë 青", "no class is likely"):
        assert text in out
    assert "bytes that" in out


@pytest.mark.parametrize("window", [("--window", "1s"), ()])
def test_lines_go_to_standard_output_beside_a_progress_bar(window, folder, rubiks_command, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # standard error counts as a terminal
    status, out, err = rubiks_command("predict", "net.ckpt", "grey.mkv", "--json", "--device", "cpu", *window)
    assert status == 0
    assert json.loads(out)["source"] == "grey.mkv"
    assert "━" in err


def test_pictures_and_videos_are_written(folder, rubiks_command):
    words = (*WORDS, "--stride", "1s", "--save-picture", "pictures", "--save-video", "drawn")
    status, _, _ = rubiks_command(*words, "--min-score", "0.9")
    assert status == 1
    assert sorted(path.name for path in (folder / "pictures").iterdir()) == ["a [1] ü.png", "grey.png"]
    picture = np.asarray(Image.open(folder / "pictures/a [1] ü.png").convert("RGB")).astype(int)
    assert (picture.max(2) - picture.min(2) > 100).sum() > 1000  # coloured segments
    assert sorted(path.name for path in (folder / "drawn").iterdir()) == ["a [1] ü.mp4", "grey.mp4"]
    labels = decode_in_order(folder / "drawn/a [1] ü.mp4")[:, :10, :60].astype(int)
    changes = np.abs(np.diff(labels, axis=0)).mean((1, 2, 3))
    assert np.flatnonzero(changes > 20).tolist() == [47, 83]
    drawn, original = decode_in_order(folder / "drawn/grey.mp4"), decode_in_order("grey.mkv")
    assert np.abs(drawn.astype(int) - original).max() < 10  # nothing to say


def test_the_copy_of_an_uneven_video_keeps_its_times(predictor, tmp_path, network, by_colour, rubiks_command):
    times = [*range(12), *range(48, 60), *range(96, 108)]
    frames = np.repeat(COLOURS, 12, axis=0)[:, None, None].repeat(48, 1).repeat(64, 2)
    encoded("h264", times=times, images=frames)(tmp_path / "a.mp4")
    found = timeline(predictor, tmp_path / "a.mp4", 1, 1).segments
    assert [(one.start, one.end) for one in found] == [(0, 4), (4, 8), (8, 9)]
    words = ("predict", network, tmp_path / "a.mp4", "--window", "1", "--stride", "1", "--device", "cpu")
    assert rubiks_command(*words, "--save-video", tmp_path / "drawn")[0] == 0
    with av.open(str(tmp_path / "drawn/a.mp4")) as container:
        assert [round(12 * frame.time) for frame in container.decode(video=0)] == times


# ---- wrong words


@pytest.mark.parametrize(
    ("text", "value"),
    [("2.5s", 2.5), ("500ms", 0.5), ("2.5", 2.5), (".5s", 0.5), ("3", 3), ("2. s", 2), (" 1s ", 1), ("-1s", -1)],
)
def test_times_are_understood(text, value):
    assert seconds("--window", text) == value


@pytest.mark.parametrize("text", ["", "s", "abc", "2,5s", "2.5m", "1:30", "nan", "inf", "1e3", "٣s", "2.5s 3s", "ms"])
def test_other_texts_are_not_times(text):
    assert_rejected(lambda: seconds("--window", text), "--window must be a time such as 2.5s or 500ms", repr(text))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window=0"], "window must be 0.01 to 1,000,000 seconds, got 0"),
        (["--window=-1s"], "window must be 0.01 to 1,000,000 seconds, got -1"),
        (["--window=2e7"], "--window must be a time such as 2.5s"),
        (["--window=20000000"], "window must be 0.01 to 1,000,000 seconds, got 2e+07"),
        (["--window=soon"], "--window must be a time such as 2.5s or 500ms, got 'soon'"),
        (["--window=2s", "--stride=0s"], "stride must be 0.001 to 1,000,000 seconds, got 0"),
        (["--window=2s", "--stride=3s"], "stride must be at most the window, 2 seconds, since frames"),
        (["--window=2s", "--stride=now"], "--stride must be a time such as"),
        (["--window=2s", "--min-score=1.5"], "min_score must be a probability, 0 to 1, got 1.5"),
        (["--window=2s", "--min-score=nan"], "min_score must be a probability, 0 to 1, got nan"),
        (["--window=2s", "--batch-size=0"], "batch_size must be a whole number of at least 1, got 0"),
        (["--window=2s", "--topk=3"], "--topk is for whole videos; leave it out with --window"),
        (["--window=2s", "--workers=1"], "--workers is for whole videos"),
        (["--window=2s", "--save-picture=net.ckpt"], "cannot be written"),
        (["--window=2s", "--save-video=net.ckpt"], "cannot be written"),
        (["--window=2s", "--save-video=."], "a [1] ü.mp4 is one of the videos and would be overwritten"),
        (["--save-video=."], "a [1] ü.mp4 is one of the videos and would be overwritten"),
        (["--stride=1s"], "--stride is for timelines; add --window"),
        (["--min-score=0.5"], "--min-score is for timelines"),
        (["--save-picture=x"], "--save-picture is for timelines"),
    ],
)
def test_wrong_words_are_one_error(words, message, folder, rubiks_command):
    status, _, err = rubiks_command("predict", "net.ckpt", "grey.mkv", "a [1] ü.mp4", "--device", "cpu", *words)
    assert status == 2
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
