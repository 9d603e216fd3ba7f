"""Noise schedules against their papers' formulas, and times against noise levels and back."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from analytic_precond.noise_levels.function_schedule import FunctionSchedule
from analytic_precond.noise_levels.schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, TrigFlowSchedule
from analytic_precond.noise_levels.vp_schedules import VPCosineSchedule, VPDiscreteSchedule, VPLinearSchedule

DDPM = torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))  # levels 0.01 to 157


def B(u: Tensor) -> Tensor:
    return 0.1 * u + 0.5 * 19.9 * u**2


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
    "vp-linear-1": VPLinearSchedule(data_at=1),
    "vp-cosine-1": VPCosineSchedule(data_at=1),
    "vp-respaced": VPDiscreteSchedule(DDPM[3::4], timesteps=torch.arange(3, 1000, 4)),
    "function-sub-vp": FunctionSchedule(lambda u: (-B(u) / 2).exp(), lambda u: -(-B(u)).expm1(), (0, 1)),
    "function-ve": FunctionSchedule(lambda u: 1.0, lambda u: 0.001 * 1e5**u, (0, 1)),
    "function-log-snr": FunctionSchedule(
        lambda g: g.sigmoid().sqrt(), lambda g: (-g).sigmoid().sqrt(), (math.inf, -math.inf)
    ),
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
    (VPCosineSchedule(data_at=1), lambda u: cosine(1 - u), lambda u: math.sqrt(1 - cosine(1 - u) ** 2)),
    (VPCosineSchedule(0.0, data_at=1), lambda u: math.sin(math.pi * u / 2), lambda u: math.cos(math.pi * u / 2)),
    (
        VPLinearSchedule(5.0, 5.0, data_at=1),
        lambda u: math.exp(-2.5 * (1 - u)),
        lambda u: math.sqrt(1 - math.exp(-5 * (1 - u))),
    ),
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
    time = schedule.time(tensor(0.0115, 0.3, 2.0, 70.0))
    step = 1e-4 * (time - schedule.time(0.99 * schedule.noise_level(time))).abs()
    for function, rate in zip((schedule.alpha, schedule.sigma), schedule.rates(time), strict=True):
        difference = (function(time + step) - function(time - step)) / (2 * step)
        # the step is 1e-6 of the time over which the level doubles: error 1e-12, rounding 1e-16 / 1e-6
        torch.testing.assert_close(rate, difference, rtol=1e-7, atol=1e-7 * float(rate.abs().max()))


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

    @pytest.mark.parametrize("way", [lambda of: of, copy.deepcopy, lambda of: pickle.loads(pickle.dumps(of))])
    def test_made_in_inference_mode_and_differentiated_outside(self, way: Any) -> None:
        with torch.inference_mode():
            schedule = way(VPDiscreteSchedule(DDPM))
        t = tensor(0.5, 2.0).requires_grad_()
        slope = torch.autograd.grad(schedule.time(t).sum(), t)
        assert torch.equal(slope[0], torch.autograd.grad(self.schedule.time(t).sum(), t)[0])

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

    def test_respaced_table_tells_the_steps_that_the_network_was_trained_on(self) -> None:
        kept = torch.cat([torch.arange(0, 1000, 4), torch.tensor([999])])  # "250 of 1000", unevenly at the end
        respaced = VPDiscreteSchedule(DDPM[kept], timesteps=kept)
        levels = ((1 - DDPM[kept]) / DDPM[kept]).sqrt()
        torch.testing.assert_close(respaced.network_time(levels), kept.double(), rtol=1e-12, atol=1e-9)
        torch.testing.assert_close(self.schedule.network_time(levels), kept.double(), rtol=1e-12, atol=1e-9)
        between = (levels[:-1] * levels[1:]).sqrt()
        torch.testing.assert_close(
            respaced.network_time(between), (kept[:-1] + kept[1:]).double() / 2, rtol=1e-9, atol=0
        )
        told = VPDiscreteSchedule(DDPM[kept], quantize=True, timesteps=kept).network_time(between * 1.0001)
        assert told.dtype == torch.int64
        assert told.tolist() == kept[1:].tolist()

    @pytest.mark.parametrize(
        ("timesteps", "error", "message"),
        [
            ([0, 1], TypeError, r"pass torch.tensor\(timesteps\)"),
            (torch.tensor([0, 1, 2]), ValueError, r"as many as alphas_cumprod, 2, got shape \(3,\)"),
            (torch.tensor([999, 0]), ValueError, r"got shape \(2,\), \[999, 0\].*timesteps.flip\(0\)"),
        ],
    )
    def test_bad_timesteps(self, timesteps: object, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            VPDiscreteSchedule(tensor(0.9, 0.5), timesteps=timesteps)  # type: ignore[arg-type]
        assert VPDiscreteSchedule(tensor(0.9, 0.5), timesteps=torch.tensor([999, 0]).flip(0)).noise_range

    def test_alphas_in_the_place_of_their_products_are_refused(self) -> None:
        alphas = 1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        with pytest.raises(ValueError, match=r"must end in noise, got 0\.98: .* pass alphas\.cumprod\(0\)"):
            VPDiscreteSchedule(alphas)
        assert VPDiscreteSchedule(alphas.cumprod(0)).noise_range[1] == pytest.approx(157.4, abs=0.1)  # the advice
        assert VPDiscreteSchedule(alphas.cumprod(0)[:200]).noise_range[1] == pytest.approx(0.72, abs=0.01)  # an expert

    @pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
    def test_integer_times(self, dtype: torch.dtype) -> None:
        index = torch.tensor([0, 500, 999], dtype=dtype)
        expected = ((1 - DDPM[index.long()]) / DDPM[index.long()]).sqrt()
        for times in (index, index.float()):
            torch.testing.assert_close(self.schedule.noise_level(times), expected, rtol=1e-12, atol=0)
        for wrong in (self.schedule.time, self.schedule.network_time):  # a level is no index
            with pytest.raises(TypeError):
                wrong(index)

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


class TestFunction:
    """Schedules that have a closed form, written as two functions; what no closed form has."""

    @pytest.mark.parametrize("name", ["vp-linear", "vp-cosine", "edm", "flow-0", "flow-1", "trigflow", "vp-linear-1"])
    def test_same_as_the_closed_form(self, name: str) -> None:
        closed = SCHEDULES[name]
        times = {"edm": (0, math.inf), "trigflow": (0, math.pi / 2)}.get(name, (0, 1))
        ours = FunctionSchedule(closed.alpha, closed.sigma, times[::-1] if name.endswith("-1") else times)
        t = torch.logspace(-3, 2, 501, dtype=torch.float64)
        torch.testing.assert_close(ours.time(t), closed.time(t), rtol=1e-12, atol=1e-15)
        for got, expected in zip(ours.rates(closed.time(t)), closed.rates(closed.time(t)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)

    @pytest.mark.parametrize("name", ["vp-linear", "flow-0", "trigflow"])
    def test_three_derivatives_in_the_level(self, name: str) -> None:
        closed = SCHEDULES[name]
        ours = FunctionSchedule(closed.alpha, closed.sigma, (0, math.pi / 2 if name == "trigflow" else 1))

        def derivatives(schedule: Schedule) -> list[Tensor]:
            t = tensor(0.01, 0.3, 5.0, 60.0).requires_grad_()
            found = [schedule.time(t)]
            for _ in range(3):
                found += torch.autograd.grad(found[-1].sum(), t, create_graph=True)
            return [value.detach() for value in found]

        for got, expected in zip(derivatives(ours), derivatives(closed), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-13)
        t = tensor(0.01, 5.0)  # and forward mode, one level at a time
        tangents = [torch.func.jvp(torch.vmap(s.time), (t,), (torch.ones_like(t),))[1] for s in (ours, closed)]
        torch.testing.assert_close(*tangents, rtol=1e-9, atol=0)

    def test_interpolated_table(self) -> None:
        discrete = VPDiscreteSchedule(DDPM[::50])  # with kinks
        ours = FunctionSchedule(discrete.alpha, discrete.sigma, (0, 19))
        t = torch.logspace(-1.9, 1.9, 501, dtype=torch.float64)
        torch.testing.assert_close(ours.time(t), discrete.time(t), rtol=1e-12, atol=1e-12)

    def test_ends(self) -> None:
        closed = SCHEDULES["vp-linear"]
        vp = FunctionSchedule(closed.alpha, closed.sigma, (0, 1))
        lowest, highest = vp.noise_range or (1.0, 1.0)
        assert lowest == 0
        assert highest == pytest.approx(math.sqrt(math.expm1(10.05)), rel=1e-12)
        ends = torch.tensor([0.0, highest]).float()  # rounded up
        assert vp.time(ends).tolist() == [0.0, 1.0]
        log_snr = SCHEDULES["function-log-snr"]
        assert log_snr.noise_range is None
        assert log_snr.time(tensor(0.0, math.inf)).tolist() == [math.inf, -math.inf]
        assert vp.time(tensor(1.0, 200.0, math.nan)).isnan().tolist() == [False, True, True]

    def test_networks_are_told(self) -> None:
        flow = FunctionSchedule(lambda u: 1 - u, lambda u: u, (0, 1), network_time=lambda u: (1000 * u).round().long())
        assert flow.network_time(tensor(1.0, 3.0)).tolist() == [500, 750]
        assert flow.network_time(tensor(1.0)).dtype == torch.int64
        again = copy.deepcopy(flow)
        assert again.time(tensor(3.0)).item() == 0.75

    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ((1.0, lambda u: u, (0, 1)), TypeError, "alpha must be a function of the time, got float"),
            ((lambda u: 1 - u, lambda u: u, (0, 1), 1000), TypeError, "network_time must be a function"),
            ((lambda u: 1 - u, lambda u: u, 1.0), TypeError, r"times must be two numbers.*got 1.0: e.g. \(0, 1\)"),
            ((lambda u: 1 - u, lambda u: u, (0, "1")), TypeError, "times must be two numbers"),
            ((lambda u: 1 - u, lambda u: u, (1, 0)), ValueError, "rise from data to noise, got inf at time 1 and 0"),
            ((lambda u: u, lambda u: 2 * u, (0.1, 1)), ValueError, "rise from data to noise, got 2 at time 0.1 and 2"),
            ((lambda u: 1.0, lambda u: 1 + u.floor(), (0, 9)), ValueError, "continuously.* interpolate tables"),
        ],
    )
    def test_bad_functions(self, arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            FunctionSchedule(*arguments)


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
        (lambda: VPLinearSchedule(data_at=2), ValueError, "data_at must be 0 or 1"),
        (lambda: VPCosineSchedule(data_at=2), ValueError, "data_at must be 0 or 1"),
        (lambda: TrigFlowSchedule(sigma_data=0), ValueError, "sigma_data"),
        (lambda: EDMSchedule(time_scale=-1), ValueError, "time_scale"),
        (lambda: EDMSchedule().time(torch.tensor(3)), TypeError, "noise_level must be a floating-point"),
    ],
)
def test_bad_arguments(build: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


@pytest.mark.parametrize("power", [3, 5])
def test_functions_that_are_nearly_flat_inside_are_inverted(power: int) -> None:
    """Newton's steps lead far away from where the slope is nearly 0: brackets hold them."""
    schedule = FunctionSchedule(lambda u: 1.0, lambda u: 1 + (2 * u - 1) ** power, times=(0, 1))
    levels = schedule.noise_level(torch.linspace(0.01, 0.99, 981, dtype=torch.float64))
    times = schedule.time(levels)
    assert bool(((times >= 0) & (times <= 1)).all())
    torch.testing.assert_close(schedule.noise_level(times), levels, rtol=1e-12, atol=0)  # as the functions' rounding


