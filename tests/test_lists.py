"""Lists and folders as people write them: headers, blank lines, hidden files, accents, numbering from 1 and from 0."""

from __future__ import annotations

import json
import os
import unicodedata

import pytest
from conftest import assert_rejected
from PIL import Image
from test_sources import HEADER, names_and_labels, write
from videos import moving_square, write_video

from rubiks import weights
from rubiks.cli.entry import training
from rubiks.data import videos
from rubiks.data.decode import open_video
from rubiks.data.manifest import Manifest
from rubiks.data.records import VideoRecord, count_frames
from rubiks.data.sources import (
    HMDB51,
    UCF101,
    CsvLists,
    FrameLists,
    Kinetics,
    SomethingSomethingV2,
    TwentyBNFrames,
    check_labels,
    describe_wrong_labels,
    read_lists,
)
from rubiks.data.sources.images import ImageFolders
from rubiks.errors import InputError, VideoError
from rubiks.models import RubiksNet
from rubiks.models.checkpoint import SavedNetwork
from rubiks.models.preprocessing import Preprocessing

NFC = unicodedata.normalize("NFC", "café")
NFD = unicodedata.normalize("NFD", "café")
FORMS = pytest.mark.parametrize(("listed", "on_disk"), [(NFC, NFD), (NFD, NFC), (NFD, NFD), (NFC, NFC)])


# ---- headers of csv files


def csv_source(tmp_path, train, val="a.mp4,0\n", **keys):
    root = write(tmp_path, {"train.csv": train, "val.csv": val, "a.mp4": None, "b.mp4": None, "folder/clip": None})
    return CsvLists(root=root, train_list="train.csv", val_list="val.csv", **keys)


@pytest.mark.parametrize(
    "header", ["path,label", "video,label", " Video , LABEL ", '"video","label"', " \nvideo,label"]
)
def test_headers(header, tmp_path):
    source = csv_source(tmp_path, f"{header}\na.mp4,1\nb.mp4,0\n", f"{header}\na.mp4,0\n")
    assert source.classes is None
    assert names_and_labels(source.records("train")[0]) == [("a.mp4", 1), ("b.mp4", 0)]
    assert names_and_labels(source.records("val")[0]) == [("a.mp4", 0)]
    assert source.rows("train") == [("a.mp4", "1"), ("b.mp4", "0")]


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("header", ["filename,class", "Name,Category", "label,path", "0,7", "video_name , target"])
@pytest.mark.parametrize("labels", [("1", "0"), ("run", "jump")])
def test_other_headers_are_an_error(split, header, labels, tmp_path):
    rows = f"a.mp4,{labels[0]}\nb.mp4,{labels[1]}\n"
    lists = {"train": rows, "val": rows} | {split: f"{header}\n{rows}"}
    source = csv_source(tmp_path, **lists)
    words = ["line 1", header.split(",")[0], "looks like a header", "`path,label` or `video,label`", "remove the line"]
    assert_rejected(lambda: source.records(split), str(tmp_path / f"{split}.csv"), *words)
    if split == "train":
        assert_rejected(lambda: source.classes, *words)


@pytest.mark.parametrize(
    "first", ["gone.mp4,1", "folder/clip,1", "clip,0"], ids=["has an extension", "is there", "label of another row"]
)
def test_a_video_is_no_header(first, tmp_path):
    source = csv_source(tmp_path, f"{first}\na.mp4,0\n")
    present, missing = source.records("train")
    assert len(present) + len(missing) == 2


def test_the_first_row_below_a_header_is_a_video(tmp_path):
    assert csv_source(tmp_path, "path,label\nclip,1\na.mp4,0\n").records("train")[1] == [str(tmp_path / "clip")]


def test_a_header_is_named_before_its_label(tmp_path):
    (tmp_path / "names.txt").write_text("jump\nrun\n")
    source = csv_source(tmp_path, "file,class\na.mp4,run\n", labels="names.txt")
    assert_rejected(lambda: source.records("train"), "line 1", "looks like a header")


def test_the_list_with_a_header_of_another_project(shared, tmp_path):
    (tmp_path / "v0.mp4").touch()
    source = CsvLists(root=str(tmp_path), train_list=str(shared / "cases/header_video_label.csv"))
    assert source.classes is None
    present, missing = source.records("train")
    assert names_and_labels(present) == [("v0.mp4", 0)]
    assert len(missing) == 149


