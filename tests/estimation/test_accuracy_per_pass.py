"""How far coefficients from few levels and few samples are from the truth: what docs/method.md, section 6, promises."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import BENCHMARKS
from problems import coefficient_tables, gaussian_problem
from torch import Tensor

import analytic_precond as ap

SCRIPT = BENCHMARKS / "sample_budget.py"


def random_jumps(num: int) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    s, t = torch.from_numpy(np.sort(np.exp(rng.uniform(math.log(0.002), math.log(80), (2, num))), axis=0))
    return t, s


def largest_error(precond: ap.AnalyticPreconditioning, truth: ap.AnalyticPreconditioning) -> float:
    """The largest relative error of c_out over random jumps."""
    t, s = random_jumps(1000)
    return float((precond(t, s).c_out / truth(t, s).c_out - 1).abs().max())


def test_forty_levels_leave_nothing_to_the_interpolation() -> None:
    problem = gaussian_problem()
    precond = ap.AnalyticPreconditioning.from_coefficients(*coefficient_tables(problem, 40))
    for t, s in torch.stack(random_jumps(12), 1).tolist():
        # 1e-6 through ln S; here s_t is interpolated, whose scale is that of a derivative
        assert precond(t, s).c_out.item() == pytest.approx(problem.jump(t, s).c_out.item(), rel=2e-5)


def test_a_24th_of_the_papers_passes() -> None:
    """The power-law spectrum of natural images, 8x8 modes: 40 levels x 512 samples instead of 120 x 4096."""
    frequency = np.arange(8)
    power = 1 / (0.25 + frequency[:, None] ** 2 + frequency**2)
    problem = gaussian_problem(tuple((0.25 * power / power.mean()).ravel()))
    truth = ap.AnalyticPreconditioning.from_coefficients(*coefficient_tables(problem, 480))
    errors = []
    for seed in range(5):
        stats = ap.estimate_statistics(
            problem.denoiser, problem.sample(4096, seed), ap.log_noise_levels(40), 512, seed=seed, progress=False
        )
        errors.append(largest_error(ap.AnalyticPreconditioning(stats), truth))
    # at high noise g is one mode: the rms of 256 normals errs by sqrt(1 / 2 / 256) = 4.4 %, and c_out by a third of it
    assert np.median(errors) < 0.02, errors
    assert max(errors) < 0.045, errors


def test_the_same_samples_at_every_level_err_alike() -> None:
    """c_out depends on differences of ln S between levels; with samples of its own at each, errors do not cancel."""
    problem, levels = gaussian_problem(), ap.log_noise_levels(16)
    truth = ap.AnalyticPreconditioning.from_coefficients(*coefficient_tables(problem, 480))
    runs = [
        ap.estimate_statistics(problem.denoiser, problem.sample(256, seed), levels, 512, 256, seed=seed, progress=False)
        for seed in range(16)
    ]
    common = [largest_error(ap.AnalyticPreconditioning(run), truth) for run in runs]
    sums = torch.stack([run.sums[:, k] for k, run in enumerate(runs)], 1)  # level k from run k
    independent = largest_error(ap.AnalyticPreconditioning(replace(runs[0], sums=sums)), truth)
    assert independent > 3 * np.median(common), (independent, np.median(common))  # 10 times in docs/method.md


@pytest.mark.long
def test_the_script_runs(tmp_path: Path) -> None:
    pytest.importorskip("skimage", reason="the benchmark's data sets are loaded with scikit-image's photographs")
    command = [sys.executable, str(SCRIPT), "--smoke", "--output", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("12 levels x   32 =     384 passes") == 2, result.stdout
