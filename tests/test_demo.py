"""`rubiks demo`: what the page shows and refuses, that it stays on this machine, and how it ends."""

from __future__ import annotations

import base64
import html
import importlib.metadata
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from videos import moving_square, write_video

from rubiks import Predictor, RubiksNet
from rubiks.pages.previews import with_map
from rubiks.predict import demo
from rubiks.predict.explanation import explain

NAMES = ["wave", "jump & run", "<b>${1 + 1}</b> {{value}}", "zoë", "Pretending to put something behind something", "f"]

# The command, in a process that notes which addresses it connects to.
SCRIPT = """
import sys
def note(event, words):
    if event in ("socket.connect", "socket.getaddrinfo"):
        with open(sys.argv[1], "a") as file:
            print(event, words[1] if event == "socket.connect" else words[0], file=file)
sys.addaudithook(note)
from rubiks.cli.main import main
from rubiks.predict import demo
demo.LARGEST_UPLOAD = "1mb"
sys.argv[:2] = ["rubiks"]
main()
"""

# Lets a page count the bytes that its recorder has given, and note which devices it has asked for.
WATCH = """
window.recorded = 0
window.asked = []
const start = MediaRecorder.prototype.start
MediaRecorder.prototype.start = function (...words) {
  this.addEventListener("dataavailable", (event) => { recorded += event.data.size })
  start.apply(this, words)
}
const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices)
navigator.mediaDevices.getUserMedia = (wish) => { asked.push(wish); return ask(wish) }
0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network that knows class names, videos, and files that are none."""
    folder = tmp_path_factory.mktemp("demo")
    torch.manual_seed(5)
    net = RubiksNet("tiny", 6, num_frames=4)
    net.new_fc.weight.data.mul_(3)
    described = {"tier": "tiny", "variant": "rubiks3d", "num_classes": 6, "num_frames": 4, "classes": NAMES}
    config = {"data": {"format": "builtin", "name": "builtin-plain", "size": 48, "sampling": "uniform", "window": 64}}
    weights = {f"net.{key}": value for key, value in net.state_dict().items()}
    torch.save({"state_dict": weights, "rubiks": {**described, "config": config, "epoch": 3}}, folder / "net.ckpt")
    for number in range(2):
        write_video(folder / f"v{number}.mp4", np.roll(moving_square(30, 120, 160), 17 * number, axis=2), gop=8)
    return folder


