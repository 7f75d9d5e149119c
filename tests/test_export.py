"""Exported files compute the network's logits in their own runtime, say what they are, and need nothing of ours."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import pickle

import onnx
import onnxruntime
import pytest
import torch
from conftest import assert_rejected
from test_inference import trained

import rubiks
from rubiks import RubiksNet
from rubiks.cli.export import _size
from rubiks.export import export as exporting
from rubiks.export.graph import ExportNet, taps
from rubiks.files import write_files
from rubiks.models import VARIANTS
from rubiks.nn import ChannelShift, Normalize

# As training leaves them and worse: whole and halves, of both signs, near and beyond the clip.
OFFSETS = torch.tensor([0.0, 1, -1, 2, -3, 0.5, -0.5, 1.5, 0.3, -0.7, 2.6, -2.2, 9.25, -11.5, 40, -40.5, 1e9, -1e-7])


def network(tier: str = "tiny", variant: str = "rubiks3d", share: float | None = None) -> RubiksNet:
    """A network like a trained one; with a share, its attention is hard and moves that many channels."""
    net = trained(tier, variant, torch.float32)
    for module in net.modules():
        if isinstance(module, ChannelShift) and isinstance(module.shift, torch.nn.Parameter):
            values = OFFSETS[torch.randint(len(OFFSETS), module.shift.shape)]
            module.shift.data = torch.where(torch.rand(module.shift.shape) < 0.5, values, module.shift.data)
    return net if share is None else net.harden(share)


def save(net: RubiksNet, path, **described) -> str:
    """An official file, with what ours also say."""
    net.save_pretrained(path)
    torch.save({**torch.load(path, weights_only=True), **described}, path)
    return str(path)


def in_onnx_runtime(path, pixels: torch.Tensor) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"pixel_values": pixels.numpy()})[0])


def in_torch_export(path, pixels: torch.Tensor) -> torch.Tensor:
    return torch.export.load(path).module()(pixels)


RUNTIMES = {"onnx": in_onnx_runtime, "pt2": in_torch_export}


@torch.no_grad()
def check_logits(net: RubiksNet, path, frames: int, height: int, width: int) -> None:
    """A file's logits are the network's, for several batches."""
    for batch in (1, 3):
        clips = torch.randn(batch, frames, 3, height, width)
        logits, expected = RUNTIMES[path.suffix[1:]](path, clips), net(clips)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


KINDS = [("rubiks3d", None), ("rubiks3d-aq", None), ("rubiks3d-aq", 0.5)]
NETWORKS = [*((variant, None) for variant in VARIANTS), *(("rubiks3d-aq", share) for share in (0.0, 0.125, 1.0))]


@pytest.mark.parametrize(("variant", "share"), NETWORKS)
@pytest.mark.parametrize("to", RUNTIMES)
@pytest.mark.usefixtures("small_network")
def test_variants(variant, share, to, rubiks_command, tmp_path):
    net = network("tiny", variant, share)
    file, out = save(net, tmp_path / "net.pth.tar"), tmp_path / f"net.{to}"
    frames, height, width = (16, 50, 33) if to == "onnx" else (8, 32, 70)
    status, stdout, err = rubiks_command(
        "export", file, "--to", to, "--out", out, "--frames", frames, "--size", f"{height}x{width}"
    )
    assert (status, err) == (0, "")
    assert f"{out}: " in stdout
    assert f"{frames} x {height} x {width}" in stdout
    check_logits(net, out, frames, height, width)


LARGE = [pytest.param(tier, marks=pytest.mark.slow) for tier in ("medium", "large")]


@pytest.mark.parametrize("tier", ["tiny", "small", *LARGE])
def test_tiers(tier, rubiks_command, tmp_path, monkeypatch):
    """In both formats, made of one program, which takes a third of the time to make."""
    net = network(tier)
    file = save(net, tmp_path / "net.pth.tar")
    programs: list[torch.export.ExportedProgram] = []
    real = torch.export.export

    def once(*arguments, **options):
        if not programs:
            programs.append(real(*arguments, **options))
        return programs[0]

    monkeypatch.setattr(torch.export, "export", once)
    for to in RUNTIMES:
        out = tmp_path / f"net.{to}"
        status, _, err = rubiks_command("export", file, "--to", to, "--out", out, "--size", 32)
        assert (status, err) == (0, "")
        check_logits(net, out, 8, 32, 32)


@torch.no_grad()
@pytest.mark.parametrize(("variant", "share"), KINDS)
@pytest.mark.parametrize("clip", [(1, 1, 1), (1, 16, 40), (3, 7, 5)])
@pytest.mark.usefixtures("small_network")
def test_tiny_clips(clip, variant, share):
    """Where every reach is cut at the clip's end."""
    net = network("small", variant, share)
    clips = torch.randn(2, clip[0], 3, *clip[1:])
    expected = net(clips)
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(ExportNet(net, *clip)(clips), expected, rtol=0, atol=tolerance)


