"""Videos of JPEG frames: the same frames as any JPEG reader, a few read without the others, damage reported."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from PIL import Image
from videos import moving_square, write_video

from rubiks.data import shards
from rubiks.data.check import examine
from rubiks.data.decode import open_video
from rubiks.data.jpegs import JpegVideo
from rubiks.data.manifest import Manifest
from rubiks.data.prepare import Job, prepare
from rubiks.data.records import VideoRecord
from rubiks.errors import VideoError


def prepared(source, folder):
    job = Job(VideoRecord(str(source), 0), folder / "v.mp4", "v.mp4", "jpeg", 256)
    assert prepare([job], Manifest(folder), 1, 60) == {}
    return folder / "v.mp4"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jpegs")
    write_video(folder / "s.webm", moving_square(30, 75, 81), codec="libvpx-vp9")
    return prepared(folder / "s.webm", folder / "out")


@pytest.fixture(scope="module")
def pictures(path):
    """The frames as Pillow decodes them, uint8 (T, H, W, 3)."""
    with av.open(str(path)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    return np.stack([np.asarray(Image.open(io.BytesIO(packet))) for packet in packets])


def read(path, indices, span=None):
    with open_video(VideoRecord(str(path), 0, span=span)) as video:
        assert isinstance(video, JpegVideo)
        return video.frames(indices).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("indices", [[29], [0, 7, 7, 29, 3, 0], range(30)], ids=str)
def test_any_frames_equal_those_of_another_decoder(path, pictures, indices):
    np.testing.assert_array_equal(read(path, indices), pictures[list(indices)])


def test_in_a_shard(path, pictures, tmp_path):
    list(shards.write(tmp_path, {"val": ([VideoRecord(str(path), 0)] * 2, [])}, None, 10**9))
    for record in shards.Shards(root=str(tmp_path)).records("val")[0]:
        np.testing.assert_array_equal(read(record.path, [28, 1], record.span), pictures[[28, 1]])


def test_frames_of_one_size_in_bytes(tmp_path):
    write_video(tmp_path / "grey.mp4", np.full((12, 64, 64, 3), 128, np.uint8))
    assert abs(read(prepared(tmp_path / "grey.mp4", tmp_path / "out"), range(12)).astype(int) - 128).max() < 4


def test_it_knows_its_rate_and_size(path):
    entry = examine(VideoRecord(str(path), 0), "v")
    assert (entry.frames, entry.rate, entry.height, entry.width) == (30, 12, 75, 81)


def test_a_folder_of_frames_from_it(path, pictures, tmp_path):
    job = Job(VideoRecord(str(path), 0), tmp_path / "v", "v", "frames", 256)
    assert prepare([job], Manifest(tmp_path), 1, 60) == {}
    with open_video(job.written(30)) as video:
        frames = video.frames(range(30)).permute(0, 2, 3, 1).numpy()
    assert np.abs(frames.astype(int) - pictures).mean() < 3


def test_a_damaged_frame_is_named_and_the_others_are_read(path, pictures, tmp_path):
    content = bytearray(path.read_bytes())
    with open_video(VideoRecord(str(path), 0)) as video:
        start = int(video._starts[5])
    content[start + 700 : start + 720] = bytes(20)
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(content)
    np.testing.assert_array_equal(read(bad, [4, 6]), pictures[[4, 6]])
    for reading in (lambda: read(bad, [4, 5]), lambda: examine(VideoRecord(str(bad), 0), "v")):
        with pytest.raises(VideoError, match=r"frame 5 is damaged: .*; prepare it again"):
            reading()


def test_mutated_files_are_read_or_named(path, tmp_path, capfd):
    """A truncated file is always reported; a changed byte may give another picture, which cannot be detected."""
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    bad = tmp_path / "bad.mp4"
    reasons = []
    for number in range(300):
        content = bytearray(whole)
        if cut := number % 3 == 0:
            del content[rng.integers(len(whole)) :]
        else:  # in the index, and elsewhere
            content[rng.integers(len(whole) - 900 if number % 3 == 1 else 0, len(whole))] = rng.integers(256)
        bad.write_bytes(content)
        try:
            with open_video(VideoRecord(str(bad), 0)) as video:
                frames = video.frames(range(len(video)))
        except VideoError as error:
            reasons.append(str(error))
            continue
        assert not cut
        assert len(frames) == 30 or not isinstance(video, JpegVideo)
    assert 120 < len(reasons) < 250
    assert all(reason.startswith(f"{bad}: ") and "\n" not in reason for reason in reasons)
    assert capfd.readouterr().err == ""