# ---- blank lines


BLANK = " \t \n"


@pytest.mark.parametrize(
    ("make", "files", "count"),
    [
        (CsvLists, {"t": "a.mp4,0\n   \n\t\n , \nb.mp4,1\r\n\r\n   \r\n"}, 2),
        (CsvLists, {"t": f'{BLANK}path,label\n{BLANK}a.mp4,jump\n" ",\t\n'}, 1),
        (FrameLists, {"t": f"{BLANK}a.mp4 3 0\n{BLANK}b.mp4 3 1\n{BLANK}"}, 2),
        (Kinetics, {"t": f"{BLANK}{HEADER}{BLANK}x,y,0,1,train,0\n , ,,,,\n{BLANK}", "y_000000_000001.mp4": None}, 1),
        (
            lambda root, train_list: TwentyBNFrames(
                format="ssv1", root=root, release="r", videos="", train_list=train_list
            ),
            {"t": f"{BLANK}a.mp4;x\n{BLANK}", "r-labels.csv": f"{BLANK}x\n{BLANK}y\n"},
            1,
        ),
        (
            lambda root, train_list: UCF101(root=root, train_list=train_list, videos=""),
            {"t": f"{BLANK}x/v.avi 1\n{BLANK}", "classInd.txt": f"{BLANK}1 x\n{BLANK}", "x/v.avi": None},
            1,
        ),
        (
            lambda root, train_list: HMDB51(root=root, lists="", videos=""),
            {"x_test_split1.txt": f"{BLANK}v.avi 1\n{BLANK}", "x/v.avi": None},
            1,
        ),
    ],
)  # fmt: skip
def test_lines_of_blanks_are_skipped(make, files, count, tmp_path):
    root = write(tmp_path, {**files, "a.mp4": None, "b.mp4": None})
    assert [len(part) for part in make(root=root, train_list="t").records("train")] == [count, 0]


def test_the_list_with_a_line_of_blanks_of_another_project(shared, tmp_path):
    source = CsvLists(root=str(tmp_path), train_list=str(shared / "cases/blank_spaces_line.csv"))
    assert source.classes is None
    assert len(source.records("train")[1]) == 8


# ---- hidden files


HIDDEN = ("._00001.jpg", ".00003.jpg", "._00002.jpg")


def frame_folder(folder, numbers, pattern="{:05d}.jpg"):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", (16, 16), (number * 10, 0, 0)).save(folder / pattern.format(number))
    return folder


def test_hidden_files_are_no_frames(tmp_path):
    write(frame_folder(tmp_path / "v", (1, 2)), dict.fromkeys(HIDDEN, "AppleDouble"))
    assert count_frames(str(tmp_path / "v"), "{:05d}.jpg") == 2
    record = VideoRecord(str(tmp_path / "v"), 0, pattern="{:05d}.jpg")
    assert [os.path.basename(file) for file in record.files] == ["00001.jpg", "00002.jpg"]
    with open_video(record) as video:
        assert video.frames([0, 1]).shape == (2, 3, 16, 16)


def test_a_folder_of_hidden_files_alone_has_no_frames(tmp_path):
    with pytest.raises(VideoError, match="contains no frames"):
        count_frames(write(tmp_path, dict.fromkeys(HIDDEN)), "{:05d}.jpg")


def test_the_frames_that_macos_copied(shared):
    assert count_frames(str(shared / "cases/appledouble_frames"), "{:05d}.jpg") == 12


def test_hidden_files_are_no_images(tmp_path):
    files = (
        "train/dog/a.jpg",
        "train/dog/._a.jpg",
        "train/dog/.thumbs/b.jpg",
        "train/.cache/c.jpg",
        "train/._dog/d.jpg",
    )
    for root in (tmp_path, tmp_path / ".hidden"):  # what is in a hidden folder is only hidden from outside
        source = ImageFolders(root=write(root, dict.fromkeys((*files, "val/dog/e.jpg"))))
        assert source.classes == ["dog"]
        assert names_and_labels(source.records("train")[0]) == [("train/dog/a.jpg", 0)]
    only = ImageFolders(root=write(tmp_path / "only", {"train/.cache/c.jpg": None}))
    assert_rejected(lambda: only.classes, "expected a subfolder for each class, found none")


