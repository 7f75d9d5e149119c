import json
import os

import pytest
import torchvision
from conftest import assert_rejected

from rubiks.data.records import VideoRecord
from rubiks.data.sources import CsvLists, FrameLists, Kinetics, SomethingSomethingV2, check_labels
from rubiks.data.sources.images import ImageFolders


def write(root, files):
    """Write {name: content} below root: text, bytes, None for an empty file, anything else as JSON."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            path.touch()
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(root)


def names_and_labels(records):
    return [(record.name, record.label) for record in records]


TEMPLATES = {"Holding something next to something": "1", "Approaching something with your camera": "0"}
SSV2_VAL = [
    {"id": "2", "label": "approaching a cat", "template": "Approaching [something] with your camera"},
    {"id": "7", "label": "x", "template": "Holding [something] next to [something]", "placeholders": ["a", "b"]},
]
VIDEOS = "20bn-something-something-v2"


@pytest.fixture
def ssv2(tmp_path):
    return write(
        tmp_path,
        {
            "labels/labels.json": TEMPLATES,
            "labels/train.json": SSV2_VAL[::-1],
            "labels/validation.json": SSV2_VAL,
            f"{VIDEOS}/2.webm": None,
            f"{VIDEOS}/7.webm": None,
        },
    )


class TestSomethingSomethingV2:
    def test_official_files(self, ssv2):
        source = SomethingSomethingV2(root=ssv2)
        assert source.classes == ["Approaching something with your camera", "Holding something next to something"]
        records, missing = source.records("val")
        assert records[1] == VideoRecord(os.path.join(ssv2, VIDEOS, "7.webm"), 1, listed="7")
        assert names_and_labels(records) == [("2", 0), ("7", 1)]
        assert missing == []
        assert names_and_labels(source.records("train")[0]) == [("7", 1), ("2", 0)]

    def test_names_of_the_first_release_in_root(self, tmp_path):
        prefix = "something-something-v2-"
        files = {f"{prefix}labels.json": TEMPLATES, f"{prefix}validation.json": SSV2_VAL, "clips/7.webm": None}
        source = SomethingSomethingV2(root=write(tmp_path, files), videos="clips")
        records, missing = source.records("val")
        assert names_and_labels(records) == [("7", 1)]
        assert missing == [str(tmp_path / "clips" / "2.webm")]

    def test_a_list_that_is_not_needed_is_not_read(self, ssv2, tmp_path):
        write(tmp_path, {"labels/train.json": b"\xff\xfe"})
        assert len(SomethingSomethingV2(root=ssv2, train_list="none.json").records("val")[0]) == 2

    def test_given_files(self, ssv2, tmp_path, monkeypatch):
        elsewhere = tmp_path / "elsewhere"
        write(elsewhere, {"mine.json": SSV2_VAL[:1], "labels/mine.json": SSV2_VAL[1:]})
        monkeypatch.chdir(elsewhere)
        for given in ("mine.json", str(elsewhere / "mine.json"), "elsewhere/mine.json"):
            records, _ = SomethingSomethingV2(root=ssv2, val_list=given).records("val")
            assert names_and_labels(records) == [("2", 0)]

    def test_all_missing_is_left_to_the_caller(self, ssv2):
        assert len(SomethingSomethingV2(root=ssv2, videos="none").records("val")[1]) == 2

    def test_no_root(self, tmp_path):
        source = SomethingSomethingV2(root=str(tmp_path / "none"))
        assert_rejected(lambda: source.records("val"), str(tmp_path / "none"), "no such folder", "data.root")

    def test_no_list(self, tmp_path):
        source = SomethingSomethingV2(root=str(tmp_path))
        looked = [
            str(tmp_path / "labels" / "validation.json"),
            str(tmp_path / "something-something-v2-validation.json"),
        ]
        assert_rejected(lambda: source.records("val"), "data.val_list", *looked)
        assert_rejected(lambda: source.classes, "data.labels", str(tmp_path / "labels.json"))
        given = SomethingSomethingV2(root=str(tmp_path), train_list="mine.json")
        assert_rejected(lambda: given.records("train"), "data.train_list", str(tmp_path / "mine.json"))

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ("[{", ["expected JSON", "line 1"]),
            ("[" * 100000, ["expected JSON"]),
            ("[" + "9" * 5000 + "]", ["expected JSON"]),
            (b"[]" * 9000 + b"\x89", ["UTF-8", "0x89 at 18000"]),
            (b"PK\x03\x04\x00\x00", ["binary"]),
            ([], ["lists no videos"]),
            ({"2": "x"}, ["expected a JSON array", "{'2': 'x'}"]),
            (["2"], ["entry 1", '"id" and "template"', "'2'"]),
            ([SSV2_VAL[0], {"id": "7"}], ["entry 2", '"template"', "test list"]),
            ([{"template": "x"}], ["entry 1", '"id"']),
            ([{"id": 7, "template": "x"}], ["entry 1", '"id"']),
            (
                [{"id": "7", "template": "Eating [something]"}],
                ["entry 1", "Eating [something]", "labels.json", "data.labels"],
            ),
            ([{**SSV2_VAL[0], "id": "../7"}], ["entry 1", "'../7'"]),
            ([{**SSV2_VAL[0], "id": "a\\7"}], ["entry 1", "id"]),
            ([{**SSV2_VAL[0], "id": ".."}], ["entry 1", "'..'"]),
            ([{**SSV2_VAL[0], "id": ""}], ["entry 1", "''"]),
            ([{**SSV2_VAL[0], "id": "a\0b"}], ["entry 1", "id"]),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_bad_lists(self, ssv2, tmp_path, content, parts):
        write(tmp_path, {"labels/validation.json": content})
        assert_rejected(
            lambda: SomethingSomethingV2(root=ssv2).records("val"),
            str(tmp_path / "labels" / "validation.json"),
            *parts,
        )

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ([], ["expected a JSON object", "[]"]),
            ({}, ["expected a JSON object"]),
            ({"A": "0", "B": "2"}, ["'B'", "0 to 1", "'2'"]),
            ({"A": "0", "B": "0"}, ["'B'", "unique number"]),
            ({"A": "zero"}, ["'A'", "'zero'"]),
            ({"A": "9" * 5000}, ["'A'"]),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_bad_labels(self, ssv2, tmp_path, content, parts):
        write(tmp_path, {"labels/labels.json": content})
        source = SomethingSomethingV2(root=ssv2)
        assert_rejected(lambda: source.classes, str(tmp_path / "labels" / "labels.json"), "data.labels", *parts)


HEADER = "label,youtube_id,time_start,time_end,split,is_cc\n"
KINETICS_TRAIN = HEADER + '"zumba",--aa_x,0,10,train,0\n"air drumming",b-b,7,17,train,0\nabseiling,ccc,3,13,train,0\n'
KINETICS_VAL = HEADER + "abseiling,ddd,1,11,val,0\nair drumming,e e,132,142,val,0\nzumba,gone,1,11,val,0\n"


@pytest.fixture
def kinetics(tmp_path):
    return write(
        tmp_path,
        {
            "train.csv": KINETICS_TRAIN,
            "annotations/validate.csv": KINETICS_VAL,
            "train/zumba/--aa_x_000000_000010.mp4": None,
            "train/air_drumming/b-b_000007_000017.webm": None,
            "ccc_000003_000013.mp4": None,
            "val/ddd_000001_000011.mp4": None,
            "air drumming/e e_000132_000142.mkv": None,
        },
    )


class TestKinetics:
    def test_all_layouts(self, kinetics, tmp_path):
        source = Kinetics(root=kinetics)
        assert source.classes == ["abseiling", "air drumming", "zumba"]
        records, missing = source.records("train")
        found = ["train/zumba/--aa_x_000000_000010.mp4", "train/air_drumming/b-b_000007_000017.webm"]
        assert records == [
            VideoRecord(str(tmp_path / found[0]), 2, listed="--aa_x_000000_000010"),
            VideoRecord(str(tmp_path / found[1]), 1, listed="b-b_000007_000017"),
            VideoRecord(str(tmp_path / "ccc_000003_000013.mp4"), 0, listed="ccc_000003_000013"),
        ]
        assert missing == []
        records, missing = source.records("val")
        assert names_and_labels(records) == [("ddd_000001_000011", 0), ("e e_000132_000142", 1)]
        assert missing == [str(tmp_path / "val" / "gone_000001_000011.mp4")]

    def test_validation_alone(self, kinetics, tmp_path):
        os.remove(tmp_path / "train.csv")
        source = Kinetics(root=kinetics)
        assert source.classes == ["abseiling", "air drumming", "zumba"]
        assert len(source.records("val")[0]) == 2

    def test_labels_file(self, kinetics, tmp_path):
        write(tmp_path, {"names.txt": "zumba\r\nabseiling\r\n\r\nair drumming\r\n", "train.csv": b"\xff"})
        source = Kinetics(root=kinetics, labels="names.txt")
        assert source.classes == ["zumba", "abseiling", "air drumming"]
        assert [record.label for record in source.records("val")[0]] == [1, 2]

    def test_each_folder_is_listed_once(self, tmp_path, monkeypatch):
        rows = "".join(f"zumba,id{number},0,10,val,0\n" for number in range(50))
        files = {f"val/id{number}_000000_000010.mp4": None for number in range(50)}
        root = write(tmp_path, {"val.csv": HEADER + rows, **files})
        listed = []
        real = os.listdir
        monkeypatch.setattr(os, "listdir", lambda path: listed.append(path) or real(path))
        assert len(Kinetics(root=root).records("val")[0]) == 50
        assert len(listed) == len(set(listed)) <= 4

    def test_all_missing(self, kinetics, tmp_path):
        write(tmp_path, {"other.csv": HEADER + "zumba,x,0,10,val,0\n"})
        source = Kinetics(root=kinetics, val_list="other.csv")
        assert_rejected(
            lambda: source.records("val"),
            "none of its 1 videos",
            "x_000000_000010.mp4",
            str(tmp_path / "val"),
            "data.root",
        )

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ("", ["lists no videos"]),
            (HEADER, ["lists no videos"]),
            ("youtube_id,time_start,time_end,split\nx,0,10,test\n", ["line 1", "label, youtube_id", "test list"]),
            (HEADER + "zumba,x,0\n", ["line 2", "6 columns", "got 3"]),
            (HEADER + "zumba,x,0.5,10,val,0\n", ["line 2", "whole seconds", "'0.5'"]),
            (HEADER + "zumba,x,-1,10,val,0\n", ["line 2", "'-1'"]),
            (HEADER + "zumba,x,1,1" + "0" * 5000 + ",val,0\n", ["line 2", "whole seconds"]),
            (HEADER + "zumba,a/x,0,10,val,0\n", ["line 2", "youtube_id", "'a/x'"]),
            (HEADER + "juggling,x,0,10,val,0\n", ["line 2", "'juggling'", "train.csv", "data.labels"]),
            (HEADER + 'zumba,"x,0,10,val,0\n', ["line 2", "csv"]),
            (b"\x00\x00", ["binary"]),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_bad_lists(self, kinetics, tmp_path, content, parts):
        write(tmp_path, {"annotations/validate.csv": content})
        path = str(tmp_path / "annotations" / "validate.csv")
        assert_rejected(lambda: Kinetics(root=kinetics).records("val"), path, *parts)


@pytest.fixture
def frame_root(tmp_path):
    return write(
        tmp_path,
        {
            "val.txt": "a 30 1\nclass x/ünï b 8 0\n\ngone 5 1\n",
            "names.txt": "jump\nrun\n",
            "a/00001.jpg": None,
            "class x/ünï b/00001.jpg": None,
        },
    )


class TestFrameLists:
    def test_records(self, frame_root, tmp_path):
        source = FrameLists(root=frame_root, val_list="val.txt", pattern="{:06d}.jpg")
        assert source.classes is None
        records, missing = source.records("val")
        assert records == [
            VideoRecord(str(tmp_path / "a"), 1, 30, "{:06d}.jpg", listed="a"),
            VideoRecord(str(tmp_path / "class x" / "ünï b"), 0, 8, "{:06d}.jpg", listed="class x/ünï b"),
        ]
        assert [record.name for record in records] == ["a", "class x/ünï b"]
        assert missing == [str(tmp_path / "gone")]

    def test_class_names(self, frame_root):
        assert FrameLists(root=frame_root, val_list="val.txt", labels="names.txt").classes == ["jump", "run"]

    def test_list_not_set(self, frame_root):
        source = FrameLists(root=frame_root, val_list="val.txt")
        assert_rejected(lambda: source.records("train"), "data.train_list is not set")

    @pytest.mark.parametrize(
        "pattern",
        ["frame.jpg", "{:05d", "{}{}.jpg", "{name}.jpg", "{:05s}.jpg", "{:05d}/a.jpg", "{0.x}.jpg", "", "{:02d}/../a"],
    )
    def test_bad_patterns(self, frame_root, pattern):
        assert_rejected(
            lambda: FrameLists(root=frame_root, pattern=pattern), "data.pattern", repr(pattern), "{:05d}.jpg"
        )

    @pytest.mark.parametrize(
        ("content", "parts"),
        [
            ("\n \n", ["lists no videos"]),
            ("a 30 1\na 30\n", ["line 2", "`folder num_frames label`", "'a 30'"]),
            ("a 30 jump\n", ["line 1", "whole numbers"]),
            ("a,30,1\n", ["line 1", "'a,30,1'"]),
            ("a 3e1 1\n", ["line 1"]),
            ("a 30 " + "9" * 5000, ["line 1"]),
            ("a 30 -1\n", ["line 1", "-1"]),
            ("a 30 2\n", ["line 1", "0 to 1", "names.txt", "got 2"]),
            ("é".encode("latin-1"), ["UTF-8"]),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_bad_lists(self, frame_root, tmp_path, content, parts):
        write(tmp_path, {"val.txt": content})
        source = FrameLists(root=frame_root, val_list="val.txt", labels="names.txt")
        assert_rejected(lambda: source.records("val"), str(tmp_path / "val.txt"), *parts)

    @pytest.mark.parametrize(
        ("content", "part"), [("\n", "no class names"), ("run\njump\nrun\n", "'run' more than once")]
    )
    def test_bad_labels(self, frame_root, tmp_path, content, part):
        write(tmp_path, {"names.txt": content})
        source = FrameLists(root=frame_root, val_list="val.txt", labels="names.txt")
        assert_rejected(lambda: source.classes, str(tmp_path / "names.txt"), part, "data.labels")


class TestCsvLists:
    def records(self, tmp_path, val, train=None, labels=None):
        files = {"val.csv": val, "a.mp4": None, "b, c.mp4": None, "sub/ü.mp4": None}
        given = {"val_list": "val.csv"}
        for key, name, content in (("train_list", "train.csv", train), ("labels", "names.txt", labels)):
            if content is not None:
                files[name] = content
                given[key] = name
        source = CsvLists(root=write(tmp_path, files), **given)
        return source, *source.records("val")

    def test_numbers(self, tmp_path):
        absolute = tmp_path / "sub" / "ü.mp4"
        source, records, missing = self.records(tmp_path, f'a.mp4,1\n"b, c.mp4", 0\n\n{absolute},12\ngone.mp4,0\n')
        assert source.classes is None
        assert records == [
            VideoRecord(str(tmp_path / "a.mp4"), 1, listed="a.mp4"),
            VideoRecord(str(tmp_path / "b, c.mp4"), 0, listed="b, c.mp4"),
            VideoRecord(str(absolute), 12, listed=str(absolute)),
        ]
        assert missing == [str(tmp_path / "gone.mp4")]

    def test_header_and_byte_order_mark(self, tmp_path):
        source, records, _ = self.records(tmp_path, "\ufeffpath,label\r\na.mp4,jump\r\nsub/ü.mp4,run\r\n")
        assert source.classes == ["jump", "run"]
        assert names_and_labels(records) == [("a.mp4", 0), ("sub/ü.mp4", 1)]

    def test_the_training_list_numbers_the_names(self, tmp_path):
        source, records, _ = self.records(tmp_path, "a.mp4,run\n", train="a.mp4,run\na.mp4,crawl\na.mp4,7\n")
        assert source.classes == ["7", "crawl", "run"]
        assert names_and_labels(records) == [("a.mp4", 2)]

    def test_labels_file(self, tmp_path):
        source, records, _ = self.records(tmp_path, "a.mp4,run\nsub/ü.mp4,0\na.mp4,2\n", labels="jump\nrun\n0\n")
        assert source.classes == ["jump", "run", "0"]
        assert names_and_labels(records) == [
            ("a.mp4", 1),
            ("sub/ü.mp4", 2),
            ("a.mp4", 2),
        ]  # the name 0 before the number 0

    @pytest.mark.parametrize(
        ("val", "more", "parts"),
        [
            ("", {}, ["lists no videos"]),
            ("path,label\n", {}, ["lists no videos"]),
            ("a.mp4 1\n", {}, ["line 1", "`path,label`", "'a.mp4 1'"]),
            ("a.mp4,1\na,b.mp4,1\n", {}, ["line 2", "quote a path"]),
            ("a.mp4,\n", {}, ["line 1"]),
            (",1\n", {}, ["line 1"]),
            ('a.mp4,1\n"a.mp4,1\n', {}, ["csv"]),
            ("a.mp4,-1\n", {}, ["line 1", "-1"]),
            ("a.mp4,2\n", {"labels": "jump\nrun\n"}, ["line 1", "0 to 1", "names.txt"]),
            ("a.mp4,fly\n", {"labels": "jump\nrun\n"}, ["line 1", "'fly'", "names.txt", "data.labels"]),
            ("a.mp4,fly\n", {"train": "a.mp4,jump\n"}, ["line 1", "'fly'", "train.csv", "data.labels"]),
            ("a.mp4,1\n", {"train": "a.mp4,jump\n"}, ["line 1", "'1'", "train.csv"]),
            ("a.mp4,fly\n", {"train": "a.mp4,1\n"}, ["line 1", "number", "train.csv", "'fly'"]),
            (b"\xff\xd8\xff", {}, ["UTF-8", "data.val_list"]),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_bad_lists(self, tmp_path, val, more, parts):
        assert_rejected(lambda: self.records(tmp_path, val, **more), str(tmp_path / "val.csv"), *parts)

    def test_a_folder_for_a_list(self, tmp_path):
        source = CsvLists(root=str(tmp_path), val_list=str(tmp_path))
        assert_rejected(lambda: source.records("val"), "data.val_list", str(tmp_path))


class TestImageFolders:
    FILES = ("train/dog/a.JPEG", "train/ant/b.png", "train/ant/deep/c.jpg", "train/notes.txt", "val/dog/d.jpeg")

    def test_as_torchvision_reads_it(self, tmp_path):
        source = ImageFolders(root=write(tmp_path, dict.fromkeys((*self.FILES, "val/dog/list.txt"))))
        assert source.classes == ["ant", "dog"]
        records, missing = source.records("train")
        expected = torchvision.datasets.ImageFolder(tmp_path / "train", loader=str)
        assert [(record.path, record.label) for record in records] == expected.samples
        assert all(record.image for record in records)
        assert missing == []
        assert names_and_labels(source.records("val")[0]) == [("val/dog/d.jpeg", 1)]

    def test_splits_of_other_names(self, tmp_path):
        files = [name.replace("train/", "x/training set/") for name in self.FILES]
        source = ImageFolders(
            root=write(tmp_path, dict.fromkeys(files)), train_folder="x/training set", val_folder=str(tmp_path / "val")
        )
        assert [len(source.records(split)[0]) for split in ("train", "val")] == [3, 1]

    def test_validation_alone(self, tmp_path):
        source = ImageFolders(root=write(tmp_path, {"val/dog/d.jpeg": None, "val/cat/e.jpeg": None}))
        assert source.classes == ["cat", "dog"]
        assert names_and_labels(source.records("val")[0]) == [("val/cat/e.jpeg", 0), ("val/dog/d.jpeg", 1)]

    @pytest.mark.parametrize(
        ("files", "split", "parts"),
        [
            ((), "train", ["train: no such folder", "data.root", "data.train_folder"]),
            (FILES[:3], "val", ["val: no such folder", "data.val_folder"]),
            (("train/a.jpg",), "train", ["train: expected a subfolder for each class, found none"]),
            (("train/dog/notes.txt",), "train", ["train: expected images", ".jpeg", "data.train_folder"]),
            ((*FILES, "val/cow/a.jpg"), "val", ["cow", "expected a class of", "train", "data.val_folder"]),
        ],
    )
    def test_bad_folders(self, tmp_path, files, split, parts):
        source = ImageFolders(root=write(tmp_path, dict.fromkeys(files)))
        assert_rejected(lambda: source.records(split), str(tmp_path), *parts)


def test_check_labels():
    records = [VideoRecord("a.mp4", 4), VideoRecord("b.mp4", 5), VideoRecord("c.mp4", 6)]
    check_labels(records[:1], 5, "val.csv")
    assert_rejected(lambda: check_labels(records, 5, "val.csv"), "val.csv", "b.mp4", "label 5", "0 to 4", "num_classes")
    assert_rejected(lambda: check_labels([VideoRecord("n.mp4", -1)], 5, "val.csv"), "n.mp4", "-1")
