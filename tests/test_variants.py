"""The ablations: what their blocks do, against plain PyTorch, and that each learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rubiks import RubiksNet
from rubiks.errors import InputError
from rubiks.models import VARIANTS, inflation
from rubiks.models.training_support import supports
from rubiks.nn import FixedTimeShift, GroupedShift, LearnableShift, Normalize, QuantizedShift
from rubiks.ops import normalize_shift_grad, reference, shift2d, shift3d
from rubiks.training.optim import parameter_groups, shift_parameters
from rubiks.training.recipe import Recipe

ABLATIONS = ("rubiks3d-quantized", "rubiks2d", "fixed-tsm", "grouped")
CHANNELS = 20  # an eighth is 2, a ninth is 2 and leaves 2


def tsm(x: Tensor) -> Tensor:
    """TSM's shift of (N, T, C, H, W), by moving frames: one eighth gets the next frame, one eighth the previous."""
    eighth = x.shape[2] // 8
    out = torch.zeros_like(x)
    out[:, :-1, :eighth] = x[:, 1:, :eighth]
    out[:, 1:, eighth : 2 * eighth] = x[:, :-1, eighth : 2 * eighth]
    out[:, :, 2 * eighth :] = x[:, :, 2 * eighth :]
    return out


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_fixed_tsm_moves_frames_and_then_shifts_in_space(stride, frames):
    shift = FixedTimeShift(CHANNELS, stride).double()
    x = torch.randn(2, frames, CHANNELS, 7, 6, dtype=torch.float64, requires_grad=True)
    expected = shift2d(tsm(x).flatten(0, 1), shift.shift, stride).unflatten(0, (2, frames))
    out = shift(x)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    ours = torch.autograd.grad(out, (x, shift.shift), upstream)
    torch.testing.assert_close(ours, torch.autograd.grad(expected, (x, shift.shift), upstream))


