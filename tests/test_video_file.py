"""What a video file's reader does besides returning frames: how it reads, what it frees, and why it fails."""

from __future__ import annotations

import os
from pathlib import Path

import av
import numpy as np
import pytest
from videos import decode_in_order, moving_square, usable, write_video

from rubiks.data import decode
from rubiks.data.decode import FrameFolder, VideoFile, open_video
from rubiks.data.records import CheckedFile, Span, VideoRecord
from rubiks.errors import VideoError

FRAMES = 24


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Files of 24 frames, with key frames at 0, 8 and 16; of the .mp4 files, libraries seek only in the first."""
    folder = tmp_path_factory.mktemp("clips")
    write_video(folder / "a.mp4", moving_square(FRAMES), gop=8, b_frames=2)
    write_video(folder / "ten bits.mp4", moving_square(FRAMES), gop=8, b_frames=2, pix_fmt="yuv420p10le")
    write_video(folder / "one key frame.mp4", moving_square(FRAMES), gop=1000)
    write_video(folder / "a.mkv", moving_square(FRAMES), gop=8, b_frames=2)
    write_video(folder / "a.avi", moving_square(FRAMES), gop=8, codec="libx264")
    write_video(folder / "a.webm", moving_square(FRAMES), gop=8, codec="libvpx-vp9")
    return folder


class Paths:
    """How the reader read, for each call of `frames`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.taken = []
        for name in ("_from_entries", "_in_order"):
            monkeypatch.setattr(VideoFile, name, self.noting(name, getattr(VideoFile, name)))
        monkeypatch.setattr(decode, "seeking_reader", self.noting_library(decode.seeking_reader))

    def noting(self, name, function):
        return lambda *arguments: self.taken.append(name) or function(*arguments)

    def noting_library(self, function):
        def open_library(reader, *others):
            library = function(reader, *others)
            return library and self.noting(reader, library)

        return open_library


@pytest.fixture
def paths(monkeypatch):
    return Paths(monkeypatch)


WANTED = [23, 3, 3, 17]


@pytest.mark.parametrize("reader", ["decord", "torchcodec", "pyav"])
@pytest.mark.parametrize(
    ("name", "seek", "key_frames"),
    [("a.mp4", "any", 3), ("a.mkv", "any", 3), ("ten bits.mp4", "pyav", 3), ("one key frame.mp4", "pyav", 1)],
)
def test_the_reader_that_is_right_for_a_file_reads_it(clips, paths, reader, name, seek, key_frames):
    """The other ways usually give the same frames, so this checks separately that they are not used."""
    with VideoFile(str(clips / name), usable(reader)) as video:
        assert (video.seek, video.key_frames, video.can_seek) == (seek, key_frames, key_frames > 1)
        frames = video.frames(WANTED).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(frames, decode_in_order(clips / name)[WANTED])
    assert paths.taken == [reader if seek == "any" and reader != "pyav" else "_from_entries"]


def test_a_library_seeks_unless_told_otherwise(clips):
    usable("decord")
    path = str(clips / "a.mp4")
    with VideoFile(path) as video, open_video(VideoRecord(path, 0)) as record:
        assert video._library is not None
        assert record._library is not None


def test_opening_decodes_nothing_where_packets_tell_the_number_of_frames(clips, monkeypatch):
    monkeypatch.setattr(VideoFile, "decoded", lambda self: pytest.fail("decoded"))
    for name in ("a.mp4", "a.mkv", "ten bits.mp4", "a.webm"):
        with VideoFile(str(clips / name), "pyav") as video:
            assert len(video) == FRAMES


@pytest.mark.parametrize(
    ("error", "decides"),
    [(av.error.ExternalError(1, "x"), True), (ValueError(), True), (KeyError(), True), (ZeroDivisionError(), False)],
)
def test_what_cannot_be_sought_is_decoded_in_order_and_defects_are_raised(clips, monkeypatch, error, decides):
    def fail(self, indices):
        raise error

    monkeypatch.setattr(VideoFile, "_from_entries", fail)
    with VideoFile(str(clips / "ten bits.mp4")) as video:
        if not decides:
            with pytest.raises(ZeroDivisionError):
                video.frames(WANTED)
            return
        frames = video.frames(WANTED).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(frames, decode_in_order(clips / "ten bits.mp4")[WANTED])


def test_colours_of_more_than_8_bits_are_those_of_a_decode_in_order(clips):
    """decord differs a little here."""
    with VideoFile(str(clips / "ten bits.mp4")) as video:
        frames = video.frames(range(FRAMES)).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(frames, decode_in_order(clips / "ten bits.mp4"))
    assert abs(frames.astype(int) - moving_square(FRAMES)).mean() < 12


