r"""From second moments along trajectories to the best linear jumps, and tables of them (docs/method.md, section 10).

$$c_{out} = \tau\, a(t, s), \qquad c_{skip} = \frac st + \tau\, b(t, s), \qquad \tau = 1 - \frac st$$

Here (a, b) regresses $y = (x_s - \frac st x_t) / \tau$, the output with which an Euler step reaches the teacher's
$x_s$, on D and $x_t$. For s = t it is (1, 0), since y = D. Levels s above t are on the same trajectories and regressed
as well: tables on all pairs are interpolated across the diagonal.

What is interpolated is $(a - 1) / w$ and $b / w$ with $w = \ln(t / s)$. They are smooth across s = t, and whatever they
are, jumps from t to t change nothing and $D = x_t - t\, \partial_s x_s|_{s=t}$; no difference of nearly equal numbers
is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..interpolation.spline_table import SplineTable
from ..interpolation.splines import derivative
from ..preconditionings.base import Scalings
from ..statistics.moments import Array, jackknife, reference
from .trajectory_moments import TrajectoryMoments

# What D must hold beyond a multiple of x to be told from it, in squares. In brackets what is found where it holds
# nothing: white Gaussian data of 4 to 3072 elements, 40 levels
_RIDGE = 1e-8  # of the smaller of D and x - D: changes well-posed coefficients by as much
_ROUNDING = 100.0  # times the squared epsilons of the teacher's dtype, of D (0.4 to 26, float32), and of float64, of x
_CANCELLATION = 1000.0  # times the epsilon of float64, of E x: the sums' own rounding (4 to 150)

# of EDM's c_out: errors of a student's network, below which a mode's D tells it nothing. It raises a U-Net's untrained
# miss by less than 0.5 %, 0.1 by up to 4 %; with none, exact denoisers of two points have a up to 1e5
NETWORK = 0.03
LEAST_A = 0.5  # an output that hardly moves x_s could not correct it; as against no bound, 0.5 % of miss at most


class Regression(NamedTuple):
    """Coefficients for all pairs of levels, t first. Shapes ``(G, K, K)``."""

    a: Array  # of D
    b: Array  # of x_t


class JumpTable(SplineTable):
    """Coefficients of G jumps at a time, from B-splines ``(K, K, 2 G)`` of each jump's (a - 1) / w, then b / w."""

    @staticmethod
    def of(levels: Array, a: Array, b: Array, dtype: torch.dtype = torch.float64) -> JumpTable:
        """Return the table through given values at all pairs of levels. Shapes ``(K,)``, ``(G, K, K)`` twice."""
        change = np.concatenate([a - 1, b])
        w = np.log(levels[:, None] / levels)
        diagonal = np.diagonal(derivative(levels, change), axis1=1, axis2=2)  # the limit of change / w
        i = np.arange(len(levels))
        w[i, i] = 1
        ratio = change / w
        ratio[:, i, i] = diagonal
        control = torch.from_numpy(SplineTable.control_points(levels, ratio))
        return JumpTable(torch.from_numpy(levels), control.to(dtype))

    @property
    def num_jumps(self) -> int:
        """Number of jumps G."""
        return self.control.shape[-1] // 2

    def jumps(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients. Shapes: ``t`` and ``s`` alike, the results ``(G, *t.shape)``."""
        a_slope, b_slope = self(t, s).chunk(2)
        w, tau = ((t - s) / s).log1p(), (t - s) / t
        return Scalings(s / t + tau * (w * b_slope), tau * (1 + w * a_slope))


def regress_samples(moments: TrajectoryMoments, precision: str) -> tuple[Regression, Regression]:
    """Return one pair of coefficients for all elements, of moments of one group, and their standard errors.

    Where D is a multiple of x, as for white Gaussian data, only a combination of a and b is determined: a then keeps
    the 1 of an Euler step, and b makes up for it.
    """
    euler, floor = np.ones(moments.xx.shape[1:]), Means.of(moments).rounding(precision)

    def both(means: Means) -> Regression:
        a = means.a(euler, floor)
        return Regression(a, means.b(a))

    (a, a_error), (b, b_error) = _jackknife(moments, both)
    return Regression(a, b), Regression(a_error, b_error)


def regress_groups(moments: TrajectoryMoments, precision: str) -> Regression:
    """Return one pair of coefficients per group, a drawn to that of whole samples where it is not determined."""
    # 1. of all elements together, every group's prior
    samples = moments.of_whole_samples()
    (whole, _), means = regress_samples(samples, precision), Means.of(samples)
    # 2. each group's own: what D holds beyond a multiple of x counts as far as it exceeds a student's errors
    data_rms = np.sqrt(means.x_square[0, -1])  # that of x at the cleanest level
    floor = means.rounding(precision) + network_errors(moments.levels, data_rms)
    ((a, error),) = _jackknife(moments, lambda means: (means.a(whole.a, floor),))
    # 3. of the difference d from the prior, with standard error e, d^3 / (d^2 + e^2) is kept: what is not noise
    signal, noise = (a - whole.a) ** 2, error**2
    kept = np.divide(signal, signal + noise, out=np.zeros_like(a), where=signal > 0)
    a = whole.a + kept * (a - whole.a)
    # 4. given a, b is the group's own regression, so that Gaussian modes stay exact
    return Regression(a, Means.of(moments).b(a))


def network_errors(levels: Array, sigma_data: float) -> Array:
    """Return the squares of what a student's network errs by: `NETWORK` of EDM's c_out. Shape ``(K,)``."""
    return np.asarray((NETWORK * sigma_data * levels) ** 2 / (levels**2 + sigma_data**2))


class Means(NamedTuple):
    """Mean products of an element: ``xx`` and ``Ex`` of shape (..., K, K), t first, ``EE`` of shape (..., K)."""

    levels: Array
    xx: Array
    Ex: Array
    EE: Array

    @staticmethod
    def of(moments: TrajectoryMoments) -> Means:
        """Return those over all blocks."""
        means = (part.sum(0) / moments.counts.sum() for part in (moments.xx, moments.Ex, moments.EE))
        return Means(moments.levels, *means)

    @property
    def x_square(self) -> Array:
        """The mean square of x_t. Shape ``(..., K)``, as all that follow but a and b."""
        return _diagonal(self.xx)

    @property
    def D_square(self) -> Array:
        """The mean square of D = E + taken x_t."""
        taken = reference(self.levels)
        return np.asarray(self.EE + 2 * taken * _diagonal(self.Ex) + taken**2 * self.x_square)

    @property
    def multiple(self) -> Array:
        """The regression coefficient of E on x_t."""
        return _diagonal(self.Ex) / self.x_square

    def rounding(self, precision: str) -> Array:
        """Return the square of what the teacher's dtype does not resolve of an element of D."""
        return np.asarray(_ROUNDING * torch.finfo(getattr(torch, precision)).eps ** 2 * self.D_square)

    def ridge(self, floor: Array) -> Array:
        """Return what D must hold beyond a multiple of x to be told from it, in squares; the floor hides it too."""
        left, eps, xE = 1 - reference(self.levels), np.finfo(np.float64).eps, _diagonal(self.Ex)
        removed_square = self.EE - 2 * left * xE + left**2 * self.x_square  # x - D = left x - E
        smaller = np.minimum(self.D_square, removed_square).clip(min=0)
        rounding = floor + _ROUNDING * eps**2 * self.x_square + _CANCELLATION * eps * np.sqrt(self.EE * self.x_square)
        return np.asarray(_RIDGE * smaller + rounding)

    def a(self, prior: Array, floor: Array) -> Array:
        """Regress y on what D holds beyond a multiple of x_t, by ridge regression towards a prior (..., K, K)."""
        # E and D differ by a multiple of x_t, and y by one from x_s / tau: beyond such multiples they are the same
        own = self.EE - self.multiple * _diagonal(self.Ex)
        with_x_s = self.Ex - self.multiple[..., None] * self.xx
        ridge = self.ridge(floor)[..., None]
        a = (with_x_s / self._tau + ridge * prior) / (own[..., None].clip(min=0) + ridge)
        return np.where(self._same_level, 1, a.clip(min=LEAST_A))

    def b(self, a: Array) -> Array:
        """Regress y - a D on x_t."""
        y = (self.xx / self.x_square[..., None] - self.levels / self.levels[:, None]) / self._tau
        D = self.multiple + reference(self.levels)
        return np.where(self._same_level, 0, y - a * D[..., None])

    @property
    def _same_level(self) -> NDArray[np.bool_]:
        return np.eye(len(self.levels), dtype=bool)

    @property
    def _tau(self) -> Array:
        """The share 1 - s/t of an Euler step; 1 in the place of 0 on the diagonal."""
        return np.where(self._same_level, 1, 1 - self.levels / self.levels[:, None])


def _diagonal(pairs: Array) -> Array:
    return np.diagonal(pairs, axis1=-2, axis2=-1)


def _jackknife(
    moments: TrajectoryMoments, statistic: Callable[[Means], tuple[Array, ...]]
) -> list[tuple[Array, Array]]:
    """Return what a statistic is and its standard error, over blocks of trajectories. Shapes ``(G, K, K)``."""
    shape = moments.xx.shape[1:]
    EE = np.broadcast_to(moments.EE[..., None], moments.xx.shape)
    sums = np.stack([moments.xx, moments.Ex, EE], -1).reshape(len(moments.counts), -1, 3)

    def flat(means: Array) -> list[Array]:
        xx, Ex, EE = np.moveaxis(means.reshape(-1, *shape, 3), -1, 0)
        return [r.reshape(len(means), -1) for r in statistic(Means(moments.levels, xx, Ex, EE[..., 0]))]

    return [(v.reshape(shape), e.reshape(shape)) for v, e in jackknife(moments.counts, sums, flat)]
