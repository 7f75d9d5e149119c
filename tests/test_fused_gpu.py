"""The compiled operators of the fused block, and what is built from them, against their definitions in float64."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from test_inference import trained
from torch import Tensor, nn

from rubiks import RubiksNet
from rubiks.models import training_path
from rubiks.models.geometry import Geometry
from rubiks.ops import fused

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fused_kernels")]
NETWORKS = [("tiny", variant) for variant in ("rubiks3d", "rubiks3d-aq", "rubiks2d", "fixed-tsm", "grouped")]
NETWORKS += [("small", "rubiks3d")]  # with squeeze-excite
ROUNDING = 4e-3  # of bfloat16, relative to the norm


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda")


def matrix(*shape: int) -> Tensor:
    return randn(*shape).bfloat16()


def close(actual: Tensor, expected: Tensor, tolerance: float = ROUNDING) -> None:
    error = (actual.double() - expected).norm()
    assert error <= tolerance * expected.norm() + 1e-12, f"relative error {error / expected.norm():.1e}"


def sums_agree(parts: Tensor, value: Tensor, other: Tensor) -> bool:
    """Row sums of value and of value * other, judged by the sums of magnitudes."""
    pairs = zip(parts.double().sum(0), (value, value * other), strict=True)
    return all(bool(((row - terms.sum(1)).abs() <= 1e-4 * terms.abs().sum(1) + 1e-6).all()) for row, terms in pairs)


def same_bits(call) -> tuple[Tensor, ...]:
    """The results of a call, which must be the same in a second call with other contents in free memory."""
    first = call()
    torch.full((2**22,), torch.nan, device="cuda")
    assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))
    return first


def double(*values: Tensor | int | None) -> list[Tensor | int | None]:
    return [value.double() if isinstance(value, Tensor) else value for value in values]


def activation(scale: Tensor | None, bias: Tensor | None, *attention: Tensor | int | None) -> fused.Activation | None:
    """From arguments of the compiled operators."""
    return None if scale is None else fused.Activation(scale, bias, *attention)


def pointwise(x, weight, scale, bias, attention, frames, offset, residual, relu) -> Tensor:
    """The definition's result, from arguments of the compiled operator."""
    before = activation(scale, bias, attention, frames)
    return fused.pointwise(x, weight, before, offset=offset, residual=residual, relu=relu)[0]


# Rows of the result, rows of x, columns: the tiers' and odd ones; for 145 to 288 rows Hopper has another kernel.
SHAPES = [(54, 54, 392), (72, 72, 4104), (144, 72, 1000), (288, 288, 3136), (576, 576, 136), (20, 6, 264), (145, 38, 8)]
SHAPES += [(288, 144, 1000), (216, 216, 17032), (150, 40, 72)]


@pytest.mark.parametrize(("m", "k", "p"), SHAPES)
def test_pointwise(m, k, p):
    x, weight, residual = matrix(k, p), matrix(m, k), matrix(m, p)
    scale, bias, offset, attention = randn(k), randn(k), randn(m), randn(k, 3)
    for norm, add, more, relu, stats in itertools.product((0, 1, 8, 16), *4 * [(False, True)]):  # 8, 16: frames
        if (add and stats) or p % max(norm, 1):
            continue
        arguments = (x, weight, *((scale, bias) if norm else (None, None)), attention if norm > 1 else None, norm)
        arguments += (offset if add else None, residual if more else None)
        y, sums = same_bits(lambda a=arguments, r=relu, s=stats: torch.ops.rubiks.pointwise(*a, r, s, False))
        exact = pointwise(*double(*arguments), relu)
        close(y, exact, 2 * ROUNDING if norm > 1 else ROUNDING)  # before the mix and after it
        if stats:
            value, written = sums_of_rounded(arguments, relu) if norm else exact, y.double()
            assert sums_agree(sums, value, value) or sums_agree(sums, written, written)  # before or after rounding


@pytest.mark.parametrize("geometry", [(3, 8, 7, 7), (2, 16, 7, 8), (1, 8, 1, 1), (40, 8, 13, 3)])
@pytest.mark.parametrize(("c", "r"), [(72, 6), (576, 48), (20, 33)])
def test_excite(c, r, geometry):
    x, reduce, expand = matrix(c, math.prod(geometry)), randn(r, c), randn(c, r)
    out, *gate = same_bits(lambda: torch.ops.rubiks.excite(x, reduce, expand, geometry))
    exact, exact_gate = fused.excite(*double(x, reduce, expand), geometry)
    close(out, exact)
    for found, expected in zip(gate, exact_gate, strict=True):
        close(found, expected, 1e-5)


