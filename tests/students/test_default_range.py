"""Defaults of noise levels come from the student, whose type decides what is known of it, not its attributes' names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import analytic_precond as ap
from analytic_precond.preconditionings.hand_crafted import CMPreconditioning
from analytic_precond.students.base import default_range, student_behind

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
NOISE = torch.randn(1, 2, 3, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, *c_noise: Tensor) -> Tensor:
        return self.layer(x)


def narrow() -> ap.AnalyticPreconditioning:
    levels = ap.log_noise_levels(40, 0.02, 14.6)
    return ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + 4 * levels**2), 0 * levels)


def students() -> list[Any]:
    torch.manual_seed(0)
    return [kind(Network(), narrow()) for kind in (ap.ConsistencyTrajectoryModel, ap.ConsistencyModel)]


WRAPPERS: dict[str, Callable[[Any], Any]] = {
    "alone": lambda student: student,
    "averaged": AveragedModel,
    "exponential average": lambda student: ap.exponential_moving_average(student, 0.9),
    "compiled": lambda student: torch.compile(student, backend="eager"),
    "both": lambda student: torch.compile(AveragedModel(student), backend="eager"),
}


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_samplers_end_where_the_student_does(wrap: Callable[[Any], Any]) -> None:
    for student in students():
        wrapped = wrap(student)
        explicit: dict[str, Any] = {"sigma_min": 0.02}
        samples = [
            (ap.sample_one_step, (14.6,), {}),
            (ap.sample_one_step, (), {"t": None}),
            (ap.sample_multistep, ([14.6, 1.0],), {"noise": NOISE}),
            (ap.sample_multistep, ([14.6, 1.0, 0.0],), {"noise": NOISE}),
        ]
        if isinstance(student, ap.ConsistencyTrajectoryModel):
            samples += [
                (ap.sample_gamma, ([14.6, 1.0, 0.0], 0.5), {"noise": NOISE}),
                (ap.sample_deterministic, ([14.6, 1.0, 0.0],), {}),
            ]
        for sample, args, kwargs in samples:
            by_default = sample(wrapped, X, *args, **kwargs)  # type: ignore[operator]
            given = {**kwargs, **explicit} if kwargs.get("t", 0) is not None else {"t": 14.6, **explicit}
            assert torch.equal(by_default, sample(student, X, *args, **given))  # type: ignore[operator]


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_times_and_the_loss_end_where_the_student_does(wrap: Callable[[Any], Any]) -> None:
    student = wrap(students()[0])

    def draw(**options: Any) -> ap.JumpTimes:
        return ap.sample_continuous_times(200, generator=torch.Generator().manual_seed(0), **options)

    times = draw(student=student)
    assert all(torch.equal(a, b) for a, b in zip(times[:3], draw(sigma_min=0.02, sigma_max=14.6)[:3], strict=True))
    assert torch.equal(draw(student=student, end="smallest").s, torch.full((200,), 0.02))

    x_0 = torch.randn(200, 3, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(200, 3, generator=torch.Generator().manual_seed(3))
    by_default, given = (
        ap.trajectory_distillation_loss(None, student, student, x_0, noise, times, **options).loss
        for options in ({}, {"sigma_min": 0.02})
    )
    assert torch.equal(by_default, given)


@pytest.mark.usefixtures("around")
def test_without_a_student_of_this_library_the_ends_are_edms() -> None:
    for callable_ in (None, lambda x, t, s: x, nn.Linear(1, 1), Foreign()):
        assert default_range(callable_) == (0.002, 80.0)
    for precond, ends in (
        (ap.CTMPreconditioning(), (0.002, 80.0)),
        (CMPreconditioning(sigma_min=0.01), (0.01, 80.0)),
        (CMPreconditioning(sigma_min=0.0), (0.0, 80.0)),
        (narrow(), pytest.approx((0.02, 14.6), rel=1e-15)),
    ):
        assert default_range(ap.ConsistencyTrajectoryModel(Network(), precond)) == ends
        assert ap.ConsistencyModel(Network(), precond).sigma_min == ends[0] if isinstance(ends, tuple) else 0.02
    model = ap.ConsistencyModel(Network(), narrow(), sigma_min=0.5)
    assert default_range(model) == (0.5, pytest.approx(14.6, rel=1e-15))
    assert student_behind(copy.deepcopy(AveragedModel(model))) is not None


class Foreign(nn.Module):
    """Somebody's own two-time student, with attributes of the same names as a ConsistencyModel's."""

    def __init__(self) -> None:
        super().__init__()
        self.precond, self.sigma_min = narrow(), 0.02

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s / t)[:, None] * x


@pytest.mark.usefixtures("around")
def test_somebodys_own_student_jumps_where_it_likes() -> None:
    assert student_behind(Foreign()) is None
    for student in (Foreign(), AveragedModel(Foreign())):
        reached = ap.sample_deterministic(student, X, [80.0, 5.0, 0.5])  # below its `sigma_min`, above its `precond`
        torch.testing.assert_close(reached, X * 0.5 / 80)
    message = r"range: jumps must end at sigma_min = 0\.02, .*, got 5: call sample_one_step or sample_multistep with"
    with pytest.raises(ValueError, match=message):
        ap.sample_deterministic(students()[1], X, [14.6, 5.0, 0.02])
    with pytest.raises(ValueError, match=r"must lie in the student's range"):
        ap.sample_deterministic(AveragedModel(students()[0]), X, [80.0, 5.0, 0.5])
