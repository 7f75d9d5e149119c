"""The same numbers on a GPU as on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from rubiks import RubiksNet
from rubiks.nn import Normalize
from rubiks.ops import normalize_shift_grad, shift3d
from rubiks.training.optim import optimizer, parameter_groups
from rubiks.training.recipe import Recipe

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _float32_arithmetic():
    """Full float32 in matrix products and convolutions, whatever the defaults are."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_operator_equals_the_cpu(dtype, quantize):
    x, shift = torch.randn(2, 5, 6, 9, 7, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64) * 2
    shift[:, 0] = torch.tensor([1.0, -2.0, 0.0])
    results = []
    for device in ("cpu", "cuda"):
        a = x.to(device, dtype, copy=True).requires_grad_()
        s = shift.to(device, torch.float64 if dtype == torch.float64 else torch.float32, copy=True).requires_grad_()
        out = shift3d(a, s, (1, 2, 2), (0, 1, 0), quantize)
        out.backward(torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(dtype))
        results.append([t.cpu().double() for t in (out.detach(), a.grad, s.grad)])
    rtol = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]
    for cpu, gpu in zip(*results, strict=True):
        torch.testing.assert_close(gpu, cpu, rtol=rtol, atol=rtol * cpu.abs().max().item())


def test_shift_that_is_not_finite_gives_zeros_on_a_gpu():
    shift = torch.zeros(3, 3, device="cuda")
    shift[0, 0], shift[1, 1] = float("nan"), float("inf")
    out = shift3d(torch.ones(1, 2, 3, 4, 4, device="cuda"), shift)
    assert out[:, :, :2].abs().max() == 0
    assert out[:, :, 2].min() == 1


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_batch_loss_and_step_equal_the_cpu(variant, name):
    """One optimiser step from the same weights and batch: loss, gradients and new weights, in float32 and float64."""
    recipe = Recipe(epochs=1, batch_size=4, lr=0.01, lr_batch=4, optimizer=name, weight_decay=1e-3, shift_lr_scale=0.1)
    views = torch.randint(0, 256, (4, 8, 3, 64, 64), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3])
    net = RubiksNet("tiny", 5, variant)
    batch = Normalize()(views)
    torch.testing.assert_close(Normalize().cuda()(views.cuda()).cpu(), batch, rtol=0, atol=1e-6)

    def step(device, dtype):
        own = copy.deepcopy(net).to(device, dtype).train()
        loss = F.cross_entropy(own(batch.to(device, dtype)), labels.to(device))
        loss.backward()
        gradients = {key: p.grad.cpu().double() for key, p in own.named_parameters()}
        for key, p in own.named_parameters():
            if key.endswith("shift"):
                p.grad = normalize_shift_grad(p.grad)
        optimizer(parameter_groups(own, recipe, recipe.lr), recipe).step()
        return loss.item(), gradients, {key: p.detach().cpu().double() for key, p in own.named_parameters()}

    loss, gradients, weights = step("cpu", torch.float64)
    gpu_loss, gpu_gradients, gpu_weights = step("cuda", torch.float64)
    assert gpu_loss == pytest.approx(loss, rel=1e-5)
    for key in gradients:
        error = (gpu_gradients[key] - gradients[key]).norm() / gradients[key].norm()
        assert error < 1e-3, (key, error)
        moved = (gpu_weights[key] - weights[key]).norm() / (weights[key].norm() + 1e-12)
        assert moved < 1e-2, (key, moved)

    single_loss, single, _ = step("cuda", torch.float32)
    cpu_loss, cpu_single, _ = step("cpu", torch.float32)
    assert single_loss == pytest.approx(cpu_loss, rel=1e-5)
    # Rounding moves some activations across the kink of ReLU: judge by how far the CPU's own float32 is from float64.
    for key in gradients:
        scale = gradients[key].norm()
        rounding = (cpu_single[key] - gradients[key]).norm() / scale
        error = (single[key] - gradients[key]).norm() / scale
        assert error < 1e-3 + 5 * rounding, (key, error, rounding)
