"""Weightings: values by hand, and against the coefficients that they are meant to undo."""

from __future__ import annotations

import math

import pytest
import torch

import analytic_precond as ap
from analytic_precond.distillation.weightings import WEIGHTINGS

USES = {
    "uniform": "",
    "snr": "t",
    "snr+1": "t",
    "karras": "td",
    "truncated-snr": "t",
    "soft-min-snr": "td",
    "inverse-c_out": "td",
    "inverse-step": "tu",
    "inverse-root-step": "tu",
    "uniform_g": "ts",
    "sq-t-inverse": "t",
}
LEVELS = ap.log_noise_levels(60)  # from 80 to 0.002
U, S = 0.75 * LEVELS, 0.125 * LEVELS


CASES = [(0.5, 0.25, 0.125, 0.5), (4.0, 3.75, 1.0, 3.0), (0.01, 0.0, 0.0, 1.0)]  # (t, u, s, sigma_data); ECT's u is 0
BY_HAND = {
    "uniform": (1, 1, 1),
    "snr": (4, 1 / 16, 1e4),
    "snr+1": (5, 17 / 16, 10001),
    "karras": (8, 25 / 144, 10001),
    "truncated-snr": (4, 1, 1e4),
    "soft-min-snr": (2, 1 / 25, 1 / 1.0001),
    "inverse-c_out": (math.sqrt(8), 5 / 12, math.sqrt(10001)),
    "inverse-step": (4, 4, 100),
    "inverse-root-step": (2, 2, 10),
    "uniform_g": (4 / 3, 4 / 3, 1),
    "sq-t-inverse": (math.sqrt(0.5), 2, 0.1),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_values_by_hand(name: str) -> None:
    for (*levels, sigma_data), expected in zip(CASES, BY_HAND[name], strict=True):
        weight = WEIGHTINGS[name](*torch.tensor(levels, dtype=torch.float64)[:, None], sigma_data)
        assert weight.item() == pytest.approx(expected, rel=1e-14)  # a few roundings
    assert set(BY_HAND) == set(USES) == set(WEIGHTINGS)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 66.6])
def test_weights_undo_edms_c_out(sigma_data: float) -> None:
    c_out = ap.EDMPreconditioning(sigma_data)(LEVELS).c_out
    for name, undone in (
        ("karras", 1 / c_out**2),
        ("inverse-c_out", 1 / c_out),
        # k-diffusion's weights of the raw network's error
        ("snr", sigma_data**2 / (LEVELS**2 + sigma_data**2) / c_out**2),
        ("soft-min-snr", (LEVELS * sigma_data / (LEVELS**2 + sigma_data**2) / c_out) ** 2),
    ):
        # a few roundings
        torch.testing.assert_close(WEIGHTINGS[name](LEVELS, U, S, sigma_data), undone, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_weights_are_positive_and_precision_hardly_matters(name: str) -> None:
    weighting = WEIGHTINGS[name]
    exact = weighting(LEVELS, U, S, 0.5)
    assert exact.shape == LEVELS.shape
    assert bool((torch.isfinite(exact) & (exact > 0)).all())
    single = weighting(LEVELS.float(), U.float(), S.float(), 0.5)
    assert single.dtype == torch.float32
    # levels rounded by 2^-24; t - u = t / 4 amplifies that by 7, and 1 / t^2 doubles it
    torch.testing.assert_close(single.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", WEIGHTINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(name: str, dtype: torch.dtype) -> None:
    levels = [v.to(dtype) for v in (LEVELS, U, S)]  # 1 / t^2 overflows in float16
    weight = WEIGHTINGS[name](*levels, 0.5)
    assert weight.dtype == torch.float32
    assert torch.equal(weight, WEIGHTINGS[name](*(v.float() for v in levels), 0.5))


@pytest.mark.parametrize("name", USES)
def test_only_what_the_formula_names_is_looked_at(name: str) -> None:
    weighting, nan = WEIGHTINGS[name], torch.full_like(LEVELS, torch.nan)
    u, s, sigma_data = (
        value if key in USES[name] else other
        for key, value, other in (("u", U, nan), ("s", S, nan), ("d", 0.5, math.nan))
    )
    weight = weighting(LEVELS, u, s, sigma_data)
    assert torch.equal(weight, weighting(LEVELS, U, S, 0.5))
    for key, changed in (
        ("t", weighting(2 * LEVELS, U, S, 0.5)),
        ("u", weighting(LEVELS, U / 2, S, 0.5)),
        ("s", weighting(LEVELS, U, S / 2, 0.5)),
        ("d", weighting(LEVELS, U, S, 1.0)),
    ):
        assert torch.equal(weight, changed) == (key not in USES[name]), key


def test_weights_without_a_step_are_infinite() -> None:
    for name in ("inverse-step", "inverse-root-step"):
        assert bool((WEIGHTINGS[name](LEVELS, LEVELS, S, 0.5) == torch.inf).all())
    assert bool((WEIGHTINGS["uniform_g"](LEVELS, LEVELS, LEVELS, 0.5) == torch.inf).all())


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        WEIGHTINGS["mine"] = WEIGHTINGS["snr"]  # type: ignore[index]
