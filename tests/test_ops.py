"""The shift operator against the official numbers, a brute-force oracle and finite differences.

Every implementation is tested, on the CPU and, with `-m gpu`, on a GPU, and the PyTorch reference as well.
"""

from __future__ import annotations

import json

import numpy as np
import oracle
import pytest
import torch
from conftest import OFFICIAL
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from rubiks.ops import library, normalize_shift_grad, reference, shift2d, shift3d

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shift, *settings):
        ctx.save_for_backward(x, shift)
        ctx.settings = settings
        return reference.forward(x, shift, *settings)

    @staticmethod
    def backward(ctx, grad):
        return *reference.backward(grad, *ctx.saved_tensors, *ctx.settings, True, True), None, None, None


def reference_shift3d(x, shift, stride, padding, quantize):
    return _Reference.apply(x, shift, stride, padding, quantize)


def reference_shift2d(x, shift, stride, padding, quantize):
    return _Reference.apply(x.unsqueeze(0), shift, (1, *stride), (0, *padding), quantize).squeeze(0)


OPERATORS = [(shift2d, shift3d), (reference_shift2d, reference_shift3d)]


def golden_cases(path):
    arrays = np.load(path)
    for case in sorted({name[:3] for name in arrays.files}):
        meta = json.loads(str(arrays[f"{case}_meta"]))
        tensors = {
            name: torch.from_numpy(arrays[f"{case}_{name}"])
            for name in ("x", "shift", "grad_out", "out", "grad_x", "grad_shift")
        }
        yield meta, tensors


def check_golden(path, operators, device) -> int:
    count = 0
    for meta, golden in golden_cases(path):
        golden = {name: tensor.to(device) for name, tensor in golden.items()}
        x, shift = golden["x"].requires_grad_(), golden["shift"].requires_grad_()
        out = operators[meta["dim"] - 2](x, shift, tuple(meta["stride"]), tuple(meta["padding"]), meta["quantize"])
        out.backward(golden["grad_out"])
        grad = normalize_shift_grad(shift.grad) if meta["normalize_grad"] else shift.grad
        torch.testing.assert_close(out, golden["out"], rtol=0, atol=1e-9)
        torch.testing.assert_close(x.grad, golden["grad_x"], rtol=0, atol=1e-9)
        # The official 3D kernel's shift gradient is wrong at whole-number shifts.
        if meta["dim"] == 2 or meta["kind"] in ("frac", "big"):
            torch.testing.assert_close(grad, golden["grad_shift"], rtol=0, atol=1e-9)
        count += 1
    return count


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operators", OPERATORS, ids=["served", "reference"])
def test_official_numbers(operators, device):
    assert check_golden(OFFICIAL / "op_golden.npz", operators, device) == 20


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("operators", OPERATORS, ids=["served", "reference"])
def test_all_official_numbers(shared, operators, device):
    assert check_golden(shared / "golden" / "op_golden_public.npz", operators, device) == 110


lengths = st.integers(1, 4)
shifts = st.one_of(st.floats(-2, 2), st.integers(-3, 3).map(float), st.floats(-50, 50), st.sampled_from([1e9, -1e30]))


