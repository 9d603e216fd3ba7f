r"""From second moments along trajectories to the best linear jumps (docs/method.md, section 10).

$$c_{out} = \tau\, a(t, s), \qquad c_{skip} = \frac st + \tau\, b(t, s), \qquad \tau = 1 - \frac st$$

Here (a, b) regresses $y = (x_s - \frac st x_t) / \tau$, the output with which an Euler step reaches the teacher's
$x_s$, on D and $x_t$. For s = t it is (1, 0), since y = D. Levels s above t are on the same trajectories and regressed
as well: tables on all pairs are interpolated across the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from ..statistics.moments import Array, jackknife, reference
from .trajectory_moments import TrajectoryMoments

# what D must hold beyond a multiple of x to be told from it, in squares
_RIDGE = 1e-8  # of the smaller of D and x - D

_ROUNDING = 100.0  # times the squared epsilons of the teacher's dtype, of D, and of float64, of x

_CANCELLATION = 1000.0  # times the epsilon of float64, of E x: the sums' own rounding

NETWORK = 0.03  # of EDM's c_out: errors of a student's network, below which a mode's D tells it nothing

LEAST_A = 0.5  # an output that hardly moves x_s could not correct it


class Regression(NamedTuple):
    """Coefficients for all pairs of levels, t first. Shapes ``(G, K, K)``.

    Attributes:
        a: Multiplies D.
        b: Multiplies x_t.
    """

    a: Array
    b: Array


def regress_samples(moments: TrajectoryMoments, precision: str) -> tuple[Regression, Regression]:
    """Regress with one pair of coefficients for all elements.

    Where D is a multiple of x, as for white Gaussian data, only a combination of a and b is determined: a then keeps
    the 1 of an Euler step, and b makes up for it.

    Args:
        moments: The moments; their groups are put together.
        precision: The teacher's dtype, e.g. ``"float32"``.

    Returns:
        The coefficients and their standard errors, with G = 1.
    """
    whole = moments.of_whole_samples()
    one, floor = np.ones(whole.xx.shape[1:]), _rounding(whole, precision)

    def both(means: _Means) -> Regression:
        a = means.a(one, floor)
        return Regression(a, means.b(a))

    (a, a_error), (b, b_error) = _jackknife(whole, both)
    return Regression(a, b), Regression(a_error, b_error)


def regress_groups(moments: TrajectoryMoments, precision: str) -> Regression:
    r"""Regress with one pair of coefficients per group, a drawn to that of whole samples where it is not determined.

    What D holds beyond a multiple of x counts as far as it exceeds the errors of a student's network. Then, of the
    difference $\delta$ from whole samples, with standard error e, $\delta^3 / (\delta^2 + e^2)$ is kept. Given a, b is
    the group's own regression.

    Args:
        moments: The moments.
        precision: The teacher's dtype, e.g. ``"float32"``.

    Returns:
        The coefficients.
    """
    (whole, _), all_modes = regress_samples(moments, precision), moments.of_whole_samples()
    floor = _rounding(all_modes, precision) + NETWORK**2 * _network_scale(all_modes)
    ((a, error),) = _jackknife(moments, lambda means: (means.a(whole.a, floor),))
    signal, noise = (a - whole.a) ** 2, error**2
    kept = np.divide(signal, signal + noise, out=np.zeros_like(a), where=signal > 0)
    a = whole.a + kept * (a - whole.a)
    return Regression(a, _means(moments).b(a))


class _Means(NamedTuple):
    """Mean products, of a group's element: ``xx`` and ``Ex`` of shape (..., K, K), ``EE`` of shape (..., K)."""

    levels: Array
    xx: Array
    Ex: Array
    EE: Array

    @property
    def tau(self) -> Array:
        """The share 1 - s/t of an Euler step; 1 in the place of 0 on the diagonal."""
        return np.where(np.eye(len(self.levels)) > 0, 1, 1 - self.levels / self.levels[:, None])

    @property
    def multiple(self) -> Array:
        """The regression coefficient of E on x. Shape ``(..., K)``."""
        return _diagonal(self.Ex) / _diagonal(self.xx)

    def a(self, prior: Array, floor: Array) -> Array:
        """Regress y on what D holds beyond a multiple of x, by ridge regression towards a prior (..., K, K)."""
        own = self.EE - self.multiple * _diagonal(self.Ex)
        ridge = ridge_of(self.levels, _diagonal(self.xx), _diagonal(self.Ex), self.EE, floor)[..., None]
        with_x_s = self.Ex - self.multiple[..., None] * self.xx
        a = (with_x_s / self.tau + ridge * prior) / (own[..., None].clip(min=0) + ridge)
        return np.where(np.eye(len(self.levels)) > 0, 1, a.clip(min=LEAST_A))

    def b(self, a: Array) -> Array:
        """Regress y - a D on x."""
        y = (self.xx / _diagonal(self.xx)[..., None] - self.levels / self.levels[:, None]) / self.tau
        D = self.multiple + reference(self.levels)
        return np.where(np.eye(len(self.levels)) > 0, 0, y - a * D[..., None])


