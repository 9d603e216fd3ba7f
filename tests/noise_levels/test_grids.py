"""Grids against the reference implementations' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from hypothesis import given
from hypothesis import strategies as st

import analytic_precond as ap

GOLDEN = np.load(GOLDEN_FILE)


@pytest.mark.parametrize("key", ["sony_times_18", "openai_sigmas_karras_18"])
def test_karras_levels_agree_with_reference_code(key: str) -> None:
    # the references compute their grid in float32, up to 5.5e-7 from the float64 formula for 18 levels
    reference = GOLDEN[key][:18]
    np.testing.assert_allclose(ap.karras_noise_levels(18).numpy(), reference, rtol=1e-6)


@given(
    num=st.integers(2, 300),
    sigma_min=st.floats(1e-4, 1.0),
    ratio=st.floats(1.5, 1e6),
    rho=st.floats(0.5, 40.0),
)
def test_grids_decrease_between_exact_ends(num: int, sigma_min: float, ratio: float, rho: float) -> None:
    sigma_max = sigma_min * ratio
    for levels in (
        ap.karras_noise_levels(num, sigma_min, sigma_max, rho),
        ap.log_noise_levels(num, sigma_min, sigma_max),
    ):
        assert levels.dtype == torch.float64
        assert levels.shape == (num,)
        assert (levels[0].item(), levels[-1].item()) == (sigma_max, sigma_min)
        assert bool((levels.diff() < 0).all())


def test_log_levels_are_uniform_in_lambda() -> None:
    steps = -ap.log_noise_levels(120).log().diff()
    # one part in 1e12: rounding of the logarithm of neighbouring levels
    torch.testing.assert_close(steps, torch.full_like(steps, np.log(40000.0) / 119), rtol=1e-12, atol=0)


def test_expand_to_views_without_copying() -> None:
    t = torch.arange(3.0)
    expanded = ap.expand_to(t, torch.zeros(3, 2, 5))
    assert expanded.shape == (3, 1, 1)
    assert expanded.data_ptr() == t.data_ptr()
    assert ap.expand_to(torch.tensor(2.0), torch.zeros(3, 2)).shape == (1, 1)
    assert ap.expand_to(expanded, torch.zeros(3, 2, 5)) is expanded
