"""Causal networks, and their streams, which take a frame at a time."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from networks import like_trained_norms
from torch import Tensor, nn

from rubiks import RubiksNet
from rubiks.errors import InputError
from rubiks.models import inflation, shifts, training_path
from rubiks.models.inference_cuda import CudaInferenceNet
from rubiks.models.tiers import TIERS, VARIANTS
from rubiks.training.aq import Annealing, AttentionSchedule

TEMPORAL = tuple(name for name in VARIANTS if name != "rubiks2d")
# Variants, with the budget of those whose attention is hard.
NETWORKS = [*((name, None) for name in VARIANTS), ("rubiks3d-aq", 0.0), ("rubiks3d-aq", 0.5)]


def trained(variant: str, tier: str = "tiny", causal: bool = True, budget: float | None = None) -> RubiksNet:
    """A float64 network with norms and shifts like those of a trained one and worse, in evaluation mode."""
    torch.manual_seed(0)
    net = RubiksNet(tier, 5, variant, causal=causal).double()
    like_trained_norms(net)
    nn.init.normal_(net.new_fc.weight)
    for block in net.backbone.blocks():
        if variant.startswith("rubiks3d") and block.attention is None:
            nn.init.normal_(block.shift.shift, 0, 1.5)
        if block.attention is not None:
            nn.init.normal_(block.attention.weight)
            block.attention.T.fill_(0.5)
    net.hold_back()
    return (net if budget is None else net.harden(budget)).eval()


def largest_difference(found: Tensor, expected: Tensor) -> float:
    """Relative to the largest of the expected values."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


# ---- streams


@pytest.mark.parametrize(
    ("tier", "batch", "variant", "budget"),
    [*(("tiny", 1, *each) for each in NETWORKS), *((tier, 3, *each) for tier in TIERS for each in NETWORKS)],
)
def test_after_each_frame_the_logits_are_those_of_the_clip_so_far(tier, batch, variant, budget):
    exact = trained(variant, tier, budget=budget)
    single = copy.deepcopy(exact).float()
    clips = torch.randn(batch, 6 if tier == "tiny" else 3, 3, 33, 24, dtype=torch.float64)
    streams = [(exact.stream(), 1e-12), (single.stream(), 1e-5)]
    states, total = [None, None], 0
    for t, frame in enumerate(clips.unbind(1)):
        with torch.no_grad():
            expected = exact(clips[:, : t + 1])
        for index, (stream, tolerance) in enumerate(streams):
            dtype = stream.net.stem.dtype
            logits, states[index] = stream.step(frame.to(dtype), states[index])
            assert logits.dtype == dtype
            assert largest_difference(logits, expected) < tolerance
        total = total + states[0].own
        assert states[0].frames == t + 1
        assert largest_difference(total / (t + 1), expected) < 1e-12


def test_videos_do_not_mix_and_a_state_can_be_used_again():
    stream = trained("rubiks3d").stream()
    one, other = torch.randn(2, 5, 1, 3, 32, 32, dtype=torch.float64)
    alone, states = [], [None]
    for frame in one:
        logits, state = stream.step(frame, states[-1])
        alone.append(logits)
        states.append(state)
    state = None
    for frame in other:
        _, state = stream.step(frame, state)
    for t, frame in enumerate(one):  # from each of the states once more
        assert torch.equal(stream.step(frame, states[t])[0], alone[t])