def test_functions_that_fall_on_the_way_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must rise continuously from data to noise, got .* restrict times"):
        FunctionSchedule(lambda u: 1.0, lambda u: 1 + u + 0.5 * torch.sin(12 * u), times=(0, 1))


@pytest.mark.parametrize(
    ("sigma", "times", "message"),
    [
        (
            lambda u: torch.where(u.isinf(), 80.0, u / (1 + u)),
            (0, math.inf),
            r"got 80 at time inf, .* be 1\.\d+: interp",
        ),
        (
            lambda u: torch.where(u < 0.5, u, u + 5),
            (0, 1),
            r"got 5\.5 at time 0\.5, .* be 0\.50\d+: interpolate tables",
        ),
        (
            lambda u: torch.where((u > 0.5) & (u < 0.6), math.nan, u),
            (0, 1),
            r"got nan at time 0\.5, .* be 0\.50\d+: int",
        ),
        (lambda u: u + 0.2 * torch.sin(12 * u), (0, 1), r"it should be between 0\.2\d+ and 0\.2\d+: restrict times"),
    ],
)
def test_functions_that_jump_are_refused(
    sigma: Callable[[Tensor], Tensor], times: tuple[float, float], message: str
) -> None:
    """Also at infinity, beside which there is no point to look at."""
    with pytest.raises(ValueError, match=message):
        FunctionSchedule(lambda u: 1.0, sigma, times)


def test_schedules_that_hold_more_than_numbers_are_equal_to_themselves_only() -> None:
    tables = [VPDiscreteSchedule(torch.tensor(values)) for values in ([0.9, 0.5], [0.8, 0.1])]
    functions = [FunctionSchedule(lambda u: 1 - u, lambda u: u, times=(0, 1)) for _ in range(2)]
    for one, other in (tables, functions):
        assert one == one
        assert one != other
        assert len({one, other, one}) == 2
    assert VPCosineSchedule() == VPCosineSchedule()


def test_timesteps_in_the_place_of_quantize_are_refused() -> None:
    with pytest.raises(TypeError, match=r"quantize must be True or False, got Tensor: .* timesteps="):
        VPDiscreteSchedule(torch.tensor([0.9, 0.5]), torch.arange(2))  # type: ignore[arg-type]


def test_a_tables_fields_are_its_arguments() -> None:
    names = {field.name for field in dataclasses.fields(VPDiscreteSchedule)}
    assert names == set(inspect.signature(VPDiscreteSchedule).parameters)
