r"""Integrals of l and s between any two noise levels, exact to rounding and cheap: the numerics behind `analytic`.

Offline, splines are resampled as polynomials on a fine grid uniform in lambda, so that finding a cell is a
multiplication. Online, everything is formed relative to the pair (t, s): nothing is exponentiated from lambda_T, and
the distance ln(t / s) is computed once, from the levels themselves, so that c_out keeps its digits beside the
diagonal and is exactly 0 on it (docs/method.md, section 7).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._precision import TableModule
from .float32_integrals import float32_integrals, float32_tables
from .splines import Array

Function = Callable[[Array], Array]
_CELLS = 512  # 0.02 in lambda each, for the usual range
_DEGREE = 4  # interpolates exp(h) over a cell to 1e-11
_POWERS_OF_2 = 2.0 ** np.arange(_DEGREE + 1, -1, -1)
_MAX_FALL = 50.0  # the running integral keeps 106 bits, of which e^-50 leaves more than 7 digits
_MAX_SPAN = 600.0  # float64 ends at e^709
_MAX_STEP = 1.0  # in a cell: L S is then interpolated to 4e-5, half as steep to 1e-6


class PairIntegrals(NamedTuple):
    """What a jump from t to s is made of."""

    l_t: Tensor  # where S is asked for
    l_s: Tensor
    L_ratio: Tensor  # L_t / L_s, in (0, 1] for l <= 1
    S_ratio: Tensor | None  # S_s / S_t, if it was asked for
    r: Tensor  # (N_s - N_t) / (L_s S_s), not negative


class IntegralTable(TableModule):
    r"""Piecewise polynomials of $l$, $\ln L$, $\ln S$ and $N$ in $\lambda = -\ln t$.

    Made of l and ln S, the latter up to a constant, as functions of lambda. Refused where ln(L S) falls so far that the
    running integral would lose its digits, or is too steep for it.
    """

    ends_in = "ends"
    shape: tuple[int, ...] = ()  # of one pair of functions; an `ElementTable` has its elements'

    rows: Tensor
    ends: Tensor
    cells: Tensor  # these three only where there is no float64
    edges: Tensor
    pairs: Tensor

    def __init__(self, sigma_max: float, sigma_min: float, l: Function, ln_S: Function) -> None:
        super().__init__()
        # 1. Equal cells in lambda, and Chebyshev nodes in [-1, 1], the ends included, so that cells join.
        lam_T, lam_eps = -math.log(sigma_max), -math.log(sigma_min)
        width = (lam_eps - lam_T) / _CELLS
        nodes = -np.cos(np.pi * np.arange(_DEGREE + 1) / _DEGREE)
        lam = lam_T + width * (np.arange(_CELLS)[:, None] + (1 + nodes) / 2)
        to_coefficients = np.linalg.inv(np.vander(nodes)).T  # of each cell's polynomial, highest power first

        # 2. ln L: the integral of 1 - l within a cell, and the cells before it.
        with np.errstate(over="ignore"):  # where a spline of the logit overshoots by hundreds, l is 0 or 1
            l_values = l(lam)
        ln_L = _integrate((1 - l_values) @ to_coefficients, width)
        ln_L[1:, -1] += _values(ln_L, np.ones(1))[:-1, 0].cumsum()

        # 3. h = ln(L S), whose maximum is taken out: only ratios are ever asked for. N is the integral of exp(h) within
        # a cell; what all cells before it add is kept beside it, as high + low.
        ln_S_values = ln_S(lam)
        h = _values(ln_L, nodes) + ln_S_values
        spans = np.array([max(np.ptp(h), np.ptp(ln_L[:, -1]), np.ptp(ln_S_values))])  # of each, not of their sum alone
        steps = np.ptp(h, axis=1)[None]
        found = unfit_row(lam=lam.ravel(), h=h.reshape(1, -1), spans=spans, steps=steps, largest_step=_MAX_STEP)
        if found is not None:
            raise ValueError(
                f"l and s must not let {found[1]}: check sign and scale (s multiplies d lambda, with lambda = "
                f"-ln t; l is between 0 and 1)."
            )
        N = _integrate(np.exp(h - h.max()) @ to_coefficients, width)
        high, low = running_sum(_values(N, np.ones(1))[:, 0])

        # 4. One row per cell, so that a level's numbers are gathered at once: polynomials of l, ln L, -ln(L S) and N in
        # w = v / 2 (scaled by powers of 2, which is exact), N up to the cell, and its middle. Those of l and ln S have
        # one degree less than the two integrals.
        l_table, S_table = (np.pad(v @ to_coefficients, ((0, 0), (1, 0))) for v in (l_values, ln_S_values - h.max()))
        polynomials = np.stack([l_table, ln_L, -(ln_L + S_table), N], -1) * _POWERS_OF_2[:, None]
        rows = np.column_stack([polynomials.reshape(_CELLS, -1), high[:-1], low[:-1], np.arange(_CELLS) + 0.5])
        self.register_buffer("rows", torch.from_numpy(rows))
        self.register_buffer("ends", torch.tensor([sigma_max, sigma_min], dtype=torch.float64, device="cpu"))
        self.mirror_ends()

    def narrowed(self) -> dict[str, Tensor]:
        """Return the tables of another algorithm: this one's differences need float64."""
        scaled = self.rows[:, :-3].unflatten(1, (-1, 4)).movedim(0, -1)  # power, function, cell
        l, ln_L, minus_h, _ = (scaled / torch.from_numpy(_POWERS_OF_2)[:, None, None]).unbind(1)
        return float32_tables(torch.stack([l, ln_L, -minus_h - ln_L], 1), self.rows[:, -3:-1], self.ends)

    def forward(self, t: Tensor, s: Tensor, with_S: bool = True) -> PairIntegrals:
        """Return the integrals for levels of one shape, in the tables' dtype, with ``s <= t`` inside the range.

        On a GPU each operation costs the host as much as any other, however few the levels: their number counts.
        """
        cells_per_lambda = _CELLS / math.log(self.sigma_max / self.sigma_min)
        if self.narrow_device is not None:
            return PairIntegrals(*float32_integrals(self.cells, self.edges, self.pairs, cells_per_lambda, t, s))
        # 1. Both places in the table, in cells from sigma_max. t's is that of s less their distance, which is computed
        # from t - s itself: at s = t they have the same bits, and beside it the distance keeps its digits.
        position_s = (s / self.sigma_max).log() * -cells_per_lambda
        position_t = position_s.sub(((t - s) / s).log1p(), alpha=cells_per_lambda)
        position = torch.stack([position_t, position_s])

        # 2. Each place's cell, and the four polynomials there; w is in [-1/2, 1/2]. NaN becomes some integer.
        rows = self.rows[position.detach().long().clamp(0, _CELLS - 1)]
        w = (position - rows[..., -1])[..., None]
        value, *lower_powers = rows[..., :-3].unflatten(-1, (-1, 4)).unbind(-2)
        for coefficient in lower_powers:  # Horner, elementwise: equal levels give equal bits
            value = value * w + coefficient
        l_t, l_s, minus_h_s = value[0, ..., 0], value[1, ..., 0], value[1, ..., 2]

        # 3. Differences and ratios of the two ends: nothing of the size of L or S itself is formed.
        _, ln_L_ratio, ln_LS_ratio, minus_N = (value[0] - value[1]).unbind(-1)
        high, low = (rows[1, ..., -3:-1] - rows[0, ..., -3:-1]).unbind(-1)
        return PairIntegrals(
            l_t=l_t,
            l_s=l_s,
            L_ratio=ln_L_ratio.exp(),
            S_ratio=(ln_LS_ratio + ln_L_ratio).exp() if with_S else None,
            r=(high + (low - minus_N)) * minus_h_s.exp(),
        )


