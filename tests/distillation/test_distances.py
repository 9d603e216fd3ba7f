"""Distances against exact arithmetic, their limits and their gradients."""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from analytic_precond.distillation.distances import pseudo_huber, pseudo_huber_elementwise, squared_error

DISTANCES = (squared_error, pseudo_huber, pseudo_huber_elementwise)
# float32 sums of a few terms
RTOL = 1e-6


def batch(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def exact_pseudo_huber(square: Decimal, c: float) -> Decimal:
    """sqrt(square + c^2) - c with 200 digits, so that the difference does not cancel."""
    return (square + Decimal(c) ** 2).sqrt() - Decimal(c)


class TestValues:
    def test_squared_error_is_the_mean_over_the_elements(self) -> None:
        x, y = batch(3, 2, 4, 4), batch(3, 2, 4, 4, seed=1)
        expected = [torch.nn.functional.mse_loss(a, b) for a, b in zip(x, y, strict=True)]
        torch.testing.assert_close(squared_error(x, y), torch.stack(expected))

    @given(
        error=st.lists(st.floats(-1e3, 1e3).filter(lambda e: e == 0 or abs(e) > 1e-6), min_size=1, max_size=5),
        c=st.floats(1e-4, 1e3),
    )
    def test_pseudo_huber_is_exact_for_tiny_and_large_errors(self, error: list[float], c: float) -> None:
        x = torch.tensor([error], dtype=torch.float64)
        with localcontext(prec=200):
            squares = [Decimal(e) ** 2 for e in error]
            whole = float(exact_pseudo_huber(sum(squares, Decimal(0)), c))
            elements = float(sum((exact_pseudo_huber(s, c) for s in squares), Decimal(0)) / len(error))
        # a handful of roundings in float64, without cancellation
        assert pseudo_huber(x, 0 * x, c).item() == pytest.approx(whole, rel=1e-14, abs=0)
        assert pseudo_huber_elementwise(x, 0 * x, c).item() == pytest.approx(elements, rel=1e-14, abs=0)

    def test_limits(self) -> None:
        """|e|^2 / 2c well below c, |e| - c well above; the next terms are below float32's rounding."""
        e = batch(4, 3, 8, dtype=torch.float32)
        norm, zero = e.double().flatten(1).norm(dim=1), torch.zeros_like(e)
        torch.testing.assert_close(pseudo_huber(e, zero, 1e4).double(), norm**2 / 2e4, rtol=RTOL, atol=0)
        torch.testing.assert_close(pseudo_huber(e, zero, 1e-6).double(), norm - 1e-6, rtol=RTOL, atol=0)

    def test_the_default_c_grows_with_the_number_of_elements(self) -> None:
        x, y = batch(2, 3, 32, 32), batch(2, 3, 32, 32, seed=1)
        c = 0.00054 * 3072**0.5
        assert c == pytest.approx(0.03, rel=0.01)  # what iCT's authors quote for CIFAR-10
        for distance in (pseudo_huber, pseudo_huber_elementwise):
            assert torch.equal(distance(x, y), distance(x, y, c))
            assert torch.equal(distance(x, y, 0.5), partial(distance, c=0.5)(x, y))

    def test_whole_and_elementwise_agree_for_one_element_only(self) -> None:
        x, y = batch(5, 1), batch(5, 1, seed=1)
        torch.testing.assert_close(pseudo_huber(x, y), pseudo_huber_elementwise(x, y))
        x, y = batch(5, 2), batch(5, 2, seed=1)
        assert (pseudo_huber(x, y) > pseudo_huber_elementwise(x, y)).all()


@pytest.mark.parametrize("distance", DISTANCES)
class TestEveryDistance:
    def test_one_number_per_sample_whatever_the_shape(self, distance: partial[Tensor]) -> None:
        x, y = batch(4, 3, 2, 2), batch(4, 3, 2, 2, seed=1)
        expected = distance(x, y)
        assert expected.shape == (4,)
        assert torch.equal(distance(x.flatten(1), y.flatten(1)), expected)
        assert torch.equal(distance(x[1:3], y[1:3]), expected[1:3])
        # memory format changes at most the order of the sum
        last = x.to(memory_format=torch.channels_last)
        torch.testing.assert_close(distance(last, y), expected)
        assert distance(x[:, 0, 0, 0], y[:, 0, 0, 0]).shape == (4,)
        assert distance(x[:0], y[:0]).shape == (0,)

    def test_symmetric_and_zero_only_for_equal_samples(self, distance: partial[Tensor]) -> None:
        x, y = batch(4, 6), batch(4, 6, seed=1)
        assert torch.equal(distance(x, y), distance(y, x))
        assert (distance(x, y) > 0).all()
        assert (distance(x, x) == 0).all()

    def test_gradient(self, distance: partial[Tensor]) -> None:
        x, y = batch(3, 5).requires_grad_(), batch(3, 5, seed=1).requires_grad_()
        assert torch.autograd.gradcheck(distance, (x, y))
        assert torch.autograd.gradgradcheck(distance, (x, y))

    def test_gradient_at_equal_samples_is_zero(self, distance: partial[Tensor]) -> None:
        y = batch(2, 5, dtype=torch.float32)
        x = y.clone().requires_grad_()
        distance(x, y).sum().backward()
        assert x.grad is not None
        assert (x.grad == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_is_compared_in_float32(self, distance: partial[Tensor], dtype: torch.dtype) -> None:
        x, y = 300 + batch(2, 64).to(dtype), batch(2, 64, seed=1).to(dtype)  # fp16 ends at 65504 < 300^2
        value = distance(x, y)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), distance(x.double(), y.double()), rtol=RTOL, atol=0)
        assert distance(x, y.double()).dtype == torch.float64

    def test_refuses_to_broadcast(self, distance: partial[Tensor]) -> None:
        with pytest.raises(ValueError, match=r"one shape \(B, ...\), got \(4, 3\) and \(1, 3\): expand one"):
            distance(batch(4, 3), batch(1, 3))
        with pytest.raises(ValueError, match=r"got \(\) and \(\)"):
            distance(torch.tensor(1.0), torch.tensor(1.0))

    def test_refuses_what_is_no_float_tensor(self, distance: partial[Tensor]) -> None:
        with pytest.raises(TypeError, match=r"x must be a floating-point tensor, got torch.uint8: .*/ 127.5 - 1"):
            distance(torch.zeros(1, 3, dtype=torch.uint8), torch.zeros(1, 3))
        with pytest.raises(TypeError, match=r"y must be a torch.Tensor, got list"):
            distance(torch.zeros(1, 1), [[0.0]])


@pytest.mark.parametrize("distance", [pseudo_huber, pseudo_huber_elementwise])
class TestConstant:
    def test_refuses_zero_with_advice(self, distance: partial[Tensor]) -> None:
        with pytest.raises(ValueError, match=r"c must be positive, got 0: .* no gradient .* 1e-8"):
            distance(batch(2, 3), batch(2, 3), c=0.0)

    @pytest.mark.parametrize("c", [-1.0, float("inf"), float("nan")])
    def test_refuses_other_values(self, distance: partial[Tensor], c: float) -> None:
        with pytest.raises(ValueError, match="c must be positive and finite"):
            distance(batch(2, 3), batch(2, 3), c=c)

    def test_refuses_what_is_no_number(self, distance: partial[Tensor]) -> None:
        with pytest.raises(TypeError, match=r"c must be a number, got '0.03'"):
            distance(batch(2, 3), batch(2, 3), c="0.03")
