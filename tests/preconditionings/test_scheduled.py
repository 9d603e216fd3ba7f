"""Jumps on x' = alpha x between a schedule's times, against exact flows and the schedules' own definitions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from foreign_networks import PATHS, Mixture
from problems import coefficient_tables, gaussian_problem
from torch import Tensor, nn

import analytic_precond as ap

PROBLEM = gaussian_problem()
T = torch.tensor([80.0, 9.0, 2.0, 0.5], dtype=torch.float64)
S = torch.tensor([0.01, 5.0, 2.0, 0.1], dtype=torch.float64)
X_T = T[:, None] * torch.randn(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
D = PROBLEM.denoiser(X_T, T)
TABLE = ap.VPDiscreteSchedule((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))
FIT: dict[str, Any] = {"num_trajectories": 32, "progress": False}


def preconditionings() -> dict[str, ap.Preconditioning]:
    levels, l, s = coefficient_tables(PROBLEM, 60)
    some, data = ap.log_noise_levels(20), PROBLEM.sample(64, 0)
    w = PROBLEM.variances / (PROBLEM.variances + levels[:, None] ** 2)
    return {
        "ctm": ap.CTMPreconditioning(),
        "analytic": ap.AnalyticPreconditioning.from_coefficients(levels, l, s),
        "forward": ap.AnalyticPreconditioning.from_coefficients(levels, l, s, "forward"),
        "per element": ap.PerElementPreconditioning.from_coefficients(levels, w, 0 * w, "forward"),
        "per mode": ap.PerModePreconditioning.fit(PROBLEM.denoiser, data, some, basis=torch.eye(6).double(), **FIT),
        "least squares": ap.LeastSquaresPreconditioning.fit(PROBLEM.denoiser, data, some, **FIT),
        "shifted": ap.ShiftedPreconditioning.fit(PROBLEM.denoiser, data, some, **FIT),
    }


PRECONDITIONINGS = preconditionings()
every = pytest.mark.parametrize("precond", PRECONDITIONINGS.values(), ids=PRECONDITIONINGS.keys())
paths = pytest.mark.parametrize("name", PATHS)


def times(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The schedule's times, and the factors of the data there, from its definition."""
    schedule, path = PATHS[name]
    here, there = schedule.time(T), schedule.time(S)
    (alpha_t, _), (alpha_s, _) = path(here * schedule.time_scale), path(there * schedule.time_scale)
    return here, there, alpha_t[:, None], alpha_s[:, None]


@paths
@every
def test_is_the_same_jump_in_another_variable(precond: ap.Preconditioning, name: str) -> None:
    here, there, alpha_t, alpha_s = times(name)
    scheduled = precond.on_schedule(PATHS[name][0])
    expected = alpha_s * precond.jump(X_T, D, T, S)
    got = scheduled.jump(alpha_t * X_T, D, here, there)
    # the table of 1000 steps and the cosine path lose digits at their ends
    torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)
    assert torch.equal(scheduled.jump(X_T, D, here, here), X_T)  # to the bit
    if not precond.coefficient_shape:
        c_skip, c_out = (c[:, None] for c in scheduled(here, there))
        torch.testing.assert_close(c_skip * alpha_t * X_T + c_out * D, expected, rtol=1e-7, atol=1e-9)
    else:
        assert scheduled(here, there).c_skip.shape == (4, *precond.coefficient_shape)


