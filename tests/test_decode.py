import builtins
import functools
import importlib.util
import os
import pickle
import sys
import types
import wave
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from videos import cut_without_encoding, decode_in_order, moving_square, real_clip, rotated, usable, write_video

from rubiks.data.dataset import VideoDataset
from rubiks.data.decode import FrameFolder, ImageFile, VideoFile, open_video
from rubiks.data.readers import check_reader
from rubiks.data.records import Span, VideoRecord
from rubiks.errors import InputError, VideoError
from rubiks.evaluation.protocols import Protocol


@pytest.fixture(scope="module", params=["decord", "pyav", "torchcodec"])
def reader(request):
    return usable(request.param)


@pytest.fixture(params=["loose", "in a shard"])
def read(request, reader, tmp_path):
    """Reads frames of a video file with each reader, from the file itself and from within a larger one."""

    def read(path, indices):
        record = VideoRecord(str(path), 0)
        if request.param == "in a shard" and os.path.isfile(path):
            content = Path(path).read_bytes()
            (tmp_path / "shard").write_bytes(b"before" + content + b"after")
            record = VideoRecord(str(path), 0, span=Span(str(tmp_path / "shard"), 6, len(content)))
        with open_video(record, reader) as video:
            return len(video), video.frames(indices)

    return read


@pytest.fixture
def assert_same_as_in_order(read):
    def check(path, indices):
        expected = decode_in_order(path)
        length, frames = read(path, indices)
        assert length == len(expected)
        assert frames.dtype == torch.uint8
        np.testing.assert_array_equal(as_images(frames), expected[list(indices)])

    return check


@functools.cache
def whole_clip(path):
    return decode_in_order(path)


def as_images(frames):
    """(T, 3, H, W) tensor -> (T, H, W, 3) array."""
    return frames.permute(0, 2, 3, 1).numpy()


