"""Whether estimates agree: differences and their standard errors, against closed forms and repeated runs."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch
from problems import gaussian_problem
from scipy.stats import norm, t

import analytic_precond as ap
from analytic_precond.diagnostics.comparison import compare_statistics
from analytic_precond.testing import GaussianProblem

PROBLEM = gaussian_problem()
LEVELS = ap.log_noise_levels(8, 0.02, 20.0)


def estimate(
    seed: int, num_samples: int = 256, problem: GaussianProblem = PROBLEM, **more: bool
) -> ap.TeacherStatistics:
    data = problem.sample(num_samples // 2, seed)
    return ap.estimate_statistics(problem.denoiser, data, LEVELS, num_samples, seed=seed, progress=False, **more)


def test_differences_are_those_of_the_tables() -> None:
    wide = gaussian_problem(2 * PROBLEM.variances)
    one, other = estimate(0, 4096), estimate(1, 4096, wide)
    found = compare_statistics(one, other)
    assert not found.agree
    for name in ("l", "s"):
        delta = (getattr(one, name) - getattr(other, name)).abs()
        z = delta / torch.hypot(getattr(one, f"{name}_stderr"), getattr(other, f"{name}_stderr"))
        difference = found.differences[name]
        assert difference.largest == delta.max()
        assert difference.largest_at == (LEVELS[delta.argmax()].item(),)
        assert difference.most_standard_errors == pytest.approx(z.max().item(), rel=1e-9)
        assert difference.most_standard_errors_at == (LEVELS[z.argmax()].item(),)
    # S = rms(g) / rms(g)|_T in closed form, of which 4096 samples give each rms to 1.3 %: 4 standard errors
    ln_S = [(p.g_rms(LEVELS) / p.g_rms(20.0)).log().numpy() for p in (PROBLEM, wide)]
    assert found.differences["ln S"].largest == pytest.approx(np.abs(ln_S[0] - ln_S[1]).max(), abs=0.1)
    for index, name in enumerate(("c_skip", "c_out")):
        difference = found.differences[name]
        t_, s_ = difference.largest_at
        pair = [ap.AnalyticPreconditioning(part)(t_, s_)[index].item() for part in (one, other)]
        assert difference.largest == abs(pair[0] - pair[1])


@pytest.mark.long
def test_standard_errors_are_those_of_repeated_runs() -> None:
    ends = LEVELS[[2, 5]]  # one jump, so that the largest z is the only one
    runs = [
        ap.estimate_statistics(PROBLEM.denoiser, PROBLEM.sample(128, seed), ends, 256, seed=seed, progress=False)
        for seed in range(32)
    ]
    pairs = [compare_statistics(runs[i], runs[i + 16]) for i in range(16)]
    assert all(pair.agree for pair in pairs)
    for name in ("ln S", "c_skip", "c_out"):
        z = np.array([pair.differences[name].most_standard_errors for pair in pairs])
        # 1 over Student's factor 1.04; its own standard error from 16 pairs is 0.17
        assert np.sqrt(np.mean(z**2)) == pytest.approx(0.96, abs=0.5)


def test_the_limit_is_student_s() -> None:
    K, jumps = len(LEVELS), 28  # all pairs of 8 levels
    chance = 0.01 / (3 * K + 2 * jumps)
    few = estimate(0, 24)  # 12 pairs in 6 groups
    many = estimate(1)
    assert (len(few.counts), len(many.counts)) == (6, 32)
    for pair, groups in (((few, many), 6), ((many, few), 6), ((many, many), 32)):
        factor = t.ppf(0.975, groups - 1) / norm.ppf(0.975)  # the standard errors have it
        assert compare_statistics(*pair).limit == pytest.approx(t.isf(chance / 2, groups - 1) / factor, rel=1e-9)


def test_statistics_agree_with_themselves() -> None:
    statistics = estimate(0, intercept=True, per_element=True)
    found = compare_statistics(statistics, statistics)
    assert found.agree
    assert {(d.largest, d.most_standard_errors) for d in found.differences.values()} == {(0.0, 0.0)}


def test_estimators_of_one_teacher_agree() -> None:
    data = PROBLEM.sample(512, 5)
    parts = [
        ap.estimate_statistics(
            PROBLEM.denoiser, data, LEVELS, 1024, l_method=l_method, s_method=s_method, seed=seed, progress=False
        )
        for seed, (l_method, s_method) in enumerate((("stein", "jvp"), ("hutchinson", "finite-difference")))
    ]
    assert all(compare_statistics(a, b).agree for a, b in combinations(parts, 2))


def test_rounding_is_no_difference() -> None:
    """White data: every sample has the same trace and no remainder, so nothing has a standard error worth the name."""
    data = torch.ones(64, 4).cumsum(0) / 64
    one, other = (
        ap.estimate_statistics(
            ap.GaussianDenoiser(0.25), data, LEVELS, 64, batch_size, l_method="exact", seed=seed, progress=False
        )
        for seed, batch_size in ((0, 7), (1, 32))
    )
    assert one.l_stderr.max() < 1e-7
    assert compare_statistics(one, other).agree
    sums = other.sums.clone()
    sums[..., 0] *= 1 + 1e-4  # of l
    assert not compare_statistics(one, replace(other, sums=sums)).agree