@st.composite
def cases(draw):
    size = (draw(st.integers(1, 2)), draw(lengths), draw(st.integers(1, 3)), draw(lengths), draw(lengths))
    shift = torch.tensor([[draw(shifts) for _ in range(size[2])] for _ in range(3)], dtype=torch.float64)
    stride = tuple(draw(st.integers(1, 3)) for _ in range(3))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(3))
    return torch.randn(size, dtype=torch.float64), shift, stride, padding, draw(st.booleans())


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=60, deadline=None)
@given(case=cases(), layout=st.permutations(range(5)), frames_shift=st.booleans())
def test_forward_and_gradient_of_x_equal_the_oracle(device, case, layout, frames_shift):
    x, shift, stride, padding, quantize = case
    if not frames_shift:  # images: no shift in time
        shift[0], stride, padding = 0, (1, *stride[1:]), (0, *padding[1:])
    expected_x = x.clone().requires_grad_()
    expected = oracle.shift(expected_x, shift, stride, padding, quantize)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    # Any memory layout: the same values, permuted in memory.
    back = [layout.index(d) for d in range(5)]
    x = x.to(device).permute(layout).contiguous().permute(back).requires_grad_()
    if frames_shift:
        out = shift3d(x, shift.to(device), stride, padding, quantize)
    else:
        images = shift2d(x.flatten(0, 1), shift[1:].to(device), stride[1:], padding[1:], quantize)
        out = images.unflatten(0, x.shape[:2])
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=1e-12)
    out.backward(grad.to(device))
    torch.testing.assert_close(x.grad.cpu(), expected_x.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("stride", "padding"), [((1, 1, 1), (0, 0, 0)), ((1, 2, 2), (0, 0, 0)), ((2, 1, 3), (1, 0, 2))]
)
def test_gradients_equal_finite_differences(stride, padding, device):
    x = torch.randn(2, 3, 4, 5, 4, dtype=torch.float64, device=device, requires_grad=True)
    shift = torch.rand(3, 4, dtype=torch.float64) * 0.8 + 0.1 + torch.randint(-2, 2, (3, 4))
    shift = shift.to(device)
    assert gradcheck(lambda a, b: shift3d(a, b, stride, padding), (x, shift.requires_grad_()))
    flat = x[:, 0].permute(0, 1, 3, 2).detach().requires_grad_()  # (N, C, H, W), not contiguous
    assert gradcheck(lambda a, b: shift2d(a, b, stride[1:], padding[1:]), (flat, shift[1:].detach().requires_grad_()))


# Too large for the oracle: several tiles of a kernel, odd sizes, one long axis, planes smaller than a vector.
SHAPES = [
    (2, 3, 5, 40, 61),
    (3, 2, 4, 64, 64),
    (1, 2, 3, 7, 1500),
    (1, 2, 2, 700, 3),
    (9, 5, 3, 7, 7),
    (4, 11, 2, 1, 1),
]


def laid_out(x, layout):
    """The same values in another order in memory."""
    if layout == "channel-major":
        return x.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4)
    if layout == "channels-last":
        return x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    if layout == "sliced":
        n, t, c, h, w = x.shape
        wide = x.new_full((n, t, c + 1, h + 1, w + 3), torch.nan)  # the gaps must not be used
        wide[:, :, 1:, 1:, 2:-1] = x
        return wide[:, :, 1:, 1:, 2:-1]
    return x


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channel-major", "channels-last", "sliced"])
def test_equals_the_reference_in_float64(shape, layout, dtype, device):
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    x = torch.randn(shape, dtype=exact).to(dtype)
    shift = torch.randn(3, shape[2], dtype=exact) * torch.tensor([[1.0], [2], [2]])
    shift[:, 0] = torch.tensor([-1.0, 0, 2])
    for stride, padding, quantize in [(1, 0, False), ((1, 2, 2), 0, False), (1, 0, True), (3, 2, False)]:
        strides, paddings = ((v,) * 3 if isinstance(v, int) else v for v in (stride, padding))
        options = strides, paddings, quantize
        expected = reference.forward(x.double(), shift.double(), *options)
        grad = torch.randn(expected.shape).to(dtype)
        expected_grads = reference.backward(grad.double(), x.double(), shift.double(), *options, True, True)

        leaf = laid_out(x.to(device), layout).detach().requires_grad_()
        leaf_shift = shift.to(device).detach().requires_grad_()
        out = shift3d(leaf, leaf_shift, stride, padding, quantize)
        out.backward(grad.to(device))
        assert out.dtype == dtype
        eps = torch.finfo(dtype).eps
        results = (out, leaf.grad, leaf_shift.grad)
        for name, got, want in zip(("out", "x", "shift"), results, (expected, *expected_grads), strict=True):
            tolerance = max(eps, 1e-15) if name != "shift" else 1e-4 if exact == torch.float32 else 1e-12
            scale = want.abs().max().item() + 1
            error = (got.double().cpu() - want).abs().max().item()
            assert error <= 2 * tolerance * scale, (name, stride, padding, quantize, error)


