"""The shift operator against the official numbers, a brute-force oracle and finite differences."""

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

from rubiks.ops import normalize_shift_grad, shift2d, shift3d


def golden_cases(path):
    arrays = np.load(path)
    for case in sorted({name[:3] for name in arrays.files}):
        meta = json.loads(str(arrays[f"{case}_meta"]))
        tensors = {
            name: torch.from_numpy(arrays[f"{case}_{name}"])
            for name in ("x", "shift", "grad_out", "out", "grad_x", "grad_shift")
        }
        yield meta, tensors


def check_golden(path) -> int:
    count = 0
    for meta, golden in golden_cases(path):
        x, shift = golden["x"].requires_grad_(), golden["shift"].requires_grad_()
        op = shift3d if meta["dim"] == 3 else shift2d
        out = op(
            x,
            shift,
            tuple(meta["stride"]),
            tuple(meta["padding"]),
            meta["quantize"],
            normalize_grad=meta["normalize_grad"],
        )
        out.backward(golden["grad_out"])
        torch.testing.assert_close(out, golden["out"], rtol=0, atol=1e-9)
        torch.testing.assert_close(x.grad, golden["grad_x"], rtol=0, atol=1e-9)
        # The official 3D kernel's shift gradient is wrong at whole-number shifts.
        if meta["dim"] == 2 or meta["kind"] in ("frac", "big"):
            torch.testing.assert_close(shift.grad, golden["grad_shift"], rtol=0, atol=1e-9)
        count += 1
    return count


def test_official_numbers():
    assert check_golden(OFFICIAL / "op_golden.npz") == 20


def test_all_official_numbers(shared):
    assert check_golden(shared / "golden" / "op_golden_public.npz") == 110


lengths = st.integers(1, 4)
shifts = st.one_of(st.floats(-2, 2), st.integers(-3, 3).map(float), st.floats(-50, 50), st.sampled_from([1e9, -1e30]))


@st.composite
def cases(draw):
    size = (draw(st.integers(1, 2)), draw(lengths), draw(st.integers(1, 3)), draw(lengths), draw(lengths))
    shift = torch.tensor([[draw(shifts) for _ in range(size[2])] for _ in range(3)], dtype=torch.float64)
    stride = tuple(draw(st.integers(1, 3)) for _ in range(3))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(3))
    return torch.randn(size, dtype=torch.float64), shift, stride, padding, draw(st.booleans())


@settings(max_examples=60, deadline=None)
@given(cases(), st.permutations(range(5)))
def test_forward_and_gradient_of_x_equal_the_oracle(case, layout):
    x, shift, stride, padding, quantize = case
    expected_x = x.clone().requires_grad_()
    expected = oracle.shift(expected_x, shift, stride, padding, quantize)
    # Any memory layout: the same values, permuted in memory.
    back = [layout.index(d) for d in range(5)]
    x = x.permute(layout).contiguous().permute(back).requires_grad_()
    out = shift3d(x, shift, stride, padding, quantize)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    out.backward(grad)
    torch.testing.assert_close(x.grad, expected_x.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("stride", "padding"), [((1, 1, 1), (0, 0, 0)), ((1, 2, 2), (0, 0, 0)), ((2, 1, 3), (1, 0, 2))]
)
def test_gradients_equal_finite_differences(stride, padding):
    x = torch.randn(2, 3, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    shift = torch.rand(3, 4, dtype=torch.float64) * 0.8 + 0.1 + torch.randint(-2, 2, (3, 4))
    assert gradcheck(lambda a, b: shift3d(a, b, stride, padding), (x, shift.requires_grad_()))
    flat = x[:, 0].permute(0, 1, 3, 2).detach().requires_grad_()  # (N, C, H, W), not contiguous
    assert gradcheck(lambda a, b: shift2d(a, b, stride[1:], padding[1:]), (flat, shift[1:].detach().requires_grad_()))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision_is_float32_arithmetic_rounded_once(dtype):
    x = torch.randn(2, 4, 5, 6, 7).to(dtype)
    shift = torch.randn(3, 5)
    leaf, shift_leaf = x.clone().requires_grad_(), shift.clone().requires_grad_()
    out = shift3d(leaf, shift_leaf)
    expected = shift3d(x.double(), shift.double())
    assert out.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=eps, atol=1e-6)
    grad = torch.randn_like(out)
    out.backward(grad)
    assert leaf.grad.dtype == dtype
    assert shift_leaf.grad.dtype == torch.float32
    exact = shift.double().requires_grad_()
    shift3d(x.double(), exact).backward(grad.double())
    torch.testing.assert_close(shift_leaf.grad.double(), exact.grad, rtol=1e-4, atol=1e-4)


def test_empty_batch_and_partial_gradients():
    x = torch.randn(0, 2, 3, 4, 4, requires_grad=True)
    shift = torch.randn(3, 3, requires_grad=True)
    out = shift3d(x, shift)
    assert out.shape == (0, 2, 3, 4, 4)
    out.sum().backward()
    assert not shift.grad.any()
    x = torch.randn(1, 2, 3, 4, 4, requires_grad=True)
    shift3d(x, shift.detach()).sum().backward()
    assert x.grad is not None
    shift3d(x, shift.detach().requires_grad_(), normalize_grad=True).sum().backward()


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
