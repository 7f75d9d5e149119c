"""What a network costs, against formulas written out by hand, PyTorch's own counts and the published numbers."""

from __future__ import annotations

import copy
import json
from collections import Counter

import pytest
import torch
import torchvision
from configurations import training

from rubiks.models import TIERS, VARIANTS, RubiksNet, cost

SIZES = [(8, 224), (3, 50)]  # the second is not a multiple of the strides
# Axes along which the shifts of a variant interpolate.
AXES = {"rubiks3d": 3, "rubiks3d-aq": 2, "rubiks3d-quantized": 0, "rubiks2d": 2, "fixed-tsm": 2, "grouped": 0}


def products(tier: str, frames: int, size: int, classes: int) -> dict[str, int]:
    """Multiply-adds of all convolutions and linear layers, by part."""
    shape, found = TIERS[tier], Counter()
    side = (size + 1) // 2
    channels = shape.width
    found["stem"] = frames * side**2 * 3 * 3 * 3 * channels
    for stage, (blocks, width) in enumerate(zip((1, *shape.blocks), (1, 1, 2, 4, 8), strict=True)):
        out = shape.width * width
        for block in range(blocks):
            after = (side + 1) // 2 if stage and not block else side
            found[f"layer{stage}"] += frames * side**2 * channels * out  # conv2, at full resolution
            found[f"layer{stage}"] += frames * after**2 * out * out  # conv3
            if after != side or channels != out:
                found[f"layer{stage}"] += frames * after**2 * channels * out  # shortcut
            if shape.reduction:
                found[f"layer{stage}"] += frames * 2 * out * (out // shape.reduction)
            channels, side = out, after
    found["head"] = frames * channels * classes
    return found


def others(tier: str, variant: str, frames: int, size: int, hard: bool) -> dict[str, int]:
    """What batch norms, shifts, soft attention and squeeze-excite add, by part."""
    shape, found = TIERS[tier], Counter(stem=0)
    side, channels = (size + 1) // 2, shape.width
    for stage, (blocks, width) in enumerate(zip((1, *shape.blocks), (1, 1, 2, 4, 8), strict=True)):
        out = shape.width * width
        for block in range(blocks):
            after = (side + 1) // 2 if stage and not block else side
            before, behind = frames * side**2, frames * after**2
            norms = 2 * before * (channels + out)
            shift = 2 * AXES[variant] * behind * out
            attention = 3 * before * channels if variant == "rubiks3d-aq" and not hard else 0
            gate = behind * out if shape.reduction else 0
            found[f"layer{stage}"] += norms + shift + attention + gate
            channels, side = out, after
    found["head"] = 2 * frames * side**2 * channels
    return found


def total(net: RubiksNet, frames: int = 8, size: int = 224) -> int:
    return sum(stage.multiply_adds for stage in cost.stages(net, frames, size))


def network(tier: str, variant: str = "rubiks3d", hard: bool = False) -> RubiksNet:
    net = RubiksNet(tier, 174, variant)
    return net.harden(0.125) if hard else net


# ---- multiply-adds


@pytest.mark.parametrize(("frames", "size"), SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tier", ["tiny", "small"])
def test_every_part_is_what_the_formulas_give(tier, variant, frames, size):
    for hard in (False, True) if variant == "rubiks3d-aq" else (False,):
        found = {stage.name: stage.multiply_adds for stage in cost.stages(network(tier, variant, hard), frames, size)}
        parts = products(tier, frames, size, 174), others(tier, variant, frames, size, hard)
        assert found == {name: parts[0][name] + parts[1][name] for name in parts[0]}


@pytest.mark.parametrize(("frames", "size"), SIZES)
@pytest.mark.parametrize("tier", TIERS)
def test_pytorch_counts_the_same_convolutions_and_linear_layers(tier, frames, size):
    counted = cost.counted_flops(network(tier), frames, size)
    assert counted == 2 * sum(products(tier, frames, size, 174).values())


@pytest.mark.parametrize(
    ("tier", "variant", "published"),
    [
        ("tiny", "rubiks3d", 3.9),
        ("small", "rubiks3d", 6.8),
        ("medium", "rubiks3d", 11.2),
        ("large", "rubiks3d", 15.8),
        ("large", "rubiks3d-aq", 15.7),  # budget 0.125
    ],
)
def test_the_rule_gives_the_published_numbers(tier, variant, published):
    """Published with one decimal, so other rules would give them too.

    Convolutions and linear layers alone do not: they give 3.7, 6.5, 10.9 and 15.3 G.
    """
    assert round(total(network(tier, variant, variant == "rubiks3d-aq")) / 1e9, 1) == published
    assert round(sum(products(tier, 8, 224, 174).values()) / 1e9, 1) < published


def test_the_rule_gives_what_the_paper_states_for_tsm():
    """32.9 G for TSM-ResNet-50, whose shifts move whole frames: only with 2 for each value of a batch norm."""
    net = torchvision.models.resnet50(num_classes=174).to("meta").eval()
    counts = Counter()
    for module in net.modules():
        module.register_forward_hook(
            lambda module, _, out: counts.update({type(module): cost.multiply_adds(module, out)})
        )
    net(torch.empty(8, 3, 224, 224, device="meta"))
    assert round(sum(counts.values()) / 1e9, 1) == 32.9
    assert round((sum(counts.values()) - counts[torch.nn.BatchNorm2d] / 2) / 1e9, 1) == 32.8


# ---- parameters, shapes, sizes


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
@pytest.mark.parametrize("tier", TIERS)
def test_parameters_and_shapes_by_part(tier, variant):
    net = network(tier, variant)
    stages = cost.stages(net, 8, 224)
    assert [stage.name for stage in stages] == ["stem", *(f"layer{i}" for i in range(5)), "head"]
    assert sum(stage.parameters for stage in stages) == sum(parameter.numel() for parameter in net.parameters())
    assert stages[4].parameters == sum(parameter.numel() for parameter in net.backbone.layer3.parameters())
    width = TIERS[tier].width
    shapes = [(8, width, 112, 112), *((8, width * 2**i, 56 // 2**i, 56 // 2**i) for i in range(4)), (8, 174)]
    assert [stage.output for stage in stages] == [shapes[0], *shapes]


def test_weights_are_as_large_as_the_file_but_for_names(tmp_path):
    net = network("tiny")
    net.save_pretrained(tmp_path / "net.pth.tar")
    file = (tmp_path / "net.pth.tar").stat().st_size
    size = cost.weight_bytes(net, torch.float32)
    assert 0 < file - size < 0.03 * size
    state = {name: value.bfloat16() if value.is_floating_point() else value for name, value in net.state_dict().items()}
    assert cost.weight_bytes(net, torch.bfloat16) == sum(value.numel() * value.itemsize for value in state.values())


# ---- memory


@pytest.mark.parametrize(
    ("tier", "variant", "hard"),
    [("tiny", "rubiks3d", False), ("small", "rubiks3d-aq", False), ("small", "rubiks3d-aq", True)],
)
def test_saved_bytes_are_those_of_a_real_forward_pass(tier, variant, hard):
    net = network(tier, variant, hard).train()
    before = copy.deepcopy(net.state_dict())
    found = cost.saved_bytes(net, 4, 48)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])  # the network is not touched
    own = {tensor.data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = net(torch.randn(1, 4, 3, 48, 48))
    expected = sum(tensor.untyped_storage().nbytes() for place, tensor in saved.items() if place not in own)
    assert logits.requires_grad
    assert found == expected


@pytest.mark.parametrize(("frames", "size"), SIZES)
def test_peak_of_inference_is_the_end_of_the_first_block(frames, size):
    """There x, a, h, z, conv3(z) and the sum are held, six times the stem's output."""
    net = network("tiny")
    side = (size + 1) // 2
    assert cost.peak_bytes(net, frames, size) == 6 * 4 * frames * 54 * side**2


# ---- the command


def test_info_of_choices(rubiks_command):
    status, out, _ = rubiks_command("info", "tier=tiny", "variant=rubiks3d-aq", "aq.budget=0.0625", "--json")
    facts = json.loads(out)
    assert status == 0
    assert facts["parameters"] == 1_904_106
    assert facts["clip"] == [8, 3, 224, 224]
    assert 0.06 < facts["temporal_share"] <= 0.0625
    assert facts["multiply_adds"] == total(RubiksNet("tiny", 174, "rubiks3d-aq").harden(0.0625))
    # In training the attention is soft at first.
    assert facts["training_bytes"] == cost.saved_bytes(RubiksNet("tiny", 174, "rubiks3d-aq"), 8, 224)

    choices = (
        "tier=tiny",
        "data=kinetics",
        "data.num_frames=16",
        "data.size=112",
        "data.num_classes=600",
        "causal=true",
    )
    status, out, _ = rubiks_command("info", *choices, "--json")
    facts = json.loads(out)
    assert facts["clip"] == [16, 3, 112, 112]
    assert facts["num_classes"] == 600
    assert facts["multiply_adds"] == total(RubiksNet("tiny", 600), 16, 112)
    assert facts["causal"]
    assert "temporal_share" not in facts


def test_info_of_a_checkpoint_and_of_a_run(rubiks_command, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    file = tmp_path / "outputs/lr=1/checkpoints/best.ckpt"
    file.parent.mkdir(parents=True)
    net = RubiksNet("tiny", 5, "rubiks3d-aq", num_frames=4)
    meta = {"tier": "tiny", "variant": net.variant, "causal": True, "num_classes": 5, "num_frames": 4}
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    torch.save({"state_dict": state, "rubiks": {**meta, "config": {"data": {"size": 96}}}}, file)
    for name in (file, tmp_path / "outputs/lr=1"):
        status, out, err = rubiks_command("info", name, "--json")
        assert status == 0, err
        facts = json.loads(out)
        assert facts["file"] == str(file)
        assert facts["file_bytes"] == file.stat().st_size
        assert facts["clip"] == [4, 3, 96, 96]
        assert facts["temporal_share"] is None
    status, out, _ = rubiks_command("info", file)
    assert status == 0
    assert f"{facts['multiply_adds'] / 1e9:.2f} G" in out
    assert cost.RULE in " ".join(out.split())
    assert "soft attention" in out
    assert "causal variant rubiks3d-aq" in out
    assert f"{facts['stages'][1]['multiply_adds']:,}" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.ckpt"], ["no checkpoint at nothing.ckpt"]),
        (["."], ["a folder without checkpoints/best.ckpt"]),
        (["net.ckpt", "tier=tiny"], ["net.ckpt", "either one checkpoint or choices"]),
        (["tier=huge"], ["tier", "large, medium, small, tiny"]),
        (["data.num_frames=0"], ["data.num_frames"]),
        (["data=csv"], ["data=csv", "data.num_classes=NUMBER"]),
        (["--shifts"], ["--shifts needs one checkpoint"]),
        (["tier=tiny", "--shifts"], ["--shifts needs one checkpoint"]),
    ],
)
def test_what_info_refuses(arguments, words, rubiks_command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = rubiks_command("info", *arguments)
    assert status == 2
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_info_without_arguments_is_about_the_installation(rubiks_command):
    status, out, _ = rubiks_command("info", "--json")
    assert status == 0
    assert {"operator", "versions"} <= set(json.loads(out))


def test_the_clips_of_info_are_those_of_the_published_numbers():
    settings = training("data=ssv2", data__root=".")
    sampling = settings.data.sampling
    assert (settings.data.source.num_classes, sampling.num_frames, sampling.size) == (174, 8, 224)
