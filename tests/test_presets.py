"""Presets of data sets: their configuration, tiny copies of their layouts, and their possible errors."""

from __future__ import annotations

import json
import os
import shlex
import shutil

import pytest
from commands import Commands
from configurations import configuration, training
from conftest import ROOT, assert_rejected
from made import Made
from PIL import Image
from videos import moving_square, write_video

from rubiks.cli import entry
from rubiks.data import decode, stills, videos
from rubiks.data.check import check, official_total
from rubiks.data.manifest import Manifest
from rubiks.data.sources import HMDB51, UCF101, TwentyBNFrames
from rubiks.errors import InputError
from rubiks.evaluation import published
from rubiks.experiment import Evaluation

CLASSES = {"ssv1": 174, "ssv2": 174, "jester": 27, "ucf101": 101, "hmdb51": 51, "kinetics": 400}


@pytest.fixture(scope="module", autouse=True)
def _this_package():
    """Worker processes import the tested package, whatever a test's working directory is."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        yield


# ---- configuration


@pytest.mark.parametrize("name", CLASSES)
def test_every_preset_composes(name):
    settings = training(f"data={name}", "tier=tiny", data__root="somewhere")
    source, sampling = settings.data.source, settings.data.sampling
    assert source.num_classes == CLASSES[name]
    assert sampling.flip == (name in ("ucf101", "hmdb51", "kinetics"))
    assert (source.format, sampling.num_frames, sampling.size) == (name, 8, 224)
    assert settings.recipe.epochs > 0
    assert official_total(source.name, CLASSES[name], "train") > official_total(source.name, CLASSES[name], "val")


EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf/experiment").iterdir())


def test_every_published_network_can_be_trained_by_a_preset():
    names = {f"{row.data}_{row.tier}{'_aq' if row.variant == 'rubiks3d-aq' else ''}" for row in published.rows()}
    assert names == set(EXPERIMENTS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_the_published_network(name):
    data, tier, *aq = name.split("_")
    settings = training(f"experiment={name}", data__root="somewhere")
    assert (settings.tier.name, settings.variant.name) == (tier, "rubiks3d-aq" if aq else "rubiks3d")
    assert (settings.aq and settings.aq.budget) == (0.125 if aq else None)
    assert (settings.data.source.format, settings.protocol.name) == (data, "one_clip")
    assert settings.recipe == training(f"data={data}", data__root="somewhere").recipe

    evaluation = Evaluation(**entry.plain(entry.compose([f"experiment={name}", "data.root=x", "ckpt=x"], "eval")))
    assert (evaluation.data.source.format, evaluation.protocol.name) == (data, "one_clip")
    assert (evaluation.tier, evaluation.variant) == (None, None)  # from the checkpoint


def test_other_choices_go_before_those_of_an_experiment():
    settings = training(
        "experiment=ssv2_large_aq", "tier=small", "data=ssv1", "protocol=two_clip", "aq.budget=0.5", data__root="x"
    )
    found = settings.tier.name, settings.data.source.format, settings.protocol.name, settings.aq.budget
    assert found == ("small", "ssv1", "two_clip", 0.5)


def test_the_recipe_of_choices():
    lists = "data.train_list=a", "data.val_list=b"
    assert entry.recipe_name(["data=csv", *lists]) == "csv"
    assert entry.recipe_name(["data=csv", *lists, "recipe=finetune"]) == "finetune"
    assert entry.recipe_name(["experiment=kinetics_tiny", "data.root=x"]) == "kinetics"
    assert entry.recipe_name([]) == "builtin"


@pytest.mark.parametrize("command", ["train", "eval"])
def test_an_unknown_experiment(command, rubiks_command):
    status, _, err = rubiks_command(command, "experiment=ssv2_tinny", "data.root=x")
    assert status == 2
    assert err.startswith(
        "error: experiment=ssv2_tinny: there is no such preset. Did you mean ssv2_tiny? The choices are "
    )
    assert err.count("\n") == 1
    assert all(name in err for name in EXPERIMENTS)


def test_splits_have_names_of_their_own_and_there_are_three():
    assert training("data=ucf101", data__root="x", data__split=3).data.source.name == "ucf101-split3"
    assert training("data=hmdb51", data__root="x").data.source.name == "hmdb51-split1"
    with pytest.raises(InputError, match=r"data\.split must be a whole number from 1 to 3, got 4"):
        training("data=ucf101", data__root="x", data__split=4)


# ---- layouts, three videos of 6, 9 and 12 frames each


def frames_of_20bn(root, release):
    for number in (1, 2, 3):
        folder = root / f"20bn-{release}" / str(number)
        folder.mkdir(parents=True)
        for index, frame in enumerate(moving_square(3 + 3 * number, 48, 64), start=1):
            Image.fromarray(frame).save(folder / f"{index:05d}.jpg")
    (root / f"{release}-labels.csv").write_text("Swiping Left\nNo gesture\n")
    (root / f"{release}-train.csv").write_text("1;Swiping Left\n3;No gesture\n")
    (root / f"{release}-validation.csv").write_text("2;Swiping Left\n")


def avi(path, frames):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, moving_square(frames, 48, 64), codec="mpeg4")


def ucf101(root):
    for number, name in enumerate(("Archery/v_Archery_g08_c01", "Archery/v_Archery_g01_c02", "YoYo/v_YoYo_g08_c01")):
        avi(root / "UCF-101" / f"{name}.avi", 6 + 3 * number)
    lists = root / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "classInd.txt").write_text("1 YoYo\r\n2 Archery\r\n")
    (lists / "trainlist01.txt").write_text("Archery/v_Archery_g08_c01.avi 2\r\nYoYo/v_YoYo_g08_c01.avi 1\r\n")
    (lists / "testlist01.txt").write_text("Archery/v_Archery_g01_c02.avi\r\n")
    (lists / "trainlist02.txt").write_text("Archery/v_Archery_g01_c02.avi 2\n")
    (lists / "testlist02.txt").write_text("Archery/v_Archery_g08_c01.avi\n")


def hmdb51(root):
    names = ("kick_ball/#1_(Rad)_kick_ball_f_0", "kick_ball/b_kick_ball_f_0", "chew/c=d!_chew_h_0")
    for number, name in enumerate(names):
        avi(root / "hmdb51_org" / f"{name}.avi", 6 + 3 * number)
    lists = root / "testTrainMulti_7030_splits"
    lists.mkdir()
    (lists / "kick_ball_test_split1.txt").write_text(
        "#1_(Rad)_kick_ball_f_0.avi 1 \nb_kick_ball_f_0.avi 2 \nunused_kick_ball_f_1.avi 0 \n"
    )
    (lists / "chew_test_split1.txt").write_text("c=d!_chew_h_0.avi 1 \n")
    (lists / "kick_ball_test_split2.txt").write_text("b_kick_ball_f_0.avi 1 \n#1_(Rad)_kick_ball_f_0.avi 2 \n")
    (lists / "chew_test_split2.txt").write_text("c=d!_chew_h_0.avi 2 \n")


LAYOUTS = {
    "ssv1": lambda root: frames_of_20bn(root, "something-something-v1"),
    "jester": lambda root: frames_of_20bn(root, "jester-v1"),
    "ucf101": ucf101,
    "hmdb51": hmdb51,
}


@pytest.fixture(scope="module")
def layouts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    for name, make in LAYOUTS.items():
        (folder / name).mkdir()
        make(folder / name)
    return folder


@pytest.fixture
def copied(layouts, tmp_path):
    """A data set's folder that a test may change."""
    return lambda name: shutil.copytree(layouts / name, tmp_path / name)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("ssv1", ["No gesture", "Swiping Left"]),
        ("jester", ["No gesture", "Swiping Left"]),
        ("ucf101", ["YoYo", "Archery"]),
        ("hmdb51", ["chew", "kick_ball"]),
    ],
)
def test_training_reads_and_evaluation_reads_every_layout(name, classes, layouts):
    small = {"num_classes": 2, "size": 32, "num_frames": 4, "workers": 0, "root": str(layouts / name)}
    changes = {f"data__{key}": value for key, value in small.items()}
    recipe = {"recipe__batch_size": 2, "recipe__crop_scales": [1, 0.875]}
    made = Made(configuration(f"data={name}", device="cpu", **recipe, **changes))
    assert made.classes == classes
    train, val = made.train, made.val
    assert sorted(record.label for record in train) == [0, 1]
    assert [record.label for record in val] == [1]
    lengths = []
    for record in (*train, *val):
        with decode.open_video(record) as video:
            lengths.append(len(video))
    assert sorted(lengths) == [6, 9, 12]
    (batch,) = made.data.train_dataloader()
    assert batch["views"].shape == (2, 1, 4, 3, 32, 32)
    assert batch["bad"] == []
    (batch,) = made.data.val_dataloader()
    assert batch["views"].shape == (1, 1, 4, 3, 32, 32)
    assert batch["label"].tolist() == [[1]]


