"""Exported streams: causal networks that take a frame at a time in another runtime, with nothing of ours."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import assert_rejected
from test_export import save
from test_stream import NETWORKS, TEMPORAL, trained
from torch import Tensor
from videos import moving_square, write_video

from rubiks import Predictor, RubiksNet
from rubiks.cli import main
from rubiks.export import stream as exporting
from rubiks.export.stream_graph import StreamNet
from rubiks.nn import Normalize

pytestmark = pytest.mark.usefixtures("small_network")


class InOnnxRuntime:
    """A file, whose states begin with zeros as its metadata say."""

    def __init__(self, path) -> None:
        self.session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        self.kept = json.loads(self.metadata["states"])

    def start(self, batch: int) -> list[np.ndarray]:
        return [np.full((batch, *state["shape"]), state["initial"], np.float32) for state in self.kept]

    def step(self, pixels: Tensor, states: list[np.ndarray]) -> tuple[Tensor, list[np.ndarray]]:
        given = {state["name"]: value for state, value in zip(self.kept, states, strict=True)}
        outputs = ["logits", *(state["next"] for state in self.kept)]
        logits, *states = self.session.run(outputs, {"pixel_values": pixels.numpy(), **given})
        return torch.from_numpy(logits), states


class InTorchExport:
    def __init__(self, path) -> None:
        extra = {"metadata.json": ""}
        self.module = torch.export.load(path, extra_files=extra).module()
        self.metadata = json.loads(extra["metadata.json"])

    def start(self, batch: int) -> list[Tensor]:
        return [torch.full((batch, *state["shape"]), state["initial"]) for state in self.metadata["states"]]

    def step(self, pixels: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        logits, *states = self.module(pixels, *states)
        return logits, states


class InOpenVino:
    def __init__(self, path) -> None:
        openvino = pytest.importorskip("openvino")
        model = openvino.Core().read_model(path)
        self.kept = json.loads(model.get_rt_info(["rubiks", "states"]).astype(str))
        self.compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def start(self, batch: int) -> list[np.ndarray]:
        return [np.full((batch, *state["shape"]), state["initial"], np.float32) for state in self.kept]

    def step(self, pixels: Tensor, states: list[np.ndarray]) -> tuple[Tensor, list[np.ndarray]]:
        given = {state["name"]: value for state, value in zip(self.kept, states, strict=True)}
        found = self.compiled({"pixel_values": pixels.numpy(), **given})
        return torch.from_numpy(found["logits"]), [found[state["next"]] for state in self.kept]


RUNTIMES = {".onnx": InOnnxRuntime, ".pt2": InTorchExport, ".xml": InOpenVino}


def causal(variant: str, budget: float | None = None) -> RubiksNet:
    return trained(variant, budget=budget).float()


def check_stream(net: RubiksNet, path, height: int, width: int, uint8: bool = False, frames: int = 5) -> None:
    """After each frame, its logits are those that the network's clips add with it; for several batches."""
    file = RUNTIMES[path.suffix](path)
    for batch in (1, 3):
        pixels = torch.randint(256, (batch, frames, 3, height, width), dtype=torch.uint8)
        clips, states, found = Normalize()(pixels), file.start(batch), []
        for frame in (pixels if uint8 else clips).unbind(1):
            logits, states = file.step(frame, states)
            found.append(logits)
        streamed, stream, state = [], net.stream(), None
        for frame in clips.unbind(1):
            _, state = stream.step(frame, state)
            streamed.append(state.own)
        with torch.no_grad():
            expected = net(clips)
        largest = max(logits.abs().max().item() for logits in streamed)
        torch.testing.assert_close(torch.stack(found), torch.stack(streamed), rtol=0, atol=1e-4 * largest)
        torch.testing.assert_close(torch.stack(found).mean(0), expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize(("variant", "budget"), NETWORKS)
def test_variants(variant, budget, rubiks_command, tmp_path):
    net = causal(variant, budget)
    file, out = save(net, tmp_path / "net.pth.tar", causal=True), tmp_path / "net.onnx"
    status, stdout, err = rubiks_command("export", file, "--to", "onnx", "--out", out, "--size", "32x40", "--stream")
    assert (status, err) == (0, "")
    assert f"{out}: " in stdout
    assert "for frames of 32 x 40" in stdout
    check_stream(net, out, 32, 40)


def test_a_network_whose_channels_all_move(rubiks_command, tmp_path):
    net = trained("rubiks3d-aq").float()
    for block in net.backbone.blocks():
        block.attention.weight.data[:, 0] += 100
    net.harden(1.0)
    assert net.temporal_share() == 1
    file, out = save(net, tmp_path / "net.pth.tar", causal=True), tmp_path / "net.onnx"
    assert rubiks_command("export", file, "--to", "onnx", "--out", out, "--size", "32", "--stream")[0] == 0
    check_stream(net, out, 32, 32)


@pytest.mark.parametrize(
    ("suffix", "variant", "budget"),
    [
        (".onnx", "rubiks3d", None),
        (".pt2", "rubiks3d", None),
        (".pt2", "rubiks3d-aq", None),
        (".xml", "rubiks3d-aq", 0.5),
    ],
)
def test_runtimes(suffix, variant, budget, rubiks_command, tmp_path):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    net, to = causal(variant, budget), {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}[suffix]
    file, out = save(net, tmp_path / "net.pth.tar", causal=True), tmp_path / f"net{suffix}"
    words = ("--to", to, "--out", out, "--size", 33, "--stream", "--uint8")
    assert rubiks_command("export", file, *words)[0] == 0
    check_stream(net, out, 33, 33, uint8=True)


@pytest.mark.slow
def test_aotinductor(rubiks_command, tmp_path):
    net = causal("rubiks3d")
    file, out = save(net, tmp_path / "net.pth.tar", causal=True), tmp_path / "net.pt2"
    words = ("--to", "aoti", "--out", out, "--size", 32, "--stream")
    assert rubiks_command("export", file, *words)[0] == 0
    package = torch._inductor.aoti_load_package(str(out))
    states = [torch.zeros(2, *state["shape"]) for state in json.loads(package.get_metadata()["states"])]
    clips, total = torch.randn(2, 4, 3, 32, 32), 0
    for frame in clips.unbind(1):
        logits, *states = package(frame.contiguous(), *states)
        total = total + logits
    with torch.no_grad():
        expected = net(clips)
    torch.testing.assert_close(total / 4, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, small_network):
    """A video, a causal network, and its stream in a file."""
    folder = tmp_path_factory.mktemp("stream")
    write_video(folder / "v.mp4", moving_square(12, 48, 64))
    described = {"classes": ["a", '"é" < 推', "c", "d", "e"], "num_frames": 4}
    save(causal("rubiks3d"), folder / "net.pth.tar", causal=True, config={"data": {"size": 32}}, **described)
    arguments = main.make_parser().parse_args(
        ["export", f"{folder}/net.pth.tar", "--to", "onnx", "--out", f"{folder}/net.onnx", "--stream"]
    )
    arguments.run(arguments)
    return folder


def test_the_file_says_how_to_run_it(folder, rubiks_command):
    model = onnx.load(folder / "net.onnx")
    shapes = [
        {
            value.name: [side.dim_param or side.dim_value for side in value.type.tensor_type.shape.dim]
            for value in values
        }
        for values in (model.graph.input, model.graph.output)
    ]
    known = InOnnxRuntime(folder / "net.onnx").metadata
    states = json.loads(known["states"])
    assert [state["name"] for state in states] == [f"state_{number}" for number in range(len(states))]
    kept = [("batch", *state["shape"]) for state in states]
    assert len(kept) == 5  # one of each block, as all have shifts in time
    for found, first, name in zip(shapes, (("batch", 3, 32, 32), ("batch", 5)), ("name", "next"), strict=True):
        assert [tuple(shape) for shape in found.values()] == [first, *kept]
        assert [*found][1:] == [state[name] for state in states]
    assert all(state["initial"] == 0 for state in states)
    assert json.loads(known["classes"])[1] == '"é" < 推'
    assert json.loads(known["preprocessing"]) == {
        "size": [32, 32],
        "short_side": 37,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "input": "normalized",
        "frames_per_second": 1.6,  # 4 frames in 2.5 s
    }
    status, out, _ = rubiks_command("info", folder / "net.onnx")
    assert status == 0
    for part in ("one frame at a time of 32 x 32 pixels, normalized", "1.6 frames/s", "state_4 -> next_state_4: "):
        assert part in out
    facts = json.loads(rubiks_command("info", folder / "net.onnx", "--json")[1])
    assert (facts["states"], facts["format"]) == (states, "onnx")


@pytest.mark.parametrize("variant", TEMPORAL)
def test_a_network_that_reads_later_frames(variant, rubiks_command, tmp_path):
    file = save(trained(variant, causal=False).float(), tmp_path / "net.pth.tar")
    status, _, err = rubiks_command("export", file, "--to", "onnx", "--out", tmp_path / "net.onnx", "--stream")
    assert (status, err.count("\n")) == (2, 1)
    assert f"{file} cannot be exported with --stream: the network reads later frames" in err
    assert "causal=true" in err
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--frames", "8"], ["--frames does not go with --stream"]),
        (["--dynamic-frames"], ["--dynamic-frames does not go with --stream"]),
        (["--int8", "videos"], ["--int8"]),
        (["--size", "0"], ["--size", "'0'"]),
        (["--out", "net.pt2"], ["--out net.pt2", ".onnx"]),
        (["--out", "net.pth.tar/net.onnx"], ["net.pth.tar/net.onnx", "Not a directory"]),
    ],
)
def test_wrong_choices(words, parts, folder, rubiks_command, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.iterdir())
    status, out, err = rubiks_command(
        "export", "net.pth.tar", "--to", "onnx", "--out", "other.onnx", "--stream", *words
    )
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert all(part in err for part in parts), err
    assert sorted(folder.iterdir()) == before


