"""Noise schedules against their papers' formulas, and times against noise levels and back."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analytic_precond.noise_levels.schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, TrigFlowSchedule
from analytic_precond.noise_levels.vp_schedules import VPCosineSchedule, VPDiscreteSchedule, VPLinearSchedule

DDPM = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))  # levels 0.01 to 157

SCHEDULES: dict[str, Schedule] = {
    "vp-linear": VPLinearSchedule(),
    "vp-constant": VPLinearSchedule(beta_min=5.0, beta_max=5.0),
    "vp-cosine": VPCosineSchedule(),
    "vp-cosine-0": VPCosineSchedule(offset=0.0),
    "vp-discrete": VPDiscreteSchedule(DDPM),
    "edm": EDMSchedule(),
    "flow-0": RectifiedFlowSchedule(),
    "flow-1": RectifiedFlowSchedule(data_at=1),
    "trigflow": TrigFlowSchedule(sigma_data=0.7),
}

all_schedules = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@all_schedules
@settings(max_examples=50, deadline=None)
@given(log_t=st.floats(math.log(0.002), math.log(80.0)))
def test_level_to_time_and_back(schedule: Schedule, log_t: float) -> None:
    t = tensor(math.exp(log_t))
    # 1e-12: alpha or sigma is a difference from 1, of size 1/80 or 0.002 at the ends
    torch.testing.assert_close(schedule.noise_level(schedule.time(t)), t, rtol=1e-12, atol=0)


@all_schedules
@settings(max_examples=50, deadline=None)
@given(share=st.floats(0.0, 1.0))
def test_time_to_level_and_back(schedule: Schedule, share: float) -> None:
    ends = schedule.time(tensor(0.01, 60.0))
    time = ends[:1] + share * (ends[1:] - ends[:1])
    again = schedule.time(schedule.noise_level(time))
    torch.testing.assert_close(again, time, rtol=1e-11, atol=1e-12)


def cosine(u: float) -> float:
    return math.cos((u + 0.008) / 1.008 * math.pi / 2) / math.cos(0.008 / 1.008 * math.pi / 2)


CLOSED_FORMS: list[tuple[Schedule, Callable[[float], float], Callable[[float], float]]] = [
    (
        VPLinearSchedule(),
        lambda u: math.exp(-0.25 * u**2 * 19.9 - 0.05 * u),
        lambda u: math.sqrt(1 - math.exp(-0.5 * u**2 * 19.9 - 0.1 * u)),
    ),
    (VPCosineSchedule(), cosine, lambda u: math.sqrt(1 - cosine(u) ** 2)),
    (EDMSchedule(), lambda u: 1.0, lambda u: u),
    (RectifiedFlowSchedule(), lambda u: 1 - u, lambda u: u),
    (RectifiedFlowSchedule(data_at=1), lambda u: u, lambda u: 1 - u),
    (TrigFlowSchedule(sigma_data=0.5), lambda u: math.cos(u) / 0.5, math.sin),
]


@pytest.mark.parametrize(("schedule", "alpha", "sigma"), CLOSED_FORMS)
@pytest.mark.parametrize("u", [0.05, 0.5, 0.93])
def test_alpha_and_sigma_are_the_papers(
    schedule: Schedule, alpha: Callable[[float], float], sigma: Callable[[float], float], u: float
) -> None:
    torch.testing.assert_close(schedule.alpha(tensor(u)), tensor(alpha(u)), rtol=1e-13, atol=0)
    # 1e-11: the papers' square root of a difference, at small times
    torch.testing.assert_close(schedule.sigma(tensor(u)), tensor(sigma(u)), rtol=1e-11, atol=0)


@all_schedules
def test_rates_are_derivatives(schedule: Schedule) -> None:
    time = schedule.time(tensor(0.011, 0.3, 2.0, 70.0))
    for function, rate in zip((schedule.alpha, schedule.sigma), schedule.rates(time), strict=True):
        derivative = torch.func.jvp(function, (time,), (torch.ones_like(time),))[1]
        torch.testing.assert_close(rate, derivative, rtol=1e-9, atol=1e-12)


class TestDiscrete:
    schedule = VPDiscreteSchedule(DDPM)

    def test_indices_are_exact(self) -> None:
        i = torch.tensor([0, 1, 500, 998, 999])
        torch.testing.assert_close(self.schedule.alpha(i.double()), DDPM[i].sqrt(), rtol=1e-12, atol=0)
        levels = ((1 - DDPM[i]) / DDPM[i]).sqrt()
        torch.testing.assert_close(self.schedule.time(levels), i.double(), rtol=1e-12, atol=1e-9)

    def test_interpolates_log_levels(self) -> None:
        log_levels = 0.5 * ((1 - DDPM) / DDPM).log().numpy()
        t = np.geomspace(0.02, 100.0, 50)
        expected = np.interp(np.log(t), log_levels, np.arange(1000))
        np.testing.assert_allclose(self.schedule.time(torch.from_numpy(t)), expected, rtol=1e-9)

    def test_network_is_told_an_index_of_the_table(self) -> None:
        t = tensor(0.002, 0.0099, 1.0, 156.0, 1000.0)  # the table ends at 0.0100 and 157
        time = self.schedule.network_time(t)
        assert time[[0, 1, 4]].tolist() == [0.0, 0.0, 999.0]
        torch.testing.assert_close(time[2:4], self.schedule.time(t[2:4]))
        torch.testing.assert_close(self.schedule.noise_level(self.schedule.time(t)), t, rtol=1e-12, atol=0)

    def test_quantize_picks_the_nearest_log_level(self) -> None:
        schedule = VPDiscreteSchedule(DDPM, quantize=True)
        t = torch.logspace(-3, 3, 301, dtype=torch.float64)
        levels = ((1 - DDPM) / DDPM).sqrt()
        nearest = (t.log()[:, None] - levels.log()).abs().argmin(1)
        assert schedule.network_time(t).dtype == torch.int64
        assert schedule.network_time(t).tolist() == nearest.tolist()
        scaled = VPDiscreteSchedule(DDPM, quantize=True, time_scale=0.5)
        assert scaled.network_time(t).tolist() == (nearest / 2).tolist()

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ([0.9], r"shape \(T,\) with T >= 2, got \(1,\)"),
            ([0.5, 0.9], "decrease strictly inside"),
            ([0.9, 0.5, 0.0], "drop a final 0"),
            ([1.0, 0.5], "decrease strictly inside"),
            ([0.9, float("nan")], "finite"),
        ],
    )
    def test_bad_tables(self, table: list[float], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            VPDiscreteSchedule(tensor(*table))

    def test_table_is_copied(self) -> None:
        table = tensor(0.9, 0.5)
        schedule = VPDiscreteSchedule(table)
        table.zero_()
        assert schedule.alphas_cumprod.tolist() == [0.9, 0.5]


@all_schedules
def test_float32_in_float64_out_and_any_shape(schedule: Schedule) -> None:
    t = torch.full((2, 1, 3), 0.5)
    for function in (schedule.time, schedule.alpha, schedule.sigma, schedule.noise_level, schedule.network_time):
        result = function(t)
        assert (result.dtype, result.shape) == (torch.float64, t.shape)


def test_time_scale_is_for_the_network_only() -> None:
    schedule = RectifiedFlowSchedule(time_scale=1000)
    assert schedule.time(tensor(1.0)).item() == 0.5
    assert schedule.network_time(tensor(1.0)).item() == 500.0
    assert schedule.rates(tensor(0.5)).sigma.item() == 1.0


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: VPLinearSchedule(beta_min=0.0), ValueError, "beta_min must be positive"),
        (lambda: VPLinearSchedule(beta_min=3.0, beta_max=2.0), ValueError, "swap them"),
        (lambda: VPCosineSchedule(offset=-0.1), ValueError, "offset"),
        (lambda: RectifiedFlowSchedule(data_at=2), ValueError, "data_at must be 0 or 1"),
        (lambda: TrigFlowSchedule(sigma_data=0), ValueError, "sigma_data"),
        (lambda: EDMSchedule(time_scale=-1), ValueError, "time_scale"),
        (lambda: EDMSchedule().time(torch.tensor(3)), TypeError, "noise_level must be a floating-point"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()
