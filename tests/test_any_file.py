"""For every kind of file, every reader returns the frames of a decode from the start, and `rubiks check` agrees.

The files are those of `generated`; a few more were made with other programs. A reader that is not installed is skipped,
with the reason.
"""

from __future__ import annotations

import functools
import shutil
import struct
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from generated import FILES
from test_decode import as_images
from videos import usable

from rubiks.data import index
from rubiks.data.decode import VideoFile, open_video
from rubiks.data.examine import examine
from rubiks.data.manifest import Entry
from rubiks.data.records import CheckedFile, VideoRecord
from rubiks.data.screen import Screen
from rubiks.errors import InputError

RECORDED = Path(__file__).parent / "data"
NAMES = [*FILES, *(path.name for path in sorted(RECORDED.iterdir()))]

# Files that must stay fast: those that any library may seek in, and those in which only PyAV seeks.
ANY_LIBRARY = [
    *(f"h264 closed.{kind}" for kind in ("mp4", "mov", "mkv")),
    *("h264 pyramid.mp4", "h264 no b-frames.mp4", "h264 fragments.mp4", "h264 slices.mp4", "h264 turned.mp4"),
    *("h264 uneven.mp4", "h264 uneven.mkv", "h264 late.mp4", "h264 4:4:4.mp4"),
    *("vp8.webm", "vp9.webm", "vp9.mp4", "vp9 uneven.webm"),
]
PYAV_ALONE = [
    *(f"h264 open.{kind}" for kind in ("mp4", "mkv", "flv", "ts")),
    *("h264 closed.ts", "h264 all samples sync.mp4", "h264 cut.mp4", "h264 cover.mp4", "h264 mirrored.mp4"),
    *("h264 chunks without data.avi", "h264 10 bits.mp4", "h264 two sizes.mkv", "hevc open.mp4", "hevc closed.mp4"),
    *("vp8 hidden frames.webm", "av1.mp4", "av1.mkv", "mpeg4.avi", "mpeg4 b-frames.mp4", "mjpeg.avi", "mjpeg.mov"),
]


