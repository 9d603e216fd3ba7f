r"""The remainder $g = D - l_t x$ from second moments: its RMS, its $s_t$, and whether it is more than rounding.

For whole samples and for single elements alike: a moment is an array of any shape, levels last.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..interpolation import splines
from .moments import Array, reference

PRECISIONS = {"float32": 1e-7, "float64": 1e-15}  # of D; a remainder below is rounding

_ROUNDING_OF_L = 100.0  # in units of the same: below it may be rounding's effect on l, of differences of D over t

_CANCELLATION = 1e-7  # of E: what the sums' own rounding leaves of g = E - k x where the two cancel


def remainder_square(EE: Array, Ex: Array, xx: Array, k: Array) -> Array:
    """Return E|g|^2 from mean moments, with g = D - l x = E - k x."""
    return np.asarray(EE - 2 * k * Ex + k**2 * xx)


def is_resolved(gg: Array, EE: Array, DD: Array, xx: Array, l_stderr: Array, precision: str) -> NDArray[np.bool_]:
    """Tell where the remainder is more than rounding of D, or of D's differences, which move l (section 6).

    Args:
        gg: Mean square of the remainder.
        EE: Mean square of E, which g was computed from.
        DD: Mean square of D, with its mean.
        xx: Mean square of x.
        l_stderr: Standard error of l.
        precision: What the teacher was called in, one of `PRECISIONS`.

    Returns:
        One truth value for each of them.
    """
    rounding = PRECISIONS[precision] ** 2 * DD
    from_l = np.where(np.isfinite(l_stderr), 5 * l_stderr, 0) ** 2 * xx
    resolved: NDArray[np.bool_] = (
        (gg > rounding) & (gg > _CANCELLATION**2 * EE) & ((gg > from_l) | (gg > _ROUNDING_OF_L**2 * rounding))
    )
    return resolved


def log_scale_spline(levels: Array, g_rms: Array, s: Array, s_method: str) -> Any:
    """Return ln S as a spline in lambda, up to constants: of g_rms itself where s is a derivative of it anyway.

    Args:
        levels: Decreasing noise levels. Shape ``(K,)``.
        g_rms: RMS of the remainder. Shape ``(..., K)``.
        s: Scaling coefficients. Shape ``(..., K)``.
        s_method: Estimator of s.

    Returns:
        The spline, as of `splines.spline`.
    """
    if s_method == "transport":
        return splines.spline(levels, splines.log_scale(levels, g_rms))
    return splines.spline(levels, s).antiderivative()


def scales(
    levels: Array, l: Array, products: Array, resolved: NDArray[np.bool_], size: int, s_method: str
) -> tuple[Array, Array]:
    """Return g_rms and s, 0 where g is not resolved.

    Args:
        levels: Decreasing noise levels. Shape ``(K,)``.
        l: Linear coefficients. Shape ``(..., K)``.
        products: Mean moments EE, Ex, xx (and Ey, xy where needed). Shape ``(3 or 5, ..., K)``.
        resolved: Where the remainder is more than rounding; broadcasts against ``l``.
        size: Number of elements that a moment sums over.
        s_method: Estimator of s.

    Returns:
        Both of shape ``(..., K)``.
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
