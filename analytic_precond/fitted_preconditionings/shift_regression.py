r"""At which noise level to ask, and the best linear jump given the answer (docs/method.md, section 12).

For each jump the miss of the best linear combination of $x_t$ and the teacher's answer is a function of the level q at
which it is asked. The levels are chosen together: as low a miss as possible for each jump, with a table of
$u = \ln(t / q)$ that is smooth in (t, s). Given q, a and b are the regression of `jump_regression`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.polynomial.polynomial import polyfit
from numpy.typing import NDArray
from scipy.interpolate import CubicSpline, make_interp_spline
from scipy.optimize import minimize
from scipy.sparse import csr_array

from ..statistics.moments import Array, reference
from .jump_regression import LEAST_A, Means, network_errors
from .trajectory_moments import ShiftMoments

Indices = NDArray[np.intp]

# In units of ln(t / s), where the miss is tabulated. Tried on three Gaussians and a mixture: with 129 or 257 of them u
# changes by 1e-3 to 5e-3 (RMS; 0.03 at most), with 33 by 4e-3 to 1e-2, with 17 by 1e-2 to 2e-2
_PLACES = np.linspace(0, 1, 65)

# Weights against the logarithm of the miss. Tables of 0.1 and 0.02 are less smooth; students trained from them about as
# fast (docs/evidence.md, "The tables' smoothness")
_SMOOTHNESS = 1.0  # of u's squared second derivatives in lambda
_PULL = 0.005  # of u's square, which decides where the miss does not


class ShiftedRegression(NamedTuple):
    """Coefficients for all pairs of levels, t first; for s > t what continues them smoothly. Shapes ``(K, K)``."""

    a: Array  # of D
    b: Array  # of x_t
    rate: Array  # u / ln(t / s), between 0 (asked at t) and 1 (at s)


def regress_shifted(moments: ShiftMoments, precision: str, sigma_data: float) -> ShiftedRegression:
    """Choose the levels to ask at, and regress."""
    levels, K = moments.levels, len(moments.levels)
    w = np.log(levels[:, None] / levels)
    i, j = np.triu_indices(K, 1)  # the pairs t > s

    # 1. what else than x_t hides the answer: rounding, as in a regression that asks at t, and a student's own errors
    unshifted = Means(levels, moments.xx, np.einsum("iij->ij", moments.Ex), np.diagonal(moments.EE))
    ridge, errors = unshifted.ridge(unshifted.rounding(precision)), network_errors(levels, sigma_data)[i]

    # 2. the miss of each pair's jump, asked at 65 levels from t to s, relative to that of x_t alone
    answers = _Answers(moments, ridge)
    tabulated = answers.at(i, j, w[i, j] * _PLACES[:, None])
    miss = np.log((tabulated.miss.clip(min=0) + errors) / (tabulated.unexplained + errors))

    # 3. the levels, u = ln(t / q), of all pairs together
    u = _smooth_shift(-np.log(levels), i, j, w[i, j], miss)

    # 4. given them, each pair's regression, as in `jump_regression` with the 1 of an Euler step as prior
    best = answers.at(i, j, u[None])
    a = (best.covariance + best.ridge) / (best.own + best.ridge)
    a = np.where(np.isfinite(a), a, 1).clip(min=LEAST_A)[0]
    b = best.y_on_x - a * best.D_on_x[0]

    # 5. tables hold what is smooth across s = t: divided by w, and continued beyond it
    def full(values: Array) -> Array:
        table = np.full((K, K), np.nan)
        table[i, j] = values / w[i, j]
        return _continued(table, w)

    rate = full(u).clip(0, 1)
    return ShiftedRegression(1 + w * full(a - 1), w * full(b), rate)


class _Moments(NamedTuple):
    """What a regression of y needs, asked at some level: of the answer's part that is orthogonal to x, and of x."""

    own: Array
    covariance: Array  # with y
    ridge: Array
    D_on_x: Array
    y_on_x: Array
    unexplained: Array  # of y, by x

    @property
    def miss(self) -> Array:
        """E|y - a D - b x|^2 for the best a and b."""
        miss: Array = self.unexplained - self.covariance**2 / (self.own + self.ridge)
        return miss


