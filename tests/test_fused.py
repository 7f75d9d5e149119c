"""The fused training path computes what the modules compute: results, gradients and running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rubiks import RubiksNet
from rubiks.models import training_path
from rubiks.models.block_plan import read_plans
from rubiks.models.geometry import Geometry, matrix
from rubiks.models.training_path import train_blocks
from rubiks.models.training_support import supports, supports_block
from rubiks.nn import RubiksBlock
from rubiks.ops.fused import (
    Activation,
    norm_input_grad,
    pointwise,
    pointwise_grad,
    pointwise_weight_grad,
    row_sums,
)

VARIANTS = ("rubiks3d", "rubiks3d-aq", "rubiks2d", "fixed-tsm", "grouped")  # which the fused path replaces
SIZES = [(2, 4, 3, 32, 32), (3, 3, 3, 33, 35)]


def shaken(module: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In training mode, with norms and shifts as training may make them: scales of both signs and 0, long shifts."""
    for name, parameter in module.named_parameters():
        if "bn" in name or name.endswith("shift"):
            nn.init.normal_(parameter, 0.3, 0.8)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            with torch.no_grad():
                norm.weight[1] = 0
    return module.to(dtype).train()


def close(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Equal up to `tolerance` of the largest value in each tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        limit = tolerance * value.abs().max().item() if value.is_floating_point() else 0
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=limit, msg=lambda text, name=name: f"{name}: {text}"
        )