def test_the_sum_of_a_long_video_is_exact():
    stream = trained("rubiks3d").float().stream()
    frame = torch.randn(1, 3, 16, 16)
    _, state = stream.step(frame)
    million = state.own.double() * 10**6
    logits, later = stream.step(frame, state._replace(frames=10**6, total=million))
    torch.testing.assert_close(later.total - million, later.own.double(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(logits, state.own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("variant", "budget"), NETWORKS)
def test_the_state_has_what_the_shifts_read_and_no_more(variant, budget):
    net = trained(variant, budget=budget)
    kept = 2 * net.num_classes  # the logits of the last frame, and the sum
    height, width = 20, 12  # after the stem
    for block in net.backbone.blocks():
        row = block.shift.time_offsets()
        if row is not None:
            farthest = (row + 0.5 if block.shift.quantize else row).floor().min()
            kept += block.conv3.in_channels * height * width * int(-farthest)
        if block.attention is not None:
            channels = block.bn1.num_features if budget is None else len(block.attention.back)
            kept += channels * height * width
        height, width = -(-height // block.shift.stride), -(-width // block.shift.stride)
    assert net.stream().state_bytes(40, 24) == 8 * kept


def test_a_stream_has_its_own_weights_and_no_gradient():
    net = trained("rubiks3d-aq").train()
    stream = net.stream()
    frame = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    logits, _ = stream.step(frame)
    assert not logits.requires_grad
    assert net.training
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(stream.step(frame)[0], logits)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stream.step(frame)[0], logits)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 32, 32), r"\(N, 3, H, W\), got \(3, 32, 32\)"),
        ((1, 8, 3, 32, 32), r"\(N, 3, H, W\)"),
        ((1, 1, 32, 32), r"\(N, 3, H, W\)"),
        ((2, 3, 32, 32), r"must be \(1, 3, 32, 32\) like the frames before, got \(2, 3, 32, 32\)"),
        ((1, 3, 32, 40), r"must be \(1, 3, 32, 32\) like the frames before"),
    ],
)
def test_frames_of_another_shape_are_refused(shape, message):
    stream = RubiksNet("tiny", 2, causal=True).stream()
    _, state = stream.step(torch.randn(1, 3, 32, 32))
    with pytest.raises(ValueError, match=message):
        stream.step(torch.randn(shape), state)


@pytest.mark.parametrize(("variant", "budget"), [*((name, None) for name in TEMPORAL), ("rubiks3d-aq", 1.0)])
def test_a_network_that_looks_ahead_has_no_stream(variant, budget):
    with pytest.raises(ValueError, match=r"sliding window.*causal=true"):
        trained(variant, causal=False, budget=budget).stream()


def test_a_network_that_happens_not_to_look_ahead_has_one():
    clips = torch.randn(1, 3, 3, 32, 32, dtype=torch.float64)
    for net in (trained("rubiks2d", causal=False), trained("rubiks3d-aq", causal=False, budget=0.0)):
        stream, state = net.stream(), None
        for frame in clips.unbind(1):
            logits, state = stream.step(frame, state)
        with torch.no_grad():
            assert largest_difference(logits, net(clips)) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize(("variant", "budget"), NETWORKS)
