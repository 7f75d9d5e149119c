"""`rubiks predict` and Predictor: what they find, say, write and refuse."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle

import av
import numpy as np
import pytest
import torch
from conftest import assert_rejected
from networks import decisive, save_checkpoint
from videos import decode_in_order, moving_square, write_video

from rubiks import Predictor, RubiksNet
from rubiks.errors import VideoError
from rubiks.predict import sources

pytestmark = [
    pytest.mark.usefixtures("small_network"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec"),
]

NAMES = ["wave", "jump & run", "[bold]sit", "zoë", "e", "f"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_network):
    """Six videos, and a checkpoint that tells them apart and knows class names and how it was trained."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(6):
        shape = (30 - 4 * number, 48 + 6 * number, 64)
        write_video(folder / f"v{number}.mp4", np.roll(moving_square(*shape), 17 * number, axis=2), gop=8)
    save_checkpoint(decisive(5, 6), folder / "net.ckpt", NAMES, 48)
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    (folder / "list.csv").write_text("".join(f"v{number}.mp4,{number}\n" for number in range(6)))
    return folder


# ---- scores


@pytest.mark.parametrize("protocol", ["one_clip", "two_clip"])
def test_scores_are_those_of_evaluation_bit_for_bit(protocol, folder, commands, tmp_path):
    commands.evaluate(
        "data=csv", f"data.root={folder}", "data.val_list=list.csv", f"data.labels={folder}/names.txt", "batch_size=4",
        f"ckpt={folder}/net.ckpt", f"protocol={protocol}", "report=false", "save_predictions=scores.npz",
    )  # fmt: skip
    logits = torch.from_numpy(np.load(tmp_path / "scores.npz")["logits"])
    predictor = Predictor(folder / "net.ckpt", protocol, topk=6, device="cpu")
    paths = [folder / f"v{number}.mp4" for number in range(6)]
    for batch_size, workers in ((4, 0), (1, 1)):
        found = list(predictor.many(paths, batch_size, workers))
        for own, scores in zip(found, logits.double().softmax(1), strict=True):
            assert [one.score for one in own.predictions] == scores.sort(descending=True).values.tolist()
            assert all(one.score == scores[one.index] and one.label == NAMES[one.index] for one in own.predictions)
    assert [predictor(path) for path in paths] == found
    assert len({own.predictions[0].score for own in found}) == 6


def test_an_official_file_gives_numbers_for_names_and_a_bad_video_an_error(folder, tmp_path):
    RubiksNet("tiny", 3).save_pretrained(tmp_path / "net.pth.tar")
    predictor = Predictor(tmp_path / "net.pth.tar", device="cpu")
    assert predictor.classes == ["0", "1", "2"]
    assert (predictor.protocol.size, predictor.protocol.num_frames) == (224, 8)
    assert len(predictor(folder / "v5.mp4").predictions) == 3
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(VideoError, match="is empty"):
        predictor(tmp_path / "empty.mp4")
    with pytest.raises(VideoError, match="No such file"):
        predictor("none.mp4")


