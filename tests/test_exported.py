"""Exported files in place of checkpoints: predict, eval and info read them, or refuse them with one clear error."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import pickle
import shutil

import numpy as np
import onnx
import pytest
import torch
from conftest import assert_rejected
from networks import decisive, save_checkpoint
from videos import moving_square, write_video

from rubiks import Predictor
from rubiks.cli import main
from rubiks.export import exported
from rubiks.export.exported import ExportedNetwork

pytestmark = [
    pytest.mark.usefixtures("small_network"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec"),
]

NAMES = ["wave", "jump & run", '"sit" 推', "zoë"]


def export(*words: object) -> None:
    """`rubiks export`, which must succeed."""
    arguments = main.make_parser().parse_args(["export", *map(str, words)])
    arguments.run(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_network):
    """Four videos, a checkpoint that tells them apart, and what has been exported from it."""
    folder = tmp_path_factory.mktemp("exported")
    for number in range(4):
        write_video(folder / f"v{number}.mp4", np.roll(moving_square(12, 48 + 6 * number, 64), 17 * number, axis=2))
    save_checkpoint(decisive(5, 4), folder / "net.ckpt", NAMES, 32)
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    (folder / "list.csv").write_text("".join(f"v{number}.mp4,{number}\n" for number in range(4)))
    export(folder / "net.ckpt", "--to", "onnx", "--out", folder / "net.onnx")
    export(folder / "net.ckpt", "--to", "onnx", "--out", folder / "uint8.onnx", "--uint8")
    export(folder / "net.ckpt", "--to", "pt2", "--out", folder / "net.pt2", "--dynamic-frames")
    return folder


def scores(path, videos) -> list[list[float]]:
    """The probabilities of all classes for each video."""
    predictor = Predictor(path, "two_clip", topk=4, device="cpu")
    assert predictor.classes == NAMES
    ordered = (sorted(one.predictions, key=lambda score: score.index) for one in predictor.many(videos, 3, 0))
    return [[score.score for score in own] for own in ordered]


@pytest.mark.parametrize("name", ["net.onnx", "uint8.onnx", "net.pt2"])
def test_the_scores_are_those_of_the_checkpoint(name, folder):
    videos = sorted(folder.glob("*.mp4"))
    expected = scores(folder / "net.ckpt", videos)
    assert max(map(max, expected)) - min(map(min, expected)) > 0.1
    np.testing.assert_allclose(scores(folder / name, videos), expected, rtol=0, atol=1e-4)


def test_predict_prints_names(folder, rubiks_command):
    words = ("--json", "--workers", 0, "--topk", 1)
    lines = []
    for name in ("net.ckpt", "net.onnx"):
        status, out, err = rubiks_command("predict", folder / name, folder / "v2.mp4", *words)
        assert (status, err) == (0, "")
        lines.append(json.loads(out))
    assert lines[1]["model"] == str(folder / "net.onnx")
    (first,), (second,) = (line["predictions"] for line in lines)
    assert (first["label"], first["score"]) == (second["label"], pytest.approx(second["score"], abs=1e-4))


def choices(folder, name, *words) -> tuple[str, ...]:
    """The arguments of an evaluation of the four videos."""
    data = ("data=csv", f"data.root={folder}", "data.val_list=list.csv", f"data.labels={folder}/names.txt")
    return *data, f"ckpt={folder / name}", "save_predictions=scores.npz", *words


def test_evaluation_says_what_was_scored(folder, commands, tmp_path):
    logits = []
    for name in ("net.ckpt", "uint8.onnx"):
        commands.evaluate(*choices(folder, name, "run=mine", "protocol=one_clip", "temporal=true"))
        logits.append(np.load(tmp_path / "scores.npz")["logits"])
    np.testing.assert_allclose(logits[1], logits[0], rtol=0, atol=1e-4 * np.abs(logits[0]).max())
    results = json.loads((tmp_path / "outputs/mine/results.json").read_text())
    digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("net.ckpt", "uint8.onnx")}
    assert (results["checkpoint"], results["checkpoint_sha256"]) == (str(folder / "uint8.onnx"), digests["uint8.onnx"])
    assert (results["tier"], results["variant"], results["num_classes"]) == ("tiny", "rubiks3d", 4)
    assert results["precision"] == "float32"
    own = results["exported"]
    assert own.pop("runtime").startswith("ONNX Runtime 1.")
    described = {"format": "onnx", "input": "uint8"}
    assert own == {**described, "source_sha256": digests["net.ckpt"]}
    page = (tmp_path / "outputs/mine/report.html").read_text(encoding="utf-8")
    assert "ONNX Runtime 1." in page
    assert not (tmp_path / "outputs/mine/previews").exists()  # those of the checkpoint are gone


@pytest.mark.parametrize(
    ("name", "words", "parts"),
    [
        (
            "net.onnx",
            ["protocol=dense_10x3"],
            ["clips of 4 frames of 32x32", "4 frames of 256x256", "--size 256"],
        ),
        ("net.onnx", ["data.num_frames=8"], ["takes clips of 4 frames", "8 frames of 32x32", "--frames 8"]),
        ("net.pt2", ["data.num_frames=3"], ["4 to 256 frames", "3 frames"]),
        ("net.onnx", ["precision=64-true"], ["precision=64-true", "net.onnx"]),
        ("net.onnx", ["tier=large"], ["tier=tiny", "tier=large is chosen"]),
    ],
)
def test_evaluations_that_do_not_fit(name, words, parts, folder, commands):
    error = commands.refused("eval", *choices(folder, name, *words))
    assert all(part in error for part in parts), error


def test_a_file_that_takes_several_numbers_of_frames(folder, commands, tmp_path):
    for name in ("net.ckpt", "net.pt2"):
        commands.evaluate(*choices(folder, name, "data.num_frames=6", "report=false"))
        shutil.move(tmp_path / "scores.npz", tmp_path / f"{name}.npz")
    expected, logits = (np.load(tmp_path / f"{name}.npz")["logits"] for name in ("net.ckpt", "net.pt2"))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_only_the_cpu_runs_exported_files(folder):
    network = ExportedNetwork(str(folder / "net.onnx"))
    network.check("auto", 4, 32)
    assert_rejected(lambda: network.check("gpu", 4, 32), "device=gpu", "net.onnx", "device=cpu")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("net.onnx", ["ONNX Runtime", "4 frames of 32 x 32", "normalized"]),
        ("uint8.onnx", ["uint8"]),
        ("net.pt2", ["torch.export", "4 to 256 frames"]),
    ],
)
def test_info(name, parts, folder, rubiks_command):
    status, out, _ = rubiks_command("info", folder / name)
    assert status == 0
    assert all(part in out for part in [*parts, "tier tiny, variant rubiks3d, 4 classes", str(folder / name)]), out
    known = json.loads(rubiks_command("info", folder / name, "--json")[1])
    assert (known["classes"], known["format"]) == (NAMES, name[-4:].lstrip("."))


def test_what_needs_weights_refuses_exported_files(folder, rubiks_command):
    status, _, err = rubiks_command("explain", folder / "net.onnx", folder / "v0.mp4")
    assert status == 2
    assert "net.onnx is an exported file" in err
    for words in (("export", "--to", "pt2", "--out", "x.pt2"), ("convert", "x"), ("info", "--shifts")):
        status, _, err = rubiks_command(words[0], folder / "net.onnx", *words[1:])
        assert status == 2
        assert "net.onnx is not a RubiksNet checkpoint" in err


# ---- wrong files


def foreign_onnx(folder, path) -> None:
    value = onnx.helper.make_tensor_value_info
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [2])], [value("y", 1, [2])])
    onnx.save(onnx.helper.make_model(graph, ir_version=9, opset_imports=[onnx.helper.make_opsetid("", 18)]), path)


def with_metadata(folder, path, **changed) -> None:
    model = onnx.load(folder / "net.onnx")
    for entry in model.metadata_props:
        entry.value = changed.get(entry.key, entry.value)
    onnx.save(model, path)


def foreign_program(folder, path) -> None:
    torch.export.save(torch.export.export(torch.nn.ReLU(), (torch.ones(2),)), path)


def cut(name):
    return lambda folder, path: path.write_bytes((folder / name).read_bytes()[:-5000])


WRONG = {
    "empty.onnx": (lambda folder, path: path.touch(), "it is empty"),
    "text.onnx": (lambda folder, path: path.write_text("no network"), ""),
    "pickle.onnx": (lambda folder, path: path.write_bytes(pickle.dumps(os.getcwd)), ""),
    "cut.onnx": (cut("net.onnx"), ""),
    "foreign.onnx": (foreign_onnx, "its metadata has no"),
    "sizes.onnx": (lambda *where: with_metadata(*where, preprocessing='{"size": 3}'), "preprocessing"),
    "names.onnx": (lambda *where: with_metadata(*where, classes='["a"'), ""),
    "empty.pt2": (lambda folder, path: path.touch(), "it is empty"),
    "text.pt2": (lambda folder, path: path.write_text("no network"), "zip"),
    "pickle.pt2": (lambda folder, path: path.write_bytes(pickle.dumps(os.getcwd)), "zip"),
    "checkpoint.pt2": (lambda folder, path: shutil.copy(folder / "net.ckpt", path), "metadata.json"),
    "cut.pt2": (cut("net.pt2"), ""),
    "foreign.pt2": (foreign_program, "metadata.json"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files(name, folder, tmp_path, rubiks_command):
    make, why = WRONG[name]
    make(folder, tmp_path / name)
    status, out, err = rubiks_command("predict", tmp_path / name, folder / "v0.mp4")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"{tmp_path / name} is not a network that rubiks export has written" in err
    assert why in err


def test_files_that_are_not_there(tmp_path):
    assert_rejected(lambda: exported.read(tmp_path / "none.onnx"), "no checkpoint at", "none.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert_rejected(lambda: exported.read(tmp_path / "folder.onnx"), "is a folder without")


def test_a_runtime_that_is_missing(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert_rejected(
        lambda: Predictor(folder / "net.onnx"), "net.onnx needs onnxruntime", "pip install 'rubiks[export]'"
    )


def test_frames_that_are_not_square(folder, tmp_path):
    export(folder / "net.ckpt", "--to", "pt2", "--out", tmp_path / "wide.pt2", "--size", "32x48")
    assert_rejected(lambda: Predictor(tmp_path / "wide.pt2"), "wide.pt2 takes clips of 4 frames of 32x48 pixels")