@pytest.mark.parametrize("device", DEVICES)
def test_expanded_gradient_and_partial_need(device):
    """sum() gives every element the same gradient; only the requested gradients are computed."""
    x, shift = torch.randn(2, 3, 4, 6, 6, device=device), torch.rand(3, 4, device=device)
    both = x.clone().requires_grad_(), shift.clone().requires_grad_()
    shift3d(*both).sum().backward()
    one = x.clone().requires_grad_()
    shift3d(one, shift).sum().backward()
    other = shift.clone().requires_grad_()
    shift3d(x, other).sum().backward()
    ones = torch.ones_like(x)
    expected = reference.backward(ones, x, shift, (1, 1, 1), (0, 0, 0), False, True, True)
    for leaf in (both[0], one):
        torch.testing.assert_close(leaf.grad, expected[0])
    for leaf in (both[1], other):
        torch.testing.assert_close(leaf.grad, expected[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_on_every_run(device):
    x, shift, grad = torch.randn(8, 4, 6, 30, 30), torch.randn(3, 6), torch.randn(8, 4, 6, 30, 30)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            leaf, leaf_shift = (value.to(device).detach().requires_grad_() for value in (x, shift))
            out = shift3d(leaf, leaf_shift)
            out.backward(grad.to(device))
            results.append((out, leaf.grad, leaf_shift.grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def operator_cases(device):
    x = torch.randn(2, 3, 4, 6, 6, device=device)
    channel_major = x.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4)
    shift = torch.rand(3, 4, device=device)
    yield x, shift, (1, 1, 1), (0, 0, 0), False
    yield channel_major, shift, (1, 2, 2), (0, 1, 1), True
    yield x.bfloat16(), shift[1:], (1, 2, 1), (0, 0, 0), False


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # from opcheck itself
@pytest.mark.parametrize("device", DEVICES)
def test_operator_is_well_registered(device):
    """Schemas, fake kernels, autograd and tracing agree with what the kernels do."""
    for x, shift, *options in operator_cases(device):
        leaves = x.clone().requires_grad_(), shift.clone().requires_grad_()
        torch.library.opcheck(torch.ops.rubiks.shift.default, (*leaves, *options))
        grad = torch.randn_like(torch.ops.rubiks.shift(x, shift, *options))
        for need in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(torch.ops.rubiks.shift_backward.default, (grad, x, shift, *options, *need))


@pytest.mark.parametrize("device", DEVICES)
def test_compiled_function_is_one_graph_with_the_same_gradients(device):
    def loss(x, shift, flat_shift):
        return (shift3d(x, shift, normalize_grad=True) * shift2d(x.flatten(0, 1), flat_shift).view_as(x)).sum()

    leaves = [torch.randn(2, 3, 4, 6, 6), torch.rand(3, 4), torch.rand(2, 4)]
    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        own = [leaf.to(device).detach().requires_grad_() for leaf in leaves]
        value = function(*own)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in own)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("device", DEVICES)
def test_export_with_any_number_of_clips_and_frames(device):
    class Shift(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.rand(3, 4))

        def forward(self, x):
            return shift3d(x, self.shift, stride=(1, 2, 2))

    module = Shift().to(device)
    sizes = {0: torch.export.Dim("clips"), 1: torch.export.Dim("frames")}
    program = torch.export.export(module, (torch.randn(2, 3, 4, 6, 6, device=device),), dynamic_shapes=(sizes,))
    x = torch.randn(5, 8, 4, 6, 6, device=device)
    torch.testing.assert_close(program.module()(x), module(x))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_leaves_the_operator_alone(device):
    x = torch.randn(1, 2, 3, 4, 4, dtype=torch.bfloat16, device=device)
    shift = torch.rand(3, 3, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = shift3d(x, shift)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, shift3d(x, shift))


def test_shift_that_is_not_finite_is_refused_in_a_compiled_graph_too():
    function = torch.compile(shift3d, fullgraph=True, backend="aot_eager")
    with pytest.raises((RuntimeError, ValueError), match="NaN or infinity"):
        function(torch.zeros(1, 2, 3, 4, 4), torch.full((3, 3), torch.nan))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(2, 3, 4, 5)}, "N, T, C, H, W"),
        ({"shift": torch.zeros(3, 9)}, "C = 4"),
        ({"shift": torch.zeros(3, 4, dtype=torch.float64)}, "float32"),
        ({"stride": (1, 0, 1)}, "stride"),
        ({"padding": (0, 0)}, "3 entries"),
    ],
)
def test_kernels_check_their_arguments_themselves(change, words):
    """Graphs and other languages call the operator directly, without the Python functions."""
    if not library.load().compiled("CPU"):
        pytest.skip("the reference serves")
    arguments = {"x": torch.zeros(1, 2, 4, 5, 5), "shift": torch.zeros(3, 4), "stride": (1, 1, 1), "padding": (0, 0, 0)}
    with pytest.raises(RuntimeError, match=words):
        torch.ops.rubiks.shift(*(arguments | change).values(), False)


