"""OpenVINO files, in float32 and int8, and AOTInductor packages."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import assert_rejected
from test_export import KINDS, network, save
from videos import moving_square, write_video

from rubiks import Predictor
from rubiks.export import export as exporting
from rubiks.export.exported import ExportedNetwork
from rubiks.export.graph import ExportNet
from rubiks.nn import Normalize

pytestmark = pytest.mark.usefixtures("small_network")


@torch.no_grad()
def check_logits(net, run, *clip: int, uint8: bool = False) -> None:
    """A file's logits are the network's, for several batches."""
    for batch in (1, 3):
        pixels = torch.randint(256, (batch, clip[0], 3, *clip[1:]), dtype=torch.uint8)
        clips = Normalize()(pixels)
        logits, expected = torch.as_tensor(run(pixels if uint8 else clips)), net(clips)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


# ---- OpenVINO


def in_openvino(path):
    """The compiled model of a file, with nothing of ours."""
    openvino = pytest.importorskip("openvino")
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda pixels: compiled({"pixel_values": pixels.numpy()})["logits"]


WORDS = ([], ["--uint8"], ["--dynamic-frames"])


@pytest.mark.parametrize(("variant", "share", "words"), [(*kind, own) for kind, own in zip(KINDS, WORDS, strict=True)])
def test_openvino(variant, share, words, rubiks_command, tmp_path):
    openvino = pytest.importorskip("openvino")
    net = network("tiny", variant, share)
    file = save(net, tmp_path / "net.pth.tar", classes=["a", '"é" < 推', "c", "d", "e", "f", "g\n"])
    out = tmp_path / "folder/net.xml"
    status, stdout, err = rubiks_command("export", file, "--to", "openvino", "--out", out, "--size", "33x40", *words)
    assert (status, err) == (0, "")
    assert f"{out}: " in stdout
    assert sorted(os.listdir(tmp_path / "folder")) == ["net.bin", "net.xml"]
    for frames in (4, 8, 16) if "--dynamic-frames" in words else (8,):
        check_logits(net, in_openvino(out), frames, 33, 40, uint8="--uint8" in words)
    model = openvino.Core().read_model(out)
    known = {key: model.get_rt_info(["rubiks", key]).astype(str) for key in ("variant", "classes", "preprocessing")}
    assert known["variant"] == variant
    assert json.loads(known["classes"])[1:] == ['"é" < 推', "c", "d", "e", "f", "g\n"]
    assert json.loads(known["preprocessing"])["size"] == [33, 40]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_network):
    """Twelve videos and a checkpoint that tells them apart."""
    folder = tmp_path_factory.mktemp("openvino")
    for number in range(12):
        write_video(folder / f"v{number}.mp4", np.roll(moving_square(12, 48, 64), 5 * number, axis=2))
    torch.manual_seed(5)
    save(network(), folder / "net.pth.tar", config={"data": {"size": 32}}, num_frames=4)
    return folder


def test_int8(folder, rubiks_command, tmp_path):
    """It is smaller, has nearly the same scores, and predict runs it."""
    pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    words = ("export", folder / "net.pth.tar", "--to", "openvino", "--out")
    assert rubiks_command(*words, tmp_path / "net.xml")[0] == 0
    status, out, _ = rubiks_command(*words, tmp_path / "int8.xml", "--int8", folder, "--uint8")
    assert status == 0
    assert (tmp_path / "int8.bin").stat().st_size < 0.6 * (tmp_path / "net.bin").stat().st_size
    predictors = [Predictor(path, topk=8, device="cpu") for path in (folder / "net.pth.tar", tmp_path / "int8.xml")]
    expected, found = (list(predictor.many([folder], workers=0)) for predictor in predictors)
    agreed = 0
    for one, other in zip(expected, found, strict=True):
        agreed += one.predictions[0].index == other.predictions[0].index
        values = ({score.index: score.score for score in own.predictions} for own in (one, other))
        assert next(values) == pytest.approx(next(values), abs=0.05)
    assert f"on 12 calibration clips the highest class is the same for {agreed / 12:.1%}" in out
    assert ", int8\n" in rubiks_command("info", tmp_path / "int8.xml")[1]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--int8", "none.txt"], ["none.txt cannot be read"]),
        (["--int8", "empty"], ["empty is a folder without videos"]),
        (["--int8", "damaged.mp4"], ["--int8 damaged.mp4: no video can be read", "is empty"]),
        (["--int8", "damaged.mp4", "--size", "32x48"], ["--int8 needs square frames", "32x48"]),
    ],
)
def test_calibrations_that_cannot_be_used(words, parts, folder, rubiks_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged.mp4").touch()
    status, _, err = rubiks_command("export", folder / "net.pth.tar", "--to", "openvino", "--out", "net.xml", *words)
    assert status == 2
    assert all(part in err for part in parts), err


def test_packages_that_are_missing(folder, rubiks_command, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("openvino", "nncf") else find(name))
    words = ("export", folder / "net.pth.tar", "--to", "openvino", "--out", tmp_path / "net.xml", "--int8", folder)
    status, _, err = rubiks_command(*words)
    assert status == 2
    assert "--to openvino needs nncf, openvino; install with: pip install 'rubiks[openvino]'" in err
    (tmp_path / "net.xml").write_text("<net/>")
    assert_rejected(lambda: Predictor(tmp_path / "net.xml"), "net.xml needs openvino", "rubiks[openvino]")


def test_openvino_files_that_are_wrong(folder, rubiks_command, tmp_path, monkeypatch):
    """Also one that computes something else is not kept, and leaves what was there."""
    pytest.importorskip("openvino")
    words = ("export", folder / "net.pth.tar", "--to", "openvino", "--out", tmp_path / "net.xml")
    assert rubiks_command(*words)[0] == 0
    for name, change, why in (
        ("alone.xml", lambda path: path.with_suffix(".bin").unlink(), "alone.bin is missing"),
        ("mixed.xml", lambda path: path.with_suffix(".bin").write_bytes(bytes(10_000_000)), "damaged"),
        ("cut.xml", lambda path: os.truncate(path, 5000), ""),
        ("pickle.xml", lambda path: path.write_bytes(pickle.dumps(os.getcwd)), ""),
        ("empty.xml", lambda path: os.truncate(path, 0), "it is empty"),
        ("other.xml", lambda path: path.write_text(path.read_text().replace("rubiks>", "x>")), "rt_info"),
    ):
        for suffix in (".xml", ".bin"):
            shutil.copy(tmp_path / f"net{suffix}", (tmp_path / name).with_suffix(suffix))
        change(tmp_path / name)
        assert_rejected(
            lambda name=name: Predictor(tmp_path / name), f"{name} is not a network that rubiks export", why
        )

    class Wrong(ExportNet):
        def forward(self, pixel_values):
            return super().forward(pixel_values) * 1.001

    monkeypatch.setattr(exporting, "ExportNet", Wrong)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("net.*")}
    status, _, err = rubiks_command(*words)
    assert status == 2
    assert "differ from PyTorch's by 1.0e-03" in err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("net.*")} == before


# ---- AOTInductor


@pytest.mark.slow
def test_aotinductor(folder, rubiks_command, tmp_path):
    """A package has any batch, and is read by predict; one that is damaged or of something else is refused."""
    out = tmp_path / "net.pt2"
    status, _, err = rubiks_command("export", folder / "net.pth.tar", "--to", "aoti", "--out", out, "--uint8")
    assert (status, err) == (0, "")
    net = Predictor(folder / "net.pth.tar", device="cpu").net
    package = torch._inductor.aoti_load_package(str(out))
    check_logits(net, package, 4, 32, 32, uint8=True)
    assert package.get_metadata()["tier"] == "tiny"
    views = torch.randint(256, (2, 3, 4, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():  # as evaluation gives the views of several videos: not in the order of memory
        expected = net(Normalize()(views[:, 1]))
    torch.testing.assert_close(
        ExportedNetwork(str(out))(views[:, 1]), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
    )
    expected, found = (Predictor(path, device="cpu")(folder / "v3.mp4") for path in (folder / "net.pth.tar", out))
    for one, other in zip(expected.predictions, found.predictions, strict=True):
        assert (one.index, pytest.approx(one.score, abs=1e-4)) == (other.index, other.score)
    content = bytearray(out.read_bytes())
    with zipfile.ZipFile(out) as archive:
        library = next(info for info in archive.infolist() if info.filename.endswith(".so"))
    content[library.header_offset + library.file_size // 2] ^= 1
    (tmp_path / "damaged.pt2").write_bytes(content)
    assert_rejected(lambda: Predictor(tmp_path / "damaged.pt2"), "damaged.pt2 is not a network", "damaged")


def test_no_compiler(folder, rubiks_command, tmp_path, monkeypatch):
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    words = ("--to", "aoti", "--out", tmp_path / "net.pt2")
    status, _, err = rubiks_command("export", folder / "net.pth.tar", *words)
    assert status == 2
    assert "--to aoti needs a C++ compiler" in err
    assert not list(tmp_path.iterdir())
