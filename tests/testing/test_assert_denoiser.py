"""`assert_denoiser` passes right adapters, against codes with variables of their own, and names what is planted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import analytic_precond as ap
from analytic_precond.testing import assert_denoiser

MEANS = torch.tensor([[-1.0, 0.5], [0.7, -0.3], [0.2, 0.9]])
EXACT = ap.GaussianMixtureDenoiser(MEANS, 0.05)
X_0 = MEANS.repeat(2, 1) + 0.2 * torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
TABLE = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0)

VP = ap.VPDiscreteSchedule(TABLE)
ON_THE_TABLE = VP.noise_level(torch.tensor([950.0, 700.0, 450.0, 200.0, 50.0, 3.0]))
FLOW = ap.RectifiedFlowSchedule()
COSINE = ap.VPCosineSchedule()


def column(level: Tensor, like: Tensor) -> Tensor:
    return level.reshape(-1, 1).to(like.dtype)


def vp_reference(z: Tensor, index: Tensor) -> Tensor:
    """A code of its own: a table of alphas, looked up by whole indices, one for the batch."""
    assert index.unique().numel() == 1
    alpha_bar = TABLE[index.round().long()]
    return EXACT(z / column(alpha_bar.sqrt(), z), (1 / alpha_bar - 1).sqrt().to(z.dtype))


def vp_network(kind: str) -> Callable[..., Tensor]:
    """What the perfect network predicts, between indices too."""

    def network(z: Tensor, index: Tensor) -> Tensor:
        t = VP.noise_level(index)
        alpha, sigma = (column(c, z) for c in (VP.alpha(index), VP.sigma(index)))
        D = EXACT(z / alpha, t.to(z.dtype))
        noise = (z - alpha * D) / sigma
        return noise if kind == "epsilon" else alpha * noise - sigma * D

    return network


def flow_network(z: Tensor, time: Tensor) -> Tensor:
    """The velocity, noise less data."""
    time = column(time, z)
    t = time / (1 - time)
    D = EXACT(z / (1 - time), t[:, 0])
    return (z - D) / time


RIGHT: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "epsilon": (ap.denoiser_from_network(vp_network("epsilon"), "epsilon", VP), vp_reference, {"schedule": VP}),
    "v": (ap.denoiser_from_network(vp_network("v"), "v", VP), vp_reference, {"schedule": VP}),
    "v, in EDM's variable": (ap.denoiser_from_network(vp_network("v"), "v", VP), EXACT, {}),
    "flow": (ap.denoiser_from_network(flow_network, "velocity", FLOW), EXACT, {}),
    "itself": (EXACT, EXACT, {"levels": torch.tensor([3.0, 0.1])}),
}


@pytest.mark.parametrize(("denoiser", "reference", "options"), RIGHT.values(), ids=RIGHT.keys())
def test_what_is_right_passes(denoiser: Any, reference: Any, options: dict[str, Any]) -> None:
    assert_denoiser(denoiser, reference, X_0, **options)
    assert_denoiser(denoiser, reference, X_0.double(), **options)


def by_hand(kind: str, *, sign: float = 1.0, **wrong: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """An adapter as one writes it, for the network of a table, with one line of it wrong."""

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        index = VP.time(t).clamp(0, 999)
        alpha, sigma = (column(c, x) for c in (VP.alpha(index), VP.sigma(index)))
        told = {"time": index, "reversed": 999 - index, "sigma": t.clamp(max=999)}[wrong.get("told", "time")]
        z = x if wrong.get("unscaled") else alpha * x
        F = sign * vp_network(kind)(z, told)
        if wrong.get("raw"):
            return F
        if kind == "epsilon":
            D = alpha * x - sigma * F
            return D if wrong.get("alpha") else D / alpha
        return alpha * (alpha * x) - sigma * F

    return denoiser


def of_the_first_level(x: Tensor, t: Tensor) -> Tensor:
    return EXACT(x, t[:1].expand_as(t))


PLANTED: dict[str, tuple[Any, str]] = {
    "time in the wrong direction": (by_hand("epsilon", told="reversed"), "if time runs in the wrong direction"),
    "sigma for index": (by_hand("epsilon", told="sigma"), "if the network is told sigma where it wants the time or in"),
    "sigma for index, of v": (by_hand("v", told="sigma"), "if the network is told sigma where it wants the time or in"),
    "a missing 1 / alpha": (by_hand("epsilon", alpha=True), "if 1 / alpha is missing"),
    "the sign of v": (by_hand("v", sign=-1.0), "if the sign of v is wrong"),
    "the sign of epsilon": (by_hand("epsilon", sign=-1.0), "if the sign of epsilon is wrong"),
    "x for alpha x": (by_hand("epsilon", unscaled=True), "if the network gets x where it wants alpha x"),
    "noise for data": (by_hand("epsilon", raw=True), "if the network's epsilon is returned, not the clean data"),
    "epsilon for v": (
        ap.denoiser_from_network(vp_network("epsilon"), "v", VP), "if the network predicts epsilon and it is taken f",
    ),
    "one level for all": (of_the_first_level, "it tells all of them the first one's"),
    "something else": (lambda x, t: EXACT(x, 1.3 * t), "None of the usual mistakes alone does that"),
}  # fmt: skip


@pytest.mark.parametrize(("denoiser", "words"), PLANTED.values(), ids=PLANTED.keys())
def test_what_is_planted_is_named(denoiser: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=r"RMS difference of .* at t = .*, sample \d, ") as caught:
        assert_denoiser(denoiser, vp_reference, X_0, ON_THE_TABLE, schedule=VP)
    assert words in str(caught.value)


@pytest.mark.long
@pytest.mark.parametrize(("denoiser", "words"), PLANTED.values(), ids=PLANTED.keys())
def test_in_edms_variable_what_does_not_depend_on_the_table_is_named(denoiser: Any, words: str) -> None:
    levels = ap.log_noise_levels(9, *VP.noise_range)
    with pytest.raises(AssertionError) as caught:
        assert_denoiser(denoiser, EXACT, X_0, levels)
    assert words in str(caught.value) or "time" in words


@pytest.mark.parametrize(
    ("network", "words"),
    [
        (lambda z, time: flow_network(z, 1 - time), "if time runs in the wrong direction"),
        (lambda z, time: -flow_network(z, time), "if the sign of velocity is wrong"),
    ],
)
def test_of_a_flow(network: Any, words: str) -> None:
    denoiser = ap.denoiser_from_network(network, "velocity", FLOW)
    with pytest.raises(AssertionError, match=words):
        assert_denoiser(denoiser, EXACT, X_0)


def test_data_at_the_other_end_is_time_in_the_wrong_direction() -> None:
    denoiser = ap.denoiser_from_network(flow_network, "velocity", ap.RectifiedFlowSchedule(data_at=1))
    with pytest.raises(AssertionError, match=r"time runs in the wrong direction: .* the velocity has the other sign"):
        assert_denoiser(denoiser, EXACT, X_0)


def flow_1000(z: Tensor, time: Tensor) -> Tensor:
    """The velocity, data less noise, of a network that counts from noise at 0 to data at 1000."""
    tau = column(time / 1000, z)
    return (EXACT(z / tau, (1 / tau - 1)[:, 0].clamp(min=0.0)) - z) / (1 - tau)


def in_the_schedules_time(z: Tensor, tau: Tensor) -> Tensor:
    return z + (1 - column(tau, z)) * flow_1000(z, 1000 * tau)


def in_the_networks_time(z: Tensor, time: Tensor) -> Tensor:
    return in_the_schedules_time(z, time / 1000)


UNSCALED, SCALED = (ap.RectifiedFlowSchedule(data_at=1, time_scale=scale) for scale in (1, 1000))
RIGHT_FLOW, FORGOTTEN = (ap.denoiser_from_network(flow_1000, "velocity", of) for of in (SCALED, UNSCALED))


def forgotten_by_hand(x: Tensor, t: Tensor) -> Tensor:
    tau = 1 / (1 + t)
    z = column(tau, x) * x
    return z + (1 - column(tau, x)) * flow_1000(z, tau)


# a denoiser and a reference that differ, what is said, and the same with the advice followed
TIME_SCALES: dict[str, tuple[Any, Any, ap.Schedule | None, str, Any, Any, ap.Schedule | None]] = {
    "a reference in the schedule's time": (
        RIGHT_FLOW, in_the_schedules_time, SCALED, "the reference gets the schedule's own time. It is given what the ",
        RIGHT_FLOW, lambda z, time: in_the_schedules_time(z, time / 1000), SCALED,
    ),
    "a reference's schedule": (
        RIGHT_FLOW, in_the_networks_time, UNSCALED, "give a schedule of time_scale=1000 here",
        RIGHT_FLOW, in_the_networks_time, SCALED,
    ),
    "a network's, against EDM's": (
        FORGOTTEN, EXACT, None, "build the denoiser with a schedule of time_scale=1000", RIGHT_FLOW, EXACT, None,
    ),
    "a network's": (
        FORGOTTEN, in_the_schedules_time, UNSCALED, "build the denoiser with a schedule of time_scale=1000.",
        RIGHT_FLOW, in_the_schedules_time, UNSCALED,
    ),
    "both": (
        FORGOTTEN, in_the_networks_time, UNSCALED, "time_scale=1000, and if the reference gets 1000 times the time: ",
        RIGHT_FLOW, in_the_networks_time, SCALED,
    ),
    "one too many": (
        ap.denoiser_from_network(flow_network, "velocity", ap.RectifiedFlowSchedule(time_scale=1000)), EXACT, None,
        "build the denoiser with a schedule of time_scale=1.", RIGHT["flow"][0], EXACT, None,
    ),
    "by hand": (
        forgotten_by_hand, in_the_networks_time, SCALED,
        "the network is told the schedule's time where it wants time_scale=1000 times that",
        lambda x, t: in_the_schedules_time(column(1 / (1 + t), x) * x, 1 / (1 + t)), in_the_networks_time, SCALED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TIME_SCALES)
def test_a_time_off_by_a_factor(name: str) -> None:
    denoiser, reference, schedule, words, mended, its, on = TIME_SCALES[name]
    with pytest.raises(AssertionError) as caught:
        assert_denoiser(denoiser, reference, X_0, schedule=schedule)
    assert words in str(caught.value)
    assert_denoiser(mended, its, X_0, schedule=on, rtol=1e-3)  # float32 divides by 1 - tau


def test_score_sdes_factor() -> None:
    linear = ap.VPLinearSchedule()

    def network(z: Tensor, label: Tensor) -> Tensor:
        tau = label.double() / 999
        t, alpha = linear.noise_level(tau).float(), column(linear.alpha(tau), z)
        return (z / alpha - EXACT(z / alpha, t)) / column(t, z)

    with pytest.raises(AssertionError, match="schedule of time_scale=999"):
        assert_denoiser(ap.denoiser_from_network(network, "epsilon", linear), EXACT, X_0)
    right = ap.denoiser_from_network(network, "epsilon", ap.VPLinearSchedule(time_scale=999))
    assert_denoiser(right, EXACT, X_0)


def test_a_wrong_time_may_be_refused_and_batches_told_apart_at_some_levels_only() -> None:
    """A table's network cannot be asked at other times, and one level for all of a batch is no matter of time_scale."""

    def network(z: Tensor, time: Tensor) -> Tensor:
        if time.max() > 1:
            raise ValueError("time")
        first = torch.where(time > 0.5, time[:1], time)
        return 0.9 * flow_network(z, time) if time.max() > 0.99 else flow_network(z, first)

    with pytest.raises(AssertionError, match="RMS difference") as caught:
        assert_denoiser(
            ap.denoiser_from_network(network, "velocity", FLOW), EXACT, X_0, torch.tensor([200.0, 3.0, 1.0, 0.1])
        )
    assert "They agree" not in str(caught.value)


