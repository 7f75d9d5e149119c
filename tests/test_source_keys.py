"""The keys of each data set reach its lists and videos."""

from __future__ import annotations

import os

import pytest
from configurations import training
from conftest import assert_rejected
from layouts import SOURCES, make_ssv2

from rubiks.data import builtin, videos


@pytest.mark.parametrize(("name", "keys", "make", "train", "val"), SOURCES)
def test_the_keys_of_each_data_set_say_where_its_lists_and_videos_are(name, keys, make, train, val, tmp_path):
    root = tmp_path / "data set"
    root.mkdir()
    make(root)
    choices = {"data__root": str(root), "data__num_classes": 2, **{f"data__{key}": keys[key] for key in keys}}
    source = training(f"data={name}", **choices).data.source.ready()
    assert videos.class_names(source) == ["a", "b"]
    found = {split: source.records(split) for split in ("train", "val")}
    assert [record.name for record in found["train"][0]] == train
    assert [record.name for record in found["val"][0]] == val
    assert found["train"][0][-1].label == 1
    assert found["val"][0][0].label == 0
    assert found["train"][1] == found["val"][1] == []
    if "first_frame" in keys:
        first = "f0.jpg" if name == "frames" else "00000.jpg"
        assert {os.path.basename(next(record.files)) for record in found["train"][0]} == {first}


def test_the_built_in_data_set_is_made_as_configured(monkeypatch, tmp_path):
    asked = {}

    def generate(root, level, train_videos, val_videos, seed):
        asked.update(root=root, level=level, train_videos=train_videos, val_videos=val_videos, seed=seed)
        make_ssv2(tmp_path)
        (tmp_path / "vids").rename(tmp_path / "20bn-something-something-v2")
        for new, old in (("train", "t"), ("validation", "v"), ("labels", "l")):
            (tmp_path / old).rename(tmp_path / f"{new}.json")
        return tmp_path

    monkeypatch.setattr(builtin, "generate", generate)
    values = {"root": "here", "level": "textured", "train_videos": 30, "val_videos": 20, "seed": 4}
    changes = {f"data__{key}": value for key, value in values.items()}
    source = training(**changes, data__num_classes=3).data.source.ready()
    assert asked == values
    assert source.classes == ["a", "b"]
    assert [source.records(split)[0][0].name for split in ("train", "val")] == ["1", "2"]
    assert_rejected(lambda: videos.class_names(source), "data.num_classes=3 classes, got 2", "files of data=builtin")