def test_kernels_are_no_wider_than_the_offsets():
    assert taps(torch.tensor([0.25, -1.0]), False, 8).tolist() == [[0, 0.75, 0.25], [1, 0, 0]]
    assert taps(torch.tensor([0.5, -1.5]), True, 8).tolist() == [[0, 0, 1], [1, 0, 0]]
    assert taps(torch.tensor([-0.5, 50.0, 7.0]), False, 3).tolist() == [[0.5, 0.5, 0], [0, 0, 0], [0, 0, 0]]


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("to", RUNTIMES)
def test_pixels_as_uint8(to, rubiks_command, tmp_path):
    net = network()
    file, out = save(net, tmp_path / "net.pth.tar"), tmp_path / f"net.{to}"
    assert rubiks_command("export", file, "--to", to, "--out", out, "--size", "40x32", "--uint8")[0] == 0
    frames = torch.randint(256, (3, 8, 3, 40, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = net(Normalize()(frames))
    logits = RUNTIMES[to](out, frames)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize(("variant", "share"), KINDS)
@pytest.mark.parametrize("to", RUNTIMES)
def test_any_number_of_frames(to, variant, share, rubiks_command, tmp_path):
    net = network("tiny", variant, share)
    file, out = save(net, tmp_path / "net.pth.tar"), tmp_path / f"net.{to}"
    status, _, err = rubiks_command("export", file, "--to", to, "--out", out, "--size", "33x40", "--dynamic-frames")
    assert (status, err) == (0, "")
    for frames in (4, 5, 16, 50):
        check_logits(net, out, frames, 33, 40)


def metadata(path) -> dict:
    if path.suffix == ".pt2":
        extra = {"metadata.json": ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra["metadata.json"])
    texts = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    return {**texts, **{key: json.loads(texts[key]) for key in ("num_classes", "classes", "preprocessing")}}


@pytest.mark.usefixtures("small_network")
@pytest.mark.parametrize("to", RUNTIMES)
def test_a_run_is_described(to, rubiks_command, tmp_path):
    """Its best checkpoint is exported, as it was trained, with names in any language."""
    classes = ["pouring", "naïve", '"quoted", 推', "d", "e", "f", "g"]
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    trained_on = {"size": 48, "sampling": "dense", "window": 32}
    file = save(network(), tmp_path / "run/checkpoints/best.ckpt", classes=classes, config={"data": trained_on})
    out = tmp_path / f"deep/er/net.{to}"
    status, stdout, _ = rubiks_command("export", tmp_path / "run", "--to", to, "--out", out)
    assert status == 0
    assert "8 x 48 x 48" in stdout
    found = metadata(out)
    assert found.pop("preprocessing") == {
        "num_frames": 8,
        "min_frames": 8,
        "max_frames": 8,
        "size": [48, 48],
        "short_side": 55,
        "sampling": "dense",
        "window": 32,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "input": "normalized",
    }
    with open(file, "rb") as content:
        digest = hashlib.sha256(content.read()).hexdigest()
    described = {"tier": "tiny", "variant": "rubiks3d", "num_classes": 7, "classes": classes, "precision": "float32"}
    assert found == {**described, "source_sha256": digest, "rubiks_version": rubiks.__version__}


@pytest.mark.usefixtures("small_network")
def test_only_standard_operators(rubiks_command, tmp_path):
    file = save(network("tiny", "rubiks3d-aq", 0.5), tmp_path / "net.pth.tar")
    for to in RUNTIMES:
        assert rubiks_command("export", file, "--to", to, "--out", tmp_path / f"net.{to}", "--size", 32)[0] == 0
    model = onnx.load(tmp_path / "net.onnx")
    assert {entry.domain for entry in model.opset_import} == {""}
    (given,), (result,) = model.graph.input, model.graph.output
    sides = [side.dim_param or side.dim_value for side in given.type.tensor_type.shape.dim]
    assert (given.name, sides) == ("pixel_values", ["batch", 8, 3, 32, 32])
    assert (result.name, result.type.tensor_type.shape.dim[0].dim_param) == ("logits", "batch")
    program = torch.export.load(tmp_path / "net.pt2")
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(target.startswith(("aten.", "<built-in function")) for target in targets), targets


@pytest.fixture
def small_file(small_network, tmp_path) -> str:
    return save(network(), tmp_path / "net.pth.tar")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--to", "onnx", "--out", "net.pt2"], ["--out net.pt2", ".onnx"]),
        (["--to", "pt2", "--out", "net"], ["--out net:", ".pt2"]),
        (["--to", "tflite", "--out", "net.tflite"], ["--to", "tflite", "onnx", "pt2"]),
        (["--to", "onnx"], ["--out"]),
        (["--to", "aoti", "--out", "net.so"], ["--out net.so", ".pt2"]),
        (["--to", "onnx", "--out", "net.onnx", "--int8", "videos"], ["--int8 needs --to openvino", "onnx"]),
        (["--to", "pt2", "--out", "taken.pt2"], ["taken.pt2", "Is a directory"]),
        (["--to", "pt2", "--out", "net.pth.tar/net.pt2"], ["net.pth.tar/net.pt2", "Not a directory"]),
        (["--to", "pt2", "--out", "net.pt2", "--frames", "0"], ["--frames", "at least 1", "'0'"]),
        (["--to", "pt2", "--out", "net.pt2", "--size", "224x"], ["--size", "224x320", "'224x'"]),
        (["--to", "pt2", "--out", "net.pt2", "--frames", "3", "--dynamic-frames"], ["--dynamic-frames", "4", "got 3"]),
    ],
)
def test_wrong_choices(words, parts, small_file, rubiks_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.pt2").mkdir()
    before = sorted(os.listdir(tmp_path))
    status, out, err = rubiks_command("export", small_file, *words)
    assert (status, out) == (2, "")
    assert all(part in err for part in parts), err
    assert sorted(os.listdir(tmp_path)) == before


def test_sizes():
    assert _size("224") == (224, 224)
    assert _size("128X256") == (128, 256)


def test_wrong_checkpoints(rubiks_command, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "net.pkl").write_bytes(pickle.dumps(os.getcwd))
    for name, part in (("missing.ckpt", "no checkpoint"), ("empty", "best.ckpt"), ("net.pkl", "could run code")):
        out = tmp_path / "net.pt2"
        status, _, err = rubiks_command("export", tmp_path / name, "--to", "pt2", "--out", out)
        assert status == 2
        assert part in err
        assert str(tmp_path / name) in err
        assert not out.exists()


def test_weights_that_are_not_finite(small_network, rubiks_command, tmp_path):
    net = network()
    net.backbone.layer2[0].shift.shift.data[1, 2] = torch.nan
    file = save(net, tmp_path / "net.pth.tar")
    status, _, err = rubiks_command("export", file, "--to", "pt2", "--out", tmp_path / "net.pt2")
    assert status == 2
    assert f"{file} cannot be exported: backbone.layer2.0.as3.rubiks3d.shift" in err


@pytest.mark.parametrize("to", RUNTIMES)
def test_a_file_that_computes_something_else_is_not_kept(to, small_file, rubiks_command, tmp_path, monkeypatch):
    class Wrong(ExportNet):
        def forward(self, pixel_values):
            return super().forward(pixel_values) * 1.001

    monkeypatch.setattr(exporting, "ExportNet", Wrong)
    (tmp_path / f"net.{to}").write_text("as before")
    before = sorted(os.listdir(tmp_path))
    status, out, err = rubiks_command("export", small_file, "--to", to, "--out", tmp_path / f"net.{to}", "--size", 32)
    assert (status, out) == (2, "")
    assert "differ from PyTorch's by 1.0e-03" in err
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / f"net.{to}").read_text() == "as before"


