"""Devices without float64, such as Apple's: the CPU plays one, and any float64 that it is asked for raises."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import coefficient_tables, gaussian_problem
from torch import Tensor, nn
from without_float64 import DEMAND, NoFloat64, moved, pretence, without_float64

import analytic_precond as ap
from analytic_precond.fitted_preconditionings.least_squares import LeastSquaresPreconditioning
from analytic_precond.fitted_preconditionings.per_mode import PerModePreconditioning
from analytic_precond.fitted_preconditionings.shifted import ShiftedPreconditioning
from analytic_precond.preconditionings.hand_crafted import (
    BCMPreconditioning,
    CMPreconditioning,
    FlowMapPreconditioning,
    TrigFlowPreconditioning,
)

PROBLEM = gaussian_problem()
FLOAT32_MIN = float(np.nextafter(np.float32(0.002), np.float32(1)))


def analytic(theta: float = 1.0) -> ap.AnalyticPreconditioning:
    return ap.AnalyticPreconditioning.from_coefficients(*coefficient_tables(PROBLEM, 120), theta=theta)


def fit(of: Any, **options: Any) -> Any:
    levels, data = ap.log_noise_levels(24), PROBLEM.sample(64, 0)
    return of.fit(PROBLEM.denoiser, data, levels, num_trajectories=64, progress=False, **options)


LEAST_SQUARES = fit(LeastSquaresPreconditioning)
PER_MODE = fit(PerModePreconditioning, basis=torch.eye(6))
SHIFTED = fit(ShiftedPreconditioning)
SMALLEST = ap.log_noise_levels(60, 1e-4, 1e4)
ALL = {
    "backward": analytic(),
    "half": analytic(0.5),
    "forward": analytic(0.0),
    "a wide range": ap.AnalyticPreconditioning.from_coefficients(SMALLEST, 1 / (1 + SMALLEST), SMALLEST.log().sin()),
    "least squares": LEAST_SQUARES,
    "per mode": PER_MODE,
    "shifted": SHIFTED,
    **{f"ctm {outer}": ap.CTMPreconditioning(outer) for outer in ("euler", "variance", "euler_variance_mixed")},
    "cm": CMPreconditioning(sigma_min=FLOAT32_MIN),
    "bcm": BCMPreconditioning(),
    "trigflow": TrigFlowPreconditioning(),
    "flow map": FlowMapPreconditioning(),
}
every = pytest.mark.parametrize("precond", ALL.values(), ids=ALL.keys())


def float32_jumps(num: int = 6000) -> tuple[Tensor, Tensor]:
    """Levels anywhere; a third of the jumps short, down to neighbouring numbers, and as many at ends of cells."""
    rng = np.random.default_rng(0)
    low, high = math.log(FLOAT32_MIN), math.log(80)
    t = np.exp(rng.uniform(low, high, num)).astype(np.float32)
    t[::3] = np.exp(high + (low - high) * rng.integers(1, 512, len(t[::3])) / 512 + rng.normal(0, 1e-4, len(t[::3])))
    s = np.exp(rng.uniform(low, np.log(t))).astype(np.float32)
    for kind in (0, 1):
        s[kind::3] = t[kind::3] * (1 - 10 ** rng.uniform(-8, -2, len(t[kind::3])))
    t = t.clip(1.0001 * FLOAT32_MIN)
    s = np.minimum(s.clip(FLOAT32_MIN), np.nextafter(t, np.float32(0)))
    return torch.from_numpy(t), torch.from_numpy(s)


T, S = float32_jumps()


def targets(precond: ap.Preconditioning) -> Tensor:
    return torch.full_like(S, FLOAT32_MIN) if isinstance(precond, CMPreconditioning) else S


def terms(precond: ap.Preconditioning, c_skip: Tensor) -> Tensor:
    """What c_skip is a sum of, in size: it changes its sign where an explicit step goes too far."""
    if not isinstance(precond, ap.AnalyticPreconditioning) or precond.theta == 1:
        return c_skip
    part = precond.integrals(T.double(), S.double())
    explicit = (1 - precond.theta) * part.S_ratio
    return (part.L_ratio + explicit * part.l_t * part.r) / (1 + precond.theta * part.l_s * part.r)


@every
def test_coefficients_are_those_of_float64(precond: ap.Preconditioning) -> None:
    s = targets(precond)
    c_skip, c_out = precond(T.double(), s.double())
    narrow = moved(precond)
    with without_float64():
        got, on_network = narrow(T, s), narrow.on_network(T, s)
    assert got.c_out.dtype == torch.float32
    assert ((got.c_out.double() - c_out) / c_out).abs().max() < DEMAND
    sizes = (terms(precond, c_skip), c_out)
    assert ((got.c_skip.double() - c_skip) / sizes[0]).abs().max() < DEMAND
    exact = precond.on_network(T.double(), s.double())
    for value, expected, size in zip(on_network, exact, sizes, strict=True):
        assert ((value.double() - expected) / torch.maximum(size.abs(), expected.abs())).abs().max() < DEMAND


def test_coefficients_are_those_of_quadrature() -> None:
    for theta in (1.0, 0.0):
        narrow = moved(analytic(theta))
        for t, s in [*zip(T[:12].tolist(), S[:12].tolist(), strict=True), (80.0, FLOAT32_MIN), (80.0, 5.0)]:
            with without_float64():
                c_skip, c_out = narrow(torch.tensor(t), torch.tensor(s))
            t_exact, s_exact = float(np.float32(t)), float(np.float32(s))
            skip, out = (c.item() for c in PROBLEM.jump(t_exact, s_exact, theta))
            assert c_out.item() == pytest.approx(out, rel=DEMAND)
            if theta == 1:
                assert c_skip.item() == pytest.approx(skip, rel=DEMAND)


@every
def test_boundary_is_exact(precond: ap.Preconditioning) -> None:
    t = torch.cat([T, torch.tensor([80.0])]) if not isinstance(precond, CMPreconditioning) else S[:1] * 0 + FLOAT32_MIN
    narrow = moved(precond)
    for levels in (t, t.clamp(0.0021, 79).bfloat16().float() if len(t) > 1 else t):
        with without_float64():
            c_skip, c_out = narrow(levels, levels)
        assert torch.equal(c_skip, torch.ones_like(c_skip))
        assert torch.equal(c_out, torch.zeros_like(c_out))


@every
def test_derivatives_are_those_of_float64(precond: ap.Preconditioning) -> None:
    t, s = torch.tensor([0.31, 7.0, 43.0, 2.0]), torch.tensor([0.017, 1.3, 0.5, 1.999])
    if isinstance(precond, CMPreconditioning):
        s = torch.full_like(t, FLOAT32_MIN)

    def gradients(precond: ap.Preconditioning, t: Tensor, s: Tensor) -> Tensor:
        levels = [level.clone().requires_grad_() for level in (t, s)]
        c_skip, c_out = precond(*levels)
        return torch.stack(
            [g for c in (c_skip, c_out) for g in torch.autograd.grad(c.sum(), levels, retain_graph=True)]
        )

    narrow = moved(precond)
    with without_float64():
        got = gradients(narrow, t, s)
    expected = gradients(precond, t.double(), s.double())
    # sums of float32 terms of up to 1 / s
    torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-6 / float(s.min()))


class Network(nn.Module):
    """Linear in the data, and told both levels."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: Tensor, *c_noise: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y + sum(c[:, None] for c in c_noise)