def outcome(module: nn.Module, result: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Result, gradients after a backward from it, and buffers."""
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    (result * weights).sum().backward()
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert None not in gradients.values()
    if x.requires_grad:
        gradients["gradient of x"] = x.grad
    return {"result": result.detach()} | gradients | dict(module.named_buffers())


def run_modules(net: RubiksNet, clips: Tensor) -> dict[str, Tensor]:
    net = copy.deepcopy(net)
    return outcome(net.backbone, net.backbone(clips.flatten(0, 1), clips.shape[1]), clips)


def run_fused(net: RubiksNet, clips: Tensor) -> dict[str, Tensor]:
    net = copy.deepcopy(net)
    return outcome(net.backbone, training_path.features(net.backbone, clips.flatten(0, 1), clips.shape[1]), clips)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_backbone(variant, size):
    net = shaken(RubiksNet("tiny", 5, variant))
    clips = torch.randn(size, dtype=torch.float64)
    assert all(supports_block(block) for layer in net.backbone.layers() for block in layer)
    close(run_fused(net, clips), run_modules(net, clips), 1e-9)


def test_attention_in_some_blocks():
    net = RubiksNet("tiny", 5, "rubiks3d-aq")
    net.backbone.layer2[1] = RubiksBlock(108, 108, 1, False, reduction=None)
    net = shaken(net)
    clips = torch.randn(SIZES[0], dtype=torch.float64)
    close(run_fused(net, clips), run_modules(net, clips), 1e-9)


def errors(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> Tensor:
    """Distance of each tensor, relative to its norm."""
    floats = [name for name, value in exact.items() if value.is_floating_point() and value.any()]
    return torch.stack([(actual[name] - exact[name]).norm() / exact[name].norm() for name in floats])


@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_and_autocast_are_as_exact_as_the_modules(variant):
    net, clips = shaken(RubiksNet("tiny", 5, variant)), torch.randn(3, 3, 3, 33, 35, dtype=torch.float64)
    exact = run_modules(net, clips)
    net, clips = net.float(), clips.float()
    single = run_fused(net, clips)
    close({"result": single["result"].double()}, {"result": exact["result"]}, 1e-5)
    assert errors(single, exact).mean() < 0.02  # rounding moves some activations across the kink of ReLU
    with torch.autocast("cpu", torch.bfloat16):
        low, modules = run_fused(net, clips), run_modules(net, clips)
    assert {name: value.dtype for name, value in low.items()} == {name: value.dtype for name, value in modules.items()}
    ours, theirs = errors(low, exact), errors(modules, exact)
    assert ours[0] < 1.5 * theirs[0] < 0.05  # the result
    assert ours.mean() < 1.25 * theirs.mean()  # with the gradients


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_parameters(variant):
    net, clips = (
        shaken(RubiksNet("tiny", 5, variant), torch.bfloat16),
        torch.randn(2, 4, 3, 32, 32, dtype=torch.bfloat16),
    )
    ours, theirs = run_fused(net, clips), run_modules(net, clips)
    assert {name: value.dtype for name, value in ours.items()} == {name: value.dtype for name, value in theirs.items()}
    assert errors(ours, theirs)[0] < 0.1


def test_only_three_activations_of_a_block_are_kept():
    block = shaken(RubiksBlock(6, 6, 1, False, reduction=None))
    x = torch.randn(2, 3, 6, 8, 8, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        block_fused(block, x)
    assert sum(size >= x.numel() for size in kept) == 3


def test_frozen_parameters_and_accumulated_gradients():
    net = shaken(RubiksNet("tiny", 5, "rubiks3d-aq"))
    for index, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(index % 3 != 0)
    for parameter in net.backbone.layer0.parameters():
        parameter.requires_grad_(False)
    nets = net, copy.deepcopy(net)
    for clips in torch.randn(2, 2, 2, 3, 32, 32, dtype=torch.float64):
        outcomes = [
            outcome(nets[0].backbone, training_path.features(nets[0].backbone, clips.flatten(0, 1), 2), clips),
            outcome(nets[1].backbone, nets[1].backbone(clips.flatten(0, 1), 2), clips),
        ]
        close(*outcomes, 1e-9)
    assert all(parameter.grad is None for parameter in nets[0].parameters() if not parameter.requires_grad)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("variant", "last"),
    [(variant, "layer1") for variant in VARIANTS] + [("rubiks3d-aq", last) for last in ("stem", "layer0", "layer3")],
)
def test_frozen_stages(variant, last, size):
    """Against the modules, frozen by hand."""
    net, clips = shaken(RubiksNet("tiny", 5, variant)), torch.randn(size, dtype=torch.float64)
    expected = copy.deepcopy(net)
    names = ["conv1", "layer0", "layer1", "layer2", "layer3"][
        : 1 + ["stem", "layer0", "layer1", "", "layer3"].index(last)
    ]
    for name in names:
        getattr(expected.backbone, name).requires_grad_(False).eval()
    net.backbone.freeze(last)
    before = copy.deepcopy(dict(net.named_buffers()))
    assert supports(net.backbone)
    ours = run_fused(net.train(), clips)
    close(ours, run_modules(expected, clips), 1e-9)
    assert f"gradient of {names[-1]}.0.bn1.weight" not in ours
    assert "gradient of layer4.0.bn1.weight" in ours
    for name, value in before.items():
        if ".bn" in name:
            frozen = name.startswith(tuple(f"backbone.{part}." for part in names))
            assert torch.equal(ours[name.removeprefix("backbone.")], value) == frozen, name


def test_frozen_stages_may_be_anything():
    net = RubiksNet("tiny", 5)
    net.backbone.layer0[0].register_forward_hook(hook)
    net.backbone.layer1[0] = nn.Sequential(net.backbone.layer1[0])
    assert not supports(net.backbone)
    net.backbone.freeze("layer1")
    assert supports(net.backbone)
    for last in ("layer4", "backbone"):  # nothing is left to do
        net.backbone.freeze(last)
        assert not supports(net.backbone)


def test_which_backbones_it_replaces():
    assert supports(RubiksNet("tiny", 5).backbone)
    assert supports(RubiksNet("small", 5).backbone)
    assert not supports(RubiksNet("tiny", 5).eval().backbone)
    for stem in (
        nn.Conv2d(3, 54, 3, 2, 1),
        nn.Conv2d(3, 54, 3, 2, 1, bias=False, padding_mode="reflect"),
        nn.Conv2d(3, 54, 7, 2, 3, bias=False),
    ):
        net = RubiksNet("tiny", 5)
        net.backbone.conv1 = stem
        assert not supports(net.backbone)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(RubiksNet("tiny", 5))
    assert not supports(synchronised.backbone)
    hooked, patched, subclassed = (RubiksNet("tiny", 5).backbone for _ in range(3))
    hooked.register_forward_hook(hook)
    patched.forward = lambda images, frames: images
    subclassed.__class__ = type("Other", (type(subclassed),), {})
    assert not any(map(supports, (hooked, patched, subclassed)))


def block_by_modules(block: RubiksBlock, x: Tensor) -> Tensor:
    return block(x.flatten(0, 1), x.shape[1]).unflatten(0, x.shape[:2])


def block_fused(block: RubiksBlock, x: Tensor) -> Tensor:
    clips, frames, _, height, width = x.shape
    columns = matrix(x)
    geometry = Geometry(clips, frames, height, width)
    plans = read_plans([block])
    y, sums, geometry = train_blocks(plans, plans[0].parameters, columns, row_sums(columns.detach()), geometry)
    assert not sums.requires_grad
    torch.testing.assert_close(sums, row_sums(y.detach()))
    return geometry.volume(y)


@pytest.mark.parametrize("geometry", [(2, 3, 6, 8), (1, 3, 5, 7), (2, 1, 7, 4), (1, 1, 9, 1)])
@pytest.mark.parametrize(("channels", "stride"), [((6, 6), 1), ((6, 10), 1), ((6, 6), 2), ((6, 10), 2), ((5, 7), 3)])
@pytest.mark.parametrize(("attention", "reduction"), [(False, None), (True, None), (False, 3)])
def test_block(attention, reduction, channels, stride, geometry):
    block = shaken(RubiksBlock(*channels, stride, attention, reduction))
    clips, frames, height, width = geometry
    outcomes = []
    for run in (block_fused, block_by_modules):
        copied, x = copy.deepcopy(block), torch.randn(clips, frames, channels[0], height, width, dtype=torch.float64)
        torch.manual_seed(2)
        x = x.copy_(torch.randn(x.shape)).requires_grad_()
        outcomes.append(outcome(copied, run(copied, x), x))
    close(*outcomes, 1e-9)


@pytest.mark.parametrize(("channels", "stride"), [((3, 3), 1), ((3, 4), 2)])
@pytest.mark.parametrize(("attention", "reduction"), [(False, None), (True, None), (False, 2)])
def test_gradcheck(attention, reduction, channels, stride):
    torch.manual_seed(3)
    block = RubiksBlock(*channels, stride, attention, reduction).double()
    for name, parameter in block.named_parameters():
        if name.endswith("shift"):  # not near whole numbers, where the gradient is a mean of two
            nn.init.uniform_(parameter, 0.2, 0.8)
    names, values = zip(*block.named_parameters(), strict=True)
    x = torch.randn(2, 2, channels[0], 3, 4, dtype=torch.float64, requires_grad=True)

    class Call(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return block_fused(self.block, x)

    def function(x: Tensor, *values: Tensor) -> Tensor:
        parameters = {f"block.{name}": value for name, value in zip(names, values, strict=True)}
        return torch.func.functional_call(Call(), parameters, (x,))

    assert torch.autograd.gradcheck(function, (x, *values), eps=1e-7, atol=1e-5)


def a_block(attention: bool = True, reduction: int | None = None) -> RubiksBlock:
    return RubiksBlock(24, 48, 2, attention, reduction)


def hook(*_) -> None:
    pass


@pytest.mark.parametrize(
    "change",
    [
        lambda block: block.eval(),
        lambda block: block.bn2.eval(),
        lambda block: setattr(block, "bn1", nn.SyncBatchNorm(24)),
        lambda block: setattr(block, "bn1", nn.BatchNorm2d(24, affine=False)),
        lambda block: setattr(block, "bn1", nn.BatchNorm2d(24, track_running_stats=False)),
        lambda block: setattr(block, "bn1", nn.BatchNorm2d(24, momentum=None)),
        lambda block: setattr(block, "conv3", nn.Conv2d(48, 48, 1)),
        lambda block: setattr(block, "conv3", nn.Conv2d(48, 48, 3, padding=1, bias=False)),
        lambda block: setattr(block, "conv3", nn.Conv2d(48, 48, 1, groups=2, bias=False)),
        lambda block: setattr(block.bn1, "num_batches_tracked", None),
        lambda block: setattr(block.bn2, "forward", lambda x: x),
        lambda block: setattr(block, "as3", nn.Identity()),
        lambda block: nn.utils.parametrizations.weight_norm(block.conv3),
        lambda block: block.conv3.register_forward_hook(hook),
        lambda block: block.bn1.register_forward_pre_hook(hook),
        lambda block: block.as3.register_full_backward_hook(hook),
        lambda block: block.register_full_backward_pre_hook(hook),
    ],
)
def test_supports_no_changed_block(change):
    block = a_block()
    assert supports_block(block)
    change(block)
    assert not supports_block(block)


def test_supports_what_the_tiers_make():
    assert supports_block(a_block(attention=False))
    assert supports_block(a_block(reduction=12))
    assert not supports_block(type("Other", (RubiksBlock,), {})(24, 24, 1, True, None))


def test_one_value_per_channel_has_no_variance():
    block = shaken(RubiksBlock(6, 6, 1, False, reduction=None))
    for run in (block_fused, block_by_modules):
        with pytest.raises(ValueError, match=r"more than (one|1) value per channel"):
            run(block, torch.randn(1, 1, 6, 1, 1, dtype=torch.float64))


@pytest.mark.parametrize("relu", [False, True])
def test_pointwise_and_its_gradients(relu):
    """Including what the block does not use: offset, residual, ReLU of the result."""
    x, residual = (torch.randn(n, 20).double() for n in (6, 5))
    weight = torch.randn(5, 6).double().requires_grad_()
    x.requires_grad_()
    scale, bias, offset = (torch.randn(n).double() for n in (6, 6, 5))
    a = (scale[:, None] * x + bias[:, None]).relu()
    expected = weight @ a + residual + offset[:, None]
    expected = expected.relu() if relu else expected
    with torch.no_grad():
        y, sums = pointwise(x, weight, Activation(scale, bias), offset=offset, residual=residual, relu=relu, stats=True)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(sums, torch.stack((expected.sum(1), expected.square().sum(1)))[None])
    if relu:
        return
    g, mix = torch.randn(5, 20).double(), torch.randn(3, 5).double()
    h = torch.randn(5, 20).double()
    upstream = norm_input_grad(g, h, mix)
    torch.testing.assert_close(upstream, mix[0, :, None] * g + mix[1, :, None] * h + mix[2, :, None])
    gradient, grad_weight = torch.autograd.grad((expected * upstream).sum(), (x, weight))
    with torch.no_grad():
        out, sums = pointwise_grad(upstream, weight, x, Activation(scale, bias))
        ours = pointwise_weight_grad(upstream, x, Activation(scale, bias))
    torch.testing.assert_close(out * scale[:, None], gradient)
    torch.testing.assert_close(sums, torch.stack((out.sum(1), (out * x).sum(1)))[None])
    torch.testing.assert_close(ours, grad_weight)