def test_a_stream_on_a_gpu_has_the_same_logits(variant, budget):
    net = trained(variant, "small", budget=budget)
    clips = torch.randn(2, 5, 3, 48, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = net(clips)
    stream, state = net.cuda().stream(), None
    for frame in clips.cuda().unbind(1):
        logits, state = stream.step(frame, state)
    assert logits.is_cuda
    assert largest_difference(logits.cpu(), expected) < 1e-10


# ---- causal networks


@pytest.mark.parametrize(("variant", "budget"), [*((name, None) for name in TEMPORAL), ("rubiks3d-aq", 1.0)])
@pytest.mark.parametrize("causal", [True, False])
def test_only_a_causal_network_ignores_later_frames(variant, budget, causal):
    net = trained(variant, causal=causal, budget=budget)
    clip = torch.randn(1, 6, 3, 32, 32, dtype=torch.float64)
    changed = clip.clone()
    changed[:, 4:] += 1
    with torch.no_grad():
        first, second = (net.backbone(x.flatten(0, 1), 6)[:4] for x in (clip, changed))
    assert torch.equal(first, second) == causal


@pytest.mark.parametrize(("variant", "budget"), NETWORKS)
def test_inference_and_export_compute_what_the_modules_do(variant, budget):
    from rubiks.export.graph import ExportNet

    net = trained(variant, "small", budget=budget)
    clip = torch.randn(2, 5, 3, 32, 40, dtype=torch.float64)
    with torch.no_grad():
        expected = net(clip)
        assert largest_difference(net.optimize_for_inference()(clip), expected) < 1e-12
        for_gpus = CudaInferenceNet(net.backbone, net.new_fc, torch.float64)
        assert largest_difference(for_gpus(clip), expected) < 1e-12
        assert largest_difference(ExportNet(net.float(), 5, 32, 40)(clip.float()), expected) < 1e-4


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "rubiks3d-quantized"])
def test_the_training_path_computes_what_the_modules_do(variant):
    nets = [trained(variant).train() for _ in range(2)]
    images = torch.randn(2 * 8, 3, 32, 32, dtype=torch.float64)
    found = training_path.features(nets[0].backbone, images, 8)
    expected = nets[1].backbone(images, 8)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(expected)
    for features in (found, expected):
        (features * upstream).sum().backward()
    named = [dict(net.backbone.named_parameters()) for net in nets]
    for name, parameter in named[1].items():
        assert largest_difference(named[0][name].grad, parameter.grad) < 1e-7, name


def test_causal_attention_gives_the_next_frames_weight_to_the_same_frame():
    causal, free = (trained("rubiks3d-aq", causal=causal).attention_shifts()[2] for causal in (True, False))
    for shift in (causal, free):
        shift.T.fill_(2.0)
    assert torch.equal(causal.weight, free.weight)
    back, stay, ahead = causal.attention().unbind(1)
    weights = free.attention()
    assert torch.equal(back, weights[:, 0])
    torch.testing.assert_close(stay, weights[:, 1:].sum(1))
    assert not ahead.any()
    assert torch.equal(causal.moves() == -1, back > 0.5)
    assert not torch.equal(causal.moves(), free.moves().clamp(max=0))  # two weights below the third may add up to more


@pytest.mark.parametrize("budget", [0.1, 1.0])
def test_a_causal_network_hardens_within_the_budget_and_to_earlier_frames_only(budget):
    net = trained("rubiks3d-aq")
    odds = torch.cat([shift.odds() for shift in net.attention_shifts()])
    wanted = sum(int((shift.moves() == -1).sum()) for shift in net.attention_shifts())
    net.harden(budget)
    room = int(budget * len(odds))
    back = torch.cat([torch.zeros(len(s.weight)).index_fill(0, s.back, 1) for s in net.attention_shifts()]).bool()
    assert back.sum() == min(wanted, room)
    assert odds[back].min() > odds[~back].max()
    assert not any(len(shift.ahead) for shift in net.attention_shifts())
    assert sum(stage.back for stage in shifts.moves(net).values()) == back.sum()


@pytest.mark.parametrize("temperature", [2.0, 0.5, 0.1])
def test_the_limit_on_attention_is_that_of_a_causal_network_that_has_chosen(temperature):
    net = RubiksNet("tiny", 2, "rubiks3d-aq", causal=True)
    schedule = AttentionSchedule(budget=0.25)
    total = moved = 0.0
    for shift in net.attention_shifts():
        count = len(shift.weight) // 4
        with torch.no_grad():
            shift.weight.zero_()
            shift.weight[:count, 0] = 1
            shift.weight[count:, 1] = 1
        shift.T.fill_(temperature)
        moved += count
        total += len(shift.weight)
    exact = AttentionSchedule(budget=moved / total)
    annealing = Annealing(net, schedule)
    annealing.penalty()
    assert annealing.share.item() == pytest.approx(exact.allowed_share(temperature, causal=True), abs=1e-5)


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-quantized", "fixed-tsm", "grouped"])
def test_offsets_ahead_become_zero_in_new_and_in_loaded_networks(variant):
    free, causal = trained(variant, causal=False), RubiksNet("tiny", 5, variant, causal=True).double()
    assert all(block.shift.offsets()[0].max() == 0 for block in causal.backbone.blocks())
    causal.load_state_dict(free.state_dict())
    for block, source in zip(causal.backbone.blocks(), free.backbone.blocks(), strict=True):
        expected = source.shift.offsets().clone()
        assert expected[0].max() > 0
        expected[0].clamp_(max=0)
        assert torch.equal(block.shift.offsets(), expected)