@pytest.mark.usefixtures("around")
@every
def test_a_training_step(precond: ap.Preconditioning) -> None:
    if isinstance(precond, CMPreconditioning):
        student: nn.Module = ap.ConsistencyModel(Network(), precond, sigma_min=FLOAT32_MIN)
    else:
        student = ap.ConsistencyTrajectoryModel(Network(), precond)
    student = moved(student)
    x_0, noise = torch.randn(2, 16, 6, generator=torch.Generator().manual_seed(0))
    times = ap.JumpTimes(*(torch.full((16,), level) for level in (2.0, 1.0, FLOAT32_MIN)))
    with without_float64():
        result = ap.consistency_distillation_loss(
            lambda x, t: x / (1 + t[:, None] ** 2), student, student, x_0, noise, times, num_steps=1
        )
        result.loss.backward()
        sample = student(x_0, times.t, times.s)
    assert all(bool(torch.isfinite(p.grad).all()) for p in student.parameters())
    assert sample.dtype == torch.float32


@every
def test_nothing_is_lost_on_the_way(precond: ap.Preconditioning) -> None:
    s, narrow = targets(precond), moved(precond)
    with without_float64():
        expected = narrow(T, s).c_out
    state = narrow.state_dict()
    assert state.keys() == precond.state_dict().keys()
    assert all(torch.equal(value, precond.state_dict()[name]) for name, value in state.items())

    back = copy.deepcopy(narrow).to("cpu")  # which has float64 again
    assert torch.equal(back(T.double(), s.double()).c_out, precond(T.double(), s.double()).c_out)

    with pretence():
        others = [narrow.half(), pickle.loads(pickle.dumps(narrow)), moved(copy.deepcopy(precond).bfloat16())]
    for other in others:
        with without_float64():
            assert torch.equal(other(T, s).c_out, expected)