def test_packages_that_are_missing(small_file, rubiks_command, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name.startswith("onnx") else find(name))
    status, _, err = rubiks_command("export", small_file, "--to", "onnx", "--out", tmp_path / "net.onnx")
    assert status == 2
    assert err.count("\n") == 1
    assert "onnx, onnxscript, onnxruntime" in err
    assert "pip install 'rubiks[export]'" in err
    assert rubiks_command("export", small_file, "--to", "pt2", "--out", tmp_path / "net.pt2", "--size", 32)[0] == 0


def test_files_that_belong_together(tmp_path):
    """All are written, or what was there stays."""
    paths = [tmp_path / "folder/net.xml", tmp_path / "folder/net.bin"]

    def write(text, *names):
        return lambda folder: [(folder / name).write_text(text) for name in names]

    write_files(paths, write("old", "net.xml", "net.bin"))
    assert_rejected(lambda: write_files(paths, write("new", "net.xml")), "net.xml cannot be written", "No such file")
    assert {path: path.read_text() for path in (tmp_path / "folder").iterdir()} == dict.fromkeys(paths, "old")
    write_files(paths, write("new", "net.xml", "net.bin"))
    assert [path.read_text() for path in paths] == ["new", "new"]


def test_exporting_logs_nothing(rubiks_command, tmp_path, caplog):
    file = save(network("tiny", "rubiks3d", None), tmp_path / "net.pth.tar")
    with caplog.at_level(logging.INFO):
        status, _, err = rubiks_command("export", file, "--to", "onnx", "--out", tmp_path / "net.onnx", "--size", "32")
    assert (status, err, caplog.records) == (0, "", [])