ENCODINGS = {
    "vp9.webm": {"codec": "libvpx-vp9"},
    "h264.mp4": {"codec": "libx264", "b_frames": 2},
    "h264.mkv": {"codec": "libx264", "b_frames": 3},
    "h264.avi": {"codec": "libx264", "b_frames": 2},
    "h264.ts": {"codec": "libx264", "b_frames": 2},
    "mpeg4.avi": {"codec": "mpeg4", "b_frames": 0},
    "mpeg4 with b-frames.avi": {"codec": "mpeg4", "b_frames": 2},
    "mpeg4 with b-frames.mp4": {"codec": "mpeg4", "b_frames": 2},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, options in ENCODINGS.items():
        write_video(folder / name, moving_square(40), **options)
    return folder


class TestVideoFile:
    @pytest.mark.parametrize("name", ENCODINGS)
    @pytest.mark.parametrize("indices", [[39], [17], [2, 11, 23, 38], [30, 4, 4, 39, 0, 30], range(40)], ids=str)
    def test_any_frames_equal_those_of_a_decode_in_order(self, clips, name, indices, assert_same_as_in_order):
        assert_same_as_in_order(clips / name, indices)

    @pytest.mark.parametrize(
        "name", ["kinetics_demo.mp4", "mpeg4_test.avi", "short_32frames.mp4", "ssv2_like.webm", "ssv2_like_2.webm"]
    )
    def test_real_clips(self, name, read):
        path = real_clip(name)
        expected = whole_clip(path)
        last = len(expected) - 1
        indices = [last, 0, last // 2, last // 3, last // 3]
        length, frames = read(path, indices)
        assert length == len(expected)
        np.testing.assert_array_equal(as_images(frames), expected[indices])

    def test_the_truth_tells_frames_apart(self, clips):
        frames = decode_in_order(clips / "h264.mp4")
        assert len({frame.tobytes() for frame in frames}) == 40
        assert abs(frames[20].astype(int) - moving_square(40)[20]).mean() < 12

    @pytest.mark.parametrize(("clip", "first"), [("short_32frames.mp4", 3), ("h264.mp4", 17)])
    def test_frames_before_a_cut_without_encoding_do_not_count(
        self, tmp_path, clips, clip, first, read, assert_same_as_in_order
    ):
        source = str(clips / clip) if (clips / clip).exists() else real_clip(clip)
        path = tmp_path / "cut.mp4"
        cut_without_encoding(source, path, first)
        original = decode_in_order(source)
        assert_same_as_in_order(path, [0, 5, len(original) - first - 1])
        np.testing.assert_array_equal(as_images(read(path, [0])[1]), original[first : first + 1])

    def test_frames_after_the_end_of_the_edit_list_do_not_count(self, tmp_path, clips, assert_same_as_in_order):
        content = bytearray((clips / "h264.mp4").read_bytes())
        duration = slice(content.index(b"elst") + 12, content.index(b"elst") + 16)  # after version, flags and count
        content[duration] = (int.from_bytes(content[duration], "big") // 2).to_bytes(4, "big")
        path = tmp_path / "cut.mp4"
        path.write_bytes(content)
        assert len(decode_in_order(path)) == 20
        assert_same_as_in_order(path, [0, 13, 19])

    def test_channels_are_last_in_memory(self, clips, read):
        assert read(clips / "h264.mp4", [1, 2])[1].permute(0, 2, 3, 1).is_contiguous()

    def test_with_one_key_frame_there_is_nothing_to_seek_to(self, tmp_path, clips, assert_same_as_in_order):
        write_video(tmp_path / "one.mp4", moving_square(30), gop=100, b_frames=2)
        for path, can_seek in ((tmp_path / "one.mp4", False), (clips / "h264.mp4", True)):
            with VideoFile(str(path)) as video:
                assert video.can_seek == can_seek
        assert_same_as_in_order(tmp_path / "one.mp4", [29, 3, 3, 17])

    def test_numpy_indices(self, clips, read):
        assert read(clips / "h264.mp4", np.array([3, 1]))[1].shape == (2, 3, 64, 80)

    def test_indices_out_of_range_are_the_callers_defect(self, clips):
        with VideoFile(str(clips / "h264.mp4")) as video:
            for indices in ([40], [-1]):
                with pytest.raises(IndexError, match="40 frames"):
                    video.frames(indices)
            with pytest.raises(ValueError, match="no frame indices"):
                video.frames([])

    def test_unicode_and_spaces_in_the_name(self, tmp_path, assert_same_as_in_order):
        path = tmp_path / "видео ü 视频.mp4"
        write_video(path, moving_square(5))
        assert_same_as_in_order(path, [4, 0])

    @pytest.mark.parametrize("name", ["a:b.mp4", "http:x.mp4", "concat:a|b.mp4", "file:x.mp4", "-i.mp4", "%d #?.mp4"])
    def test_names_that_look_like_something_else(self, tmp_path, clips, name, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path(name).write_bytes((clips / "h264.mp4").read_bytes())
        expected = decode_in_order(clips / "h264.mp4")[[30, 2]]
        for reader in ("auto", "pyav"):
            with open_video(VideoRecord(name, 0), reader) as video:
                np.testing.assert_array_equal(as_images(video.frames([30, 2])), expected)

    @pytest.mark.parametrize("name", ["decord", "torchcodec"])
    def test_closing_frees_the_reader_also_after_an_error(self, clips, name):
        video = VideoFile(str(clips / "h264.mp4"), usable(name))
        library = weakref.ref(video._library)
        with pytest.raises(KeyError), video:
            raise KeyError
        assert library() is None

    def test_turned_as_players_show_it(self, tmp_path, clips, read):
        path = tmp_path / "from a phone.mp4"
        path.write_bytes(rotated((clips / "h264.mp4").read_bytes()))
        _, frames = read(path, [30, 2])
        upright = np.rot90(decode_in_order(path)[[30, 2]], -1, axes=(1, 2))
        np.testing.assert_array_equal(as_images(frames), upright)

    def test_more_than_8_bits_per_channel(self, tmp_path, assert_same_as_in_order):
        write_video(tmp_path / "10.mp4", moving_square(12), gop=4, pix_fmt="yuv420p10le")
        with VideoFile(str(tmp_path / "10.mp4")) as video:
            assert (video.seek, video.key_frames) == ("pyav", 3)  # decord and torchcodec would seek too
        assert_same_as_in_order(tmp_path / "10.mp4", [11, 3])


class TestBadVideoFiles:
    @pytest.fixture
    def reason(self, read):
        def reason(path, indices=(0, 1)):
            with pytest.raises(VideoError) as caught:
                read(path, indices)
            assert caught.value.path == str(path)
            assert "\n" not in caught.value.reason
            assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
            return caught.value.reason

        return reason

    def test_missing(self, tmp_path, reason):
        assert "No such file" in reason(tmp_path / "none.mp4")

    def test_folder(self, tmp_path, reason):
        assert "is a folder" in reason(tmp_path)

    def test_no_bytes(self, tmp_path, reason):
        (tmp_path / "empty.webm").touch()
        assert "0 bytes" in reason(tmp_path / "empty.webm")

    @pytest.mark.parametrize("kind", ["random", "text", "header", "half of an mp4"])
    def test_not_a_video(self, tmp_path, clips, kind, capfd, reason):
        whole = (clips / "h264.mp4").read_bytes()
        noise = np.random.default_rng(0).bytes(5000)
        contents = {
            "random": noise,
            "text": b"hello\n" * 50,
            "header": whole[:48] + noise,
            "half of an mp4": whole[:2000],
        }
        path = tmp_path / "bad.mp4"
        path.write_bytes(contents[kind])
        assert "Invalid data" in reason(path)
        assert capfd.readouterr().err == ""

    def test_a_pipe_is_refused_and_not_waited_for(self, tmp_path, reason):
        os.mkfifo(tmp_path / "pipe.mp4")
        assert "a pipe or a device" in reason(tmp_path / "pipe.mp4")

    def test_a_playlist_is_no_video(self, tmp_path, clips):
        (tmp_path / "a.mp4").write_bytes((clips / "h264.mp4").read_bytes())
        (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile a.mp4\n")
        path = tmp_path / "list.mp4"
        for reader in ("auto", "pyav"):
            with pytest.raises(VideoError, match=r": is a playlist, expected a video file$"):
                open_video(VideoRecord(str(path), 0), reader)

    def test_sound_only(self, tmp_path, reason):
        path = tmp_path / "sound.mp4"
        with wave.open(str(path), "wb") as sound:
            sound.setnchannels(1)
            sound.setsampwidth(2)
            sound.setframerate(8000)
            sound.writeframes(bytes(4000))
        assert reason(path) == "contains no video, only sound or data"

    @pytest.mark.parametrize("name", ["vp9.webm", "h264.avi"])
    def test_no_frames(self, tmp_path, clips, name, reason):
        # The headers end where the first frame's data begin.
        path = tmp_path / name
        whole = (clips / name).read_bytes()
        marker = b"movi" if name.endswith("avi") else b"\x1f\x43\xb6\x75"
        path.write_bytes(whole[: whole.index(marker) + 4])
        assert reason(path) == "contains no frames"

    @pytest.mark.parametrize("name", ["h264.avi", "h264.ts", "mpeg4.avi"])
    def test_what_is_left_of_a_file_cut_off(self, tmp_path, clips, name):
        whole = (clips / name).read_bytes()
        path = tmp_path / name
        path.write_bytes(whole[: len(whole) * 8 // 10])
        with VideoFile(str(path)) as video:
            assert 4 < len(video) < 40
            indices = [0, len(video) // 2]
            np.testing.assert_array_equal(as_images(video.frames(indices)), decode_in_order(clips / name)[indices])

    def test_damage_in_the_middle(self, tmp_path, clips, reason):
        # Without the packets of frames 12 to 39, the container still announces 40 frames.
        whole = bytearray((clips / "h264.mp4").read_bytes())
        start = whole.index(b"mdat")
        moov = whole.index(b"moov")
        assert start < moov
        middle = start + (moov - start) // 3
        whole[middle : moov - 4] = bytes(moov - 4 - middle)
        path = tmp_path / "damaged.mp4"
        path.write_bytes(whole)
        assert "cannot be" in reason(path, [0, 13, 26, 39])

    @pytest.mark.parametrize("name", ["DECORDLimitReachedError", "DECORDError", "RuntimeError", "IndexError"])
    def test_errors_of_decord(self, clips, monkeypatch, name, assert_same_as_in_order):
        decord = pytest.importorskip("decord")
        error = getattr(decord, name, None) or getattr(builtins, name)

        class Reader:
            def __init__(self, path, num_threads, fault_tol):
                assert 0 < fault_tol * 40 < 1  # negative, the default, means that replaced frames are not an error

            def __len__(self):
                return 40

            def get_batch(self, indices):
                raise error("[15:55:53] /src/video_reader.cc:731: [a.mp4]more than 0 duplicate frames\nStack trace:\n")

        monkeypatch.setattr(decord, "VideoReader", Reader)
        assert_same_as_in_order(clips / "h264.mp4", [39, 0, 17])

    def test_sizes_that_decord_cannot_read(self, tmp_path, assert_same_as_in_order):
        for width in (20, 48, 50):
            write_video(tmp_path / f"{width}.mp4", moving_square(6, height=48, width=width), gop=3)
            assert_same_as_in_order(tmp_path / f"{width}.mp4", [5, 2])

    def test_without_decord(self, clips, monkeypatch, assert_same_as_in_order):
        real_import = builtins.__import__

        def fake_import(name, *args, **kwargs):
            if name == "decord":
                raise ModuleNotFoundError("No module named 'decord'")
            return real_import(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", fake_import)
        assert_same_as_in_order(clips / "h264.mp4", [39, 0, 17])


@pytest.fixture(params=["{:05d}.jpg", "img_{:d}.png"])
def frames(request, tmp_path):
    """A folder with four frames, as a record."""
    for number, image in enumerate(moving_square(4, height=30, width=40), start=1):
        Image.fromarray(image).save(tmp_path / request.param.format(number))
    return VideoRecord(str(tmp_path), 0, 4, request.param)


class TestFrameFolder:
    def test_equals_pillow(self, frames):
        with open_video(frames) as video:
            assert isinstance(video, FrameFolder)
            assert len(video) == 4
            images = as_images(video.frames([3, 0, 0]))
        for image, number in zip(images, (4, 1, 1), strict=True):
            expected = np.asarray(Image.open(os.path.join(frames.path, frames.pattern.format(number))))
            np.testing.assert_array_equal(image, expected)

    def test_grey_and_transparent_frames_become_rgb(self, tmp_path):
        for number, mode in enumerate(("L", "RGBA", "P"), start=1):
            Image.fromarray(moving_square(1)[0]).convert(mode).save(tmp_path / f"{number}.png")
        assert open_video(VideoRecord(str(tmp_path), 0, 3, "{}.png")).frames([0, 1, 2]).shape == (3, 3, 64, 80)

    def reason(self, record, indices=(0, 1, 2, 3)):
        with pytest.raises(VideoError) as caught, open_video(record) as video:
            video.frames(indices)
        assert caught.value.path == record.path
        assert "\n" not in caught.value.reason
        return caught.value.reason

    def test_a_missing_frame(self, frames):
        name = frames.pattern.format(3)
        os.remove(os.path.join(frames.path, name))
        assert f"{name} is missing" in self.reason(frames)
        assert "4 frames" in self.reason(frames)

    def test_a_frame_of_another_size(self, frames):
        name = frames.pattern.format(2)
        Image.new("RGB", (20, 30)).save(os.path.join(frames.path, name))
        reason = self.reason(frames)
        assert name in reason
        assert "20x30" in reason
        assert "40x30" in reason

    @pytest.mark.parametrize("kind", ["empty", "text", "cut off"])
    def test_a_broken_frame(self, frames, kind):
        name = frames.pattern.format(4)
        path = os.path.join(frames.path, name)
        with open(path, "rb") as file:
            whole = file.read()
        with open(path, "wb") as file:
            file.write({"empty": b"", "text": b"hello", "cut off": whole[: len(whole) // 2]}[kind])
        assert f"{name} cannot be decoded" in self.reason(frames)

    def test_sixteen_bits(self, tmp_path):
        Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(tmp_path / "1.png")
        assert "1.png has more than 8 bits" in self.reason(VideoRecord(str(tmp_path), 0, 1, "{}.png"), [0])

    @pytest.mark.parametrize("count", [0, -3, None])
    def test_no_frames(self, tmp_path, count):
        assert ("contains no frames" if count is None else f"{count} frames") in self.reason(
            VideoRecord(str(tmp_path), 0, count, "{:05d}.jpg")
        )

    def test_no_folder(self, tmp_path):
        assert "no such folder" in self.reason(VideoRecord(str(tmp_path / "none"), 0, 4, "{:05d}.jpg"))
        (tmp_path / "file").touch()
        assert "not a folder" in self.reason(VideoRecord(str(tmp_path / "file"), 0, 4, "{:05d}.jpg"))

    def test_indices_out_of_range(self, frames):
        for indices in ([4], [-1]):
            with pytest.raises(IndexError, match="4 frames"), open_video(frames) as video:
                video.frames(indices)


class TestImageFile:
    def test_is_a_video_of_one_frame(self, tmp_path):
        path = tmp_path / "a.png"
        Image.fromarray(moving_square(1)[0]).convert("RGBA").save(path)
        with open_video(VideoRecord(str(path), 0, image=True)) as video:
            assert isinstance(video, ImageFile)
            assert len(video) == 1
            images = as_images(video.frames([0, 0, 0]))
            with pytest.raises(IndexError, match="1 frames"):
                video.frames([1])
        np.testing.assert_array_equal(images, np.stack([moving_square(1)[0]] * 3))

    @pytest.mark.parametrize(
        ("content", "words"), [(None, "no such file"), (b"", "cannot be decoded"), (b"hello", "cannot be decoded")]
    )
    def test_bad_files(self, tmp_path, content, words):
        path = tmp_path / "a.jpg"
        if content is not None:
            path.write_bytes(content)
        with (
            pytest.raises(VideoError, match=words) as error,
            open_video(VideoRecord(str(path), 0, image=True)) as image,
        ):
            image.frames([0])
        assert error.value.path == str(path)


def test_a_reader_that_is_unknown_or_missing_is_named(monkeypatch):
    with pytest.raises(InputError, match=r"data\.reader must be one of auto, decord, pyav, torchcodec; got 'opencv'"):
        check_reader("opencv")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_reader("auto")
    check_reader("pyav")
    for name in ("decord", "torchcodec"):
        with pytest.raises(InputError, match=f"data.reader={name} needs {name}.*pip install {name}"):
            check_reader(name)


def test_a_torchcodec_that_finds_no_ffmpeg_is_an_error_not_a_slow_run(monkeypatch):
    def decoder(file):
        raise RuntimeError("Could not load libtorchcodec. Likely causes: ...")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", types.SimpleNamespace(VideoDecoder=decoder))
    with pytest.raises(InputError, match="needs the system's FFmpeg libraries"):
        check_reader("torchcodec")


def megabytes() -> float:
    """Memory of this process."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_memory_stays_flat(tmp_path, reader):
    write_video(tmp_path / "a.mp4", moving_square(9, 240, 320), gop=4)  # 1.8 MB of frames a video
    with VideoFile(str(tmp_path / "a.mp4"), reader) as video:
        assert reader == "pyav" or video._library is not None
    record, protocol = VideoRecord(str(tmp_path / "a.mp4"), 0), Protocol("one_clip", 1, 1, 8, 32)
    videos = VideoDataset([record], protocol, 0, reader, timeout=60)
    for number in range(160):
        assert videos[0, 0, 0]["views"].shape == (1, 8, 3, 32, 32)
        if number == 39:
            before = megabytes()
    assert megabytes() - before < 30
