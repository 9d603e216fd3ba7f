"""Noise conditionings: values, dtypes and end points."""

from __future__ import annotations

import math

import pytest
import torch

import analytic_precond as ap
from analytic_precond.noise_levels.network_scalings import (
    NOISE_CONDITIONINGS,
    cm_c_noise,
    edm_c_noise,
    raw_c_noise,
    trigflow_c_noise,
)

T = ap.log_noise_levels(40)


def test_values() -> None:
    t = torch.tensor([0.002, 0.5, 1.0, 80.0], dtype=torch.float64)
    for name, function in (
        ("edm", lambda v: math.log(v) / 4),
        ("cm", lambda v: 250 * math.log(v)),
        ("raw", float),
        ("trigflow", lambda v: math.atan2(v, 0.5)),
    ):
        expected = torch.tensor([function(v) for v in t.tolist()], dtype=torch.float64)
        # elementary functions of two libraries: a unit or two in the last place
        torch.testing.assert_close(NOISE_CONDITIONINGS[name](t), expected, rtol=1e-15, atol=0)
    assert set(NOISE_CONDITIONINGS) == {"edm", "cm", "raw", "trigflow"}


def test_edm_is_the_preconditionings_own() -> None:
    assert torch.equal(edm_c_noise(T), ap.EDMPreconditioning()(T).c_noise)


def test_the_angle_meets_the_noise_level() -> None:
    angle = trigflow_c_noise(T, sigma_data=0.7)
    # tan amplifies roundings of an angle near pi / 2 by t / sigma_data = 114
    torch.testing.assert_close(0.7 * angle.tan(), T, rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", NOISE_CONDITIONINGS)
def test_dtypes(name: str) -> None:
    function = NOISE_CONDITIONINGS[name]
    assert function(T).dtype == torch.float64
    assert function(T.float()).dtype == torch.float32


def test_refuses_a_scale_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match=r"sigma_data must be positive.*got 0\.0"):
        trigflow_c_noise(T, sigma_data=0.0)


def test_zero() -> None:
    zero = torch.zeros(1, dtype=torch.float32)
    # 1e-44 in float32 is the denormal 7 * 2^-149; float64 has it; tolerances: a few roundings of each dtype
    assert cm_c_noise(zero).item() == pytest.approx(250 * math.log(7 * 2.0**-149), rel=1e-6)
    assert cm_c_noise(zero.double()).item() == pytest.approx(250 * math.log(1e-44), rel=1e-14)
    assert edm_c_noise(zero) == -math.inf
    assert raw_c_noise(zero) == trigflow_c_noise(zero) == 0


@pytest.mark.parametrize("name", NOISE_CONDITIONINGS)
def test_refuses_indices(name: str) -> None:
    with pytest.raises(TypeError, match=r"t must be a floating-point tensor, got torch\.int64"):
        NOISE_CONDITIONINGS[name](torch.tensor([3]))