class _Answers(NamedTuple):
    """The moments of the teacher's answers as functions of u, by interpolation between the levels it was asked at."""

    moments: ShiftMoments
    ridge: Array  # (K,)

    def at(self, i: Indices, j: Indices, u: Array) -> _Moments:
        """Return the moments for jumps from level i to level j, asked at u. Shapes ``(P,)``, ``(P,)``, ``(N, P)``."""
        levels, xx, Ex, EE = self.moments.levels, self.moments.xx, self.moments.Ex, self.moments.EE
        K, tau = len(levels), (1 - levels[j] / levels[i])
        own, covariance, D_on_x = (np.empty_like(u) for _ in range(3))
        for row in range(K - 1):
            # 1. E_k = multiple x_i + what is orthogonal to it, of root mean square `scale`, for each level k asked at
            asked = np.log(levels[row] / levels[row:])
            multiple = Ex[row, row:, row] / xx[row, row]
            scale = np.sqrt((EE[row, row:] - multiple * Ex[row, row:, row]).clip(min=0) + self.ridge[row])
            # 2. its products with every x_j, in units of that: they and squares themselves fall by orders of magnitude,
            # and would be interpolated badly
            with_x = (Ex[row, row:] - multiple[:, None] * xx[row]) / scale[:, None]
            # 3. all of them between the levels asked at, by one spline in u
            parts = np.column_stack([np.log(scale), multiple, with_x])
            function = make_interp_spline(asked, parts, k=min(3, K - row - 1))
            for pair in np.flatnonzero(i == row):
                ln_scale, D_on_x[:, pair], with_x_s = function(u[:, pair])[:, [0, 1, 2 + j[pair]]].T
                scale = np.exp(ln_scale)
                own[:, pair], covariance[:, pair] = scale**2 - self.ridge[row], with_x_s * scale
        # 4. of y = (x_s - s/t x_t) / tau: what is orthogonal to x_t is that of x_s / tau, and so is what x_t leaves
        x_s_on_x = xx[i, j] / xx[i, i]
        return _Moments(
            own=own.clip(min=0),
            covariance=covariance / tau,
            ridge=self.ridge[i],
            D_on_x=D_on_x + reference(levels)[i],
            y_on_x=(x_s_on_x - levels[j] / levels[i]) / tau,
            unexplained=(xx[j, j] - x_s_on_x * xx[i, j]).clip(min=0) / tau**2,
        )


def _smooth_shift(lam: Array, i: Indices, j: Indices, w: Array, miss: Array) -> Array:
    """Return the shift of every pair that minimises the sum of all misses and the table's roughness. Shape ``(P,)``."""
    # what is minimised over is rate = u / w, from 0 to 1, as `_PLACES`
    pieces = CubicSpline(_PLACES, miss).c  # (4, cells, P)
    cells, pairs = len(_PLACES) - 1, np.arange(len(w))
    rough = _second_derivatives(lam, i, j)

    def objective(rate: Array) -> tuple[float, Array]:
        """Return the sum, and its derivatives by the rates: docs/method.md, section 12, has the formula."""
        cell = np.minimum((rate * cells).astype(int), cells - 1)
        v, u = rate - _PLACES[cell], rate * w
        c3, c2, c1, c0 = pieces[:, cell, pairs]
        bend = rough @ u
        value = (((c3 * v + c2) * v + c1) * v + c0).sum() + _SMOOTHNESS * (bend @ bend) + _PULL * (u @ u)
        slope = (3 * c3 * v + 2 * c2) * v + c1 + 2 * w * (_SMOOTHNESS * (rough.T @ bend) + _PULL * u)
        return float(value), slope

    # There are local minima: in one of three Gaussians the start from 0.6 ended 0.007 above the others, in the rest and
    # in a mixture all three agreed to 1e-9. And where one stops early, rounding decides the answer: these ended of
    # themselves, after 670 to 1030 iterations
    starts = (_PLACES[miss.argmin(0)], np.full(len(w), 0.2), np.full(len(w), 0.6))
    options = {"maxiter": 20000, "maxfun": 40000, "ftol": 1e-14, "gtol": 1e-8}
    bounds = [(0, 1)] * len(w)
    ends = [minimize(objective, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for x in starts]
    best: Array = min(ends, key=lambda end: float(end.fun)).x
    return best * w


def _second_derivatives(lam: Array, i: Indices, j: Indices) -> Any:
    """Return the sparse matrix that takes u at pairs to its second derivatives along t and along s; u(t, t) = 0."""
    K = len(lam)
    number = np.full((K, K), -1)  # each pair's, t first; -1 on the diagonal, whose zeros need no entry
    number[i, j] = np.arange(len(i))
    entries, row = [], 0
    for along_s, lines in ((True, number), (False, number.T)):
        for line in range(K):
            # levels with a neighbour on either side, in a row from the diagonal on, in a column up to it
            for m in range(line + 1, K - 1) if along_s else range(1, line):
                before, after = lam[m] - lam[m - 1], lam[m + 1] - lam[m]
                weights = 2 / (before * (before + after)), -2 / (before * after), 2 / (after * (before + after))
                entries += [(row, lines[line, m + o], c) for o, c in zip((-1, 0, 1), weights, strict=True)]
                row += 1
    kept = np.array([entry for entry in entries if entry[1] >= 0]).reshape(-1, 3)
    return csr_array((kept[:, 2], (kept[:, 0].astype(int), kept[:, 1].astype(int))), shape=(row, len(i)))


def _continued(table: Array, w: Array) -> Array:
    """Fill the diagonal by its limit along s, and what is beyond it by reflection through it."""
    K = len(table)
    diagonal = np.empty(K)  # at w = 0, of the parabola through the three nearest values
    for i in range(K - 1):
        near = slice(i + 1, min(i + 4, K))
        # not Polynomial.fit, which before numpy 2.1 cannot take a single point
        diagonal[i] = polyfit(w[i, near], table[i, near], near.stop - near.start - 1)[0]
    diagonal[-1] = diagonal[-2]
    reflected = diagonal[:, None] + diagonal - table.T
    return np.where(np.isnan(table), np.where(np.eye(K) > 0, np.diag(diagonal), reflected), table)