def test_hidden_files_are_no_classes_of_hmdb51(tmp_path):
    files = {"x_test_split1.txt": "v.avi 1\n", "._x_test_split1.txt": b"\0\5\x16\7", "x/v.avi": None, "x/._v.avi": None}
    source = HMDB51(root=write(tmp_path, files), lists="", videos="")
    assert source.classes == ["x"]
    assert len(source.records("train")[0]) == 1


# ---- accents


@FORMS
def test_paths_are_found_in_either_form(listed, on_disk, tmp_path):
    path = tmp_path / on_disk / "plain" / on_disk
    write(path.parent, {f"{on_disk}.mp4": None})
    here = os.path.join(str(tmp_path), listed, "plain")
    lines = [f"{listed}/plain/{listed}.mp4", f"{here}/{listed}.mp4", f"{listed}/plain/gone {listed}.mp4"]
    write(tmp_path, {"t.csv": "".join(f"{line},0\n" for line in lines), "t.txt": f"{lines[0]} 3 0\n"})
    present, missing = CsvLists(root=str(tmp_path), train_list="t.csv").records("train")
    assert [record.path for record in present] == [f"{path}.mp4"] * 2
    assert missing == [os.path.join(str(tmp_path), lines[2])]
    assert all(os.path.exists(record.path) for record in present)
    (record,), _ = FrameLists(root=str(tmp_path), train_list="t.txt").records("train")
    assert record == VideoRecord(f"{path}.mp4", 0, 3, "{:06d}.jpg", listed=lines[0])


@pytest.mark.parametrize("listed", [NFC, NFD])
def test_the_very_name_comes_first(listed, tmp_path):
    write(tmp_path, {f"{NFC}.mp4": None, f"{NFD}.mp4": None, "t.csv": f"{listed}.mp4,0\n"})
    (record,), _ = CsvLists(root=str(tmp_path), train_list="t.csv").records("train")
    assert record.path == str(tmp_path / f"{listed}.mp4")


@FORMS
def test_classes_are_compared_in_one_form(listed, on_disk, tmp_path):
    official = json.dumps({f"{on_disk} [something]".replace("[", "").replace("]", ""): "0"})
    entries = [{"id": "1", "template": f"{listed} [something]"}]
    files = {
        "names.txt": on_disk,
        "t.csv": f"1.mp4,{listed}\n",
        "v.csv": f"1.mp4,{on_disk}\n",
        "1.mp4": None,
        "1.webm": None,
        "s/labels.json": official,
        "s/train.json": entries,
        "j/j-labels.csv": on_disk,
        "j/j-train.csv": f"1;{listed}\n",
        "j/1/00001.jpg": None,
        "k/train.csv": HEADER + f"{listed} au lait,y,0,1,train,0\n",
        "k/val.csv": HEADER + f"{on_disk} au lait,y,0,1,val,0\n",
        f"k/train/{on_disk}_au_lait/y_000000_000001.mp4": None,
        f"k/val/{on_disk} au lait/y_000000_000001.mp4": None,
        "u/classInd.txt": f"1 {on_disk}\n",
        "u/trainlist01.txt": f"{listed}/v_{listed}.avi 1\n",
        f"u/{on_disk}/v_{on_disk}.avi": None,
        f"h/{listed}_test_split1.txt": f"v_{listed}.avi 1\n",
        f"h/{on_disk}/v_{on_disk}.mp4": None,
        f"i/train/{listed}/a.jpg": None,
        f"i/val/{on_disk}/b.jpg": None,
    }
    root = write(tmp_path, files)
    for source, splits in (
        (CsvLists(root=root, train_list="t.csv", val_list="v.csv"), ("train", "val")),
        (CsvLists(root=root, train_list="t.csv", labels="names.txt"), ("train",)),
        (SomethingSomethingV2(root=f"{root}/s", videos=".."), ("train",)),
        (TwentyBNFrames(format="jester", root=f"{root}/j", release="j", videos=""), ("train",)),
        (Kinetics(root=f"{root}/k"), ("train", "val")),
        (UCF101(root=f"{root}/u", videos=""), ("train",)),
        (HMDB51(root=f"{root}/h", lists="", videos=""), ("train",)),
        (ImageFolders(root=f"{root}/i"), ("train", "val")),
    ):
        (name,) = source.classes
        assert name.startswith(NFC), source
        for split in splits:
            (record,), missing = source.records(split)
            assert (record.label, missing) == (0, []), source
            assert os.path.exists(record.path)