def unfit_row(*, lam: Array, h: Array, spans: Array, steps: Array, largest_step: float) -> tuple[int, str] | None:
    """Return the index of a row that no table could hold, and what it does; None if all are well.

    A row for each pair of l and s: h is ln(L S) at ``lam``; ``spans`` are the largest of what h, ln L and ln S span,
    ``steps`` what h changes by within equal cells. Shapes ``(n, k)``, ``(n,)``, ``(n, cells)``.
    """
    fall = np.maximum.accumulate(h, axis=1) - h
    if not fall.max() <= _MAX_FALL:
        row, point = np.unravel_index(fall.argmax(), fall.shape)
        got = f"{fall[row, point]:.4g} down to t = {math.exp(-lam[point]):.6g}"
        return int(row), f"ln(L S) fall by more than {_MAX_FALL:g} over the levels, got {got}"
    if not spans.max() <= _MAX_SPAN:
        what = f"ln(L S), ln L or ln S span more than {_MAX_SPAN:g} over the levels, got {spans.max():.4g}"
        return int(spans.argmax()), what
    if not steps.max() <= largest_step:
        row, cell = np.unravel_index(steps.argmax(), steps.shape)
        width = (lam[-1] - lam[0]) / steps.shape[1]
        got = f"{steps[row, cell]:.4g} at t = {math.exp(-lam[0] - width * cell):.6g}"
        return int(row), f"ln(L S) change by more than {largest_step:g} within {width:.3g} in lambda, got {got}"
    return None


def _integrate(density: Array, width: float) -> Array:
    """Return each cell's integral from its noisy end: polynomials one degree up from those of the density."""
    powers = np.arange(density.shape[1], 0, -1)
    integral = np.pad(density / powers * width / 2, ((0, 0), (0, 1)))
    integral[:, -1] = -_values(integral, -np.ones(1))[:, 0]
    return integral


def _values(polynomials: Array, places: Array) -> Array:
    """Return each cell's polynomial at places in [-1, 1]. Shapes: ``(cells, powers)``, ``(n,)`` to ``(cells, n)``."""
    values: Array = polynomials @ np.vander(places, polynomials.shape[1]).T
    return values


def running_sum(terms: Array) -> tuple[Array, Array]:
    """Return the sums of the terms before each, and of all, as unevaluated pairs high + low.

    Along the last axis: shapes ``(..., n)`` to ``(..., n + 1)`` twice.
    """
    high, low = np.zeros((2, *terms.shape[:-1], terms.shape[-1] + 1))
    for k in range(terms.shape[-1]):  # Knuth's two-sum: total and what rounding took from it are high + term, exactly
        total = high[..., k] + terms[..., k]
        carried = total - high[..., k]
        high[..., k + 1] = total
        low[..., k + 1] = low[..., k] + ((high[..., k] - (total - carried)) + (terms[..., k] - carried))
    return high, low
