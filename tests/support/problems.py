"""The problems that tests share: `analytic_precond.testing`'s, with numbers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import analytic_precond as ap
from analytic_precond.testing import GaussianProblem, MixtureProblem

Array = NDArray[np.float64]


def gaussian_problem(
    variances: Tensor | Sequence[float] = (4.0, 1.0, 0.25, 0.05, 0.01, 0.001), mean: Tensor | float = 0.0
) -> GaussianProblem:
    return GaussianProblem(variances, mean)


def mixture_problem() -> MixtureProblem:
    return MixtureProblem(means=(-1.0, 0.3, 1.5), variances=(0.05, 0.01, 0.2), weights=(0.3, 0.5, 0.2))


def coefficient_tables(problem: GaussianProblem, num: int) -> tuple[Tensor, Tensor, Tensor]:
    levels = ap.log_noise_levels(num)
    return levels, problem.l(levels), problem.s(levels)
