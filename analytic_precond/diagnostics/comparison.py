r"""Whether two estimates of a teacher's statistics agree: their differences, in units of their standard errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..interpolation.splines import Array
from ..preconditionings.analytic import AnalyticPreconditioning
from ..statistics.moments import jackknife
from ..statistics.teacher_statistics import TeacherStatistics

FALSE_ALARMS = 0.01
"""The chance, at most, that two independent estimates of one teacher are said to differ."""

_JUMP_ENDS = 12  # levels that jumps are compared between, so 66 jumps
_NORMAL_95 = 1.959963984540054  # standard errors to each side make a 95 % interval, however few the groups
Levels = tuple[float, ...]


@dataclass(frozen=True)
class Difference:
    """How far estimates of one quantity are apart at most, and where: at the level ``(t,)`` or the jump ``(t, s)``."""

    largest: float
    largest_at: Levels
    most_standard_errors: float
    most_standard_errors_at: Levels


@dataclass(frozen=True)
class StatisticsComparison:
    """What differs, by quantity, and the number of standard errors that no difference may exceed."""

    differences: dict[str, Difference]
    limit: float

    @property
    def agree(self) -> bool:
        """Whether all differences may be sampling noise."""
        return all(difference.most_standard_errors <= self.limit for difference in self.differences.values())


def compare_statistics(first: TeacherStatistics, second: TeacherStatistics) -> StatisticsComparison:
    r"""Return how far two estimates differ at each noise level, and in the jumps that follow from them.

    Each of m quantities has a difference $\delta$ and its standard error, that of two independent estimates:

    $$z = |\delta| \,/ \sqrt{e_1^2 + e_2^2 + \epsilon^2}$$

    with the jackknife's errors $e$ (docs/method.md, section 6), also of $\ln S$ and the coefficients, and $\epsilon$
    the rounding of the teacher's dtype. They agree if no z exceeds a limit that follows from Student's quantile for
    the groups of the smaller estimate, and a chance of $0.01 / m$ each. However the m quantities are correlated, two
    independent estimates of one teacher are then said to differ in at most one case of a hundred. The noise of
    estimates with the same seed cancels in part: they differ by less than the errors say.

    Raises:
        ValueError: If levels differ, there are too few samples for standard errors, or no jumps follow from the
            statistics.
    """
    _check_levels(first.levels, second.levels)
    groups = min(len(first.counts), len(second.counts))
    if groups < 2:
        raise ValueError(
            f"statistics must have standard errors, got {min(first.num_samples, second.num_samples)} samples: take 8 "
            f"at least."
        )
    rounding = max(torch.finfo(getattr(torch, part.header.precision)).eps for part in (first, second))
    (values_1, errors_1), (values_2, errors_2) = _jackknifed(first), _jackknifed(second)
    delta = np.abs(values_1 - values_2)
    z = delta / np.sqrt(errors_1**2 + errors_2**2 + rounding**2)

    at_levels: list[Levels] = [(t,) for t in first.levels.tolist()]
    of_jumps: list[Levels] = list(zip(*(end.tolist() for end in _jumps(first.levels)), strict=True))
    places = dict.fromkeys(("l", "s", "ln S"), at_levels) | dict.fromkeys(("c_skip", "c_out"), of_jumps)
    differences, start = {}, 0
    for name, where in places.items():
        own = slice(start, start + len(where))
        i, j = int(delta[own].argmax()), int(z[own].argmax())
        differences[name] = Difference(float(delta[own][i]), where[i], float(z[own][j]), where[j])
        start = own.stop
    return StatisticsComparison(differences, _limit(groups, len(delta)))


def _check_levels(first: Tensor, second: Tensor) -> None:
    """Refuse other levels than the same, to float32 rounding."""
    if first.shape == second.shape and torch.allclose(first, second, rtol=1e-6, atol=0):
        return
    index = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if abs(a - b) > 1e-6 * b), 0)
    raise ValueError(
        f"statistics must share their noise levels, got {len(first)} and {len(second)} of them, at index {index} "
        f"{first[index]:g} and {second[index]:g}: estimate both on one grid."
    )


def _jumps(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Return from where to where the jumps go."""
    num = min(_JUMP_ENDS, len(levels))
    some = levels[torch.linspace(0, len(levels) - 1, num, dtype=torch.float64, device="cpu").round().long()]
    start, end = torch.triu_indices(num, num, offset=1, device="cpu")
    return some[start], some[end]


def _quantities(statistics: TeacherStatistics) -> Array:
    """Return l, s, ln S at the levels and c_skip, c_out of the jumps, one after the other."""
    levels, precond = statistics.levels, AnalyticPreconditioning(statistics)
    S_ratio = precond.integrals(levels[:1].expand_as(levels), levels).S_ratio
    return torch.cat([statistics.l, statistics.s, S_ratio.log(), *precond(*_jumps(levels))]).numpy()


def _jackknifed(statistics: TeacherStatistics) -> tuple[Array, Array]:
    """Return all quantities and their standard errors."""
    counts, sums = statistics.counts, statistics.sums
    parts = [statistics]
    for group in range(len(counts)):
        others = torch.arange(len(counts), device="cpu") != group
        parts.append(replace(statistics, counts=counts[others], sums=sums[others]))
    rows = np.stack([_quantities(part) for part in parts])  # in the jackknife's order: all, then without each group
    return jackknife(counts.numpy(), sums.numpy(), lambda _: [rows])[0]


def _limit(groups: int, comparisons: int) -> float:
    """Return how many standard errors one of so many differences exceeds with a chance of `FALSE_ALARMS` at most."""
    from scipy.special import stdtrit

    quantile, usual = (float(stdtrit(groups - 1, 1 - p / 2)) for p in (FALSE_ALARMS / comparisons, 0.05))
    return quantile / usual * _NORMAL_95  # the errors carry Student's factor for 95 % already