def test_a_class_in_both_forms_is_one(tmp_path):
    files = [f"train/{NFC}/a.jpg", f"train/{NFD}/b.jpg", "train/dog/c.jpg"]
    source = ImageFolders(root=write(tmp_path, {**dict.fromkeys(files), "t.csv": f"a.mp4,{NFC}\na.mp4,{NFD}\n"}))
    assert source.classes == [NFC, "dog"]
    assert set(names_and_labels(source.records("train")[0])) == set(zip(files, (0, 0, 1), strict=True))
    assert CsvLists(root=str(tmp_path), train_list="t.csv").classes == [NFC]
    (tmp_path / "names.txt").write_text(f"{NFC}\n{NFD}\n")
    assert_rejected(lambda: FrameLists(root=str(tmp_path), labels="names.txt").classes, "more than once")


def test_a_checkpoint_of_a_mac_knows_the_classes():
    saved = SavedNetwork("mac.ckpt", "tiny", "rubiks3d", 2, Preprocessing(8), {}, classes=[NFD, "run"])
    weights.check_same_classes(saved, [NFC, "run"])
    assert_rejected(lambda: weights.check_same_classes(saved, [NFC, "jump"]), "class 1 is 'run'")


@pytest.mark.parametrize("accent", ["e", NFC, NFD])
def test_each_folder_is_listed_once(accent, tmp_path, monkeypatch):
    names = [f"{folder}/{number}_{accent}" for folder in ("x", accent, "gone_é") for number in range(20)]
    files = {unicodedata.normalize("NFD", f"videos/{name}.avi"): None for name in names if "gone" not in name}
    rows = "".join(f"{name}.avi\n" for name in names)
    root = write(tmp_path, {**files, "classInd.txt": f"1 x\n2 {accent}\n3 gone_é\n", "testlist01.txt": rows})
    listed = []
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or real(path))
    present, missing = UCF101(root=root, videos="videos").records("val")
    assert (len(present), len(missing)) == (40, 20)
    assert len(listed) == len(set(listed)) <= 5


# ---- labels from 1


@pytest.mark.parametrize(
    ("labels", "hint"),
    [((1, 2, 3), True), ((3, 1), True), ((0, 3), False), ((1, 4), False), ((2, 3), False), ((-1, 3), False)],
)
def test_labels_from_1(labels, hint, tmp_path):
    records = [VideoRecord(f"{label}.mp4", label) for label in labels]
    words = ["labels seem to start at 1", "must start at 0", "subtract 1"] if hint else ["set data.num_classes"]
    assert_rejected(lambda: check_labels(iter(records), 3, "t.csv"), "t.csv: ", "0 to 2", *words)
    assert all(word in describe_wrong_labels(records, 3) for word in words)
    rows = {"t.csv": "".join(f"{label}.mp4,{label}\n" for label in labels)}
    rows["t.txt"] = "".join(f"{label} 8 {label}\n" for label in labels)
    root = write(tmp_path, {**rows, "names.txt": "run\njump\nfly\n"})
    words = words if hint else ["correct it"]
    for source in (
        CsvLists(root=root, train_list="t.csv", labels="names.txt"),
        FrameLists(root=root, train_list="t.txt", labels="names.txt"),
    ):
        assert_rejected(lambda source=source: source.records("train"), "expected a label from 0", *words)


def test_right_labels():
    records = [VideoRecord("a.mp4", 1), VideoRecord("b.mp4", 2)]
    check_labels(records, 3, "t.csv")
    assert describe_wrong_labels(records, 3) is None


# ---- frames from 0