def test_other_splits(layouts):
    ucf, hmdb = UCF101(root=str(layouts / "ucf101"), split=2), HMDB51(root=str(layouts / "hmdb51"), split=2)
    assert [record.name for record in ucf.records("val")[0]] == ["Archery/v_Archery_g08_c01.avi"]
    assert [record.name for record in hmdb.records("train")[0]] == ["kick_ball/b_kick_ball_f_0.avi"]
    assert [record.label for record in hmdb.records("val")[0]] == [0, 1]


def test_frame_folders_and_prepared_files_are_named_by_the_lists_ids(layouts, tmp_path):
    shutil.copytree(layouts / "jester", tmp_path / "jester")
    folder = tmp_path / "jester/20bn-jester-v1"
    shutil.rmtree(folder / "3")
    (folder / "3.mp4").touch()
    source = training("data=jester", data__num_classes=2, data__root=str(tmp_path / "jester")).data.source
    assert [record.name for record in source.records("train")[0]] == ["1", "3"]


@pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*number of training batches.*")
def test_the_commands(layouts, tmp_path, monkeypatch, capsys):
    commands = Commands(monkeypatch, capsys, tmp_path)
    data = ("data=ucf101", f"data.root={layouts / 'ucf101'}", "data.size=16", "data.num_frames=1")
    assert "classInd.txt: expected data.num_classes=101 classes, got 2" in commands.refused("train", *data)
    data += ("data.num_classes=2",)
    commands.train(*data, "recipe.epochs=1", "recipe.batch_size=2", "recipe.dropout=0")
    commands.evaluate(*data, "run=scores")  # the newest run on this split
    assert json.loads((tmp_path / "outputs/scores/results.json").read_text())["videos"] == 1
    assert "no run with data=ucf101-split2" in commands.refused("eval", *data, "data.split=2")


