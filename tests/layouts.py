"""Small data sets in the layout of each preset, under names that are not the defaults."""

from __future__ import annotations

import json
from pathlib import Path


def frames(folder: Path, *numbers: int) -> None:
    folder.mkdir(parents=True)
    for number in numbers:
        (folder / f"f{number}.jpg").touch()


def make_20bn(root: Path, release="r", lists=("r-train.csv", "r-validation.csv", "r-labels.csv")) -> None:
    for name in ("1", "2"):
        (root / "vids" / name).mkdir(parents=True)
        (root / "vids" / name / "00000.jpg").touch()
    for name, text in zip(lists, ("1;b\n", "2;a\n", "a\nb\n"), strict=True):
        (root / name).write_text(text)


def make_own_lists(root: Path) -> None:
    make_20bn(root, lists=("t", "v", "l"))


def make_ssv2(root: Path) -> None:
    (root / "vids").mkdir()
    for name in ("1", "2"):
        (root / "vids" / f"{name}.webm").touch()
    (root / "t").write_text('[{"id": "1", "template": "b"}]')
    (root / "v").write_text('[{"id": "2", "template": "a"}]')
    (root / "l").write_text('{"a": "0", "b": "1"}')


def make_kinetics(root: Path) -> None:
    for name, label in (("t", "b"), ("v", "a")):
        (root / name).write_text(f"label,youtube_id,time_start,time_end\n{label},{name},0,10\n")
        (root / f"{name}_000000_000010.mp4").touch()
    (root / "l").write_text("a\nb\n")


def make_ucf101(root: Path, lists=("t", "v", "l")) -> None:
    for name in ("a/2.avi", "b/1.avi"):
        (root / "vids" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "vids" / name).touch()
    for name, text in zip(lists, ("b/1.avi 2\n", "a/2.avi\n", "1 a\n2 b\n"), strict=True):
        (root / name).write_text(text)


def make_ucf101_split(root: Path) -> None:
    make_ucf101(root, ("trainlist02.txt", "testlist02.txt", "classInd.txt"))


def make_hmdb51(root: Path) -> None:
    make_ucf101(root, ("x", "y", "z"))
    (root / "own").mkdir()
    (root / "own/a_test_split3.txt").write_text("2.avi 2\n")
    (root / "own/b_test_split3.txt").write_text("1.avi 1\n")


def make_frames(root: Path) -> None:
    frames(root / "one", 0, 1)
    frames(root / "two", 0)
    (root / "t").write_text("one 2 1\n")
    (root / "v").write_text("two 1 0\n")
    (root / "l").write_text("a\nb\n")


def make_images(root: Path) -> None:
    for name in ("training/a/0.jpg", "training/b/1.jpg", "validation/a/2.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def make_shards(root: Path) -> None:
    (root / "shard.tar").write_text("12")
    splits = {
        split: {"shards": [["shard.tar", 2]], "videos": [[name, label, False, 0, 0, 1]], "missing": []}
        for split, name, label in (("train", "1", 1), ("val", "2", 0))
    }
    (root / "index.json").write_text(json.dumps({"classes": ["a", "b"], "splits": splits}))


LISTS = {"train_list": "t", "val_list": "v", "labels": "l"}
# Data set, its keys with non-default values, what makes its folder, and the names that are listed. Only the configured
# names exist, so a key that is not passed on is an error.
SOURCES = [
    ("ssv1", {"release": "r", "videos": "vids", "first_frame": 0}, make_20bn, ["1"], ["2"]),
    ("jester", {"release": "r", "videos": "vids", "first_frame": 0}, make_20bn, ["1"], ["2"]),
    ("ssv1", {**LISTS, "videos": "vids", "first_frame": 0}, make_own_lists, ["1"], ["2"]),
    ("jester", {**LISTS, "videos": "vids", "first_frame": 0}, make_own_lists, ["1"], ["2"]),
    ("ssv2", {**LISTS, "videos": "vids"}, make_ssv2, ["1"], ["2"]),
    ("kinetics", LISTS, make_kinetics, ["t_000000_000010"], ["v_000000_000010"]),
    ("ucf101", {**LISTS, "videos": "vids"}, make_ucf101, ["b/1.avi"], ["a/2.avi"]),
    ("ucf101", {"split": 2, "videos": "vids"}, make_ucf101_split, ["b/1.avi"], ["a/2.avi"]),
    ("hmdb51", {"split": 3, "lists": "own", "videos": "vids"}, make_hmdb51, ["b/1.avi"], ["a/2.avi"]),
    ("frames", {**LISTS, "pattern": "f{}.jpg", "first_frame": 0}, make_frames, ["one"], ["two"]),
    (
        "images", {"train_folder": "training", "val_folder": "validation"}, make_images,
        ["training/a/0.jpg", "training/b/1.jpg"], ["validation/a/2.jpg"],
    ),
    ("shards", {}, make_shards, ["1"], ["2"]),
]  # fmt: skip
