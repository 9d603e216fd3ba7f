r"""Interpolation in ``lambda = -ln t``: everything between two noise levels is a spline through the values at them.

Quintic where there are six levels or more: with 120 levels the integrals of a smooth teacher are then good to about
1e-9, and derivatives at the levels to 1e-7. Scipy does the work; nothing here is on a training step's path.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def spline(levels: Array, values: Array) -> Any:
    """Return the interpolating spline in lambda, scipy's ``BSpline``, of values ``(..., K)`` at levels ``(K,)``."""
    from scipy.interpolate import make_interp_spline  # 0.1 s to import, and only needed to build tables

    return make_interp_spline(-np.log(levels), values, k=min(5, len(levels) - 1), axis=-1)


def derivative(levels: Array, values: Array) -> Array:
    """Return d values / d lambda at the levels. Shapes: ``(K,)``, ``(..., K)`` to ``(..., K)``."""
    result: Array = spline(levels, values).derivative()(-np.log(levels))
    return result


def linear_coefficient(levels: Array, l: Array) -> Callable[[Array], Array]:
    r"""Return $l_t$ between the levels ``(K,)``, of values ``(..., K)`` at them, as a function of arrays of lambda.

    Where all values of one lie between 0 and 1, its spline goes through $\ln(l / (1 - l))$, which is nearly straight at
    both ends of the range: there l or 1 - l is proportional to $t^{\mp 2}$, and a spline through l itself has large
    relative errors.
    """
    from scipy.special import expit

    logistic = _is_logistic(l)
    through = []
    if logistic.any():
        inside = l[logistic]
        through.append((logistic, spline(levels, np.log(inside / (1 - inside))), expit))
    if not logistic.all():
        through.append((~logistic, spline(levels, l[~logistic]), np.asarray))

    def l_at(lam: Array) -> Array:
        values = np.empty((*l.shape[:-1], *lam.shape))
        for rows, curve, value in through:
            values[rows] = value(curve(lam))
        return values

    return l_at


def linear_coefficient_derivative(levels: Array, l: Array) -> Array:
    """Return dl / dlambda at the levels, of the same interpolation. Shapes: ``(K,)``, ``(..., K)`` to ``(..., K)``."""
    if not _is_logistic(l).all():
        return derivative(levels, l)
    return l * (1 - l) * derivative(levels, np.log(l / (1 - l)))


def _is_logistic(l: Array) -> Any:
    return ((l > 0) & (l < 1)).all(-1)


def log_scale(levels: Array, g_rms: Array) -> Array:
    r"""Return $\ln S$, ``(..., K)``, at the levels from the remainder's RMS, $S = rms(g) / rms(g)|_{\lambda_T}$.

    Where the remainder vanishes ($g = 0$, s_t is 0/0 and defined as 0) resolved levels are joined linearly, and the
    outermost value goes on beyond them, so that S stays finite.
    """
    lam = -np.log(levels)
    result = np.zeros_like(g_rms)
    for row in np.ndindex(g_rms.shape[:-1]):
        resolved = g_rms[row] > 0
        if resolved.any():
            result[row] = np.interp(lam, lam[resolved], np.log(g_rms[row][resolved]))
    return result - result[..., :1]


def log_scale_spline(levels: Array, g_rms: Array, s: Array, s_method: str) -> Any:
    """Return ln S as a `spline`, up to constants: of g_rms itself where s is a derivative of it anyway."""
    if s_method == "transport":
        return spline(levels, log_scale(levels, g_rms))
    return spline(levels, s).antiderivative()