def test_hundreds_of_videos_of_which_some_are_damaged(folder, rubiks_command, tmp_path):
    damaged = {number: f"clip{number:03}.mp4" for number in range(7, 500, 25)}
    for number in range(500):
        path = tmp_path / "all" / f"part{number % 3}" / f"clip{number:03}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number in damaged:
            content = (folder / "v0.mp4").read_bytes()
            path.write_bytes((b"", b"no video", content[:300], content[: len(content) // 9])[number % 4])
        else:
            os.link(folder / f"v{number % 6}.mp4", path)
    status, out, err = rubiks_command("predict", folder / "net.ckpt", tmp_path / "all", "--json", "--device", "cpu")
    assert status == 1
    assert "20 of 500 videos cannot be read" in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["source"] for line in lines] == sorted(line["source"] for line in lines)
    assert len({line["source"] for line in lines}) == 500
    bad = [line for line in lines if "error" in line]
    assert sorted(os.path.basename(line["source"]) for line in bad) == sorted(damaged.values())
    assert all(line["error"] and "predictions" not in line for line in bad)
    assert sum(len(line["predictions"]) == 5 for line in lines if "error" not in line) == 480
    assert {(line["model"], line["protocol"]) for line in lines} == {(str(folder / "net.ckpt"), "one_clip")}


# ---- what is printed


def test_the_same_in_three_forms(folder, rubiks_command, monkeypatch):
    monkeypatch.chdir(folder)
    words = ("predict", "net.ckpt", "v1.mp4", "list.csv", "--topk", 2, "--workers", 0, "--device", "cpu")
    status, out, _ = rubiks_command(*words, "--json")
    first, second = map(json.loads, out.splitlines())
    assert status == 1
    assert second["error"].startswith("cannot be opened as a video")
    status, out, _ = rubiks_command(*words, "--csv")
    rows = list(csv.reader(io.StringIO(out)))
    assert rows[0] == ["source", "error", "class1", "score1", "class2", "score2"]
    assert rows[1][:2] == ["v1.mp4", ""]
    assert rows[1][2::2] == [one["label"] for one in first["predictions"]]
    assert [float(cell) for cell in rows[1][3::2]] == pytest.approx(
        [one["score"] for one in first["predictions"]], rel=1e-5
    )
    assert rows[2] == ["list.csv", second["error"], "", "", "", ""]
    status, out, _ = rubiks_command(*words)
    assert status == 1
    for one in first["predictions"]:
        assert one["label"] in out
        assert f"{100 * one['score']:.1f}" in out
    assert "cannot be opened as a video" in out


def test_the_class_is_drawn_on_a_copy(folder, rubiks_command, tmp_path):
    (tmp_path / "other").mkdir()
    write_video(tmp_path / "other/v1.mkv", moving_square(9, 51, 67), pix_fmt="yuv444p")
    words = ("predict", folder / "net.ckpt", folder / "v1.mp4", tmp_path / "other", "--save-video", tmp_path / "drawn")
    status, _, err = rubiks_command(*words, "--device", "cpu", "--workers", 0)
    assert (status, err) == (0, "")
    for name, source, size in (
        ("v1.mp4", folder / "v1.mp4", (54, 64)),
        ("v1-2.mp4", tmp_path / "other/v1.mkv", (50, 66)),
    ):
        drawn, original = decode_in_order(tmp_path / "drawn" / name), decode_in_order(source)
        assert (len(drawn), drawn.shape[1:3]) == (len(original), size)
        changed = np.abs(drawn.astype(int) - original[:, : size[0], : size[1]]).mean((0, 3))
        assert changed[:8, :30].mean() > 25 > 12 > changed[size[0] // 2 :].mean()
        with av.open(str(tmp_path / "drawn" / name)) as file:
            assert file.streams.video[0].average_rate == 12
    assert len(list((tmp_path / "drawn").iterdir())) == 2


# ---- sources


def test_files_folders_patterns_and_lists_name_videos(tmp_path, monkeypatch):
    for name in ("a.mp4", "b.WEBM", "c.txt", ".hidden.mp4", "._a.mp4", "sub/d.avi", "sub/deep/e.mkv", "odd [1].mp4"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    (tmp_path / "in/list.txt").write_text("a.mp4\n\n  sub/d.avi  \n/else/where.mp4\n")
    monkeypatch.chdir(tmp_path)

    def found(*words: str) -> list[str]:
        return [record.path for record in sources.find(words)]

    everything = ["in/a.mp4", "in/b.WEBM", "in/odd [1].mp4", "in/sub/d.avi", "in/sub/deep/e.mkv"]
    assert found("in") == everything
    assert found("in/*.mp4") == ["in/a.mp4", "in/odd [1].mp4"]
    assert found("in/**/*.mkv") == ["in/sub/deep/e.mkv"]
    assert found("in/odd [1].mp4") == ["in/odd [1].mp4"]
    assert found("in/list.txt") == ["in/a.mp4", "in/sub/d.avi", "/else/where.mp4"]
    assert found("none.mp4", "in/sub", "none.mp4") == ["none.mp4", "in/sub/d.avi", "in/sub/deep/e.mkv", "none.mp4"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("empty", "empty is a folder without videos, files that end in .3gp, "),
        ("*.mp4", "*.mp4 matches no file"),
        ("blank.txt", "blank.txt is an empty list"),
        ("none.txt", "none.txt cannot be read: No such file"),
    ],
)
def test_sources_without_videos_are_refused(source, words, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/picture.jpg").touch()
    (tmp_path / "blank.txt").write_text("\n \n")
    monkeypatch.chdir(tmp_path)
    assert_rejected(lambda: sources.find([source]), words)


# ---- wrong input


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ckpt": "none.ckpt"}, "none.ckpt"),
        ({"ckpt": "evil.ckpt"}, "because it could run code"),
        ({"ckpt": "v1.mp4"}, "v1.mp4 is not a RubiksNet checkpoint"),
        ({"--protocol": "three_clip"}, "protocol must be one of one_clip, two_clip, dense_10x3; got 'three_clip'"),
        ({"--topk": "0"}, "topk must be a whole number of at least 1, got 0"),
        ({"--batch-size": "0"}, "batch_size must be a whole number of at least 1, got 0"),
        ({"--workers": "-1"}, "workers must be a whole number of at least 0, got -1"),
        ({"--save-video": "v1.mp4"}, "v1.mp4"),
    ],
)
def test_wrong_words_are_one_error(changes, words, folder, rubiks_command, monkeypatch, tmp_path):
    for name in ("net.ckpt", "v1.mp4"):
        os.link(folder / name, tmp_path / name)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps({"state_dict": os.system}))
    monkeypatch.chdir(tmp_path)
    options = {"ckpt": "net.ckpt", "--device": "cpu", "--workers": "0"} | changes
    status, _, err = rubiks_command(
        "predict", options.pop("ckpt"), "v1.mp4", *(word for pair in options.items() for word in pair)
    )
    assert status == 2
    assert err.startswith("error: ")
    assert words in err
    assert err.count("\n") == 1


# ---- explanations


@pytest.mark.parametrize("label", [None, "[bold]sit", "4"])
def test_an_explanation_adds_up_and_is_written(label, folder, rubiks_command, tmp_path):
    words = ("explain", folder / "net.ckpt", folder / "v2.mp4", "--out", tmp_path / "why", "--device", "cpu")
    status, out, err = rubiks_command(*words, *(() if label is None else ("--class", label)))
    assert (status, err) == (0, "")
    predictor = Predictor(folder / "net.ckpt", topk=6, device="cpu")
    ranked = predictor(folder / "v2.mp4").predictions
    index = ranked[0].index if label is None else NAMES.index(label) if label in NAMES else int(label)
    found = json.loads((tmp_path / "why/explanation.json").read_text(encoding="utf-8"))
    assert [one["label"] for one in found["predictions"]] == [one.label for one in ranked[:5]]
    assert found["shown"]["index"] == index
    scores = {one.index: one.score for one in ranked}
    assert found["shown"]["score"] == pytest.approx(scores[index], abs=1e-4)

    # The clip's logits are the means of those of the frames, and those of the class the means of its maps.
    with open(tmp_path / "why/frames.csv", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["frame", *NAMES]
    logits = np.array([[float(cell) for cell in row[1:]] for row in rows])
    odds = np.exp(logits.mean(0))
    assert odds[index] / odds.sum() == pytest.approx(found["shown"]["score"], abs=1e-5)
    assert logits[:, index] == pytest.approx(found["frame_logits"], rel=1e-5)
    bias = predictor.net.new_fc.bias[index].item()
    assert np.mean(found["maps"], axis=(1, 2)) + bias == pytest.approx(logits[:, index], rel=1e-4, abs=1e-4)

    # What the order of frames does.
    clip = (
        predictor.views(folder / "v2.mp4")[0].double() / 255 - torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    ) / (torch.tensor([0.229, 0.224, 0.225])[:, None, None])
    with torch.no_grad():
        backwards = predictor.net(clip.flip(0)[None].float())[0].softmax(0)[index].item()
    assert found["score_reversed"] == pytest.approx(backwards, abs=1e-4)
    assert len(set(found["scores_shuffled"])) > 3
    for text in (NAMES[index], f"{found['shown']['score']:.1%}", f"reversed {found['score_reversed']:.1%}"):
        assert text in out
    assert decode_in_order(tmp_path / "why/overlay.mp4").shape == (4, 48, 48, 3)
    assert (tmp_path / "why/sheet.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("v9.mp4",), "v9.mp4: cannot be opened: No such file"),
        (("v1.mp4", "--class", "6"), "the network has no class '6'; give a name, or a number from 0 to 5"),
        (("v1.mp4", "--class", "fly"), "the network has no class 'fly'"),
        (("v1.mp4", "--out", "v1.mp4"), "cannot be written"),
    ],
)
def test_what_cannot_be_explained_is_one_error(words, message, folder, rubiks_command, monkeypatch):
    monkeypatch.chdir(folder)
    status, _, err = rubiks_command("explain", "net.ckpt", *words, "--device", "cpu")
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