@paths
@every
def test_asks_the_network_as_the_denoiser_does(precond: ap.Preconditioning, name: str) -> None:
    """A raw network of the schedule, asked on its own variable: the student's jump."""
    schedule, path = PATHS[name]
    mixture = Mixture(2, "epsilon", path, schedule.time_scale)
    denoiser = ap.denoiser_from_network(
        lambda z, time: mixture(z[:, :6].reshape(-1, 2, 3), time).flatten(1), "epsilon", schedule
    )
    student = ap.ConsistencyTrajectoryModel.from_denoiser(lambda x, t, s: denoiser(x, t), precond)
    here, there, alpha_t, alpha_s = times(name)
    scheduled = precond.on_schedule(schedule)
    z, time = scheduled.query(alpha_t * X_T, here, there)
    alpha, sigma = (v[:, None] for v in path(time * schedule.time_scale))
    F = mixture(z.reshape(-1, 2, 3), time * schedule.time_scale).flatten(1)
    z_s = scheduled.jump(alpha_t * X_T, (z - sigma * F) / alpha, here, there)
    torch.testing.assert_close(z_s, alpha_s * student(X_T, T, S), rtol=1e-6, atol=1e-8)
    if precond.told_lower_level:
        assert (sigma / alpha < 0.95 * T[:, None])[:2].all()
    else:
        assert time is here


def test_exact_jump_of_a_flow() -> None:
    """Independent Gaussian elements, carried exactly by the forward form per element, between times of a flow."""
    c = PROBLEM.variances
    start, end = torch.tensor([0.9, 0.5], dtype=torch.float64), torch.tensor([0.5, 0.1], dtype=torch.float64)
    a, b = ((1 - v)[:, None] ** 2 * c + v[:, None] ** 2 for v in (start, end))
    z = a.sqrt() * torch.randn(2, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    denoised = (1 - start)[:, None] * c / a * z  # E[x_0 | z] of z = (1 - tau) x_0 + tau n
    jump = PRECONDITIONINGS["per element"].on_schedule(ap.RectifiedFlowSchedule()).jump
    torch.testing.assert_close(jump(z, denoised, start, end), (b / a).sqrt() * z, rtol=1e-4, atol=0)  # a table of 60


def test_times_as_users_have_them() -> None:
    table = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    on_table = ap.CTMPreconditioning().on_schedule(ap.VPDiscreteSchedule(table))
    steps = torch.tensor([999, 499, 19])
    c_skip, c_out = on_table(steps, 0)
    assert c_skip.dtype == torch.float32
    level = ((1 - table) / table).sqrt()
    ratio = level[0] / level[steps]
    torch.testing.assert_close(c_skip, (ratio * (table[0] / table[steps]).sqrt()).float())
    torch.testing.assert_close(c_out, ((1 - ratio) * table[0].sqrt()).float())
    z = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    for whole in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        first = torch.zeros(3, dtype=whole)
        torch.testing.assert_close(on_table.jump(z, 0 * z, steps, first), c_skip[:, None] * z)
        torch.testing.assert_close(on_table.schedule.noise_level(first), level[:1].expand(3))
    with pytest.raises(TypeError, match=r"time must be a floating-point tensor, got torch\.bool"):
        on_table(steps, steps == 0)
    asked, told = on_table.query(z, 999, 0)
    assert asked is z
    assert told == 999
    assert on_table(999, 0).c_skip.dtype == torch.float64

    for dtype in (torch.bfloat16, torch.float16):
        assert on_table.jump(z.to(dtype), z.to(dtype), steps, 0).dtype == dtype
        with pytest.raises(TypeError, match=r"must be float32 or float64"):
            on_table(steps.to(dtype), 0)


@pytest.mark.parametrize("name", ["flow-0", "flow-1", "trigflow", "vp-linear", "vp-cosine"])
def test_ends_of_the_range_survive_their_rounding(name: str) -> None:
    schedule, precond = PATHS[name][0], PRECONDITIONINGS["analytic"]
    scheduled = precond.on_schedule(schedule)
    exact = scheduled(schedule.time(torch.tensor(80.0)), schedule.time(torch.tensor(0.002)))
    rounded = [schedule.time(torch.tensor(level)).float() for level in (80.0, 0.002)]
    for start in (rounded[0], rounded[0].nextafter(torch.tensor(9.0)), rounded[0].nextafter(torch.tensor(-9.0))):
        for end in (rounded[1], rounded[1].nextafter(torch.tensor(9.0)), rounded[1].nextafter(torch.tensor(-9.0))):
            # alpha is that of the rounded time: 1 / 81 of a flow that ends in 1
            torch.testing.assert_close(scheduled(start, end).c_out.double(), exact.c_out, rtol=1e-4, atol=0)
    with pytest.raises(ValueError, match=r"jumps must go from t to s with 0\.002 <= s <= t <= 80"):
        scheduled(schedule.time(torch.tensor(80.1)), rounded[1])
    with pytest.raises(ValueError, match=r"jumps must go from t to s"):
        scheduled(rounded[1], rounded[0])


def test_is_a_module_that_travels() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.jump = PRECONDITIONINGS["analytic"].on_schedule(ap.RectifiedFlowSchedule())

        def forward(self, z: Tensor, denoised: Tensor, start: Tensor, end: Tensor) -> Tensor:
            return self.jump.jump(z, denoised, start, end)

    holder = Holder()
    z, start, end = X_T.float(), torch.tensor([0.9, 0.5, 0.3, 0.1]), torch.tensor([0.5, 0.4, 0.1, 0.05])
    expected = holder(z, D.float(), start, end)
    other = copy.deepcopy(holder).half()
    other.load_state_dict(holder.state_dict())
    assert torch.equal(other(z, D.float(), start, end), expected)
    torch.compiler.reset()
    compiled = torch.compile(holder, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, D.float(), start, end), expected)
    torch.compiler.reset()
    slope = torch.func.jvp(lambda v: holder.jump(v, end.double()).c_out, (start.double(),), (torch.ones(4).double(),))[
        1
    ]
    h = 1e-6
    up, down = (holder.jump(start.double() + k * h, end.double()).c_out for k in (1, -1))
    torch.testing.assert_close(slope, (up - down) / (2 * h), rtol=1e-5, atol=1e-6)