def sums_of_rounded(arguments: tuple[Tensor | None, ...], relu: bool) -> Tensor:
    """The result if the input of the product is rounded first, as in the kernel."""
    x, weight, scale, bias, attention, frames, offset, residual = arguments
    a = torch.addcmul(bias[:, None], x, scale[:, None]).relu().bfloat16()
    if attention is not None:
        pixels, (back, stay, ahead) = (
            a.view(len(a), -1, frames).float(),
            attention.bfloat16().float().t()[..., None, None],
        )
        out = (stay * pixels).bfloat16().float()
        out[..., :-1] = (out[..., :-1] + ahead * pixels[..., 1:]).bfloat16()
        out[..., 1:] = (out[..., 1:] + back * pixels[..., :-1]).bfloat16()
        a = out.view(a.shape).bfloat16()
    return pointwise(*double(a, weight, None, None, None, 1, offset, residual), relu)


@pytest.mark.parametrize(("m", "k", "p"), [shape for shape in SHAPES if shape[0] % 2 == 0])
def test_pointwise_gradients(m, k, p):
    g, h, x, weight = matrix(m, p), matrix(m, p), matrix(k, p), matrix(m, k)
    mix, scale, bias, attention = randn(3, m), randn(k), randn(k), randn(k, 3)
    for mixed, masked in itertools.product((False, True), repeat=2):
        of_norm = (h, mix) if mixed else (None, None)
        of_x = (x, scale, bias) if masked else (None, None, None)
        upstream = fused.norm_input_grad(*double(g, h, mix)) if mixed else g.double()
        transposed = weight.t().contiguous()
        arguments = (g, *of_norm, transposed, *of_x)
        out, sums = same_bits(lambda a=arguments: torch.ops.rubiks.pointwise_grad(*a, None, 0, False))
        exact_x, *exact_norm = double(*of_x)
        exact, _ = fused.pointwise_grad(upstream, weight.double(), exact_x, activation(*exact_norm))
        close(out, exact)
        if masked:
            rounded = upstream.bfloat16().double()
            value, _ = fused.pointwise_grad(rounded, weight.double(), exact_x, activation(*exact_norm))
            assert sums_agree(sums, value, x.double()) or sums_agree(sums, out.double(), x.double())
        for frames in (8, 16):  # the sums are of the gradient before the mix of frames
            if not (mixed and masked) or p % frames:
                continue
            out, sums = same_bits(
                lambda a=arguments, t=frames: torch.ops.rubiks.pointwise_grad(*a, attention, t, False)
            )
            close(out, fused.pointwise_grad(upstream, weight.double())[0])
            value, *_ = fused.norm_mix_backward(*double(out, x, scale, bias, attention), frames)
            assert sums_agree(sums, value, x.double())
        for frames in (0, 8, 16):
            if frames and (not masked or p % frames):
                continue
            of_weight = (x, *of_x[1:], attention if frames else None, frames)
            (gradient,) = same_bits(lambda n=of_norm, o=of_weight: (torch.ops.rubiks.pointwise_weight_grad(g, *n, *o),))
            of_columns, *before = double(*of_weight)
            exact = fused.pointwise_weight_grad(upstream, of_columns, activation(*before))
            close(gradient, exact, (2 if frames else 1) * ROUNDING)


# N, T, H, W.
GEOMETRIES = [(3, 8, 7, 7), (2, 16, 7, 8), (2, 8, 14, 14), (1, 16, 28, 28), (3, 8, 5, 9), (2, 8, 1, 1), (40, 8, 13, 3)]


def strided(geometry: tuple[int, ...], stride: int) -> tuple[int, ...]:
    return tuple(Geometry(*geometry).strided(stride))


