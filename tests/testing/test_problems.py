"""The problems against densities of torch.distributions, quadrature, differences and each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import gaussian_problem, mixture_problem
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor

import analytic_precond as ap
from analytic_precond.testing import GaussianProblem, MixtureProblem
from analytic_precond.testing.problems import Problem

LEVELS = torch.tensor([80.0, 5.0, 0.7, 0.05, 0.002], dtype=torch.float64)
MEAN = torch.tensor([0.3, -0.5, 0.0, 1.0, 0.1, 2.0], dtype=torch.float64)
PROBLEMS = {"gaussian": gaussian_problem(), "with a mean": gaussian_problem(mean=MEAN), "mixture": mixture_problem()}
every = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS.keys())


def richardson(f: Callable[[float], float], lam: float, h: float = 0.02) -> float:
    """df/dlambda to the fourth order."""

    def slope(h: float) -> float:
        return (f(lam + h) - f(lam - h)) / (2 * h)

    return (4 * slope(h / 2) - slope(h)) / 3


def moments(problem: MixtureProblem, t: float) -> tuple[float, float, float]:
    """E[D], E[D^2] and E[x D] by adaptive quadrature, D from Tweedie's formula with scipy's densities."""
    m, sd, p = problem.means.numpy(), np.sqrt(problem.variances.numpy() + t**2), problem.weights.numpy()
    ends = sorted(m[k] + j * sd[k] for k in range(len(m)) for j in (-8, -2, 0, 2, 8))

    def expectation(power: int, of_x: int) -> float:
        def integrand(x: float) -> float:
            each = p * norm.pdf(x, m, sd)
            D = x + t**2 * (each * (m - x) / sd**2).sum() / each.sum()
            return float(each.sum() * D**power * x**of_x)

        return sum(quad(integrand, a, b, epsabs=1e-13, epsrel=1e-11)[0] for a, b in pairwise(ends))

    return expectation(1, 0), expectation(2, 0), expectation(1, 1)


@pytest.mark.parametrize("t", [5.0, 0.7, 0.1])
def test_moments_of_the_mixture(t: float) -> None:
    problem = mixture_problem()
    D, DD, xD = moments(problem, t)
    m, c, p = (v.numpy() for v in (problem.means, problem.variances, problem.weights))
    mean, square = (p * m).sum(), (p * (m**2 + c)).sum()
    # the mean slope of D is its least squared error, E[x_0^2] - E[D^2], over t^2
    l = (square - DD) / t**2
    assert float(problem.l(t)) == pytest.approx(l, rel=1e-8)
    assert pytest.approx(mean, rel=1e-9) == D
    gg, g = DD - 2 * l * xD + l**2 * (square + t**2), D - l * mean
    # differences of terms of order 1, or 25 at t = 5
    assert float(problem.g_rms(t)) == pytest.approx(math.sqrt(gg), rel=1e-7)
    assert float(problem.g_rms(t, intercept=True)) == pytest.approx(math.sqrt(gg - g**2), rel=1e-7)


@every
@pytest.mark.parametrize("intercept", [False, True])
def test_s_is_the_slope_of_the_remainder(problem: Problem, intercept: bool) -> None:
    for t in LEVELS.tolist():
        got = float(problem.s(t, intercept))
        expected = richardson(lambda lam: math.log(problem.g_rms(math.exp(-lam), intercept)), -math.log(t))
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-7)  # steps of 0.02: 1e-8 of the fourth derivative


@every
def test_L_is_the_integral_of_one_minus_l(problem: Problem) -> None:
    for t in LEVELS.tolist():
        slope = richardson(lambda lam: float(problem.log_L(math.exp(-lam))), -math.log(t))
        assert slope == pytest.approx(1 - float(problem.l(t)), rel=1e-6, abs=1e-8)


@every
@pytest.mark.parametrize(("t", "s"), [(5.0, 0.05), (0.4, 3.0)])
def test_flow_solves_the_teachers_ode(problem: Problem, t: float, s: float) -> None:
    x = problem.sample(16, 0)
    x_t = x + t * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lam = torch.linspace(math.log(t), math.log(s), 401, dtype=torch.float64).exp()
    # Heun's error falls by 4 with the steps halved: extrapolated, 1e-8
    fine, coarse = (ap.solve_ode(problem.denoiser, x_t, lam[::step]) for step in (1, 2))
    torch.testing.assert_close(problem.flow(x_t, t, s), (4 * fine - coarse) / 3, rtol=1e-6, atol=1e-6)
    back = problem.flow(problem.flow(x_t, t, s), torch.full((16,), s), torch.full((16,), t))
    torch.testing.assert_close(back, x_t, rtol=1e-6, atol=1e-6)
    assert problem.flow(x_t.float(), t, s).dtype == torch.float32


@every
def test_samples_have_the_law(problem: Problem) -> None:
    data = problem.sample(20_000, 3)
    assert torch.equal(data, problem.sample(20_000, 3))
    # D at noise far above the data is their mean, less the pull of x: E[x_0] to 0.05 standard errors of 20,000
    far = problem.denoiser(torch.zeros(1, *data.shape[1:]).double(), torch.tensor([1e4]).double())[0]
    assert ((data.mean(0) - far).abs() < 5 * data.std(0) / 20_000**0.5 + 1e-3).all()


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
@every
def test_jumps_are_those_of_the_tables(problem: Problem, theta: float) -> None:
    levels = ap.log_noise_levels(120)
    precond = ap.AnalyticPreconditioning.from_coefficients(levels, problem.l(levels), problem.s(levels), theta=theta)
    t, s = torch.tensor([5.0, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.01], dtype=torch.float64)
    for got, expected in zip(precond(t, s), problem.jump(t, s, theta), strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-8)  # splines through 120 levels, times c_out


def test_jump_of_one_variance_is_the_flow() -> None:
    problem = GaussianProblem([0.25, 0.25])
    assert problem.g_rms(LEVELS).eq(0).all()
    assert problem.s(LEVELS).eq(0).all()
    c_skip, c_out = problem.jump(5.0, 1.0)
    x = torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    # backward: D is asked at the end of the jump, of the flow's own point there
    landed = problem.flow(x, 5.0, 1.0)
    torch.testing.assert_close(c_skip * x + c_out * problem.denoiser(landed, torch.tensor([1.0])), landed)
    same = problem.jump(2.0, 2.0)
    assert (float(same.c_skip), float(same.c_out)) == (1.0, 0.0)
    with pytest.raises(ValueError, match=r"0 < s <= t, got t = 1, s = 2"):
        problem.jump(torch.tensor([3.0, 1.0]), 2.0)


def test_shapes() -> None:
    problem = GaussianProblem(torch.ones(3, 2, 2), mean=torch.arange(3.0)[:, None, None])
    assert problem.sample(5, 0).shape == (5, 3, 2, 2)
    grid = torch.ones(2, 3)
    for function in (problem.l, problem.g_rms, problem.s, problem.log_L, mixture_problem().l, mixture_problem().s):
        assert function(grid).shape == (2, 3)
    assert problem.jump(grid, torch.tensor(0.5)).c_out.shape == (2, 3)
    for wrong in ({"variances": (1.0,)}, {"variances": (1.0, 0.0)}, {"weights": (1.0, -1.0)}):
        numbers: dict[str, tuple[float, ...]] = {"means": (0.0, 1.0), "variances": (1.0, 1.0), **wrong}
        with pytest.raises(ValueError, match=r"one number per component|must be positive"):
            MixtureProblem(**numbers)


def test_a_mixture_of_one_is_a_gaussian() -> None:
    one, other = MixtureProblem((0.3,), (0.5,)), GaussianProblem((0.5,), 0.3)
    x = torch.tensor([[0.1], [2.0]], dtype=torch.float64)
    pairs: list[tuple[Tensor, Tensor]] = [(one.l(LEVELS), other.l(LEVELS)), (one.s(LEVELS), other.s(LEVELS))]
    pairs += [(one.g_rms(LEVELS), other.g_rms(LEVELS)), (one.flow(x, 2.0, 0.1), other.flow(x, 2.0, 0.1))]
    pairs += [(one.log_L(LEVELS).diff(), other.log_L(LEVELS).diff())]
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