def test_check_reads_frames_once_and_the_manifest_counts_them(copied, rubiks_command, monkeypatch):
    root = copied("jester")
    choices = ("data=jester", f"data.root={root}", "data.num_classes=2", "--workers", 1)
    for name in ("4", "5"):
        (root / "20bn-jester-v1" / name).mkdir()
    shutil.copy(root / "20bn-jester-v1/1/00001.jpg", root / "20bn-jester-v1/5/00002.jpg")
    with open(root / "jester-v1-train.csv", "a") as file:
        file.write("4;No gesture\n5;No gesture\n6;No gesture\n")
    status, _, _ = rubiks_command("check", *choices)
    assert status == 1
    bad = dict(line.split("\t") for line in (root / "rubiks-bad.txt").read_text().splitlines())
    assert {os.path.basename(path): reason.partition(",")[0] for path, reason in bad.items()} == {
        "4": "contains no frames",
        "5": "has 1 .jpg files but not 00001.jpg",
        "6": "no such file",
    }
    shutil.copy(root / "20bn-jester-v1/1/00001.jpg", root / "20bn-jester-v1/5")
    records, missing = TwentyBNFrames(
        format="jester", root=str(root), release="jester-v1", videos="20bn-jester-v1"
    ).records("train")
    check(records, Manifest(root), 1, 60)
    assert missing == [str(root / "20bn-jester-v1/6")]
    known = Manifest(root).apply(records)
    assert [record.checked and record.checked.frames for record in known] == [6, 12, None, 2]
    with monkeypatch.context() as patch:
        patch.setattr(stills, "count_frames", lambda *_: pytest.fail("counted again"))
        with decode.open_video(known[0]) as video:
            assert len(video) == 6
    shutil.copy(root / "20bn-jester-v1/1/00001.jpg", root / "20bn-jester-v1/1/00007.jpg")  # it was only partly unpacked
    with decode.open_video(known[0]) as video:
        assert len(video) == 7


