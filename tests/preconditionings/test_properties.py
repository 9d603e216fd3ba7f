r"""What holds for the analytic preconditioning of any coefficients: finite or refused, boundary, order, invariances.

With $h = \ln(L S)$, $r(t, s) = \int e^{h(\lambda) - h(\lambda_s)} d\lambda$ over the jump. For a given s it grows with
t, and with it the backward $c_{out} = r / (1 + l_s r)$, whose derivative in r is $1 / (1 + l_s r)^2$, up to $1 / l_s$.
For $0 \le l \le 1$, $L_t / L_s \le 1$ falls as t grows, so the backward $c_{skip} = (L_t / L_s) / (1 + l_s r)$ lies in
(0, 1] and falls. In s nothing is monotone in general but the parts: $L_t / L_s$ falls and
$\int_t^s L S\, d\lambda / (L_t S_t) = r\, (S_s / S_t) / (L_t / L_s)$ grows as s falls.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import analytic_precond as ap
from analytic_precond import _precision
from analytic_precond.interpolation.integral_table import IntegralTable

ROUNDING = 1e-12  # of float64 in the tables' sums; monotone functions may waver by it
few = settings(max_examples=40)
thetas = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)


@st.composite
def grids(draw: st.DrawFn) -> Tensor:
    """5 to 150 noise levels, evenly or unevenly spaced in lambda, over ranges from a factor of 2 to 10^12."""
    num = draw(st.integers(5, 150))
    low = draw(st.floats(-9, 2))
    span = draw(st.floats(math.log(2), 27))
    unevenness = draw(st.sampled_from([0.0, 0.3, 0.9]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    steps = 1 + unevenness * rng.uniform(-1, 1, num - 1)
    share = np.concatenate([[0], steps.cumsum() / steps.sum()])
    return torch.from_numpy(np.exp(low + span * (1 - share)))


@st.composite
def smooth(draw: st.DrawFn, levels: Tensor) -> tuple[Tensor, Tensor]:
    """What teachers have: l rises from 0 to 1 once, s is a wave of order 1."""
    lam = -levels.log()
    place, width = draw(st.floats(-4, 4)), draw(st.floats(0.7, 3))
    height, length, phase = draw(st.floats(-1.5, 1.5)), draw(st.floats(3, 10)), draw(st.floats(0, 6))
    return torch.sigmoid(2 * (lam - place) / width), height * torch.sin(lam / length * 2 + phase)


@st.composite
def rough(draw: st.DrawFn, levels: Tensor, l_range: tuple[float, float] = (0.0, 1.0)) -> tuple[Tensor, Tensor]:
    """Noise, independent at each level."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = 10 ** draw(st.floats(-2, 1.5))
    l = rng.uniform(*l_range, len(levels))
    return torch.from_numpy(l), torch.from_numpy(scale * rng.uniform(-1, 1, len(levels)))


