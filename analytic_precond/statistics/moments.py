r"""Sums over samples, and how every statistic follows from them (docs/method.md, section 6).

A *unit* is an antithetic pair $x_0 \pm t n$. At each level it yields the inner products listed in `MOMENTS`, averaged
over its two halves. They are summed in float64 per *group*, a block of consecutive units; the spread between groups
gives the standard error of whatever is computed from the sums.

From their means follow the remainder $g = D - l_t x$, its RMS and $s_t$, for whole samples and for single elements
alike: there a moment is an array of any shape, levels last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._precision import wide_dtype
from ..interpolation import splines

Array = NDArray[np.float64]

# an estimate of tr dD/dx and its normaliser; inner products of E = D - a x, x and y = dE/dlambda (0 where not needed)
MOMENTS = ("trace", "norm", "EE", "Ex", "xx", "Ey", "xy")
PRODUCTS = ((0, 0), (0, 1), (1, 1), (0, 2), (1, 2))  # the features E, x, y that each moment after norm multiplies
GROUPS = 32
PRECISIONS = {"float32": 1e-7, "float64": 1e-15}  # of D; a remainder below is rounding
_ROUNDING_OF_L = 100.0  # in units of the same: below it may be rounding's effect on l, of differences of D over t
_CANCELLATION = 1e-7  # of E: what the sums' own rounding leaves of g = E - k x where the two cancel


def reference(levels: Array) -> Array:
    """Return a, the part of x that is taken out of D before products are formed: all of it below t = 1.

    There D is nearly x, and the small remainder would be lost in the rounding of D's own square.
    """
    return np.where(levels < 1, 1.0, 0.0)


def num_groups(num_units: int) -> int:
    """Return the number of groups: at most `GROUPS`, of at least two units each."""
    return max(1, min(GROUPS, num_units // 2))


def group_range(group: int, num_units: int) -> tuple[int, int]:
    """Return the first unit of a group and the first one after it."""
    groups = num_groups(num_units)
    return -(-group * num_units // groups), -(-(group + 1) * num_units // groups)


def group_sizes(num_units: int) -> list[int]:
    """Return the number of units in each group."""
    return [stop - start for start, stop in (group_range(g, num_units) for g in range(num_groups(num_units)))]


def group_of(first_unit: int, count: int, num_units: int) -> Tensor:
    """Return the groups of consecutive units, blocks of equal size as nearly as can be, whatever the batches."""
    return torch.arange(first_unit, first_unit + count, device="cpu") * num_groups(num_units) // num_units


def inner_products(features: Sequence[Tensor], dim: int = -1) -> Tensor:
    """Return the 5 moments from ``"EE"`` on, of E, x (and y), summed over a dimension; they are the last, and wide."""
    E, x, *y = features
    k, rest, Ex, xx = regressed(E, x, dim)
    rest_x, wide = Ex - k * xx, xx.dtype
    EE = (rest * rest).sum(dim).to(wide) + k * (rest_x + Ex)
    if not y:
        return torch.stack([EE, Ex, xx, torch.zeros_like(xx), torch.zeros_like(xx)], -1)
    m, rest_of_y, xy, _ = regressed(y[0], x, dim)
    Ey = (rest * rest_of_y).sum(dim).to(wide) + m * rest_x + k * xy
    return torch.stack([EE, Ex, xx, Ey, xy], -1)


def regressed(f: Tensor, x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Regress f on x over a dimension; arithmetic of their size is in their own dtype.

    Plain sums in float32 would not do: a remainder g of E = k x + g that is below 3e-4 of E drowns in
    EE - 2 k Ex + k^2 xx, and a trace that is nearly d is rounded by 6e-8, while l may be as near to 1.

    1. A rough multiple k is taken out: the rest f - k x is good to float32's epsilon times f, for each element.
    2. Sums of the rest and of x are pairwise: good to a few epsilons of what they add up.
    3. With f = k x + rest all else is algebra, in float64. Whatever rounding has made of k and xx drops out of g^2 and
       of the ratio fx / xx: they are good to a few epsilons of themselves, and epsilon^2 of E^2, which is less than
       float32 leaves of the teacher's D (`is_resolved`).

    Returns:
        k, the rest, and the sums of f x and x x; all but the rest in the wide dtype.
    """
    wide = wide_dtype(x.device)
    xx = (x * x).sum(dim)
    k = (f * x).sum(dim) / xx.clamp(min=torch.finfo(xx.dtype).tiny)  # where x is 0
    rest = torch.addcmul(f, k.unsqueeze(dim), x, value=-1)
    k, xx, rest_x = (part.to(wide) for part in (k, xx, (rest * x).sum(dim)))
    return k, rest, rest_x + k * xx, xx


def jackknife(counts: Array, sums: Array, statistic: Callable[[Array], Sequence[Array]]) -> list[tuple[Array, Array]]:
    """Return each result of a statistic with its standard error, by leaving out one group at a time.

    Groups may differ in size (Busing, Meijer and van der Leeden 1999). The errors carry Student's factor for the
    number of groups, so that 1.96 of them make a 95 % interval; of a single group they are infinite. Units ``(G,)`` and
    sums ``(G, K, M)`` per group become results ``(K,)``; the statistic maps means ``(R, K, M)`` to ``(R, K)``.
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


def remainder_square(EE: Array, Ex: Array, xx: Array, k: Array) -> Array:
    """Return E|g|^2 from mean moments, with g = D - l x = E - k x."""
    return np.asarray(EE - 2 * k * Ex + k**2 * xx)


def is_resolved(gg: Array, EE: Array, DD: Array, xx: Array, l_stderr: Array, precision: str) -> NDArray[np.bool_]:
    """Return where the remainder is more than rounding of D, or of D's differences, which move l (section 6).

    The arguments are mean squares of g, of the E that it was computed from, of D with its mean, and of x.
    """
    rounding = PRECISIONS[precision] ** 2 * DD
    from_l = np.where(np.isfinite(l_stderr), 5 * l_stderr, 0) ** 2 * xx
    resolved: NDArray[np.bool_] = (
        (gg > rounding) & (gg > _CANCELLATION**2 * EE) & ((gg > from_l) | (gg > _ROUNDING_OF_L**2 * rounding))
    )
    return resolved


def scales(
    levels: Array, l: Array, products: Array, resolved: NDArray[np.bool_], size: int, s_method: str
) -> tuple[Array, Array]:
    """Return g_rms and s, 0 where g is not resolved, of l ``(..., K)`` and the mean products ``(3 or 5, ..., K)``.

    A moment sums over ``size`` elements.
    """
    a = reference(levels)
    EE, Ex, xx = products[:3]
    k = l - a
    gg = np.where(resolved, remainder_square(EE, Ex, xx, k), 0).clip(min=0)
    g_rms = np.sqrt(gg / size)

    if s_method == "transport":
        s = splines.derivative(levels, splines.log_scale(levels, g_rms))
    else:
        Ey, xy = products[3:]
        # dg/dlambda = y - l' x - k (D - x) with y = dE/dlambda along the ODE and D - x = E - (1 - a) x
        dl = splines.linear_coefficient_derivative(levels, l)
        E_dg = Ey - dl * Ex - k * (EE - (1 - a) * Ex)
        x_dg = xy - dl * xx - k * (Ex - (1 - a) * xx)
        s = (E_dg - k * x_dg) / np.where(gg > 0, gg, 1)
    return g_rms, np.where(resolved, s, 0)