def test_what_a_prepared_copy_in_other_files_is_to_be_read_with(layouts, tmp_path, rubiks_command):
    choices = ("data=ucf101", "data.num_classes=2", f"data.root={layouts / 'ucf101'}", "--workers", 1)
    status, printed, _ = rubiks_command("prepare", *choices, "--form", "frames", "--out", tmp_path / "a folder")
    (line,) = [line for line in printed.splitlines() if line.startswith("Use it with: ")]
    words = shlex.split(line.removeprefix("Use it with: "))
    assert status == 0
    data = entry.training(words).data
    assert (data.source.name, data.sampling.flip) == ("ucf101-split1", True)
    assert data.source.root == str(tmp_path / "a folder")
    records, missing = data.source.records("train")
    assert len(records) == 2
    assert missing == []


def test_videos_outside_of_the_root_are_not_prepared_where_nobody_would_look(layouts, tmp_path, rubiks_command):
    root = tmp_path / "ucf101"
    shutil.copytree(layouts / "ucf101", root)
    videos = next(path for path in root.iterdir() if path.is_dir() and any(path.rglob("*.avi")))
    shutil.move(videos, tmp_path / "elsewhere")
    choices = (f"data.root={root}", f"data.videos={tmp_path / 'elsewhere'}", "data.num_classes=2")
    status, printed, errors = rubiks_command("prepare", "data=ucf101", *choices, "--out", tmp_path / "out")
    assert status == 2
    assert f"is outside data.root={root}" in printed + errors


@pytest.mark.parametrize("name", ["jester", "ucf101", "hmdb51"])
def test_a_prepared_copy_is_read_by_the_same_keys(name, layouts, tmp_path, rubiks_command):
    out = tmp_path / "out"
    choices = [f"data={name}", "data.num_classes=2"]
    status, printed, _ = rubiks_command(
        "prepare", *choices, f"data.root={layouts / name}", "--out", out, "--workers", 1
    )
    assert status == 0
    assert f"Use it with: data={name} data.num_classes=2 data.root={out}" in printed
    before, after = (training(*choices, data__root=str(root)).data.source for root in (layouts / name, out))
    assert before.classes == after.classes
    for split in ("train", "val"):
        (old, _), (new, gone) = before.records(split), after.records(split)
        assert [(record.name, record.label) for record in new] == [(record.name, record.label) for record in old]
        assert gone == []
        assert all(record.path.endswith(".mp4") and record.pattern is None for record in new)


# ---- what is wrong: each error names the file and the line


def source_of(name, root, **keys):
    changes = {f"data__{key}": value for key, value in keys.items()}
    return training(f"data={name}", data__root=str(root), **changes).data.source


