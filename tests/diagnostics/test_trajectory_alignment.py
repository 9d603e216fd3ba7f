"""A student's jumps against the teacher's ODE: closed forms on Gaussian data."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from problems import gaussian_problem
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.diagnostics.trajectory_alignment import TrajectoryAlignment, trajectory_alignment

PROBLEM = gaussian_problem()
LEVELS = ap.karras_noise_levels(8)
VARIANCES = PROBLEM.variances.numpy()


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    """One sample whose squares are their expectations at the first level."""
    return (PROBLEM.variances + LEVELS[0] ** 2).sqrt()[None].to(dtype)


def exact_student(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    c = PROBLEM.variances.to(x_t.dtype)
    return ((c + s[:, None] ** 2) / (c + t[:, None] ** 2)).sqrt() * x_t


def euler_student(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return ap.CTMPreconditioning().jump(x_t, PROBLEM.denoiser(x_t, t), t, s)


def test_perfect_student_has_no_errors_but_the_solvers() -> None:
    worst = []
    for num_steps in (8, 16, 32):
        errors = trajectory_alignment(PROBLEM.denoiser, exact_student, start(), LEVELS, num_steps=num_steps)
        assert errors.from_start_relative is not None
        worst.append(max(errors.from_start_relative.max().item(), errors.to_end_relative.max().item()))
    assert worst[-1] < 1e-10  # measured: 3.2e-11
    order = np.log2(worst[0] / worst[-1]) / 2
    assert order > 5.0 - 0.3  # 6.9 measured: the method's fifth-order error is small


def test_untrained_ctm_student_in_closed_form() -> None:
    """The teacher's own denoiser in CTM's Euler jump: x_s = (s/t + (1 - s/t) w_t) x_t with w = c / (c + t^2)."""
    errors = trajectory_alignment(PROBLEM.denoiser, euler_student, start(), LEVELS, num_steps=32)
    assert torch.equal(errors.levels, LEVELS)
    size = {t: np.sqrt(VARIANCES + t**2) for t in LEVELS.tolist()}  # of x_t, per element

    def miss(t: float, s: float) -> float:
        factor = s / t + (1 - s / t) * VARIANCES / (VARIANCES + t**2)
        return float(np.sqrt(((factor * size[t] - size[s]) ** 2).mean()))

    first, *between, last = LEVELS.tolist()
    expected = [miss(first, s) for s in (*between, last)], [miss(t, last) for t in (first, *between)]
    sizes = [float(np.sqrt((size[s] ** 2).mean())) for s in (*between, last)]
    for found, values, divisor in (
        (errors.from_start, expected[0], 1.0),
        (errors.to_end, expected[1], 1.0),
        (errors.from_start_relative, expected[0], np.asarray(sizes)),
        (errors.to_end_relative, expected[1], sizes[-1]),
    ):
        assert found is not None
        # the solver's error: 3.2e-11 of x_s, measured, with x_s up to 43
        np.testing.assert_allclose(found, np.asarray(values) / divisor, rtol=1e-5, atol=1e-4)


def test_float32_students_of_both_kinds_get_conditions_and_float32_levels() -> None:
    class Network(nn.Module):
        """F such that EDM's denoiser around it is the teacher's, for data N(0, 1/4): 0."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor, *c_noise: Tensor, label: Tensor) -> Tensor:
            assert label.shape == (4,)
            assert {x.dtype, *(c.dtype for c in c_noise)} == {torch.float32}
            return self.scale * x

    def teacher(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        assert x.dtype == t.dtype == torch.float32
        return x / (1 + 4 * t[:, None] ** 2)

    x, label = 80 * torch.ones(4, 3), torch.arange(4)
    network = Network()
    trajectory = ap.ConsistencyTrajectoryModel(network, ap.CTMPreconditioning())
    end_only = ap.ConsistencyModel(network, ap.CTMPreconditioning())
    with global_rng_untouched():
        both = trajectory_alignment(teacher, trajectory, x, LEVELS, label=label)
        one = trajectory_alignment(teacher, end_only, x, LEVELS, to_end_only=True, label=label)
    assert one.from_start is one.from_start_relative is None
    torch.testing.assert_close(one.to_end, both.to_end, rtol=1e-5, atol=1e-6)  # the same jumps, in float32
    assert not both.to_end.requires_grad
    # the last jump is from 80 to 0.002 in both lists
    assert both.from_start is not None
    assert both.from_start[-1].item() == pytest.approx(both.to_end[0].item(), rel=1e-5)


def test_dtypes_that_students_and_the_report_get() -> None:
    seen = set()

    def student(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        seen.add((x_t.dtype, t.dtype, s.dtype, t.shape, s.shape))
        return x_t

    x = start(torch.bfloat16).expand(3, -1)
    errors = trajectory_alignment(PROBLEM.denoiser, student, x, LEVELS.float())
    assert seen == {(torch.bfloat16, torch.float32, torch.float32, (3,), (3,))}
    assert errors.to_end.dtype == errors.levels.dtype == torch.float64
    # a student that does nothing is off by the distance to the end, nearly all of x
    assert errors.to_end[0].item() == pytest.approx(80.0, rel=0.01)


class Counter:
    """A teacher that counts the samples it evaluates."""

    def __init__(self) -> None:
        self.evaluations = 0

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.evaluations += len(x)
        return PROBLEM.denoiser(x, t)


def test_teacher_evaluations_are_as_documented() -> None:
    teacher = Counter()
    trajectory_alignment(teacher, exact_student, start().expand(2, -1), LEVELS, num_steps=4)
    assert teacher.evaluations == 2 * (7 * 3 * 4 + 1)


def align(student: Any = exact_student, teacher: Any = None, x: Any = None, **options: Any) -> TrajectoryAlignment:
    options = {"levels": LEVELS, **options}
    return trajectory_alignment(teacher, student, start() if x is None else x, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"student": 1}, TypeError, r"student must be callable as student\(x_t, t, s\), got int"),
        ({"teacher": 1}, TypeError, r"denoiser must be callable as denoiser\(x, t\), got int"),
        ({"x": torch.ones(2, dtype=torch.int64)}, TypeError, r"x must be a floating-point tensor, got torch\.int64"),
        ({"x": torch.ones(0, 6)}, ValueError, r"x must be a batch of at least one sample, .*got \(0, 6\): leave empty"),
        ({"levels": LEVELS[:1]}, ValueError, r"levels must be 1-D with at least 2"),
        ({"levels": LEVELS.flip(0)}, ValueError, r"levels must be strictly decreasing"),
        ({"num_steps": 3}, ValueError, r"num_steps must be even, .* got 3"),
        ({"student": lambda x, t, s: x[:, :2]}, ValueError, r"student must return x's shape \(1, 6\), got \(1, 2\)"),
        ({"student": lambda x, t, s: (x,)}, TypeError, "student must return a floating-point tensor, got tuple"),
        (
            {"student": ap.ConsistencyModel(lambda x, c: x, ap.CTMPreconditioning())},
            ValueError,
            r"s must be sigma_min = 0\.002",  # to_end_only=True is for it
        ),
    ],
)
def test_refused_before_the_teacher_is_called(options: dict[str, Any], error: type[Exception], match: str) -> None:
    counter = Counter()
    with pytest.raises(error, match=match):
        align(**{"teacher": counter, **options})
    assert counter.evaluations == 0