def test_int8_is_not_for_streams(folder, rubiks_command):
    words = ("--to", "openvino", "--out", folder / "int8.xml", "--int8", folder, "--stream")
    status, _, err = rubiks_command("export", folder / "net.pth.tar", *words)
    assert status == 2
    assert "--int8 does not go with --stream" in err


def test_what_scores_videos_refuses_a_stream(folder, rubiks_command, commands):
    assert_rejected(lambda: Predictor(folder / "net.onnx"), "net.onnx is a stream's file", "without --stream")
    for words in (
        ("predict", folder / "net.onnx", folder / "v.mp4"),
        ("online", folder / "net.onnx", folder / "v.mp4"),
    ):
        status, out, err = rubiks_command(*words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "net.onnx is a stream's file" in err
    (folder / "list.csv").write_text("v.mp4,0\n")
    data = ("data=csv", f"data.root={folder}", "data.val_list=list.csv", "data.num_classes=5")
    assert "net.onnx is a stream's file" in commands.refused("eval", *data, f"ckpt={folder / 'net.onnx'}")


@pytest.mark.parametrize(
    "metadata", [{"states": "[{}]"}, {"states": "3"}, {"states": "["}, {"preprocessing": '{"size": [32, 32]}'}]
)
def test_files_with_wrong_metadata(metadata, folder, rubiks_command, tmp_path):
    model = onnx.load(folder / "net.onnx")
    for entry in model.metadata_props:
        entry.value = metadata.get(entry.key, entry.value)
    onnx.save(model, tmp_path / "net.onnx")
    for words in (("predict", tmp_path / "net.onnx", folder / "v.mp4"), ("info", tmp_path / "net.onnx")):
        status, out, err = rubiks_command(*words)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert "net.onnx is not a network that rubiks export has written" in err


def test_a_file_that_forgets_a_state_is_not_kept(folder, rubiks_command, tmp_path, monkeypatch):
    class Wrong(StreamNet):
        def forward(self, pixel_values, *states):
            logits, *kept = super().forward(pixel_values, *states)
            return logits, *kept[:-1], kept[-1] * 0.5

    monkeypatch.setattr(exporting, "StreamNet", Wrong)
    (tmp_path / "net.pt2").write_text("as before")
    words = ("--to", "pt2", "--out", tmp_path / "net.pt2", "--stream")
    status, out, err = rubiks_command("export", folder / "net.pth.tar", *words)
    assert (status, out) == (2, "")
    assert "differ from PyTorch's" in err
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"net.pt2": "as before"}