@pytest.mark.parametrize(
    ("name", "file", "content", "words"),
    [
        ("jester", "jester-v1-train.csv", None, ["data.train_list", "jester-v1-train.csv", "labels"]),
        ("ssv1", "something-something-v1-labels.csv", None, ["data.labels", "something-something-v1-labels.csv"]),
        ("jester", "jester-v1-train.csv", "1;No gesture\n\n2\n", ["line 3", "`id;label`", "'2'", "test list"]),
        ("jester", "jester-v1-train.csv", "1;Waving\n", ["line 1", "'Waving'", "jester-v1-labels.csv", "data.labels"]),
        ("jester", "jester-v1-train.csv", "../1;No gesture\n", ["line 1", "'../1'"]),
        ("jester", "jester-v1-train.csv", "\n", ["lists no videos"]),
        ("jester", "jester-v1-labels.csv", "No gesture\nNo gesture\n", ["'No gesture' more than once"]),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", None, ["data.train_list", "trainlist01.txt"]),
        ("ucf101", "ucfTrainTestlist/classInd.txt", None, ["data.labels", "classInd.txt"]),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "1 YoYo\n3 Archery\n", ["line 2", "`2 class`", "'3 Archery'"]),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "1 YoYo\n2 YoYo\n", ["line 2", "with a new class"]),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "YoYo\n", ["line 1", "`1 class`"]),
        ("ucf101", "ucfTrainTestlist/classInd.txt", "", ["no classes"]),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "v_YoYo_g08_c01.avi 1\n", ["line 1", "`class/video.avi`"]),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "Yo/a.avi 1\n", ["line 1", "'Yo'", "classInd.txt"]),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "YoYo/a/b.avi 1\n", ["line 1", "'a/b.avi'"]),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "YoYo/a.avi 2\n", ["line 1", "expected 1", "'2'"]),
        ("ucf101", "ucfTrainTestlist/trainlist01.txt", "", ["lists no videos"]),
        ("hmdb51", "testTrainMulti_7030_splits", None, ["cannot be listed", "data.lists", "CLASS_test_split1.txt"]),
        ("hmdb51", "testTrainMulti_7030_splits/chew_test_split1.txt", "a.avi 3\n", ["line 1", "0, 1 or 2", "3'"]),
        ("hmdb51", "testTrainMulti_7030_splits/chew_test_split1.txt", "a.avi\n", ["line 1", "`video.avi flag`"]),
        ("hmdb51", "testTrainMulti_7030_splits/chew_test_split1.txt", "x/a.avi 1\n", ["line 1", "'x/a.avi'"]),
    ],
)  # fmt: skip
def test_bad_lists(copied, name, file, content, words):
    root = copied(name)
    path = root / file
    if content is not None:
        path.write_text(content)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    assert_rejected(lambda: source_of(name, root).records("train"), str(path), *words)


def test_lists_of_hmdb51_without_videos(copied):
    root = copied("hmdb51")
    source = HMDB51(root=str(root), split=3)
    assert_rejected(lambda: source.classes, "testTrainMulti_7030_splits", "CLASS_test_split3.txt, found none")
    (root / "testTrainMulti_7030_splits/chew_test_split3.txt").write_text("c=d!_chew_h_0.avi 2\n")
    assert_rejected(lambda: source.records("train"), "testTrainMulti_7030_splits", "no train videos (flag 1)")


@pytest.mark.parametrize(
    ("name", "file"), [("jester", "jester-v1-labels.csv"), ("hmdb51", "testTrainMulti_7030_splits")]
)
def test_wrong_class_counts_name_the_file(name, file, layouts, rubiks_command):
    root = layouts / name
    status, _, err = rubiks_command("check", f"data={name}", f"data.root={root}")
    assert status == 2
    assert f"{root / file}: expected data.num_classes={CLASSES[name]} classes, got 2" in err
    assert "data.num_classes=2" in err


@pytest.mark.parametrize(("name", "count"), [("ssv2", 174), ("kinetics", 400), ("kinetics", 600), ("kinetics", 700)])
def test_the_labels_must_be_as_many_as_the_edition_has(name, count, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps({f"class {label}": str(label) for label in range(count)}))
    rows = "".join(f"class {label},id{label},0,10,train\n" for label in range(count))
    (tmp_path / "train.csv").write_text("label,youtube_id,time_start,time_end,split\n" + rows)
    path = tmp_path / {"ssv2": "labels.json", "kinetics": "train.csv"}[name]

    def names(number=CLASSES[name]):
        return videos.class_names(source_of(name, tmp_path, num_classes=number))

    assert source_of(name, tmp_path).num_classes == CLASSES[name]
    assert len(names(count)) == len(names(None)) == count
    assert_rejected(lambda: names(500), f"{path}: expected data.num_classes=500", f"got {count}")
    if count == CLASSES[name]:
        assert len(names()) == count
    else:
        assert_rejected(names, str(path), f"data.num_classes={count}")
