r"""Sums over samples, from which every statistic follows (docs/method.md, section 6).

A *unit* is an antithetic pair $x_0 \pm t n$. At each level it yields the inner products listed in `MOMENTS`, averaged
over its two halves. They are summed in float64 per *group*, a block of consecutive units; the spread between groups
gives the standard error of whatever is computed from the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]

# an estimate of tr dD/dx and its normaliser; inner products of E = D - a x, x and y = dE/dlambda (0 where not needed)
MOMENTS = ("trace", "norm", "EE", "Ex", "xx", "Ey", "xy")
_PRODUCTS = ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))  # the features E, x, y that each moment after norm multiplies
GROUPS = 32


def reference(levels: Array) -> Array:
    """Return a, the part of x that is taken out of D before products are formed: all of it below t = 1.

    There D is nearly x, and the small remainder would be lost in the rounding of D's own square.
    """
    return np.where(levels < 1, 1.0, 0.0)


def num_groups(num_units: int) -> int:
    """Return the number of groups: at most `GROUPS`, of at least two units each."""
    return max(1, min(GROUPS, num_units // 2))


def group_of(first_unit: int, count: int, num_units: int) -> Tensor:
    """Return the groups of consecutive units, blocks of equal size as nearly as can be, whatever the batches."""
    return torch.arange(first_unit, first_unit + count, device="cpu") * num_groups(num_units) // num_units


def inner_products(features: Sequence[Tensor]) -> Tensor:
    """Return the products of E, x and y, averaged over the halves.

    Args:
        features: E, x and perhaps y, flattened. Each of shape ``(halves, B, d)``.

    Returns:
        The moments from ``"EE"`` on. Shape ``(B, 5)``.
    """
    zero = features[0].new_zeros(features[0].shape[1])
    return torch.stack(
        [(features[a] * features[b]).sum(-1).mean(0) if b < len(features) else zero for a, b in _PRODUCTS], 1
    )


class MomentSums:
    """Moments summed per group and level."""

    def __init__(self, num_units: int, num_levels: int) -> None:
        self.num_units = num_units
        groups = num_groups(num_units)
        self.counts = torch.zeros(groups, dtype=torch.float64, device="cpu")
        self.values = torch.zeros(groups, num_levels, len(MOMENTS), dtype=torch.float64, device="cpu")

    def add(self, first_unit: int, moments: Tensor) -> None:
        """Add consecutive units' moments. Shape ``(levels, B, 7)``, float64 on the CPU."""
        groups = group_of(first_unit, moments.shape[1], self.num_units)
        self.counts.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
        self.values.index_add_(0, groups, moments.transpose(0, 1))


class Centering:
    r"""What an intercept takes out of the sums: products of means, so that a mean of the data does not enter g.

    From a group's $\sum_i a_i \cdot b_i$ over its $m$ units goes the unbiased estimate of $m\,E[a] \cdot E[b]$ from
    distinct units, $\sum_{i \ne j} a_i \cdot b_j / (m - 1)$. Memory: the vectors of one group at a time.
    """

    def __init__(self, num_units: int, num_levels: int) -> None:
        self.num_units = num_units
        self.totals: list[Tensor | None] = [None] * num_levels  # sums of E, x (and y) over all units, (F, d)
        self._open: list[tuple[int, Tensor] | None] = [None] * num_levels  # the group at work and its sums
        shape = (num_groups(num_units), num_levels, len(_PRODUCTS))
        self._distinct = torch.zeros(shape, dtype=torch.float64, device="cpu")

    def add(self, level: int, first_unit: int, features: Sequence[Tensor]) -> None:
        """Add one level's features of consecutive units; shapes as for `inner_products`."""
        means = torch.stack([f.mean(0) for f in features])
        groups = group_of(first_unit, means.shape[1], self.num_units)
        first_row = 0
        for group, size in zip(*_runs(groups), strict=True):
            rows = means[:, first_row : first_row + size]
            first_row += size
            if self._open[level] is not None and self._open[level][0] != group:  # type: ignore[index]
                self._close(level)
            _, sums = self._open[level] or (group, torch.zeros_like(rows[:, 0]))
            self._open[level] = (group, sums + rows.sum(1))
            self._distinct[group, level] -= inner_products(list(rows[:, None])).sum(0).cpu()

    def _close(self, level: int) -> None:
        current = self._open[level]
        if current is not None:
            group, sums = current
            self._distinct[group, level] += inner_products(list(sums[:, None, None]))[0].cpu()
            total = self.totals[level]
            self.totals[level] = sums if total is None else total + sums
            self._open[level] = None

    def close(self, sums: MomentSums) -> Tensor:
        """Centre the sums in place. A group left with a single unit, where data ran out, is emptied.

        Args:
            sums: The uncentred sums of the same units.

        Returns:
            The means of E, x (and y) per level, float64. Shape ``(levels, F, d)``.

        Raises:
            ValueError: If all groups are empty then.
        """
        for level in range(len(self.totals)):
            self._close(level)
        means = torch.stack([t for t in self.totals if t is not None]).to("cpu", torch.float64) / sums.counts.sum()
        if not bool((sums.counts > 1).any()):
            raise ValueError("an intercept needs at least 2 clean samples, got 1: pass more data, or no intercept.")
        single = sums.counts == 1
        sums.values[..., 2:] -= self._distinct / (sums.counts - 1).clamp(min=1)[:, None, None]
        sums.values[single], sums.counts[single] = 0, 0
        return means


def _runs(groups: Tensor) -> tuple[list[int], list[int]]:
    """Return the groups in a batch, in order, and how many of its units each has."""
    values, sizes = groups.unique(return_counts=True)
    return values.tolist(), sizes.tolist()


def jackknife(counts: Array, sums: Array, statistic: Callable[[Array], Sequence[Array]]) -> list[tuple[Array, Array]]:
    """Return the statistic of the mean moments with its standard error, by leaving out one group at a time.

    Groups may differ in size (Busing, Meijer and van der Leeden 1999). The errors carry Student's factor for the
    number of groups, so that 1.96 of them make a 95 % interval.

    Args:
        counts: Units per group. Shape ``(G,)``.
        sums: Moments summed per group. Shape ``(G, K, M)``.
        statistic: Maps mean moments of shape ``(R, K, M)`` to results of shape ``(R, K)``.

    Returns:
        Per result its value and standard error, each of shape ``(K,)``; infinite errors where there is one group.
    """
    n, groups = counts.sum(), len(counts)
    total = sums.sum(0)
    if groups < 2:
        return [(r[0], np.full_like(r[0], np.inf)) for r in statistic(total[None] / n)]
    left_out = (total - sums) / (n - counts)[:, None, None]
    results = statistic(np.concatenate([total[None] / n, left_out]))

    from scipy.special import stdtrit

    student = float(stdtrit(groups - 1, 0.975)) / 1.959963984540054
    h = (n / counts)[:, None]
    pairs = []
    for result in results:
        value, without = result[0], result[1:]
        pseudo = h * value - (h - 1) * without
        center = groups * value - ((1 - 1 / h) * without).sum(0)
        variance = ((pseudo - center) ** 2 / (h - 1)).mean(0)
        pairs.append((value, student * np.sqrt(variance)))
    return pairs
