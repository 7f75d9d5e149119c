"""The module that optimize_for_inference returns computes the network's logits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from networks import like_trained_norms
from torch import nn

from rubiks import RubiksNet
from rubiks.models import inference_cpu
from rubiks.models.inference_cuda import CudaInferenceNet
from rubiks.models.tiers import TIERS, VARIANTS


def trained(tier: str, variant: str, dtype: torch.dtype = torch.float64) -> RubiksNet:
    """A network with norms like those of a trained one and worse: scales of both signs, and channels switched off."""
    torch.manual_seed(0)
    net = RubiksNet(tier, 7, variant)
    like_trained_norms(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            with torch.no_grad():
                module.weight[3] = 0
    nn.init.normal_(net.new_fc.weight)
    return net.to(dtype).eval()


def check(net: RubiksNet, clips: torch.Tensor, tolerance: float, module: nn.Module | None = None) -> None:
    with torch.no_grad():
        expected = net(clips)
    logits = (module or net.optimize_for_inference())(clips)
    assert logits.dtype == expected.dtype
    assert not logits.requires_grad
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tier", TIERS)
def test_same_logits(tier, variant, dtype, tolerance):
    check(trained(tier, variant, dtype), torch.randn(2, 3, 3, 40, 33, dtype=dtype), tolerance)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tier", ["tiny", "small"])
def test_the_form_for_gpus_has_the_same_logits(tier, variant):
    net = trained(tier, variant)
    module = CudaInferenceNet(net.backbone, net.new_fc, torch.float64)
    for shape in ((2, 3, 3, 40, 33), (1, 1, 3, 16, 16), (2, 2, 3, 1, 1)):
        clips = torch.randn(shape, dtype=torch.float64)
        check(net, clips, 1e-13, module)
        check(net, clips.flatten(1, 2), 1e-13, module)
    assert module(clips[:0]).shape == (0, 7)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(clips), module(clips))
    with pytest.raises(TypeError, match=r"float64.*optimize_for_inference"):
        module.float()(clips)


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_size_number_of_frames_and_layout(variant, monkeypatch):
    net = trained("small", variant)
    module = net.optimize_for_inference()
    for shape in ((3, 5, 3, 33, 48), (1, 8, 3, 50, 32), (2, 2, 3, 1, 1), (1, 1, 3, 16, 16)):
        clips = torch.randn(shape, dtype=torch.float64)
        check(net, clips, 1e-13, module)
    check(net, clips.flatten(1, 2), 1e-13, module)
    assert module(clips[:0]).shape == (0, 7)
    # Larger work is split.
    monkeypatch.setattr(inference_cpu, "PIXELS_AT_ONCE", 2 * 4 * 40 * 40)
    monkeypatch.setattr(inference_cpu, "ELEMENTS_AT_ONCE", 3 * 72 * 20 * 20)
    check(net, torch.randn(3, 4, 3, 40, 40, dtype=torch.float64), 1e-13, module)


@pytest.mark.parametrize("form", ["cpu", "cuda"])
def test_own_weights_whatever_the_mode(form):
    net = trained("small", "rubiks3d").train()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for_gpus = CudaInferenceNet(net.backbone, net.new_fc, torch.float64)
    module = net.optimize_for_inference() if form == "cpu" else for_gpus
    clips = torch.randn(1, 4, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    logits = module(clips)
    assert net.training
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    torch.testing.assert_close(module(clips), logits, rtol=0, atol=0)
    net.load_state_dict(state)
    check(net.eval(), clips, 1e-13, module.train())


def test_autocast_and_bfloat16():
    net = trained("tiny", "rubiks3d", torch.float32)
    clips = torch.randn(2, 4, 3, 32, 32)
    module = net.optimize_for_inference()
    with torch.autocast("cpu", torch.bfloat16):  # computed in the type of its weights
        logits = module(clips)
    with torch.no_grad():
        torch.testing.assert_close(logits, net(clips), rtol=0, atol=1e-4 * logits.abs().max().item())
    low = module.bfloat16()(clips.bfloat16())
    assert low.dtype == torch.bfloat16
    assert (low - logits).abs().max() < 0.05 * logits.abs().max()


def test_bad_inputs():
    module = RubiksNet("tiny", 3).optimize_for_inference()
    with pytest.raises(ValueError, match=r"\(N, T, 3, H, W\)"):
        module(torch.randn(1, 8, 4, 32, 32))
    with pytest.raises(TypeError, match="uint8"):
        module(torch.zeros(1, 8, 3, 32, 32, dtype=torch.uint8))