def test_times_that_pass() -> None:
    """A schedule's own ends in float32, and times beyond a table, compiled too."""
    flow = ap.FunctionSchedule(lambda u: 1 - u, lambda u: u, times=(0.0, 0.999))
    jump = ap.CTMPreconditioning().on_schedule(flow)(torch.tensor([0.999]), torch.tensor([0.5]))
    torch.testing.assert_close(jump.c_out, torch.tensor([1 - 0.5 / 0.999]), rtol=1e-5, atol=0)
    on_table = ap.CTMPreconditioning().on_schedule(TABLE)
    t, s = torch.tensor([500.0, 1000.0]), torch.tensor([-1.0, 1.0])
    compiled = torch.compile(lambda t, s: tuple(on_table(t, s)), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(t, s), tuple(on_table(t, s)), rtol=1e-6, atol=0)
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: p.on_schedule("flow"), TypeError, r"must be a Schedule, got str: .* VPDiscreteSchedule"),
        (lambda p: p.on_schedule(ap.RectifiedFlowSchedule())(1.0, 0.5), ValueError, r"pure noise has no finite level"),
        (lambda p: p.on_schedule(ap.RectifiedFlowSchedule())(True, 0.5), TypeError, r"a time must be .* got True"),
        (lambda p: p.on_schedule(ap.RectifiedFlowSchedule())("0.9", 0.5), TypeError, r"a time must be .* got '0\.9'"),
        (lambda p: p.on_schedule(ap.RectifiedFlowSchedule()).jump(X_T, D[:2], 0.5, 0.1), ValueError, r"shape"),
        (lambda p: p.on_schedule(ap.RectifiedFlowSchedule()).jump(X_T, D, T[:2] / 90, 0.1), ValueError,
         r"time_t must hold one noise level per sample"),
        (lambda p: p.on_schedule(ap.RectifiedFlowSchedule())(100.0, 500.0), ValueError,
         r"counted without its time_scale.*got 100, a noise level of -1\.01"),
        (lambda p: p.on_schedule(ap.TrigFlowSchedule())(torch.tensor(torch.pi / 2), 0.5), ValueError, r"pure noise"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(ap.CTMPreconditioning())