def test_checkpoints_and_files_hold_float64(tmp_path: Path) -> None:
    for precond in (LEAST_SQUARES, PER_MODE):
        narrow = moved(precond)
        narrow.save(tmp_path / "jumps.safetensors")
        loaded = type(precond).load(tmp_path / "jumps.safetensors")
        assert torch.equal(loaded(T.double(), S.double()).c_skip, precond(T.double(), S.double()).c_skip)
        assert torch.equal(narrow.levels, precond.levels)

    forward = analytic(0.0)
    expected = moved(forward)
    other = moved(ap.AnalyticPreconditioning.from_coefficients(*torch.tensor([[90.0, 0.001], [0.1, 0.9], [0.0, 0.0]])))
    other.load_state_dict(forward.state_dict())
    assert (other.sigma_max, other.sigma_min) == (80.0, 0.002)
    with without_float64():
        assert torch.equal(other(T, S).c_skip, expected(T, S).c_skip)


@pytest.mark.parametrize("precond", [analytic(), LEAST_SQUARES], ids=["analytic", "least squares"])
def test_compiles_into_one_graph_and_maps(precond: ap.Preconditioning) -> None:
    narrow = moved(precond)
    t, s = T[:64], S[:64]
    with pretence():
        torch.compiler.reset()
        compiled = torch.compile(narrow, fullgraph=True, backend="aot_eager")
        for got in (compiled(t, s), torch.vmap(lambda t, s: tuple(narrow(t, s)))(t, s)):
            torch.testing.assert_close(torch.stack(tuple(got)), torch.stack(tuple(narrow(t, s))), rtol=5e-7, atol=0)
        torch.compiler.reset()


def on_meta(precond: ap.Preconditioning) -> Callable[[], None]:
    student = moved(ap.ConsistencyTrajectoryModel(Network(), precond), "meta")
    x = torch.empty(4, 6, device="meta")
    grid = ap.log_noise_levels(10)

    def step() -> None:
        times = ap.sample_jump_times(4, grid, max_steps=3, generator=torch.Generator().manual_seed(0))
        teacher = ap.GaussianDenoiser(0.25)
        ap.trajectory_distillation_loss(teacher.to("meta"), student, student, x, x, times).loss.backward()
        assert student(x, grid[0], grid[-1]).dtype == torch.float32  # a grid is float64, on the CPU
        assert student.precond(5.0, 1.0).c_out.dtype == torch.float32

    return step


def test_no_float64_reaches_another_device() -> None:
    """The CPU has float64 here, the other device not: what is float64 on the CPU must not follow to the device."""
    step = on_meta(analytic())
    with without_float64("meta"):
        step()
    precond = moved(analytic(), "meta")
    assert precond(5.0, 1.0).c_out.device.type == "meta"
    with pytest.raises(TypeError, match="on float64"), NoFloat64("meta"):  # so does the watch see what it is to see
        copy.deepcopy(analytic()).to("meta")


def test_level_that_a_network_is_told() -> None:
    t, s = float32_jumps()
    narrow = moved(SHIFTED)
    with without_float64():
        q = narrow.network_level(t, s)
    torch.testing.assert_close(q.double(), SHIFTED.network_level(t.double(), s.double()), rtol=DEMAND, atol=0)