@pytest.mark.parametrize("frames", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_is_a_depthwise_convolution_and_tsm(stride, frames):
    shift = GroupedShift(CHANNELS, stride).double()
    # One weight of each 3x3 kernel is 1: the groups have the nine places in turn, the last two channels the centre.
    kernels = torch.zeros(CHANNELS, 9, dtype=torch.float64)
    kernels[torch.arange(CHANNELS), [*range(9), *range(9), 4, 4]] = 1
    x = torch.randn(2, frames, CHANNELS, 7, 6, dtype=torch.float64)
    moved = F.conv2d(tsm(x).flatten(0, 1), kernels.view(CHANNELS, 1, 3, 3), stride=stride, padding=1, groups=CHANNELS)
    assert torch.equal(shift(x), moved.unflatten(0, (2, frames)))


@pytest.mark.parametrize("channels", [8, 54, 72, 432])
def test_groups_are_of_equal_size_but_for_the_rest(channels):
    offsets = GroupedShift(channels).shift
    for column in torch.cartesian_prod(*[torch.arange(-1.0, 2)] * 2):
        members = (offsets[1:] == column[:, None]).all(0).sum()
        assert members == channels // 9 + (channels % 9 if not column.any() else 0)
    assert [(offsets[0] == step).sum() for step in (-1, 1)] == [channels // 8] * 2
    assert all((offsets[1:, offsets[0] == step].abs().sum(0) > 0).any() for step in (-1, 1) if channels > 9)


def test_quantized_moves_by_the_nearest_whole_numbers_with_the_gradient_of_interpolation():
    shift = QuantizedShift(CHANNELS, stride=2).double()
    nn.init.normal_(shift.shift, std=1.5)
    x = torch.randn(2, 4, CHANNELS, 7, 6, dtype=torch.float64, requires_grad=True)
    out = shift(x)
    whole = (shift.shift + 0.5).floor().detach()
    moved = reference.forward(x.detach(), whole, (1, 2, 2), (0, 0, 0), False)
    torch.testing.assert_close(out, moved)
    upstream = torch.randn_like(out)
    grad_x, grad_shift = torch.autograd.grad(out, (x, shift.shift), upstream)
    soft = shift3d(x, shift.shift, stride=(1, 2, 2))
    torch.testing.assert_close(grad_shift, torch.autograd.grad(soft, shift.shift, upstream)[0])
    hard = shift3d(x, whole, stride=(1, 2, 2))
    torch.testing.assert_close(grad_x, torch.autograd.grad(hard, x, upstream)[0])


def shaken(variant: str) -> RubiksNet:
    """A network in evaluation mode, with a classifier that separates features."""
    net = RubiksNet("tiny", 5, variant).double().eval()
    nn.init.normal_(net.new_fc.weight)
    return net


def test_without_time_the_order_of_frames_does_not_matter():
    clips = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    with torch.no_grad():
        for variant in VARIANTS:
            net = shaken(variant)
            change = (net(clips[:, order]) - net(clips)).abs().max() / net(clips).abs().max()
            assert (change < 1e-12) == (variant == "rubiks2d"), variant


@pytest.mark.parametrize("variant", ABLATIONS)
def test_what_is_trained(variant):
    net = RubiksNet("small", 5, variant)
    groups = {
        group["name"]: group["params"]
        for group in parameter_groups(net, Recipe(epochs=1, batch_size=1, lr=1, lr_batch=1), 1)
    }
    listed = [id(parameter) for params in groups.values() for parameter in params]
    assert sorted(listed) == sorted(id(parameter) for parameter in net.parameters())
    rows = {"rubiks3d-quantized": 3, "rubiks2d": 2, "fixed-tsm": 2}.get(variant)
    shifts = groups.get("shift", [])
    assert [id(p) for p in shift_parameters(net)] == [id(p) for p in shifts]
    assert {len(parameter) for parameter in shifts} == ({rows} if rows else set())
    assert len(shifts) == (17 if rows else 0)

    # Normalised over the trained rows, and the fixed ones do not move.
    fixed = {name: value.clone() for name, value in net.named_buffers() if "as3" in name}
    assert len(fixed) == {"fixed-tsm": 17, "grouped": 17}.get(variant, 0)
    net(torch.randn(2, 3, 3, 32, 32)).square().sum().backward()
    for parameter in shifts:
        lengths = normalize_shift_grad(parameter.grad).norm(dim=0)
        assert ((lengths - 1).abs() < 1e-4).float().mean() > 0.9
    torch.optim.SGD(net.parameters(), 1.0).step()
    state = net.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in fixed.items())


@pytest.mark.parametrize("variant", ABLATIONS)
def test_files(variant, tmp_path):
    net = RubiksNet("tiny", 4, variant, num_frames=3).eval()
    net.save_pretrained(tmp_path / "net.pth.tar")
    again = RubiksNet.load_pretrained(tmp_path / "net.pth.tar")
    assert (again.variant, again.num_frames) == (variant, 3)
    clips = torch.randn(1, 5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(clips), net(clips))
    assert VARIANTS[variant].about in repr(again)


@pytest.mark.parametrize("variant", ABLATIONS)
def test_it_learns_a_handful_of_clips(variant):
    net = RubiksNet("tiny", 4, variant).train()
    clips = Normalize()(torch.randint(0, 256, (4, 4, 3, 32, 32)))
    recipe = Recipe(epochs=1, batch_size=4, lr=2e-3, lr_batch=4, optimizer="adamw", shift_lr_scale=1.0)
    optimizer = torch.optim.AdamW(parameter_groups(net, recipe, recipe.lr))
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(net(clips), torch.arange(4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.3
    assert losses[-1] < 0.3


def test_fused_training_replaces_only_what_it_computes():
    served = {name for name in VARIANTS if supports(RubiksNet("tiny", 5, name).train().backbone)}
    assert served == set(VARIANTS) - {"rubiks3d-quantized"}  # whose gradient is not the derivative of its output


# ---- from a network without time


def flat_net(tier: str = "tiny") -> RubiksNet:
    torch.manual_seed(3)
    net = RubiksNet(tier, 5, "rubiks2d").double().eval()
    nn.init.normal_(net.new_fc.weight)
    return net


def inflated(variant: str, rule: str, tier: str = "tiny", noise: float = inflation.NOISE) -> RubiksNet:
    net = RubiksNet(tier, 5, variant).double().eval()
    inflation.inflate(net, flat_net(tier), rule, noise)
    return net


def difference(net: RubiksNet, other: RubiksNet, clips: Tensor) -> float:
    """Of the logits, relative to the largest."""
    with torch.no_grad():
        expected = other(clips)
        return ((net(clips) - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-quantized", "rubiks3d-aq"])
@pytest.mark.parametrize("tier", ["tiny", "small"])
def test_zero_time_changes_no_logit(tier, variant):
    clips = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64)
    nets = [inflated(variant, "zero", tier, noise) for noise in (0, 1e-7)]
    flat = flat_net(tier)
    if variant == "rubiks3d-quantized":  # space is rounded too
        for parameter in shift_parameters(flat):
            parameter.detach().add_(0.5).floor_()
    for net in nets:
        for layer in net.backbone.layers():
            for block in layer:
                if block.attention is not None:  # soft: frames are mixed until it hardens
                    block.attention.T.fill_(1e-3)
    assert difference(nets[0], flat, clips) < 1e-12
    assert difference(nets[1], flat, clips) < 1e-5


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-quantized", "fixed-tsm"])
def test_tsm_time_is_that_of_tsm(variant):
    net = inflated(variant, "tsm")
    twin = RubiksNet("tiny", 5, "fixed-tsm").double().eval()
    weights = flat_net().state_dict()
    twin.load_state_dict(twin.state_dict() | weights)
    if variant == "rubiks3d-quantized":
        for module in twin.modules():
            if isinstance(module, LearnableShift):
                module.quantize = True
    clips = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64)
    assert difference(net, twin, clips) < 1e-12
    assert difference(net, flat_net(), clips) > 1e-3


def test_values_of_the_rules():
    def rows(rule: str) -> Tensor:
        net = inflated("rubiks3d", rule)
        return torch.cat([block.shift.shift[0] for layer in net.backbone.layers() for block in layer]).detach()

    def logits(rule: str) -> Tensor:
        net = inflated("rubiks3d-aq", rule)
        return torch.cat([block.attention.weight for layer in net.backbone.layers() for block in layer]).detach()

    widths = [54] * 4 + [108] * 4 + [216] * 6 + [432] * 3  # after the first convolution of each block
    eighths = sum(width // 8 for width in widths)
    assert [(rows("tsm") == step).sum() for step in (1, -1, 0)] == [eighths, eighths, sum(widths) - 2 * eighths]
    uniform, zero = rows("uniform"), rows("zero")
    assert uniform.abs().max() <= 0.25
    assert uniform.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.05)
    assert zero.std().item() == pytest.approx(0.01, rel=0.1)
    widths = [54] * 5 + [108] * 4 + [216] * 6 + [432] * 2  # before it
    eighths = sum(width // 8 for width in widths)
    back, stay, ahead = logits("tsm").t()
    assert (back.sum(), ahead.sum()) == (eighths, eighths)
    assert torch.equal(back + stay + ahead, torch.ones(sum(widths), dtype=torch.float64))
    assert logits("uniform").mean().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(logits("zero").mean(0), torch.tensor([0.0, 1, 0]).double(), atol=2e-3, rtol=0)


def test_inflation_refuses_what_it_cannot_do():
    with pytest.raises(InputError, match="init_temporal must be tsm for variant=fixed-tsm; got 'zero'"):
        inflated("fixed-tsm", "zero")
    with pytest.raises(InputError, match="tsm or uniform or zero"):
        inflated("rubiks3d", "one")
    with pytest.raises(ValueError, match="got rubiks2d to grouped"):
        inflated("grouped", "tsm")