@pytest.mark.parametrize("count", [None, 3])
def test_frames_from_0(count, tmp_path):
    folder = frame_folder(tmp_path / "v", (0, 1, 2))
    record = VideoRecord(str(folder), 0, count, "{:05d}.jpg", first_frame=0)
    assert [os.path.basename(file) for file in record.files] == ["00000.jpg", "00001.jpg", "00002.jpg"]
    with open_video(record) as video:
        assert len(video) == 3
        assert [round(frame[0].float().mean().item(), -1) for frame in video.frames([0, 1, 2])] == [0, 10, 20]
    (folder / "00001.jpg").unlink()
    with pytest.raises(VideoError) as caught, open_video(record) as video:
        video.frames([0, 1, 2])
    assert "00001.jpg" in caught.value.reason
    assert "first_frame" not in caught.value.reason


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize(("numbers", "first"), [((0, 1, 2), 1), ((1, 2, 3), 0)])
def test_frames_numbered_otherwise_are_said_to_be(count, numbers, first, tmp_path):
    folder = frame_folder(tmp_path / "v", numbers)
    record = VideoRecord(str(folder), 0, count, "{:05d}.jpg", first_frame=first)
    with pytest.raises(VideoError) as caught, open_video(record) as video:
        video.frames([1])  # whose file exists in any case, but is one frame off
    assert caught.value.reason.endswith(f"; its frames are numbered from {1 - first}; set data.first_frame={1 - first}")
    assert "unpack it again" not in caught.value.reason


@pytest.mark.parametrize(
    ("numbers", "first", "count"),
    [((1, 2), 1, 3), ((1, 3), 1, 3), ((1, 3), 1, None), ((0, 1), 0, 3), ((0, 2), 0, 3), ((0, 2), 0, None)],
)
def test_frames_that_are_not_whole_are_not_called_misnumbered(numbers, first, count, tmp_path):
    record = VideoRecord(str(frame_folder(tmp_path, numbers)), 0, count, "{:05d}.jpg", first_frame=first)
    with pytest.raises(VideoError) as caught, open_video(record) as video:
        video.frames([0, 1, 2])
    assert "first_frame" not in caught.value.reason


@pytest.mark.parametrize("name", ["frames", "ssv1", "jester"])
def test_the_setting_of_the_first_frame(name, tmp_path):
    release = {"ssv1": "something-something-v1"}.get(name, "jester-v1")
    folder = frame_folder(tmp_path / ("1" if name == "frames" else f"20bn-{release}/1"), (0, 1))
    lists = {f"{release}-labels.csv": "wave\n", f"{release}-validation.csv": "1;wave\n", "val.txt": "1 2 0\n"}
    choices = [f"data={name}", f"data.root={write(tmp_path, lists)}", "data.num_classes=1"]
    if name == "frames":
        choices += ["data.val_list=val.txt", 'data.pattern="{:05d}.jpg"']
    for first in (0, 1):
        (record,), _ = training([*choices, f"data.first_frame={first}"]).data.source.records("val")
        assert (record.path, record.first_frame) == (str(folder), first)
    assert training(choices).data.source.records("val")[0][0].first_frame == 1
    for value in ("2", "-1", "true", "1.0", "zero", "null"):
        with pytest.raises(InputError, match=r"data\.first_frame must be 0 or 1") as caught:
            training([*choices, f"data.first_frame={value}"])
        assert value.title().replace("Null", "None") in str(caught.value).title()


def test_what_is_known_of_frames_from_0(tmp_path, rubiks_command):
    frame_folder(tmp_path / "v", (0, 1, 2))
    write(tmp_path, {"t.txt": "v 3 0\n"})
    choices = ("data=frames", f"data.root={tmp_path}", "data.train_list=t.txt", "data.num_classes=1")
    choices += ('data.pattern="{:05d}.jpg"',)
    status, _, _ = rubiks_command("check", *choices, "--workers", 1)
    assert status == 1
    reason = (tmp_path / "rubiks-bad.txt").read_text()
    assert "set data.first_frame=0" in reason
    status, _, _ = rubiks_command("check", *choices, "data.first_frame=0", "--workers", 1)
    assert status == 0
    (entry,) = Manifest(tmp_path).entries.values()
    assert entry.frames == 3
    (known,) = Manifest(tmp_path).apply([VideoRecord(str(tmp_path / "v"), 0, pattern="{:05d}.jpg", first_frame=0)])
    with open_video(known) as video:
        assert len(video) == 3
    frame_folder(tmp_path / "v", (3,))  # it was only partly unpacked
    with open_video(known) as video:
        assert len(video) == 4


# ---- one list alone