def test_norm():
    x, g, beta = matrix(72, 4096), matrix(72, 4096), randn(72)
    weight, running = randn(72), [randn(72), torch.rand(72, device="cuda")]
    exact_running = double(*running)
    parts = torch.stack([fused.row_sums(part.float())[0] for part in x.chunk(4, 1)])
    batches = torch.tensor(3, device="cuda")
    stats = torch.ops.rubiks.norm_coefficients(parts, 4096, weight, beta, *running, batches, 0.1, 1e-5)
    statistics = fused.RunningStatistics(*exact_running, torch.tensor(3, device="cuda"), 0.1, 1e-5)
    exact = fused.norm_coefficients(fused.row_sums(x.double()), 4096, *double(weight, beta), statistics)
    for actual, expected in zip((stats, *running), (exact, *exact_running), strict=True):
        close(actual, expected, 1e-5)
    assert batches == statistics.batches == 4

    sums = torch.stack((g.float().sum(1), (g.float() * x).sum(1)))[None]
    mix, grad_weight, grad_beta = torch.ops.rubiks.norm_gradients(sums, 2 * sums, 4096, stats)
    expected = fused.norm_gradients(3 * sums.double(), 4096, exact)
    for actual, value in zip((mix, grad_weight, grad_beta), expected, strict=True):
        close(actual, value, 1e-4)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_norm_input_grad(geometry):
    channels, columns, volume = 6, math.prod(geometry), Geometry(*geometry).volume
    g, x, residual = (matrix(channels, columns) for _ in range(3))
    mix, scale, bias, attention = randn(3, channels), randn(channels), randn(channels), randn(channels, 3)
    for extra, stride, weights in itertools.product((None, residual), (0, 2, 3), (None, attention)):
        part = matrix(channels, math.prod(strided(geometry, stride))) if stride else None
        arguments = (g, x, mix, extra, part, geometry, max(stride, 1), scale, bias, weights)
        out, grad_attention = same_bits(lambda a=arguments: torch.ops.rubiks.norm_input_grad(*a))
        exact = g.double()
        if weights is not None:
            exact, grad_weights, _ = fused.norm_mix_backward(*double(g, x, scale, bias, weights), geometry[1])
            close(grad_attention, grad_weights, 1e-4)
        if part is not None:
            small = Geometry(*geometry).strided(stride).volume(part)
            volume(exact)[..., ::stride, ::stride] += small.double()
        close(out, fused.norm_input_grad(exact, *double(x, mix, extra)))


def shifts(channels: int):
    """Shifts (2 or 3, C) and strides: below a pixel and long, some whole, and one out of the clip."""
    for rows, stride, size in itertools.product((2, 3), (1, 2), (1, 6)):
        shift = size * (2 * torch.rand(rows, channels, device="cuda") - 1)
        shift[:, 1] = shift[:, 1].round()
        shift[:, 2] = 100
        shift[-1, 3] = -1  # whole only in W
        yield shift, stride


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_clip_shift(geometry):
    channels, volume = 6, Geometry(*geometry).volume
    x = matrix(channels, math.prod(geometry))
    stats, (ones, zeros) = randn(4, channels), (torch.ones(channels).cuda(), torch.zeros(channels).cuda())
    stats[2, 0] = 0
    scale, bias = stats[2:]
    for shift, stride in shifts(channels):
        after = Geometry(*strided(geometry, stride)).volume

        def call(x, *norm, shift=shift, stride=stride):
            return (torch.ops.rubiks.clip_shift(x, *norm, shift, geometry, stride),)

        (y,), (plain,) = same_bits(lambda: call(x, scale, bias)), same_bits(lambda: call(x.abs(), None, None))
        close(after(y), fused.norm_shift(volume(x.double()), *double(scale, bias, shift), stride))
        close(after(plain), fused.norm_shift(volume(x.abs().double()), *double(ones, zeros, shift), stride))
        grad = torch.randn_like(y)
        g, grad_shift, *of_norm = same_bits(
            lambda s=shift, d=stride, grad=grad: torch.ops.rubiks.clip_shift_backward(grad, x, stats, s, geometry, d)
        )
        exact_g, exact_shift, sums = fused.norm_shift_backward(
            after(grad.double()), volume(x.double()), *double(scale, bias, shift), stride
        )
        close(volume(g), exact_g)
        close(grad_shift, exact_shift, 1e-4)
        for actual, expected in zip(of_norm, fused.norm_gradients(sums, x.shape[1], stats.double()), strict=True):
            close(actual, expected, 1e-3)


def test_clip_shift_of_nothing():
    x, shift = matrix(6, 0), randn(3, 6)
    assert torch.ops.rubiks.clip_shift(x, None, None, shift, (0, 8, 4, 4), 2).shape == (6, 0)


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_columns_of_strided_convolutions(geometry):
    x = matrix(6, math.prod(geometry))
    for stride in (1, 2, 3):
        every = torch.ops.rubiks.every(x, geometry, stride)
        taken = Geometry(*geometry).volume(x)[..., ::stride, ::stride]
        assert torch.equal(Geometry(*strided(geometry, stride)).volume(every), taken)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(16, 3, 32, 32), (32, 3, 17, 30), (16, 3, 1, 1)])
def test_stem_columns(size, dtype):
    images = randn(*size).to(dtype)
    for frames in fused.FRAMES:
        exact = fused.stem_columns(images.double(), frames, torch.float64)
        assert torch.equal(fused.stem_columns(images, frames, torch.bfloat16), exact.bfloat16())