class Server:
    """`rubiks demo` in a process of its own."""

    def __init__(self, folder: Path, ckpt: Path) -> None:
        self.connections, self.temporary = folder / "connections", folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.connections.touch()
        words = [sys.executable, "-c", SCRIPT, self.connections, "demo", ckpt, "--port", "0", "--device", "cpu"]
        unhelpful = {"GRADIO_ANALYTICS_ENABLED": "True", "GRADIO_SHARE": "True", "GRADIO_SERVER_NAME": "0.0.0.0"}
        self.process = subprocess.Popen(
            list(map(str, words)),
            cwd=self.temporary,
            env={**os.environ, **unhelpful, "TMPDIR": str(self.temporary), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line + self.end()[2]
        self.address = found[0]

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[int, str, str]:
        """Exit status, stdout and stderr."""
        self.process.send_signal(number)
        try:
            out, err = self.process.communicate(timeout=60)
        finally:
            self.process.kill()
        return self.process.returncode, out, err


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    pytest.importorskip("gradio")
    server = Server(tmp_path_factory.mktemp("server"), folder / "net.ckpt")
    yield server
    server.end()


def opened(browser, server, width: int = 1440):
    """The page, once it can be used."""
    shown = browser.open(server.address, width)
    shown.wait("document.querySelector('input[type=file]') && document.querySelector('.answer')")
    return shown


def problems(shown, server) -> list[str]:
    """Problems of the page, without a warning that gradio's own scripts always give."""
    return [one for one in shown.problems(server.address) if "Method not implemented." not in one]


def bars(shown) -> list[tuple[str, str, float]]:
    """Name, percentage, and share of the bar that is filled."""
    lengths = shown.run(
        "[...document.querySelectorAll('.bar')].map((e) => e.firstElementChild.offsetWidth / e.offsetWidth)"
    )
    return list(zip(shown.texts(".answer .name"), shown.texts(".answer .score"), lengths, strict=True))


# ---- the page


@pytest.mark.parametrize("width", [390, 1440])
def test_an_uploaded_video_is_classified_as_by_predictor(width, server, folder, browser):
    predictor = Predictor(folder / "net.ckpt", device="cpu")
    shown = opened(browser, server, width)
    assert shown.run("document.title") == "RubiksNet tiny"
    text, *_ = shown.texts(".about")
    for part in ("RubiksNet tiny", "Trained on builtin-plain, 3 epochs", "4 frames of 48 x 48 pixels", "6 classes"):
        assert part in text
    shown.click(".about summary")
    assert shown.texts(".about li") == NAMES
    leaders = set()
    for name in ("v0.mp4", "v1.mp4"):
        ranked = predictor(folder / name).predictions
        shown.choose("input[type=file]", folder / name)
        shown.wait("document.querySelectorAll('.bar').length == 5")
        expected = [(one.label, f"{100 * one.score:.1f}%") for one in ranked]
        assert [found[:2] for found in bars(shown)] == expected
        assert [found[2] for found in bars(shown)] == pytest.approx([one.score for one in ranked], abs=0.01)
        leaders.add(expected[0])
        shown.wait("[...document.querySelectorAll('.frames img')].every((e) => e.complete && e.naturalWidth == 48)")
        assert shown.run("document.querySelectorAll('.frames img').length") == 8
        captions = shown.texts(".frames figcaption")
        assert captions == ["The frames that the network saw", f"Evidence for {ranked[0].label}: blue least, red most"]
        shown.click("[aria-label=Clear]")
        shown.wait("document.querySelector('.answer .hint') && document.querySelector('input[type=file]')")
    assert len(leaders) == 2
    assert problems(shown, server) == []


def test_what_the_frames_show(folder):
    """The pixels that were scored, and over them the map that `rubiks explain` draws."""
    predictor = Predictor(folder / "net.ckpt", device="cpu")
    shown = demo.answer_to(predictor, str(folder / "v1.mp4"))
    images = [base64.b64decode(one) for one in re.findall(r"data:image/png;base64,([^\"]+)", shown)]
    pixels = torch.stack([torch.tensor(np.asarray(Image.open(io.BytesIO(one)))) for one in images]).movedim(-1, 1)
    found = explain(predictor, str(folder / "v1.mp4"))
    assert pixels[:4].equal(found.frames)
    assert pixels[4:].equal(with_map(found.frames, found.maps))


def test_a_built_in_example_is_classified(server, browser):
    shown = opened(browser, server)
    shown.wait("document.querySelectorAll('.gallery-item video').length == 8")
    shown.click(".gallery-item")
    shown.wait("document.querySelectorAll('.bar').length == 5")
    assert problems(shown, server) == []


def test_a_video_from_the_camera_is_classified(server, browser):
    """Chromium's own recorder writes the file, webm without a duration."""
    shown = opened(browser, server)
    shown.run(WATCH)
    shown.click("[aria-label='Capture from camera']")
    for title, recorded in (("grant webcam access", 0), ("start recording", 0), ("stop recording", 6000)):
        shown.wait(f"document.querySelector('[title=\"{title}\"]') && recorded >= {recorded}")
        shown.click(f"#video button:has([title='{title}']), [title='{title}'] button")
    shown.wait("document.querySelectorAll('.bar').length == 5")
    assert shown.run("asked.map((wish) => wish.audio)") == [False]
    assert problems(shown, server) == []


def test_webm_without_a_duration_is_read(folder, tmp_path):
    predictor = Predictor(folder / "net.ckpt", device="cpu")
    for codec in ("libvpx", "libvpx-vp9"):
        live = Unseekable()
        with av.open(live, "w", format="webm", options={"live": "1"}) as out:
            stream = out.add_stream(codec, rate=30)
            stream.height, stream.width, stream.pix_fmt = 120, 160, "yuv420p"
            for image in moving_square(40, 120, 160):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            out.mux(stream.encode())
        path = tmp_path / f"{codec}.webm"
        path.write_bytes(live.content)
        with av.open(str(path)) as file:
            assert file.duration is None
        assert len(re.findall("<li>", demo.answer_to(predictor, str(path)))) == 5


class Unseekable:
    """A file that can only be appended to, as that of a recording while it lasts."""

    content = b""

    def write(self, more: bytes) -> int:
        self.content += bytes(more)
        return len(more)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("noise.mp4", b"no video", "cannot be opened as a video"),
        ("cut.mp4", None, "cannot be opened as a video"),
        ("b & w <i>.mp4", b"no video", "cannot be opened as a video"),
    ],
)
def test_a_damaged_video_is_a_message_and_the_next_is_classified(
    name, content, reason, server, folder, browser, tmp_path
):
    path = tmp_path / name
    path.write_bytes((folder / "v0.mp4").read_bytes()[:300] if content is None else content)
    shown = opened(browser, server)
    shown.choose("input[type=file]", path)
    shown.wait("document.querySelector('.answer .error')")
    (text,) = shown.texts(".answer .error")
    assert reason in text
    assert "/" not in text
    assert shown.texts(".bar") == []
    shown = opened(browser, server)
    shown.choose("input[type=file]", folder / "v0.mp4")
    shown.wait("document.querySelectorAll('.bar').length == 5")


