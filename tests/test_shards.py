"""Shards give the same batches as the original files, bit for bit, and report errors at the start."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_datamodule import Stage, batches, data_module, pass_all
from videos import moving_square, write_video

from rubiks.data import shards
from rubiks.data.records import VideoRecord
from rubiks.data.shards import Shards
from rubiks.errors import InputError


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    """Two folders with one name in both, an image, an empty file and a file that is not a video."""
    folder = tmp_path_factory.mktemp("loose")
    for number, name in enumerate(("a/1.mp4", "b/1.mp4", "b/2.webm", "b/3.avi", "a/c/4.mp4")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        codec = "libvpx-vp9" if name.endswith("webm") else "libx264"
        write_video(folder / name, moving_square(10 + 3 * number, height=48, width=64), codec)
    Image.fromarray(moving_square(1)[0]).save(folder / "a" / "5.png")
    (folder / "b" / "empty.mp4").touch()
    (folder / "b" / "text.mp4").write_text("no video")
    names = ("b/2.webm", "a/1.mp4", "b/text.mp4", "b/1.mp4", "a/c/4.mp4", "b/empty.mp4", "b/3.avi")
    records = [VideoRecord(str(folder / name), label % 3, listed=f"../{name}") for label, name in enumerate(names)]
    return [*records, VideoRecord(str(folder / "a" / "5.png"), 2, image=True, listed="5")]


CLASSES = ["x", "y", "z"]


@pytest.fixture(scope="module")
def written(loose, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards") / "new"
    splits = {"train": (loose, ["gone.mp4"]), "val": (loose[:2], [])}
    assert len(list(shards.write(folder, splits, CLASSES, 6000))) > 2
    return folder


def test_labels_classes_names_and_missing_videos_are_those_of_the_list(loose, written):
    source = Shards(root=str(written))
    records, missing = source.records("train")
    assert source.classes == CLASSES
    assert missing == ["gone.mp4"]
    assert [(record.label, record.name, record.image) for record in records] == [
        (record.label, record.name, record.image) for record in loose
    ]
    assert len({record.path for record in records}) == len(records)
    assert len({record.span.file for record in records}) > 1


def test_shards_that_were_written_before_names_were_kept(loose, tmp_path):
    list(shards.write(tmp_path, {"val": (loose, [])}, None, 10**9))
    index = json.loads((tmp_path / "index.json").read_text())
    for video in index["splits"]["val"]["videos"]:
        del video[6:]
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert [record.name for record in Shards(root=str(tmp_path)).records("val")[0]][:2] == ["b/2.webm", "a/1.mp4"]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_equal_those_of_the_loose_files(loose, written, workers):
    records, _ = Shards(root=str(written)).records("train")
    expected, actual = (batches(data_module(list_, workers=workers), 3) for list_ in (loose, records))
    assert len(expected) == 4
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one["index"], other["index"])
        assert torch.equal(one["label"], other["label"])
        assert len(one["views"]) == len(other["views"])
        assert not len(one["views"]) or torch.equal(one["views"], other["views"])
        assert [reason for _, reason in one["bad"]] == [reason for _, reason in other["bad"]]


def test_an_epoch_goes_on_where_it_was(written):
    records, _ = Shards(root=str(written)).records("train")
    data = data_module(records)
    whole = batches(data, 1)
    data.start_at(1, 4)
    rest = list(data.train_dataloader())
    assert [batch["index"].tolist() for batch in rest] == [batch["index"].tolist() for batch in whole[2:]]


def test_unreadable_videos_are_named_by_their_place_in_the_shard(written):
    records, _ = Shards(root=str(written)).records("train")
    data = data_module([], records, on_error="skip", max_bad=0.5)
    loader = data.val_dataloader()
    data.trainer = Stage(training=False)
    pass_all(data, loader)
    assert set(data.bad["val"]) == {"b/text.mp4", "b/empty.mp4"}


def test_tar_unpacks_the_files(loose, written, tmp_path):
    for shard in written.glob("train-*.tar"):
        with tarfile.open(shard) as tar:
            tar.extractall(tmp_path, filter="data")
    for record, packed in zip(loose, Shards(root=str(written)).records("train")[0], strict=True):
        assert (tmp_path / packed.path).read_bytes() == Path(record.path).read_bytes()


def test_the_same_videos_give_the_same_files(loose, written, tmp_path):
    list(shards.write(tmp_path, {"train": (loose, ["gone.mp4"]), "val": (loose[:2], [])}, CLASSES, 6000))
    for path in written.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_errors(loose, written, tmp_path):
    with pytest.raises(InputError, match=r"index\.json: cannot be read.*rubiks shard"):
        _ = Shards(root=str(tmp_path)).classes
    with pytest.raises(InputError, match="already contains shards"):
        list(shards.write(written, {"train": (loose, [])}, None, 1))
    folder = VideoRecord("frames", 0, 8, "{}.jpg")
    with pytest.raises(InputError, match="frames: shards are made of video files"):
        list(shards.write(tmp_path, {"train": ([folder], [])}, None, 1))
    with pytest.raises(InputError, match=r"none\.mp4: cannot be read: No such file"):
        list(shards.write(tmp_path, {"train": ([VideoRecord(str(tmp_path / "none.mp4"), 0)], [])}, None, 1))

    list(shards.write(tmp_path / "a", {"val": (loose, [])}, None, 10**9))
    source = Shards(root=str(tmp_path / "a"))
    with pytest.raises(InputError, match="has no train videos"):
        source.records("train")
    shard = tmp_path / "a" / "val-00000.tar"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"val-00000\.tar: expected a shard of .* bytes, got .* bytes; copy it"):
        source.records("val")
    shard.unlink()
    with pytest.raises(InputError, match="got no such file"):
        source.records("val")
    for text, message in (("{", "expected JSON"), ("{}", "expected the classes"), ("[1]", "expected the classes")):
        (tmp_path / "a" / "index.json").write_text(text)
        with pytest.raises(InputError, match=message):
            Shards(root=str(tmp_path / "a")).records("val")
    with pytest.raises(InputError, match="expected a video file"):
        list(shards.write(tmp_path, {"train": ([VideoRecord(str(tmp_path), 0)], [])}, None, 1))


def test_interrupted_writing_leaves_no_index(loose, tmp_path):
    writing = shards.write(tmp_path, {"train": (loose, [])}, None, 1)
    next(writing)
    writing.close()
    assert not (tmp_path / "index.json").exists()
    list(shards.write(tmp_path, {"train": (loose, [])}, None, 1))
    assert len(json.loads((tmp_path / "index.json").read_text())["splits"]["train"]["videos"]) == len(loose)
