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


@pytest.mark.parametrize(("variant", "budget"), [("rubiks3d", None), ("rubiks3d-aq", None), ("rubiks3d-aq", 0.5)])
@pytest.mark.parametrize("suffix", RUNTIMES)
def test_runtimes(suffix, variant, budget, rubiks_command, tmp_path):
    if suffix == ".xml":
        pytest.importorskip("openvino")
    net, to = causal(variant, budget), {".onnx": "onnx", ".pt2": "pt2", ".xml": "openvino"}[suffix]
    file, out = save(net, tmp_path / "net.pth.tar", causal=True), tmp_path / f"net{suffix}"
    words = ("--to", to, "--out", out, "--size", 33, "--stream", "--uint8")
    assert rubiks_command("export", file, *words)[0] == 0
    check_stream(net, out, 33, 33, uint8=True)