def jumps(levels: Tensor, seed: int, num: int = 200) -> tuple[Tensor, Tensor]:
    """Levels t >= s: anywhere, short, at the grid's own levels, and from end to end."""
    rng = np.random.default_rng(seed)
    low, high = math.log(levels[-1]), math.log(levels[0])
    t = rng.uniform(low, high, num)
    s = rng.uniform(low, t)
    s[: num // 4] = t[: num // 4] - 10 ** rng.uniform(-9, -2, num // 4)
    t, s = np.exp(t), np.exp(s)
    t[-20:], s[-20:] = np.sort(rng.choice(levels.numpy(), (2, 20)), axis=0)[::-1]
    t[-1], s[-1] = levels[0], levels[-1]
    t, s = (torch.from_numpy(v).clamp(float(levels[-1]), float(levels[0])) for v in (t, s))
    return t, torch.minimum(s, t)


def build(levels: Tensor, tables: tuple[Tensor, Tensor], theta: float) -> ap.AnalyticPreconditioning | None:
    """The preconditioning, or None where it is refused, which must be for a reason that names a level."""
    try:
        return ap.AnalyticPreconditioning.from_coefficients(levels, *tables, theta=theta)
    except ValueError as error:
        message = str(error)
        assert "denominator" in message or r"ln(L S)" in message
        assert "t = " in message or "jump from" in message
        return None


def check_any(precond: ap.AnalyticPreconditioning, levels: Tensor, interpolation: float) -> None:
    """Finite, exact on the diagonal, and the read-out, as far as the table's N' is L S."""
    t, s = jumps(levels, 0)
    c_skip, c_out = precond(t, s)
    assert bool(torch.isfinite(c_skip).all() & torch.isfinite(c_out).all())
    assert bool((c_out >= 0).all())
    same = precond(t, t)
    assert torch.equal(same.c_skip, torch.ones_like(t))
    assert torch.equal(same.c_out, torch.zeros_like(t))
    _, slopes = torch.func.jvp(lambda s: tuple(precond(t, s)), (t,), (torch.ones_like(t),))
    part = precond.integrals(t, t)
    # x - t d/ds (c_skip x + c_out D) = D, for all x and D
    torch.testing.assert_close(-t * slopes[1], torch.ones_like(t), rtol=interpolation, atol=0)
    size = float(1 + part.l_t.abs().max())
    torch.testing.assert_close(t * slopes[0], torch.ones_like(t), rtol=0, atol=interpolation * size)


@few
@given(st.data(), thetas)
def test_smooth_tables(data: st.DataObject, theta: float) -> None:
    levels = data.draw(grids())
    precond = build(levels, data.draw(smooth(levels)), theta)
    assume(precond is not None)
    assert precond is not None
    check_any(precond, levels, 1e-7)


@few
@given(st.data(), thetas, st.sampled_from([(0.0, 1.0), (0.4, 0.6), (-1.0, 2.0), (-30.0, 30.0)]))
def test_rough_tables(data: st.DataObject, theta: float, l_range: tuple[float, float]) -> None:
    levels = data.draw(grids())
    precond = build(levels, data.draw(rough(levels, l_range)), theta)
    if precond is not None:
        check_any(precond, levels, 1e-2)  # cells hardly follow the wildest tables that are accepted


@few
@given(st.data(), st.booleans())
def test_order_of_the_backward_form(data: st.DataObject, is_rough: bool) -> None:
    levels = data.draw(grids())
    precond = build(levels, data.draw(rough(levels, (0.2, 0.8)) if is_rough else smooth(levels)), 1.0)
    assume(precond is not None)
    assert precond is not None
    t, s = jumps(levels, 1)
    l_s = precond.integrals(t, s).l_s
    assert bool(((l_s >= 0) & (l_s <= 1)).all())  # between the levels, too: the spline is of the logit
    c_skip, c_out = precond(t, s)
    assert bool(((c_skip > 0) & (c_skip <= 1 + ROUNDING)).all())
    assert bool((c_out * l_s <= 1 + ROUNDING).all())

    later = (t + 0.3 * (levels[0] - t)).clamp(max=float(levels[0]))  # another, larger t for the same s
    skip, out = precond(later, s)
    assert bool((out >= c_out * (1 - ROUNDING)).all())
    assert bool((skip <= c_skip * (1 + ROUNDING)).all())


@few
@given(st.data(), st.booleans())
def test_parts_compose_and_are_monotone_in_the_target(data: st.DataObject, is_rough: bool) -> None:
    levels = data.draw(grids())
    precond = build(levels, data.draw(rough(levels) if is_rough else smooth(levels)), 1.0)
    assume(precond is not None)
    assert precond is not None
    t, s = jumps(levels, 2)
    u = (t * s).sqrt().clamp(max=t).maximum(s)
    whole, first, second = (precond.integrals(*pair) for pair in ((t, s), (t, u), (u, s)))
    torch.testing.assert_close(whole.L_ratio, first.L_ratio * second.L_ratio, rtol=1e-11, atol=0)
    torch.testing.assert_close(whole.S_ratio, first.S_ratio * second.S_ratio, rtol=1e-11, atol=0)
    # N_s - N_t = (N_s - N_u) + (N_u - N_t), over L_s S_s; sums of many cells keep 106 bits of the largest
    r = first.r * second.L_ratio / second.S_ratio + second.r
    torch.testing.assert_close(whole.r, r, rtol=1e-9, atol=1e-13)
    grown, begun = (part.r * part.S_ratio / part.L_ratio for part in (whole, first))
    assert bool((grown >= begun * (1 - 1e-9)).all())


@few
@given(grids(), st.floats(-1, 1), st.floats(-3, 3), thetas)
def test_constant_coefficients(levels: Tensor, l: float, s_t: float, theta: float) -> None:
    """Closed form: h is linear, with slope k = 1 - l + s, so that r = (1 - (t/s)^-k) / k."""
    k = 1 - l + s_t
    w = math.log(levels[0] / levels[-1])
    assume(abs(k) > 1e-6 and -k * w < 45 and max(abs(k), 1 - l, abs(s_t)) * w < 500)
    r_end = -math.expm1(-k * w) / k
    assume(1 + theta * min(l, 0) * r_end > 0.01)  # refused below 0, ill-conditioned beside it
    constant = torch.ones_like(levels)
    precond = ap.AnalyticPreconditioning.from_coefficients(levels, l * constant, s_t * constant, theta=theta)
    t, s = jumps(levels, 3)
    w = ((t - s) / s).log1p()
    r, S_ratio = -torch.expm1(-k * w) / k, (s_t * w).exp()
    denominator = 1 + theta * l * r
    explicit = (1 - theta) * S_ratio * r
    c_skip, c_out = precond(t, s)
    # interpolation of exp over a cell, k (up to 5) times up to 0.053 wide
    torch.testing.assert_close(c_out, (explicit + theta * r) / denominator, rtol=1e-6, atol=1e-15)
    size = (((l - 1) * w).exp() + (l * explicit).abs()) / denominator
    expected = (((l - 1) * w).exp() - l * explicit) / denominator
    assert bool(((c_skip - expected).abs() <= 1e-6 * size).all())


@few
@given(st.data(), thetas, st.floats(-9, 9))
def test_units_and_constants_do_not_matter(data: st.DataObject, theta: float, shift: float) -> None:
    levels = data.draw(grids())
    l, s_t = data.draw(smooth(levels))
    precond = build(levels, (l, s_t), theta)
    assume(precond is not None)
    assert precond is not None
    t, s = jumps(levels, 4)

    # other units of data and noise: only t / s counts
    scaled = ap.AnalyticPreconditioning.from_coefficients(levels * math.exp(shift), l, s_t, theta=theta)
    ends = scaled.sigma_min, scaled.sigma_max
    t_scaled, s_scaled = ((level * math.exp(shift)).clamp(*ends) for level in (t, s))
    keep = (t - s) / s > 1e-6  # shorter jumps change by the rounding of their levels
    for got, expected in zip(scaled(t_scaled, s_scaled), precond(t, s), strict=True):
        torch.testing.assert_close(got[keep], expected[keep], rtol=1e-7, atol=1e-9)

    # S is defined up to a factor
    def table(constant: float) -> IntegralTable:
        return IntegralTable(80.0, 0.002, lambda lam: 1 / (1 + np.exp(-lam)), lambda lam: np.sin(lam) + constant)

    t, s = jumps(torch.tensor([80.0, 0.002]).double(), 5)
    for got, expected in zip(table(shift)(t, s), table(0.0)(t, s), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-15)


@few
@given(st.data(), thetas)
def test_twice_the_levels_change_little(data: st.DataObject, theta: float) -> None:
    """40 levels of a smooth teacher say what 79 say: the splines are of fifth degree."""
    fine = ap.log_noise_levels(79, 0.01, 10.0)
    l, s_t = data.draw(smooth(fine))
    few, many = (
        ap.AnalyticPreconditioning.from_coefficients(fine[::step], l[::step], s_t[::step], theta=theta)
        for step in (2, 1)
    )
    t, s = jumps(fine, 6)
    for got, expected in zip(few(t, s), many(t, s), strict=True):
        # levels 0.18 apart in lambda, waves of at least 9 and a logit that is a straight line
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@few
@given(st.data(), st.booleans())
def test_without_float64(data: st.DataObject, is_rough: bool) -> None:
    levels = data.draw(grids())
    precond = build(levels, data.draw(rough(levels) if is_rough else smooth(levels)), 1.0)
    assume(precond is not None)
    assert precond is not None
    t, s = (level.float().clamp(precond.sigma_min * (1 + 1e-7), precond.sigma_max) for level in jumps(levels, 7))
    s = torch.minimum(t, s)
    expected = precond(t.double(), s.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_precision, "WITHOUT_FLOAT64", ("cpu",))
        got = precond.to("cpu")(t, s)
    for narrow, wide in zip(got, expected, strict=True):
        assert narrow.dtype == torch.float32
        # float32 does without the polynomials of L S, which hardly follow the wildest tables that are accepted
        torch.testing.assert_close(narrow.double(), wide, rtol=1e-2 if is_rough else 2e-6, atol=0)
