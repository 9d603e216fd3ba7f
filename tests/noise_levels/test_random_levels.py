"""Random noise levels against closed-form distributions, and against the library's own grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import analytic_precond as ap
from analytic_precond.noise_levels.random_levels import sample_karras_noise_levels, sample_lognormal_noise_levels

# seeds are fixed, so a test either always passes or never; a right sampler fails at one seed in a thousand
SIGNIFICANCE = 1e-3
Sampler = Callable[..., Tensor]
SAMPLERS: dict[str, Sampler] = {"lognormal": sample_lognormal_noise_levels, "karras": sample_karras_noise_levels}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("options", "mean", "std"), [({}, -1.2, 1.2), ({"mean": -1.1, "std": 2.0}, -1.1, 2.0)])
def test_lognormal_levels(options: dict[str, float], mean: float, std: float) -> None:
    levels = sample_lognormal_noise_levels(20_000, generator=seeded(0), **options)
    assert stats.kstest(levels.log().numpy(), stats.norm(mean, std).cdf).pvalue > SIGNIFICANCE


def test_karras_levels_are_as_dense_as_the_grid() -> None:
    levels = sample_karras_noise_levels(20_000, generator=seeded(1), dtype=torch.float64)
    counts, _ = np.histogram(levels.numpy(), ap.karras_noise_levels(41).flip(0).numpy())
    assert counts.sum() == 20_000
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE


@pytest.mark.parametrize(("sigma_min", "sigma_max", "rho"), [(0.002, 80.0, 7.0), (1.0, 9.0, 2.0), (0.5, 3.0, 1.0)])
def test_karras_levels_follow_the_closed_form(sigma_min: float, sigma_max: float, rho: float) -> None:
    def cdf(level: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        root, low, high = (np.asarray(v) ** (1 / rho) for v in (level, sigma_min, sigma_max))
        return (root - low) / (high - low)

    levels = sample_karras_noise_levels(20_000, sigma_min, sigma_max, rho, seeded(2))
    assert stats.kstest(levels.numpy().astype(float), cdf).pvalue > SIGNIFICANCE


def test_the_smallest_level_that_the_docstring_gives_for_ctm() -> None:
    # CTM's own words: uniform ramp positions, times 0.7, through the formula of the grid; 0.318 is rounded to 3 digits
    at_seven_tenths = ap.karras_noise_levels(11)[7].item()
    assert at_seven_tenths == pytest.approx(0.318, abs=5e-4)
    position = 0.7 * np.random.default_rng(0).random(20_000)
    reference = (80 ** (1 / 7) + position * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    levels = sample_karras_noise_levels(20_000, sigma_min=0.318, generator=seeded(3))
    assert stats.ks_2samp(levels.numpy(), reference).pvalue > SIGNIFICANCE


@given(
    sigma_min=st.floats(1e-4, 10.0),
    log_ratio=st.floats(1e-6, 14.0),
    rho=st.floats(0.1, 40.0),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_karras_levels_stay_between_their_ends(
    sigma_min: float, log_ratio: float, rho: float, dtype: torch.dtype
) -> None:
    sigma_max = sigma_min * math.exp(log_ratio)
    levels = sample_karras_noise_levels(64, sigma_min, sigma_max, rho, seeded(4), dtype=dtype)
    low, high = torch.tensor([sigma_min, sigma_max], dtype=dtype)
    assert bool(((levels >= low) & (levels <= high)).all())


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_a_generator_decides_everything(sample: Sampler) -> None:
    with global_rng_untouched():
        first, again, other, wide = (
            sample(50, generator=seeded(seed), dtype=dtype)
            for seed, dtype in ((7, torch.float32), (7, torch.float32), (8, torch.float32), (7, torch.float64))
        )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first, wide.float())  # drawn once in float64, rounded once


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_without_a_generator_torchs_own_is_used(sample: Sampler) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        first, second = sample(50), sample(50)
    assert torch.equal(first, sample(50, generator=seeded(7)))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_noisy_data_keep_their_dtype(sample: Sampler) -> None:
    levels = sample(3)
    x_t = torch.zeros(3, 2) + ap.expand_to(levels, torch.zeros(3, 2)) * torch.ones(3, 2)
    assert x_t.dtype == torch.float32
    assert levels.device == torch.get_default_device()
    assert sample(3, device="meta").is_meta  # which has no values to read: nothing waits for a device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_cuda(sample: Sampler) -> None:
    on_cpu = sample(500, generator=seeded(9))
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = sample(500, generator=seeded(9), device="cuda")
        assert sample(500, generator=torch.Generator("cuda")).is_cuda
        assert sample(500, device="cuda").is_cuda
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # exp and pow of two libraries, rounded from float64
    torch.testing.assert_close(moved.cpu(), on_cpu, rtol=1e-6, atol=0)
    assert sample(500, generator=torch.Generator("cuda"), device="cpu").device.type == "cpu"


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0}, ValueError, r"batch must be at least 1, got 0\. Pass len\(x\)"),
        ({"batch": -1}, ValueError, r"batch must be at least 1, got -1"),
        ({"batch": torch.zeros(3)}, TypeError, r"batch must be an int"),
        (
            {"generator": 0},
            TypeError,
            r"torch\.Generator or None, got 0 \(int\): pass torch\.Generator\(\)\.manual_seed",
        ),
        ({"dtype": torch.float16}, ValueError, r"dtype must be torch\.float32 or torch\.float64, got torch\.float16"),
    ],
)
def test_bad_input(sample: Sampler, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(**{"batch": 4, **options})


@pytest.mark.parametrize(
    ("sample", "options", "error", "message"),
    [
        (sample_lognormal_noise_levels, {"std": 0.0}, ValueError, r"std must be positive and finite, got 0\.0"),
        (sample_lognormal_noise_levels, {"mean": math.nan}, ValueError, r"mean must be finite, got nan"),
        (sample_lognormal_noise_levels, {"mean": "-1.2"}, TypeError, r"mean must be a number, got '-1\.2' \(str\)"),
        (sample_karras_noise_levels, {"sigma_min": 0.0}, ValueError, r"sigma_min must be positive and finite"),
        (sample_karras_noise_levels, {"sigma_max": 0.001}, ValueError, r"sigma_min must be below sigma_max"),
        (sample_karras_noise_levels, {"rho": math.inf}, ValueError, r"rho must be positive and finite"),
    ],
)
def test_bad_numbers(sample: Sampler, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample(4, **options)