@pytest.mark.parametrize("seek", ["any", "pyav", "none"])
def test_what_is_known_of_a_file_is_not_looked_for_again(clips, paths, monkeypatch, seek):
    monkeypatch.setattr(VideoFile, "_look", lambda self: pytest.fail("looked for"))
    path = str(clips / "a.mp4")
    checked = CheckedFile(os.path.getsize(path), FRAMES, 3, seek)
    with open_video(VideoRecord(path, 0, checked=checked), usable("decord")) as video:
        assert (len(video), video.seek, video.key_frames, video.can_seek) == (FRAMES, seek, 3, seek != "none")
        np.testing.assert_array_equal(video.frames(WANTED).permute(0, 2, 3, 1).numpy(), decode_in_order(path)[WANTED])
    assert paths.taken == [{"any": "decord", "pyav": "_from_entries", "none": "_in_order"}[seek]]


@pytest.mark.parametrize("inside", [False, True])
def test_what_was_known_of_a_file_of_another_size_does_not_count(clips, tmp_path, inside):
    path = clips / "a.mp4"
    checked = CheckedFile(path.stat().st_size + 1, 7, 1, "none")
    span = Span(str(path), 0, path.stat().st_size) if inside else None
    with VideoFile(str(path), content=path.read_bytes() if span else None, checked=checked) as video:
        assert (len(video), video.seek, video.key_frames) == (FRAMES, "any", 3)


def test_a_wrong_count_of_frames_never_gives_a_wrong_frame(clips, paths):
    path = str(clips / "a.mp4")
    size, truth = os.path.getsize(path), decode_in_order(path)
    with VideoFile(path, checked=CheckedFile(size, FRAMES - 4, 3, "any")) as video:
        np.testing.assert_array_equal(video.frames([19, 4]).permute(0, 2, 3, 1).numpy(), truth[[19, 4]])
    assert paths.taken == ["_from_entries", "_in_order"]  # each sees that there are others
    with VideoFile(path, checked=CheckedFile(size, 50, 3, "none")) as video:
        np.testing.assert_array_equal(video.frames([23]).permute(0, 2, 3, 1).numpy(), truth[[23]])
        with pytest.raises(VideoError, match=r": is broken or cut off: it ends before frame 30 of 50$"):
            video.frames([2, 30, 5])


def test_the_first_frame_gives_the_size_whichever_are_asked_for(clips, monkeypatch):
    images = [moving_square(1)[0], *moving_square(3, 32, 40)]
    coded = [av.VideoFrame.from_ndarray(image, format="rgb24") for image in images]
    monkeypatch.setattr(decode, "decode", lambda container, stream: iter(coded))
    path = clips / "a.mp4"
    with VideoFile(str(path), checked=CheckedFile(path.stat().st_size, 4, 1, "none")) as video:
        (frame,) = video.frames([2]).permute(0, 2, 3, 1).numpy()
    scaled = coded[2].reformat(80, 64, interpolation="BICUBIC").to_ndarray()
    np.testing.assert_array_equal(frame, scaled)


