"""iCT's times: the frequencies of the paper's formula by SciPy, and its table of grid sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, norm

import analytic_precond as ap


@pytest.mark.parametrize(("num", "mean", "std"), [(11, -1.1, 2.0), (41, -1.1, 2.0), (11, 1.0, 0.7)])
def test_frequencies_are_the_log_normal_masses(num: int, mean: float, std: float) -> None:
    levels = ap.karras_noise_levels(num)
    times = ap.sample_ict_times(100_000, levels, mean, std, torch.Generator().manual_seed(0))
    assert times.t_index is not None
    mass = -np.diff(norm.cdf(np.log(levels.numpy()), mean, std))
    counts = np.bincount(times.t_index.numpy(), minlength=num - 1)
    often = mass > 1e-4
    expected = np.append(mass[often], mass[~often].sum()) / mass.sum() * 100_000
    found = np.append(counts[often], counts[~often].sum())
    keep = expected > 0
    assert chisquare(found[keep], expected[keep]).pvalue > 1e-3


def test_neighbours_that_end_at_the_last_level() -> None:
    levels = ap.karras_noise_levels(11).float()
    times = ap.sample_ict_times(1000, levels, generator=torch.Generator().manual_seed(0))
    assert times.t.dtype == torch.float32
    assert torch.equal(times.t, levels[times.t_index])
    assert torch.equal(times.u, levels[times.t_index + 1])  # type: ignore[operator]
    assert torch.equal(times.s, levels[-1:].expand(1000))
    again = ap.sample_ict_times(1000, levels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.t, times.t)


def test_grid_doubles_at_equal_spans() -> None:
    """The paper's setting for CIFAR-10: 400,000 steps, 10 to 1280 intervals, K' = 50,000."""
    for k in range(8):
        assert (
            ap.ict_num_levels(50_000 * k, 400_000) == ap.ict_num_levels(50_000 * k + 49_999, 400_000) == 10 * 2**k + 1
        )
    assert ap.ict_num_levels(10**9, 400_000) == 1281
    assert [ap.ict_num_levels(k, 4, first=3, last=20) for k in range(5)] == [4, 7, 13, 21, 21]
    assert ap.ict_num_levels(0, 1, first=2, last=2) == 3
    assert len(ap.karras_noise_levels(ap.ict_num_levels(0, 100))) == 11


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ap.sample_ict_times(0, torch.tensor([2.0, 1.0])), ValueError, "batch must be at least 1"),
        (lambda: ap.sample_ict_times(1, torch.tensor([1.0, 2.0])), ValueError, "strictly decreasing"),
        (lambda: ap.sample_ict_times(1, torch.tensor([2.0, 1.0]), std=0.0), ValueError, "std must be positive"),
        (lambda: ap.sample_ict_times(1, torch.tensor([2.0, 1.0]), "x"), TypeError, "mean must be a number"),
        (lambda: ap.sample_ict_times(1, torch.tensor([2.0, 1.0]), 80.0, 0.1), ValueError,
         r"the levels from 2 to 1 some probability, got 80 and 0\.1: they are of ln t, e\.g\. -1\.1 and 2\.0"),
        (lambda: ap.ict_num_levels(-1, 10), ValueError, "step must be at least 0"),
        (lambda: ap.ict_num_levels(1, 10, first=20, last=10), ValueError, "last must be at least 20, got 10"),
    ],
)  # fmt: skip
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