def gradients(net: RubiksNet, clips: Tensor, autocast: bool) -> dict[str, Tensor]:
    net = copy.deepcopy(net)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        logits = net(clips)
    F.cross_entropy(logits.to(clips.dtype), torch.arange(len(clips), device="cuda")).backward()
    found = (
        {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
        | dict(net.named_buffers())
        | {"logits": logits}
    )
    return {name: value.double() for name, value in found.items()}


@pytest.mark.parametrize("frames", fused.FRAMES)
@pytest.mark.parametrize(
    ("tier", "variant", "freeze"), [(*network, None) for network in NETWORKS] + [(*NETWORKS[1], "layer1")]
)
def test_training_is_as_exact_as_the_modules(tier, variant, freeze, frames, monkeypatch):
    net = RubiksNet(tier, 5, variant, frames).cuda().train()
    if freeze is not None:
        net.backbone.freeze(freeze)
    nn.init.normal_(net.new_fc.weight, std=0.1)
    clips = randn(32 // frames, frames, 3, 64, 64)
    calls = []
    monkeypatch.setattr(training_path, "features", lambda *a, f=training_path.features: calls.append(1) or f(*a))
    exact = gradients(copy.deepcopy(net).double(), clips.double(), autocast=False)
    assert not calls
    ours, again = (gradients(net, clips, autocast=True) for _ in range(2))
    assert len(calls) == 2
    monkeypatch.setattr(training_path, "serves", lambda *_: False)
    modules = gradients(net, clips, autocast=True)

    def errors(found: dict[str, Tensor]) -> dict[str, float]:
        return {n: ((found[n] - v).norm() / v.norm().clamp_min(1e-9)).item() for n, v in exact.items()}

    assert all(torch.equal(value, again[name]) for name, value in ours.items())
    a, b = errors(ours), errors(modules)
    assert sum(a.values()) < 1.15 * sum(b.values())
    assert a["logits"] < 2 * b["logits"] + 0.01
    off = {name: (error, b[name]) for name, error in a.items() if error > 2 * b[name] + 0.4}
    assert not off  # small ones are mostly rounding errors


@pytest.mark.parametrize(("tier", "variant"), NETWORKS)
def test_bfloat16_parameters(tier, variant):
    net = RubiksNet(tier, 5, variant).cuda().bfloat16().train()
    clips = matrix(2, 8, 3, 32, 32)
    assert training_path.serves(net.backbone, clips.flatten(0, 1), 8)
    F.cross_entropy(net(clips).float(), torch.tensor([0, 1], device="cuda")).backward()
    assert all(p.grad.dtype == p.dtype and p.grad.isfinite().all() for p in net.parameters())


def test_what_it_serves():
    net = RubiksNet("tiny", 5).cuda().train()
    images = randn(16, 3, 32, 32)
    assert not training_path.serves(net.backbone, images, 8)  # float32
    with torch.autocast("cuda", torch.bfloat16):
        assert training_path.serves(net.backbone, images, 8)
        assert training_path.serves(net.backbone, images, 16)
        assert not training_path.serves(net.backbone, images, 4)
        assert not training_path.serves(net.backbone, images.clone().requires_grad_(), 8)
        assert not training_path.serves(net.eval().backbone, images, 8)
        assert not training_path.serves(net.double().backbone, images.double(), 8)
        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(net.float().train())
        assert not training_path.serves(synchronised.backbone, images, 8)
    with torch.autocast("cuda", torch.float16):
        assert not training_path.serves(RubiksNet("tiny", 5).cuda().train().backbone, images, 8)


@pytest.mark.parametrize(("tier", "variant"), [("tiny", "rubiks3d"), ("tiny", "rubiks3d-aq"), ("small", "rubiks3d")])
def test_inference(tier, variant):
    net = trained(tier, variant, torch.float32).cuda()
    module = net.optimize_for_inference(torch.bfloat16)
    for shape in ((2, 8, 3, 112, 112), (1, 8, 3, 64, 64), (2, 8, 3, 112, 112), (1, 16, 3, 32, 48), (1, 3, 3, 33, 47)):
        clips = randn(*shape)
        with torch.no_grad():
            exact = copy.deepcopy(net).double()(clips.double())
            with torch.autocast("cuda", torch.bfloat16):
                modules = net(clips)
        logits = module(clips)
        error, theirs = ((found.double() - exact).norm() / exact.norm() for found in (logits, modules))
        assert error < 1.5 * theirs + 0.005
        assert torch.equal(module(clips), logits)
        assert torch.equal(module(clips.flatten(1, 2)), logits)
    assert module(clips[:0]).shape == (0, 7)
    # Graphs are dropped by a move, and full precision uses none of our kernels.
    assert torch.equal(module.cpu().cuda()(clips), logits)
    close(net.optimize_for_inference(torch.float64)(clips.double()), exact, 1e-6)