# Per data set: files, choices, the number of listed videos, and what the message about the other list mentions.
VAL_ALONE = {
    "csv": ({"val.csv": "a.mp4,run\nb.mp4,jump\n"}, ["data.val_list=val.csv"], 2, "data.train_list"),
    "frames": ({"val.txt": "a 3 0\n"}, ["data.val_list=val.txt", "data.num_classes=2"], 1, "data.train_list"),
    "kinetics": (
        {"val.csv": HEADER + "a,y,0,1,val,0\n", "y_000000_000001.mp4": None}, [], 1, "data.train_list",
    ),
    "ssv1": (
        {"something-something-v1-labels.csv": "a\n", "something-something-v1-validation.csv": "1;a\n"},
        [], 1, "data.train_list",
    ),
    "jester": ({"jester-v1-labels.csv": "a\n", "jester-v1-validation.csv": "1;a\n"}, [], 1, "data.train_list"),
    "ssv2": (
        {"labels.json": {"a": "0"}, "validation.json": [{"id": "1", "template": "a"}]}, [], 1, "data.train_list",
    ),
    "ucf101": ({"classInd.txt": "1 a\n", "testlist01.txt": "a/x.avi\n"}, [], 1, "data.train_list"),
    "hmdb51": ({"testTrainMulti_7030_splits/a_test_split1.txt": "x.avi 2\n"}, [], 1, "no train videos"),
    "images": ({"val/a/x.jpg": None}, [], 1, "data.train_folder"),
    "shards": (
        {"index.json": {"classes": ["a"], "splits": {"val": {"shards": [], "videos": [], "missing": ["x.mp4"]}}}},
        [], 1, "no train videos",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", VAL_ALONE)
def test_a_validation_list_needs_no_training_list(name, tmp_path):
    files, choices, count, word = VAL_ALONE[name]
    choices = [f"data={name}", f"data.root={write(tmp_path, files)}", "data.num_classes=null", *choices]
    source = training(choices).data.source
    assert videos.class_names(source)
    lists, missing, absent = read_lists(source)
    assert len(lists["val"]) + len(missing["val"]) == count
    assert list(lists) == ["val"]
    assert word in absent["train"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("name", ["csv", "frames"])
def test_evaluation_and_check_with_one_list(name, commands, rubiks_command, tmp_path):
    for number in range(2):
        frame_folder(tmp_path / f"f{number}", range(1, 7))
        write_video(tmp_path / f"{number}.mp4", moving_square(8, 48, 48))
    write(tmp_path, {"list.csv": "video,label\n0.mp4,0\n1.mp4,1\n", "list.txt": "f0 6 0\nf1 6 1\n"})
    RubiksNet("tiny", 2).save_pretrained(tmp_path / "net.pth.tar")
    file = {"csv": "list.csv", "frames": "list.txt"}[name]
    choices = [f"data={name}", "data.root=.", "data.num_classes=2"]
    choices += ['data.pattern="{:05d}.jpg"'] if name == "frames" else []
    small = ("data.size=32", "ckpt=net.pth.tar")
    commands.evaluate(*choices, *small, f"data.val_list={file}", "run=scores")
    assert json.loads((tmp_path / "outputs/scores/results.json").read_text())["videos"] == 2
    alone = {split: f"data.{split}_list={file}" for split in ("train", "val")}
    assert "data.val_list is not set; set it" in commands.refused("eval", *choices, *small, alone["train"])
    assert "data.val_list is not set; set it" in commands.refused("eval", *choices, *small)
    assert "data.train_list is not set; set it" in commands.refused("train", *choices, alone["val"])
    assert "data.train_list is not set; set it" in commands.refused("train", *choices)
    for split, other in (("train", "val"), ("val", "train")):
        status, out, err = rubiks_command("check", *choices, alone[split], "--workers", 1)
        assert status == 0, err
        assert f"{other} list not checked: data.{other}_list is not set" in out
    status, _, err = rubiks_command("check", *choices)
    assert status == 2
    assert "data.train_list is not set" in err


def test_kinetics_without_lists_names_both(tmp_path):
    assert_rejected(lambda: Kinetics(root=str(tmp_path)).classes, "data.train_list", "data.val_list", "validate.csv")
    assert_rejected(lambda: Kinetics(root=str(tmp_path / "none")).classes, "none: no such folder")
