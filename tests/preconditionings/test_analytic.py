"""The analytic preconditioning against adaptive quadrature, golden numbers and its special cases."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from problems import coefficient_tables, gaussian_problem
from torch import Tensor

import analytic_precond as ap

PROBLEM = gaussian_problem()
FORMS = {"backward": 1.0, "forward": 0.0, "half": 0.5}

# Gaussian with variances (4, 1, 0.25, 0.05, 0.01, 0.001), S = rms(g); adaptive quadrature at 1e-11 by another program
GOLDEN = [
    (80, 5, (0.06251380048, 0.516477604), (0.06248547292, 7.67287915)),
    (80, 0.002, (3.33904199e-06, 0.9998526981), (-0.002306652734, 43.68398916)),
    (5, 1, (0.2035140411, 0.6385773588), (0.1942811025, 1.580142549)),
    (2, 0.5, (0.2599816791, 0.6793629525), (0.2313051664, 0.9962423674)),
    (1, 0.1, (0.1165891397, 0.8680725833), (0.03246230558, 1.097160807)),
    (0.5, 0.002, (0.0004752437614, 0.9995030473), (-0.07860964846, 1.127912895)),
    (1, 0.999, (0.9990000279, 0.0009998610064), (0.9989999721, 0.001000139116)),
]


def build(theta: float, num: int = 120) -> ap.AnalyticPreconditioning:
    return ap.AnalyticPreconditioning.from_coefficients(*coefficient_tables(PROBLEM, num), theta=theta)


@pytest.mark.parametrize(("t", "s", "backward", "forward"), GOLDEN)
def test_golden_numbers(t: float, s: float, backward: tuple[float, float], forward: tuple[float, float]) -> None:
    tables = coefficient_tables(PROBLEM, 2000)
    for discretization, expected in (("backward", backward), ("forward", forward)):
        precond = ap.AnalyticPreconditioning.from_coefficients(*tables, discretization)
        got = [c.item() for c in precond(float(t), float(s))]
        np.testing.assert_allclose(got, expected, rtol=6e-10)  # ten digits are given


def jumps() -> list[tuple[float, float]]:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(40):
        t, s = sorted(np.exp(rng.uniform(math.log(0.002), math.log(80), 2)), reverse=True)
        pairs.append((float(t), float(s)))
        near = np.float32(max(t, 0.0021))
        pairs.append((float(near), float(near * np.float32(1 - 2e-4))))  # float32 levels, taken as exact
    return [*pairs, (80.0, 0.002), (80.0, 79.9), (0.00201, 0.002)]


@pytest.mark.parametrize("form", FORMS)
def test_quadrature_with_120_levels(form: str) -> None:
    theta = FORMS[form]
    precond = build(theta)
    for t, s in jumps():
        c_skip, c_out = (c.item() for c in precond(t, s))
        skip, out = (c.item() for c in PROBLEM.jump(t, s, theta))
        # the demand is 1e-6; the quintic spline reaches 4e-10, but in the forward form an error of l_t near the end of
        # the grid, where l_t itself is 1e-4, is multiplied by c_out
        assert c_out == pytest.approx(out, rel=4e-9), (t, s)
        if skip >= 1e-6:
            assert c_skip == pytest.approx(skip, rel=4e-9 if theta == 1 else 2e-7), (t, s)


def test_float32_levels_are_taken_as_exact() -> None:
    precond = build(1.0)
    t = torch.tensor([80.0, 3.7, 0.5, 0.0031])
    s = t * (1 - 2e-4)
    exact = precond(t.double(), s.double())
    for got, wide in zip(precond(t, s), exact, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), wide, rtol=6e-8, atol=0)  # one rounding


def test_statistics_and_tables_lead_to_the_same_jumps() -> None:
    stats = ap.estimate_statistics(PROBLEM.denoiser, PROBLEM.sample(256, 0), num_samples=512, progress=False)
    direct = ap.AnalyticPreconditioning(stats)
    tabled = ap.AnalyticPreconditioning.from_coefficients(stats.levels, stats.l, stats.s)
    t, s = torch.tensor(jumps(), dtype=torch.float64).T
    for a, b in zip(direct(t, s), tabled(t, s), strict=True):
        # s is the derivative of a quintic spline: its own spline differs by a sixth derivative, more at the ends
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)
    by_jvp = ap.estimate_statistics(
        PROBLEM.denoiser, PROBLEM.sample(256, 0), num_samples=512, s_method="jvp", progress=False
    )
    jvp = ap.AnalyticPreconditioning(by_jvp)
    assert torch.equal(
        jvp(t, s).c_out, ap.AnalyticPreconditioning.from_coefficients(by_jvp.levels, by_jvp.l, by_jvp.s)(t, s).c_out
    )


def test_estimated_statistics_reach_the_true_jumps() -> None:
    """End to end on the default path: 4096 samples bring c_out within 2 % and c_skip within 5 % of the truth."""
    stats = ap.estimate_statistics(PROBLEM.denoiser, PROBLEM.sample(2048, 1), progress=False)
    precond = ap.AnalyticPreconditioning(stats)
    for t, s, (skip, out), _ in GOLDEN:
        c_skip, c_out = precond(float(t), float(s))
        assert c_out.item() == pytest.approx(out, rel=0.02)
        assert c_skip.item() == pytest.approx(skip, rel=0.05)


class TestSpecialCases:
    levels = ap.log_noise_levels(120)
    t, s = torch.tensor(jumps(), dtype=torch.float64).T

    @pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
    def test_ctm(self, theta: float) -> None:
        zero = torch.zeros_like(self.levels)
        precond = ap.AnalyticPreconditioning.from_coefficients(self.levels, zero, zero, theta=theta)
        for got, expected in zip(precond(self.t, self.s), ap.CTMPreconditioning()(self.t, self.s), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=0)

    def test_trigflow_euler(self) -> None:
        """l = v / (v + t^2) and S proportional to EDM's c_out: an Euler step in the angle arctan(t / sigma_data)."""
        v = 0.25
        l = v / (v + self.levels**2)
        # ln c_out = ln t - ln(t^2 + v) / 2, so s_t = -t d/dt ln c_out = -v / (t^2 + v)
        precond = ap.AnalyticPreconditioning.from_coefficients(self.levels, l, -l, "forward")
        t, s = self.t, self.s
        angle = (t / 0.5).arctan() - (s / 0.5).arctan()
        # closed form from L = (v + t^2)^-1/2, S = c_out_edm: N_s - N_t = angle, c_out = (N_s - N_t) / (L_s S_t)
        c_skip, c_out = precond(t, s)
        out = angle * (s**2 + v).sqrt() * (t**2 + v).sqrt() / (0.5 * t)
        torch.testing.assert_close(c_out, out, rtol=1e-8, atol=0)
        scale = ((s**2 + v) / (t**2 + v)).sqrt()  # L_t / L_s
        torch.testing.assert_close(c_skip, scale - v / (v + t**2) * out, rtol=1e-7, atol=1e-9)

    @pytest.mark.parametrize("theta", [0.0, 1.0])
    def test_dpm_solver_v3_of_order_one_is_the_forward_form(self, theta: float) -> None:
        """Its published update with l_v3 = 1 - l_t, s_v3 = s_t, b = 0 and the noise prediction eps = (x - D) / t."""
        l, s_t = 1 / (1 + 4 * self.levels**2), torch.tanh(self.levels.log()) - 0.3
        precond = ap.AnalyticPreconditioning.from_coefficients(self.levels, l, s_t, theta=theta)
        x, D = torch.tensor(1.3), torch.tensor(-0.4)
        lam = torch.linspace(-math.log(5.0), -math.log(0.7), 20001, dtype=torch.float64)
        level = torch.exp(-lam)
        l_v3, s_v3 = 1 - 1 / (1 + 4 * level**2), torch.tanh(level.log()) - 0.3
        cum_l = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(l_v3, lam)])
        cum_s = torch.cat([torch.zeros(1), torch.cumulative_trapezoid(s_v3, lam)])
        integral = torch.trapezoid((cum_l + cum_s).exp(), lam)
        f = level[0] * (x - D) / level[0] - l_v3[0] * x  # sigma eps - l x
        x_s = (-cum_l[-1]).exp() * (x - f * integral)
        forward = precond.jump(x[None], D[None], level[:1], level[-1:])[0]
        # 20,000 trapezoids: 1e-8; the backward form is another scheme
        assert (abs(forward - x_s) < 1e-6) == (theta == 0.0)

    def test_isotropic_gaussian_statistics(self) -> None:
        stats = ap.estimate_statistics(
            ap.GaussianDenoiser(0.25), torch.randn(64, 4, generator=torch.Generator().manual_seed(0)).double() / 2,
            num_samples=64, progress=False,
        )  # fmt: skip
        zero = torch.zeros_like(stats.levels)
        tabled = ap.AnalyticPreconditioning.from_coefficients(stats.levels, 0.25 / (0.25 + stats.levels**2), zero)
        for got, expected in zip(
            ap.AnalyticPreconditioning(stats)(self.t, self.s), tabled(self.t, self.s), strict=True
        ):
            assert bool(torch.isfinite(got).all())
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-15)
        # g = 0: with D = l x, every form must follow the exact flow sqrt((c + s^2) / (c + t^2)), to the splines' 1e-8
        x = torch.ones_like(self.t)
        l_t = 0.25 / (0.25 + self.t**2)
        flow = ((0.25 + self.s**2) / (0.25 + self.t**2)).sqrt()
        forward = ap.AnalyticPreconditioning(stats, "forward")
        torch.testing.assert_close(forward.jump(x, l_t * x, self.t, self.s), flow, rtol=1e-6, atol=0)