# ---- what leaves this machine, and what stays


def test_browsers_refuse_to_ask_other_addresses(server, browser):
    shown = opened(browser, server)
    assert "Failed to fetch" in shown.run("fetch('http://127.0.0.2:9/').catch((error) => String(error))")
    assert any("violates the following Content Security Policy" in one for one in problems(shown, server))
    assert not server.connections.read_text().split()


@pytest.mark.parametrize("path", ["docs", "redoc", "openapi.json", "monitoring", "gradio_api/file=/etc/hostname"])
def test_pages_that_are_not_served(path, server):
    with pytest.raises(urllib.error.HTTPError, match=r"40[34]"):
        urllib.request.urlopen(f"{server.address}/{path}", timeout=60)


def test_the_network_cannot_be_called_by_name(server):
    with urllib.request.urlopen(f"{server.address}/gradio_api/info", timeout=60) as answer:
        assert json.load(answer) == {"named_endpoints": {}, "unnamed_endpoints": {}}


@pytest.mark.parametrize(("size", "status"), [(100_000, 200), (2_000_000, 413)])
def test_large_files_are_refused(size, status, server):
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.mp4"\r\n\r\n'
    request = urllib.request.Request(
        f"{server.address}/gradio_api/upload",
        head + bytes(size) + b"\r\n--x--\r\n",
        {"Content-Type": "multipart/form-data; boundary=x"},
    )
    if status == 200:
        urllib.request.urlopen(request, timeout=60).close()
    else:
        with pytest.raises(urllib.error.HTTPError, match=str(status)):
            urllib.request.urlopen(request, timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_and_no_file_is_left(number, folder, browser, tmp_path):
    pytest.importorskip("gradio")
    server = Server(tmp_path, folder / "net.ckpt")
    try:
        shown = opened(browser, server)
        shown.choose("input[type=file]", folder / "v0.mp4")
        shown.wait("document.querySelectorAll('.bar').length == 5")
        assert any(server.temporary.rglob("v0.mp4"))
        with urllib.request.urlopen(f"{server.address}/gradio_api/heartbeat/x", timeout=60):  # a connection stays open
            status, out, err = server.end(number)
    finally:
        server.process.kill()
    assert status == {signal.SIGINT: 130}.get(number, 143)
    assert (out, err) == ("", "Interrupted\n" if number == signal.SIGINT else "")
    assert list(server.temporary.iterdir()) == []
    assert server.connections.read_text() == ""


# ---- what the network is


def test_a_network_of_unknown_origin_and_without_class_names(tmp_path):
    RubiksNet("tiny", 300).save_pretrained(tmp_path / "net.pth.tar")
    text = demo.about(Predictor(tmp_path / "net.pth.tar", device="cpu"))
    assert "300 classes, shown as numbers" in text
    assert "net.pth.tar" in text
    assert "Trained on" not in text


def test_the_score_of_a_network_is_shown(folder):
    predictor = Predictor(folder / "net.ckpt", device="cpu")
    predictor.net.source["evaluation"] = {"data": "ssv2", "protocol": "two_clip", "videos": 24777, "top1": 58.84}
    text = demo.about(predictor)
    assert "Top-1 accuracy 58.8% on 24,777 videos of ssv2 (two_clip)" in text
    assert html.escape(NAMES[2]) in text
    assert NAMES[2] not in text


# ---- wrong input


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (None, "and it is not installed"),
        ("5.50.0", "and version 5.50.0 is installed"),
        ("6.9.0", "and version 6.9.0 is installed"),
    ],
)
def test_without_gradio_one_line_says_what_to_install(version, words, folder, rubiks_command, monkeypatch):
    def installed(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", installed)
    status, out, err = rubiks_command("demo", folder / "net.ckpt")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"rubiks demo needs gradio 6.20 or later, {words}; install with: pip install 'rubiks[demo]'" in err


def test_what_cannot_be_served_is_one_error(folder, rubiks_command, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "6.20.0")
    (tmp_path / "bad.ckpt").write_bytes(b"no network")
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        for words, message in (
            ((folder / "net.ckpt", "--port", taken), f"--port {taken} cannot be used: Address already in use"),
            ((folder / "net.ckpt", "--port", 65536), "--port must be a number from 0 to 65535, got 65536"),
            ((folder / "net.ckpt", "--port", -1), "--port must be a number from 0 to 65535, got -1"),
            ((tmp_path / "bad.ckpt", "--port", 0), "bad.ckpt is not a RubiksNet checkpoint"),
            ((tmp_path / "none.ckpt", "--port", 0), "none.ckpt"),
        ):
            status, out, err = rubiks_command("demo", *words, "--device", "cpu")
            assert (status, out, err.count("\n")) == (2, "", 1)
            assert message in err
