r"""Integrals of many elements' l and s between any two noise levels: `integral_table` is for one pair of functions.

Thousands of elements leave no room for polynomials on hundreds of cells. So B-splines in lambda are kept, 12 to a unit,
of $l$, $\ln L$ and $h = \ln (L S)$, and the integral N up to each cell. The two pieces of cells at a jump's ends are
integrated on the spot. Every term is positive: one algorithm serves float64 and float32 (docs/method.md, section 14).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._precision import TableModule
from . import splines
from .float32_integrals import gauss_mean, jump_pieces
from .integral_table import PairIntegrals, running_sum, unfit_row
from .spline_table import local_basis, local_weights, recentred
from .splines import Array

_PER_LAMBDA = 12
_FEWEST = 9  # B-splines: some cells beside the two wide ones at the ends
_GAUSS = np.polynomial.legendre.leggauss(5)
_MAX_STEP = 2.0  # in a twelfth: Gauss's rule of three points is then good to 1e-5, half as steep to 1e-7
_AT_ONCE = 1024  # elements: splines through 1200 levels then take 10 MB each, not gigabytes


class ElementTable(TableModule):
    r"""B-splines of $l$, $\ln L$ and $\ln (L S)$ in $\lambda = -\ln t$, of n elements.

    Made of l at the levels, ``(n, K)``, and of what returns the ln S of a slice of the elements, a function of lambda
    up to constants. Refused, with the advice, where an element's ln(L S) falls so far that its running integral would
    lose its digits, or is too steep for it; so are checkpoints of elements of another shape.
    """

    ends_in = "edges"

    element_shape: Tensor
    edges: Tensor
    half_widths: Tensor
    basis: Tensor
    control: Tensor
    running: Tensor

    def __init__(
        self,
        levels: Array,
        l: Array,
        ln_S: Callable[[slice], Callable[[Array], Array]],
        shape: tuple[int, ...],
        advice: str,
    ) -> None:
        super().__init__()
        self.shape = shape
        sigma_max, sigma_min = float(levels[0]), float(levels[-1])
        # 1. A grid uniform in lambda, which the splines through the levels are resampled on.
        span = math.log(sigma_max / sigma_min)
        steps = max(_FEWEST, math.ceil(_PER_LAMBDA * span))
        lam = np.linspace(-math.log(sigma_max), -math.log(sigma_min), steps + 1)
        grid, nodes = np.exp(-lam), _gauss_nodes(lam)

        # 2. The cells of B-splines on this grid: they begin at points of it, but not at each of them.
        starts, basis = local_basis(grid)
        begins = np.abs(lam[:, None] - starts).argmin(0)
        edges = np.append(grid[begins], sigma_min)
        edges[0] = sigma_max
        half = torch.from_numpy(np.append(np.diff(starts), lam[-1] - starts[-1]) / 2)

        # 3. Of each element the B-splines of l, ln L and h = ln(L S), whose maximum is taken out, and N = the integral
        # of exp(h) up to each cell as high + low.
        control = np.empty((3, len(grid), len(l)))
        running = np.empty((2, len(begins), len(l)))
        for start in range(0, len(l), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            l_at = splines.linear_coefficient(levels, l[some])
            ln_L = _running_integral(1 - l_at(nodes), lam)[0]
            h = ln_L + ln_S(some)(lam)
            spans, changes = np.ptp(h, axis=1), np.abs(np.diff(h))
            found = unfit_row(lam=lam, h=h, spans=spans, steps=changes, largest_step=_MAX_STEP)
            if found is not None:
                element, what = found
                raise ValueError(f"l and s must not let {what} in {element_name(start + element, shape)}: {advice}")
            h_spline = splines.spline(grid, h - h.max(1, keepdims=True))
            control[..., some] = [splines.spline(grid, v).c for v in (l_at(lam), ln_L)] + [h_spline.c]
            sums = np.stack(_running_integral(np.exp(h_spline(nodes)), lam))
            running[..., some] = sums[..., begins].swapaxes(1, 2)

        self.register_buffer("element_shape", torch.tensor(shape, dtype=torch.int64, device="cpu"))
        self.register_buffer("edges", torch.from_numpy(np.stack([edges, np.zeros_like(edges)])))
        self.register_buffer("half_widths", half)
        self.register_buffer("basis", recentred(torch.from_numpy(basis), half))
        self.register_buffer("control", torch.from_numpy(control))  # function, B-spline, element
        self.register_buffer("running", torch.from_numpy(running))
        self.mirror_ends()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "element_shape")
        if isinstance(given, Tensor) and tuple(given.tolist()) != self.shape:
            args[-1].append(  # the list of errors
                f"{prefix}element_shape must be {self.shape}, got {tuple(given.tolist())}: coefficients belong to "
                f"elements, build the preconditioning for samples of the checkpoint's shape."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    def narrowed(self) -> dict[str, Tensor]:
        """Return the tables in float32, what is subtracted as high + low."""
        pairs = {}
        for name, (high, low) in {"edges": self.edges, "running": self.running}.items():
            rounded = high.float()
            pairs[name] = torch.stack([rounded, ((high - rounded) + low).float()])
        return super().narrowed() | pairs

    def forward(self, t: Tensor, s: Tensor, with_S: bool = True) -> PairIntegrals:
        """Return the elements' integrals, ``(*t.shape, n)``, for levels of one shape, ``s <= t`` inside the range."""
        # 1. The cells i of t and j of s, and where the jump's two pieces are in them (`jump_pieces`).
        levels = torch.stack([t, s])
        i, j = (levels.detach()[..., None] <= self.edges[0, 1:-1]).sum(-1)
        i = torch.minimum(i, j)  # where rounding parts neighbours
        places, first, last = jump_pieces(self.edges, i, j, t, s)

        # 2. l and ln L at t and s; h there and at Gauss's nodes of the pieces.
        cell = torch.stack([i, j])
        weights = local_weights(self.basis[cell], places / self.half_widths[cell] - 1)
        asked = slice(0 if with_S else 1, 2)  # l at t goes with S
        l = self._values(0, cell[asked], weights[:1, asked])[0]
        ln_L = self._values(1, cell, weights[:1])[0]
        h = self._values(2, cell, weights)

        # 3. r: the pieces by Gauss's rule, and the whole cells between them from the running integral, all over
        # exp(h) at s. Every term is positive.
        at_s = h[0, 1]
        first_mean, last_mean = gauss_mean((h[1:] - at_s).exp())
        ends = first[..., None] * first_mean + torch.where((i == j)[..., None], 0, last[..., None]) * last_mean
        # in one gather, and so never by an index of one number, which the host would read
        high, low = self.running[:, torch.stack([j, torch.minimum(i + 1, j)])]
        between = (high[0] - high[1]) + (low[0] - low[1])

        ln_S = h[0] - ln_L if with_S else None
        return PairIntegrals(
            l_t=l[0],
            l_s=l[-1],
            L_ratio=(ln_L[0] - ln_L[1]).exp(),
            S_ratio=None if ln_S is None else (ln_S[1] - ln_S[0]).exp(),
            r=ends + between * (-at_s).exp(),
        )

    def _values(self, function: int, cell: Tensor, weights: Tensor) -> Tensor:
        """Return a function's values: shape ``(*weights.shape[:-1], n)``. Elementwise: equal levels give equal bits."""
        control = self.control[function]
        value = weights[..., 0, None] * control[cell]
        for local in range(1, weights.shape[-1]):
            value = torch.addcmul(value, weights[..., local, None], control[cell + local])
        return value


def element_name(index: int, shape: tuple[int, ...]) -> str:
    """Return what to call an element in messages: its place in a sample."""
    return f"element {tuple(int(i) for i in np.unravel_index(index, shape))}"


def _gauss_nodes(lam: Array) -> Array:
    """Return where to evaluate what `_running_integral` integrates. Shape ``(cells, nodes)``."""
    return lam[:-1, None] + np.diff(lam)[:, None] / 2 * (1 + _GAUSS[0])


def _running_integral(density: Array, lam: Array) -> tuple[Array, Array]:
    """Return integrals from ``lam[0]`` to every point as pairs high + low, of a density at `_gauss_nodes`."""
    return running_sum((density * _GAUSS[1]).sum(-1) * np.diff(lam) / 2)