def _diagonal(pairs: Array) -> Array:
    return np.diagonal(pairs, axis1=-2, axis2=-1)


def _means(moments: TrajectoryMoments) -> _Means:
    means = (part.sum(0) / moments.counts.sum() for part in (moments.xx, moments.Ex, moments.EE))
    return _Means(moments.levels, *means)


def ridge_of(levels: Array, xx: Array, xE: Array, EE: Array, floor: Array) -> Array:
    """Return what D must hold beyond a multiple of x to be told from it, in squares. Shapes ``(..., K)``.

    Args:
        levels: The noise levels. Shape ``(K,)``.
        xx: Mean squares of x.
        xE: Mean products of x and E.
        EE: Mean squares of E.
        floor: What else hides it, e.g. `rounding_of`.

    Returns:
        The ridge.
    """
    left, eps = 1 - reference(levels), np.finfo(np.float64).eps
    smaller = np.minimum(_D_square(levels, xx, xE, EE), EE - 2 * left * xE + left**2 * xx)  # x - D = left x - E
    rounding = floor + _ROUNDING * eps**2 * xx + _CANCELLATION * eps * np.sqrt(EE * xx)
    return np.asarray(_RIDGE * smaller.clip(min=0) + rounding)


def rounding_of(levels: Array, xx: Array, xE: Array, EE: Array, precision: str) -> Array:
    """Return the square of what the teacher's dtype does not resolve of an element of D. Shapes as for `ridge_of`."""
    return _ROUNDING * torch.finfo(getattr(torch, precision)).eps ** 2 * _D_square(levels, xx, xE, EE)


def _D_square(levels: Array, xx: Array, xE: Array, EE: Array) -> Array:
    taken = reference(levels)  # D = E + taken x
    return np.asarray(EE + 2 * taken * xE + taken**2 * xx)


def _rounding(whole: TrajectoryMoments, precision: str) -> Array:
    """Return `rounding_of` whole samples. Shape ``(K,)``."""
    means = _means(whole)
    return rounding_of(means.levels, _diagonal(means.xx)[0], _diagonal(means.Ex)[0], means.EE[0], precision)


def _network_scale(whole: TrajectoryMoments) -> Array:
    """Return the square of EDM's c_out, for data of the samples' mean square. Shape ``(K,)``."""
    t_square, data_square = whole.levels**2, _diagonal(_means(whole).xx)[0, -1]
    scale: Array = t_square * data_square / (t_square + data_square)
    return scale


def _jackknife(
    moments: TrajectoryMoments, statistic: Callable[[_Means], tuple[Array, ...]]
) -> list[tuple[Array, Array]]:
    """Return what a statistic is and its standard error, over blocks of trajectories. Shapes ``(G, K, K)``."""
    shape = moments.xx.shape[1:]
    EE = np.broadcast_to(moments.EE[..., None], moments.xx.shape)
    sums = np.stack([moments.xx, moments.Ex, EE], -1).reshape(len(moments.counts), -1, 3)

    def flat(means: Array) -> list[Array]:
        xx, Ex, EE = np.moveaxis(means.reshape(-1, *shape, 3), -1, 0)
        return [r.reshape(len(means), -1) for r in statistic(_Means(moments.levels, xx, Ex, EE[..., 0]))]

    return [(v.reshape(shape), e.reshape(shape)) for v, e in jackknife(moments.counts, sums, flat)]