def times_open(path: Path) -> int:
    """How often this process has the file open."""
    return [os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")].count(str(path))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
@pytest.mark.parametrize("reader", ["auto", "pyav", "torchcodec"])
@pytest.mark.parametrize("name", ["a.mp4", "ten bits.mp4", "a.avi", "a.webm"])
def test_no_file_stays_open(clips, reader, name):
    usable(reader)
    path = (clips / name).resolve()
    with path.open("rb"):
        assert times_open(path) == 1
    for indices in ([1], [23, 2], None):
        video = VideoFile(str(path), reader)
        if indices is not None:
            video.frames(indices)
        assert times_open(path) <= 1
        video.close()
        assert times_open(path) == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_no_file_stays_open_where_one_is_refused(clips, tmp_path):
    path = tmp_path / "unknown.mp4"
    path.write_bytes((clips / "a.mp4").read_bytes().replace(b"avc1", b"zzz1"))
    with pytest.raises(VideoError) as caught:  # while the error's frames are kept
        VideoFile(str(path))
    assert times_open(path.resolve()) == 0
    assert caught.value.reason == "has a codec that FFmpeg does not know, or a broken header"


def test_a_video_takes_one_core(clips):
    """Each worker of a loader has one."""
    container, stream = VideoFile(str(clips / "a.mp4")).open()
    with container:
        assert stream.codec_context.thread_count == 1


def test_times_are_those_of_the_packets(clips):
    with av.open(str(clips / "a.mkv")) as container:
        expected = sorted(packet.pts for packet in container.demux(video=0) if packet.size)
    with VideoFile(str(clips / "a.mkv")) as video:
        assert video.times == expected


def test_a_tag_that_is_no_text_does_no_harm(tmp_path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "TITLE"
        stream = container.add_stream("libx264", rate=12)
        stream.height, stream.width, stream.pix_fmt = 64, 80, "yuv420p"
        container.mux([*stream.encode(av.VideoFrame(80, 64, "yuv420p")), *stream.encode()])
    content = path.read_bytes()
    assert content.count(b"TITLE") == 1
    path.write_bytes(content.replace(b"TITLE", b"\xff\xfeTLE"))
    with VideoFile(str(path)) as video:
        assert len(video) == 1


def test_frame_folders_are_opened_with_all_that_the_list_says(tmp_path):
    for number, image in enumerate(moving_square(3)):
        av.VideoFrame.from_ndarray(image, format="rgb24").to_image().save(tmp_path / f"{number}.png")
    for count, checked in ((3, None), (2, None), (None, CheckedFile(0, 3, 0, "none"))):
        with open_video(VideoRecord(str(tmp_path), 0, count, "{}.png", checked=checked, first_frame=0)) as video:
            assert isinstance(video, FrameFolder)
            assert len(video) == (count or 3)
            np.testing.assert_array_equal(video.frames([1])[0].permute(1, 2, 0).numpy(), moving_square(3)[1])


def test_an_image_in_a_shard(tmp_path):
    av.VideoFrame.from_ndarray(moving_square(1)[0], format="rgb24").to_image().save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "shard").write_bytes(b"before" + content + b"after")
    record = VideoRecord("gone/a.png", 0, image=True, span=Span(str(tmp_path / "shard"), 6, len(content)))
    with open_video(record) as image:
        np.testing.assert_array_equal(image.frames([0])[0].permute(1, 2, 0).numpy(), moving_square(1)[0])


# ---- what is wrong


def reason(path: str | Path, indices=(0,), **options) -> str:
    with pytest.raises(VideoError) as caught, VideoFile(str(path), **options) as video:
        video.frames(indices)
    assert caught.value.path == str(path)
    return caught.value.reason


def test_files_that_are_none(tmp_path, monkeypatch):
    assert reason(tmp_path / "none.mp4") == "cannot be opened: No such file or directory"
    assert reason("a\0b.mp4") == "cannot be opened: embedded null byte"
    assert reason(tmp_path) == "is a folder, expected a video file; for folders of frames use data=frames"
    assert reason("/dev/null") == "is a pipe or a device, expected a video file"
    (tmp_path / "empty.mp4").touch()
    assert reason(tmp_path / "empty.mp4") == "is empty, 0 bytes"
    (tmp_path / "text.mp4").write_text("no video")
    assert reason(tmp_path / "text.mp4").startswith("cannot be opened as a video: Invalid data found when processing")
    asked = []
    monkeypatch.setattr(os, "access", lambda *what: asked.append(what))  # chmod does not stop root
    assert reason(tmp_path / "text.mp4") == "cannot be opened: no permission to read it"
    assert asked == [(str(tmp_path / "text.mp4"), os.R_OK)]


def test_videos_without_frames(clips, tmp_path):
    for name, marker in (
        ("a.avi", b"movi"),
        ("a.webm", b"\x1f\x43\xb6\x75"),
    ):  # before the first frame's data
        content = (clips / name).read_bytes()
        assert reason("", content=content[: content.index(marker) + 4]) == "contains no frames"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("Conversion is not supported\nby this build"), "Conversion is not supported"),
        (av.error.InvalidDataError(1, "Invalid data", "a.mp4"), "Invalid data"),
        (av.error.InvalidDataError(1, "", "a.mp4"), "[Errno 1] "),
    ],
)
def test_the_reason_why_frames_cannot_be_decoded_is_told(clips, monkeypatch, error, words):
    def fail(container, stream):
        raise error
        yield

    monkeypatch.setattr(decode, "decode", fail)
    path = clips / "a.mp4"
    told = reason(path, checked=CheckedFile(path.stat().st_size, FRAMES, 3, "none"))
    assert told.startswith(f"is broken or cut off and cannot be decoded: {words}")
    assert "\n" not in told


def test_parts_of_shards_that_cannot_be_read(tmp_path):
    shard = tmp_path / "train.tar"
    shard.write_bytes(bytes(900))
    gone = tmp_path / "gone.tar"
    for span, words in (
        (Span(str(gone), 0, 9), f"cannot be read from {gone}: No such file or directory"),
        (Span(str(shard), 512, 389), f"is incomplete in {shard}, which is cut off"),
        (Span(str(shard), 512, 0), "is empty, 0 bytes"),
        (Span(str(shard), 512, 388), "cannot be opened as a video: Invalid data found when processing input"),
    ):
        with pytest.raises(VideoError) as caught:
            open_video(VideoRecord("a/1.mp4", 0, span=span))
        assert (caught.value.path, caught.value.reason) == ("a/1.mp4", words)
