"""A GPU gives the same numbers as the CPU, and training does not wait for it."""

from __future__ import annotations

import copy

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from rubiks import RubiksNet
from rubiks.data.batches import Loader
from rubiks.nn import Normalize
from rubiks.ops import normalize_shift_grad, shift3d
from rubiks.training.aq import AttentionSchedule
from rubiks.training.callbacks import Throughput
from rubiks.training.distributed import AveragedGradients
from rubiks.training.mixing import Mixing
from rubiks.training.module import VideoClassifier
from rubiks.training.nonfinite import SkipNonFinite
from rubiks.training.optim import optimizer, parameter_groups
from rubiks.training.recipe import Recipe

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _float32_arithmetic():
    """Full float32 in matrix products and convolutions, regardless of the defaults."""
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags


def results(x, shift, grad):
    """The operator's output and gradients."""
    out = torch.ops.rubiks.shift(x, shift, (1, 2, 2), (0, 1, 0), False)
    return out, *torch.ops.rubiks.shift_backward(grad, x, shift, (1, 2, 2), (0, 1, 0), False, True, True)


def case(device="cuda"):
    x = torch.randn(4, 5, 6, 30, 34, device=device)
    return x, torch.randn(3, 6, device=device), torch.randn(4, 5, 6, 16, 17, device=device)


def test_cuda_graph_replays_the_operator():
    x, shift, grad = case()
    results(x, shift, grad)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(x, shift, grad)
    for tensor in (x, shift, grad):
        tensor.normal_()
    graph.replay()
    for replayed, expected in zip(captured, results(x, shift, grad), strict=True):
        assert torch.equal(replayed, expected)


def test_operator_runs_on_the_current_stream():
    """Work on a side stream waits for what that stream does before, not for the default stream."""
    x, shift, grad = case()
    expected = results(x, shift, grad)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        source = torch.zeros_like(x)
        torch.cuda._sleep(50_000_000)
        source.copy_(x)
        got = results(source, shift, grad)
    stream.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_operator_runs_on_the_gpu_of_its_arguments():
    x, shift, grad = case()
    expected = results(x, shift, grad)
    got = results(*(tensor.to("cuda:1") for tensor in (x, shift, grad)))  # cuda:0 stays the current device
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda:1")
        assert torch.equal(a.cpu(), b.cpu())


def test_more_than_two_to_the_31_elements():
    free, _ = torch.cuda.mem_get_info()
    if free < 25e9:
        pytest.skip("needs 25 GB of GPU memory")
    x = torch.zeros(3, 8, 96, 992, 1000, dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[-1] = torch.randint(0, 100, (8, 96, 992, 1000), device="cuda")
    shift = torch.zeros(3, 96, device="cuda")
    shift[1] = 1
    out = shift3d(x, shift)
    assert torch.equal(out[-1, :, :, :-1], x[-1, :, :, 1:])
    assert not out[:2].any()
    del out
    grad_x, _ = torch.ops.rubiks.shift_backward(x, x, shift, (1, 1, 1), (0, 0, 0), False, True, False)
    assert torch.equal(grad_x[-1, :, :, 1:], x[-1, :, :, :-1])


def test_compiled_by_inductor():
    def loss(x, shift):
        return F.relu(shift3d(F.relu(x) * 2, shift)).square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        x, shift, _ = case()
        torch.manual_seed(1)
        x.normal_()
        leaves = x.requires_grad_(), shift.copy_(torch.linspace(-2, 2, 18).view(3, 6)).requires_grad_()
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-3)


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


def test_clips_are_mixed_as_on_the_cpu():
    clips, labels, mixing = torch.rand(4, 2, 3, 16, 16), torch.arange(4), Mixing(0.8, 1.0, 4, seed=0)
    for step in range(6):
        expected = mixing(clips, labels, (step, 0, 0))
        for actual, wanted in zip(mixing(clips.cuda(), labels.cuda(), (step, 0, 0)), expected, strict=True):
            torch.testing.assert_close(actual.cpu(), wanted)


class NoWaiting(pl.Callback):
    """Raises an error for any wait for the GPU between the third and the last batch."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            torch.cuda.set_sync_debug_mode("error")
        if batch_idx == trainer.num_training_batches - 1:
            torch.cuda.set_sync_debug_mode("default")
            self.done = True


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:Synchronization debug mode is a prototype",
    "ignore:.*in eval mode at the start of training",
)
@pytest.mark.parametrize(
    ("variant", "name", "options"),
    [
        ("rubiks3d", "sgd", {}),
        ("rubiks3d-aq", "adamw", {}),
        ("rubiks3d", "sgd", {"ema_decay": 0.99, "freeze": "layer1"}),
        ("rubiks3d-aq", "adamw", {"ema_decay": 0.99, "freeze": "layer1"}),
    ],
)
@pytest.mark.parametrize("strategy", ["auto", "distributed"])
def test_steps_do_not_wait_for_the_gpu(variant, name, options, strategy):
    recipe = Recipe(epochs=1, batch_size=2, lr=0.01, lr_batch=2, optimizer=name, clip_grad_norm=20, **options)
    attention = AttentionSchedule(budget=0.125, soft=0.99) if variant == "rubiks3d-aq" else None
    net = RubiksNet("tiny", 7, variant)
    net.recorder.enabled = False  # recording waits, once
    if recipe.freeze is not None:
        net.backbone.freeze(recipe.freeze)
    module = VideoClassifier(net, recipe, attention=attention, mixing=Mixing(0.2, 1.0, 7, seed=0))
    watch = NoWaiting()
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="gpu",
        devices=1,
        strategy=AveragedGradients() if strategy == "distributed" else "auto",
        precision="bf16-mixed",
        log_every_n_steps=2,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Throughput(), SkipNonFinite(), watch],
    )
    clip = {"views": torch.zeros(1, 8, 3, 64, 64, dtype=torch.uint8), "label": torch.tensor([3]), "index": 0}
    try:
        trainer.fit(module, Loader([clip] * 16, batch_size=2, pin_memory=True), Loader([clip] * 2, batch_size=2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    assert watch.done


@pytest.mark.parametrize("variant", ["rubiks3d", "rubiks3d-aq"])
@pytest.mark.parametrize(("tier", "size"), [("tiny", 64), ("small", 112), ("large", 224)])
def test_scores_do_not_depend_on_the_batch(tier, variant, size, fused_kernels):
    net = RubiksNet(tier, 174, variant).cuda().eval()
    net.new_fc.weight.data.mul_(20)
    fast = net.optimize_for_inference(torch.bfloat16)
    clips = torch.randn(16, 8, 3, size, size, device="cuda")
    one, *others = (torch.cat([fast(part).clone() for part in clips.split(count)]) for count in (1, 3, 16))
    assert one.dtype == torch.float32
    for other in others:
        assert torch.equal(one, other)