def rough_tables(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    num = draw(st.integers(2, 40))
    numbers = st.lists(st.floats(-1, 1), min_size=num, max_size=num)
    l = torch.tensor(draw(numbers), dtype=torch.float64).add(1).div(2)
    s = torch.tensor(draw(numbers), dtype=torch.float64).mul(1.5)
    return ap.log_noise_levels(num, 0.01, 10.0), l, s


@given(st.composite(rough_tables)(), st.lists(st.floats(0, 1), min_size=16, max_size=16))
def test_any_table_gives_finite_coefficients_with_the_boundary(
    tables: tuple[Tensor, Tensor, Tensor], places: list[float]
) -> None:
    try:
        precond = ap.AnalyticPreconditioning.from_coefficients(*tables)
    except ValueError as error:  # rough tables can overshoot below zero between levels
        assert "denominator" in str(error)  # noqa: PT017
        return
    t = 0.01 * 1000 ** torch.tensor(places, dtype=torch.float64)
    s = 0.01 * (t / 0.01) ** torch.tensor(places[::-1], dtype=torch.float64)
    c_skip, c_out = precond(t, torch.minimum(s, t))
    assert bool(torch.isfinite(c_skip).all() & torch.isfinite(c_out).all())
    assert bool((c_out >= 0).all() & (c_skip > 0).all())
    assert torch.equal(precond(t, t).c_skip, torch.ones_like(t))
    assert torch.equal(precond(t, t).c_out, torch.zeros_like(t))


def test_coefficients_that_overflow_are_refused_for_what_they_are() -> None:
    levels = ap.log_noise_levels(20)
    for l, s in ((0, 100.0), (-99, -100.0)):  # of the latter ln(L S) is flat
        with pytest.raises(ValueError, match=r"ln\(L S\), ln L or ln S span more than 600 over the levels, got 1\d{3}"):
            ap.AnalyticPreconditioning.from_coefficients(levels, 0 * levels + l, 0 * levels + s)


def test_tables_written_in_place_or_exchanged_are_the_ones_used() -> None:
    levels, l, s = coefficient_tables(PROBLEM, 40)
    known = ap.AnalyticPreconditioning.from_coefficients(levels, l, s)
    for way in ("in place", "exchanged", "moved", "copied"):
        other = ap.AnalyticPreconditioning.from_coefficients(levels, 0 * l, 0 * s)
        other(4.0, 1.0)
        if way == "exchanged":
            answer = torch.func.functional_call(other, known.state_dict(), (4.0, 1.0))
            assert other(4.0, 1.0).c_skip.item() == pytest.approx(0.25)
        else:
            for name, table in other.state_dict().items():
                table.copy_(known.state_dict()[name])
            other = copy.deepcopy(other) if way == "copied" else other.double() if way == "moved" else other
            answer = other(4.0, 1.0)
        assert answer == known(4.0, 1.0)


@pytest.mark.parametrize("theta", [0.5, 1.0])
def test_many_levels_at_once_are_those_of_few(theta: float) -> None:
    """In values, shape and gradients: calls above 4,096 levels are cut."""
    precond = build(theta, 30)
    noise = torch.rand(2, 3, 2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = (0.002 * 4e4 ** noise.sort(0, descending=True).values).requires_grad_()

    def slope(jumps: ap.Scalings) -> Tensor:
        return torch.autograd.grad((jumps.c_skip + 2 * jumps.c_out).sum(), (t, s))[0]

    few = [precond(*levels) for levels in zip(t, s, strict=True)]
    many = precond(t, s)
    assert torch.equal(many.c_skip, torch.stack([jumps.c_skip for jumps in few]))
    assert torch.equal(many.c_out, torch.stack([jumps.c_out for jumps in few]))
    assert torch.equal(slope(many), sum(slope(jumps) for jumps in few))
    assert torch.equal(torch.vmap(precond)(t, s).c_out, many.c_out)


@pytest.mark.long
def test_many_levels_are_exported_for_any_number() -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.precond = build(1.0, 30)

        def forward(self, t: Tensor, s: Tensor) -> Tensor:
            return self.precond(t, s).c_out

    batch = torch.export.Dim("batch")
    t, s = torch.tensor([[5.0, 6.0], [1.0, 2.0]])
    exported = torch.export.export(Both(), (t, s), dynamic_shapes=({0: batch}, {0: batch})).module()
    many = torch.full((5000,), 5.0), torch.full((5000,), 1.0)
    torch.testing.assert_close(exported(*many), build(1.0, 30)(*many).c_out)