class Files:
    """A folder in which each file is made when a test first asks for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __truediv__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            if name in FILES:
                FILES[name](path)
            else:
                shutil.copy(RECORDED / name, path)
        return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("SVT_LOG", "0")
        yield Files(tmp_path_factory.mktemp("files"))


READERS = ("auto", "decord", "torchcodec", "pyav")


@pytest.fixture(params=READERS)
def reader(request):
    return usable(request.param)


_truths: dict[Path, np.ndarray] = {}


def truth(path: Path) -> np.ndarray:
    """Every frame decoded from the start, scaled and turned like the first one, pixel by pixel."""
    if path not in _truths:
        images: list[np.ndarray] = []
        with av.open(str(path)) as container:
            videos = container.streams.video
            stream = next(one for one in videos if not one.disposition & av.stream.Disposition.attached_pic)
            size, matrix, rgb = None, None, VideoReformatter()
            frames = [frame for packet in container.demux(stream) if packet.size for frame in packet.decode()]
            for frame in (*frames, *stream.decode(None)):
                if size is None:
                    size, matrix = (frame.width, frame.height), frame.side_data.get("DISPLAYMATRIX")
                same = size == (frame.width, frame.height)
                how = "BILINEAR" if same else "BICUBIC"
                image = rgb.reformat(frame, *size, format="rgb24", interpolation=how).to_ndarray()
                images.append(as_shown(image, matrix))
        _truths[path] = np.stack(images)
    return _truths[path]


def as_shown(image: np.ndarray, matrix: object) -> np.ndarray:
    """Each pixel (x, y) at the place that the display matrix gives it, to the nearest quarter turn."""
    if matrix is None:
        return image
    a, b, _, c, d = struct.unpack("=5i", bytes(matrix)[:20])
    a, b, c, d = np.sign((0, b, c, 0) if abs(b) + abs(c) > abs(a) + abs(d) else (a, 0, 0, d))
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    column, row = a * x + c * y, b * x + d * y
    column, row = column - column.min(), row - row.min()
    shown = np.empty((row.max() + 1, column.max() + 1, 3), np.uint8)
    shown[row, column] = image
    return shown


def assert_any_frames_equal(record: VideoRecord, reader: str, frames: np.ndarray, seed: int = 0) -> None:
    """The last frame, and clips of random ones, others for each reader, each from a file that was just opened."""
    rng = np.random.default_rng((seed, READERS.index(reader)))
    clips = [rng.integers(0, len(frames), count).tolist() for count in (8, *rng.integers(1, 8, 2))]
    for indices in ([len(frames) - 1], *clips):
        with open_video(record, reader) as video:
            assert len(video) == len(frames)
            np.testing.assert_array_equal(as_images(video.frames(indices)), frames[indices], str(indices))


@pytest.mark.parametrize("name", NAMES)
def test_frames_are_those_of_a_decode_from_the_start(files, reader, name):
    record, frames = VideoRecord(str(files / name), 0), truth(files / name)
    assert_any_frames_equal(record, reader, frames)
    with open_video(record, reader) as video:  # and again, in any order, from an open one
        for indices in ([0], range(len(frames)), [5, 2], [9], [9]):
            np.testing.assert_array_equal(as_images(video.frames(indices)), frames[indices], str(indices))


@pytest.mark.parametrize("name", NAMES)
def test_check_agrees_and_what_it_found_serves_the_readers(files, reader, name):
    path = files / name
    frames, entry = truth(path), examined(path)
    assert (entry.frames, entry.height, entry.width) == frames.shape[:3]
    with VideoFile(str(path)) as video:
        assert (entry.seek, entry.key_frames) == (video.seek, video.key_frames)  # as the packets say
    checked = CheckedFile(entry.size, entry.frames, entry.key_frames, entry.seek)
    assert_any_frames_equal(VideoRecord(str(path), 0, checked=checked), reader, frames, seed=1)


@functools.cache
def examined(path: Path) -> Entry:
    return examine(VideoRecord(str(path), 0), path.name)


@pytest.mark.parametrize("name", ANY_LIBRARY)
@pytest.mark.parametrize("library", ["decord", "torchcodec"])
def test_a_library_reads_what_any_may_read(files, library, name, monkeypatch):
    """The tests above would also pass if PyAV read everything, as it does after any error of a library."""
    for other in ("_in_order", "_from_entries"):
        monkeypatch.setattr(VideoFile, other, lambda self, indices: pytest.fail("PyAV reads it"))
    frames = truth(files / name)
    with VideoFile(str(files / name), usable(library)) as video:
        np.testing.assert_array_equal(as_images(video.frames([41, 3, 3, 17])), frames[[41, 3, 3, 17]])


def test_the_truth_is_not_trivial(files):
    """Frames differ from each other, and some are hidden, repeated or dropped."""
    lengths = {name: len(truth(files / name)) for name in NAMES}
    for name in set(NAMES) - {path.name for path in RECORDED.iterdir()}:
        images = truth(files / name)
        assert len({image.tobytes() for image in images}) > 0.9 * len(images), name
    assert lengths["vp8 hidden frames.webm"] < 60 < lengths["vp9 superframes.mp4"]
    assert lengths["h264 cut.mp4"] == 43
    assert lengths["h264 begins within.mkv"] == lengths["hevc begins within.mkv"] == 48
    assert lengths["repeats.ogv"] == 14  # of 17 packets, 3 without data
    assert truth(files / "h264 turned.mp4").shape[1:3] == (80, 64)


@pytest.mark.parametrize(("names", "seek"), [(ANY_LIBRARY, "any"), (PYAV_ALONE, "pyav")], ids=["any", "pyav"])
def test_files_are_sought_in(files, names, seek):
    for name in names:
        with VideoFile(str(files / name), "pyav") as video:
            assert (video.seek, video.can_seek) == (seek, True), name
    for name in ("h264 one key frame.mp4", "h264 intra refresh.mkv", "vp9 one key frame.webm", "mpeg2.ts"):
        with VideoFile(str(files / name)) as video:
            assert not video.can_seek, name


@pytest.mark.parametrize("name", [*ANY_LIBRARY, *PYAV_ALONE])
def test_seeking_decodes_few_frames(files, name, monkeypatch):
    """The last frame but one is read without decoding all those before it, so seeking really happens."""
    monkeypatch.setattr(VideoFile, "_in_order", lambda self, indices: pytest.fail("decoded in order"))
    decoded = []
    image = Screen.image
    monkeypatch.setattr(Screen, "image", lambda self, frame: decoded.append(frame.pts) or image(self, frame))
    with VideoFile(str(files / name), "pyav") as video:
        frames = truth(files / name)
        np.testing.assert_array_equal(as_images(video.frames([len(frames) - 2]))[0], frames[-2])
        assert len(decoded) <= 2  # with the first, which gives the size


# The command turns by any angle, but before version 7 ignores the orientation within H.264.
TURNED_OTHERWISE = [f"h264 turned by {how}" for how in ("60.mp4", "200.mp4", "SEI.mp4", "SEI.mkv")]


@pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="needs the ffmpeg command")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in TURNED_OTHERWISE])
def test_ffmpeg_shows_the_same(files, name):
    command = ["ffmpeg", "-v", "error", "-i", files / name, "-map", "0:V:0", "-fps_mode", "passthrough"]
    pixels = subprocess.run([*command, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], capture_output=True, check=True)
    frames = truth(files / name)
    shown = np.frombuffer(pixels.stdout, np.uint8).reshape(-1, *frames.shape[1:])
    assert len(shown) == len(frames)
    # Versions of FFmpeg round colours and scale a little differently.
    assert np.abs(shown.astype(int) - frames).mean((1, 2, 3)).max() < 1.5


@pytest.mark.parametrize("target", [0, 10_000_000], ids=["before", "behind"])
def test_a_container_that_leads_elsewhere_costs_time_not_a_wrong_frame(files, monkeypatch, target):
    """The packets that arrive show where seeking landed."""
    made = index.Entry
    monkeypatch.setattr(index, "Entry", lambda position, time, _: made(position, time, target))
    path = files / "h264 closed.mp4"
    assert_any_frames_equal(VideoRecord(str(path), 0), "pyav", truth(path))


CASES = [
    *("closed_gop_ok.mp4", "opengop.mp4", "all_samples_sync.mp4", "vp8_altref.webm", "hflip.mp4", "cover_first.mp4"),
    *("dropped_frames.avi", "size_change.mkv"),
]


@pytest.mark.parametrize("name", CASES)
def test_reported_files(shared, reader, name):
    path = shared / "cases" / name
    assert_any_frames_equal(VideoRecord(str(path), 0), reader, truth(path))
    assert examine(VideoRecord(str(path), 0), "x").frames == len(truth(path))


def test_a_cover_alone_is_no_video(tmp_path, reader):
    path = tmp_path / "sound with a cover.mp4"
    with av.open(str(path), "w") as container:
        sound, cover = container.add_stream("aac", rate=8000), container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux([*cover.encode(av.VideoFrame(64, 48, "yuvj420p")), *cover.encode()])
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 8192), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        container.mux([*sound.encode(silence), *sound.encode()])
    with pytest.raises(InputError, match="contains no video, only a picture such as a cover"):
        open_video(VideoRecord(str(path), 0), reader)