def test_arguments() -> None:
    with pytest.raises(TypeError, match="x_0 must be a floating-point tensor"):
        assert_denoiser(EXACT, EXACT, torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="add a batch dimension"):
        assert_denoiser(EXACT, EXACT, torch.ones(2))
    with pytest.raises(ValueError, match="rtol must be positive and finite, got nan"):
        assert_denoiser(EXACT, EXACT, X_0, rtol=float("nan"))
    with pytest.raises(AssertionError, match=r"the reference must return a tensor of x's shape \(6, 2\), got \(6,\)"):
        assert_denoiser(EXACT, lambda x, t: EXACT(x, t)[:, 0], X_0)


def test_schedules_whose_levels_begin_at_0_or_never_end() -> None:
    sub_vp = ap.FunctionSchedule(lambda u: (-5 * u).exp(), lambda u: -torch.expm1(-10 * u), times=(0, 1))
    for schedule in (sub_vp, ap.FunctionSchedule(lambda u: 1 - u, lambda u: u + 0.01, times=(0, 1))):

        def network(z: Tensor, time: Tensor, schedule: ap.Schedule = schedule) -> Tensor:
            t, alpha = schedule.noise_level(time.double()).float(), schedule.alpha(time.double()).float()
            return EXACT(z / column(alpha, z), t)

        assert_denoiser(ap.denoiser_from_network(network, "sample", schedule), EXACT, X_0, schedule=None, rtol=1e-3)


def test_a_respaced_table_is_asked_at_its_own_times() -> None:
    own = torch.arange(1000)[::7]
    respaced = ap.VPDiscreteSchedule(VP.alphas_cumprod[::7], timesteps=own)
    asked: list[float] = []

    def reference(z: Tensor, time: Tensor) -> Tensor:
        asked.append(time[0].item())
        return vp_reference(z, time)

    assert_denoiser(ap.denoiser_from_network(vp_network("v"), "v", respaced), reference, X_0, schedule=respaced)
    assert set(asked) <= set(own.tolist())