def test_an_offset_at_zero_can_fall_again():
    net = trained("rubiks3d").train()
    shift = net.backbone.blocks()[0].shift.shift
    net(torch.randn(2, 5, 3, 32, 32, dtype=torch.float64)).square().sum().backward()
    held = shift[0] == 0
    assert held.any()
    assert shift.grad[0, held].all()
    with torch.no_grad():
        shift[0] -= shift.grad[0].sign()
    net.hold_back()
    assert torch.equal(shift[0, held], -(shift.grad[0, held] > 0).double())


def test_inflation_of_a_causal_network():
    flat = RubiksNet("tiny", 5, "rubiks2d")
    for rule in inflation.RULES:
        net = RubiksNet("tiny", 5, causal=True)
        inflation.inflate(net, flat, rule)
        offsets = torch.cat([block.shift.shift[0] for block in net.backbone.blocks()])
        assert offsets.max() == 0
        assert (offsets < 0).any()


# ---- files


def written(net: RubiksNet, tmp_path, form: str) -> RubiksNet:
    net.save_pretrained(tmp_path / form)
    return RubiksNet.load_pretrained(tmp_path / form)


@pytest.mark.parametrize("form", ["net.pth.tar", "folder"])
@pytest.mark.parametrize(("variant", "budget"), NETWORKS)
def test_files_keep_causal(variant, budget, form, tmp_path):
    net = trained(variant, budget=budget).float()
    again = written(net, tmp_path, form)
    clip = torch.randn(1, 4, 3, 32, 32)
    assert again.causal
    assert "causal=True" in repr(again)
    with torch.no_grad():
        assert torch.equal(again(clip), net(clip))
    assert torch.equal(again.stream().step(clip[:, 0])[0], net.stream().step(clip[:, 0])[0])


def test_files_of_other_networks_do_not_mention_it(tmp_path):
    net = RubiksNet("tiny", 2)
    assert not written(net, tmp_path, "net.pth.tar").causal
    official = {"tier", "num_classes", "num_frames", "variant", "model"}
    assert set(torch.load(tmp_path / "net.pth.tar", weights_only=True)) == official
    assert not written(net, tmp_path, "folder").causal
    assert "causal" not in (tmp_path / "folder/README.md").read_text()


def test_saved_folders_of_before_are_not_causal_and_a_wrong_value_is_refused(tmp_path):
    RubiksNet("tiny", 2, causal=True).save_pretrained(tmp_path / "net")
    assert "causal: no frame depends on a later one" in (tmp_path / "net/README.md").read_text()
    assert "causal=true" in (tmp_path / "net/README.md").read_text()
    path = tmp_path / "net/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"causal": "perhaps"}))
    with pytest.raises(InputError, match=r"config.json: causal: .*'perhaps'"):
        RubiksNet.load_pretrained(tmp_path / "net")
    del config["causal"]
    path.write_text(json.dumps(config))
    assert not RubiksNet.load_pretrained(tmp_path / "net").causal


def test_copies_stay_causal(tmp_path):
    net = RubiksNet("tiny", 2, "rubiks3d-aq", causal=True)
    for again in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        again.load_state_dict(trained("rubiks3d-aq", causal=False, budget=1.0).replace_classifier(2).state_dict())
        assert again.causal
        assert not any(len(shift.ahead) for shift in again.attention_shifts())