def test_gradient_at_whole_shifts_is_the_mean_of_both_sides():
    x = torch.randn(1, 4, 3, 5, 5, dtype=torch.float64)
    whole = torch.randint(-2, 3, (3, 3), dtype=torch.float64)
    weight = torch.randn_like(x)

    def loss(shift):
        return (shift3d(x, shift) * weight).sum()

    shift = whole.clone().requires_grad_()
    loss(shift).backward()
    step = 1e-6
    for row in range(3):
        for channel in range(3):
            moved = torch.zeros_like(whole)
            moved[row, channel] = step
            two_sided = (loss(whole + moved) - loss(whole - moved)) / (2 * step)
            assert shift.grad[row, channel].item() == pytest.approx(two_sided.item(), abs=1e-7)


def test_quantized_gradient_of_shift_is_that_of_the_interpolation():
    x, grad = torch.randn(2, 1, 3, 4, 4, 5, dtype=torch.float64)
    shift = torch.randn(3, 4, dtype=torch.float64)
    gradients = []
    for quantize in (False, True):
        leaf = shift.clone().requires_grad_()
        shift3d(x, leaf, quantize=quantize).backward(grad)
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_normalized_gradient_has_length_one_and_keeps_zero():
    x = torch.randn(1, 3, 2, 4, 4)
    shift = torch.tensor([[0.3, 100.0], [0.4, 0.0], [0.2, 0.0]], requires_grad=True)  # channel 1 sees nothing
    shift3d(x, shift, normalize_grad=True).sum().backward()
    assert shift.grad[:, 0].norm().item() == pytest.approx(1)
    assert shift.grad[:, 1].tolist() == [0, 0, 0]
    raw = torch.tensor([[3.0], [4.0], [0.0]])
    assert normalize_shift_grad(raw, t_factor=0.0)[:, 0].tolist() == [0, 1, 0]


@pytest.mark.parametrize("device", DEVICES)
def test_empty_batch(device):
    x = torch.randn(0, 2, 3, 4, 4, device=device, requires_grad=True)
    shift = torch.randn(3, 3, device=device, requires_grad=True)
    out = shift3d(x, shift)
    assert out.shape == (0, 2, 3, 4, 4)
    out.sum().backward()
    assert not shift.grad.any()
    assert shift2d(x[:, 0], shift[1:], stride=2).shape == (0, 3, 2, 2)


def test_second_derivative_is_refused():
    x = torch.randn(1, 2, 3, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(shift3d(x, torch.randn(3, 3)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3, 4, 5)}, ValueError, "N, T, C, H, W"),
        ({"x": torch.zeros(1, 2, 4, 5, 5, dtype=torch.int32)}, TypeError, "int32"),
        ({"x": [1.0]}, TypeError, "list"),
        ({"shift": torch.zeros(3, 5)}, ValueError, r"\(3, 4\)"),
        ({"shift": torch.zeros(2, 4)}, ValueError, "T, H, W"),
        ({"shift": torch.zeros(3, 4, dtype=torch.int64)}, TypeError, "int64"),
        ({"shift": torch.full((3, 4), float("nan"))}, ValueError, "NaN"),
        ({"stride": (1, 0, 1)}, ValueError, "stride"),
        ({"stride": (1, 1)}, ValueError, "stride"),
        ({"padding": -1}, ValueError, "padding"),
        ({"padding": 1.5}, (ValueError, TypeError), "padding|float"),
    ],
)
def test_bad_arguments_are_named(change, error, words):
    arguments = {"x": torch.zeros(1, 2, 4, 5, 5), "shift": torch.zeros(3, 4)} | change
    with pytest.raises(error, match=words):
        shift3d(**arguments)
