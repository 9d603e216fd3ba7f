r"""Functions of two noise levels from their values on a grid: tensor-product splines in $\lambda = -\ln t$.

Quintic where there are six levels or more. Evaluated in torch from a few gathers, with no host synchronisation,
traceable by torch.compile, differentiable in both levels.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .._precision import TableModule, without_autocast
from .splines import Array, spline


class SplineTable(TableModule):
    r"""Several functions f(t, s), from B-spline coefficients ``(K, K, F)`` on a grid of decreasing levels ``(K,)``.

    Coefficients in float32 are several times faster where functions are many.
    """

    ends_in = "levels"

    levels: Tensor
    knots: Tensor
    basis: Tensor
    control: Tensor
    starts: Tensor  # these two only where there is no float64
    half_widths: Tensor

    def __init__(self, levels: Tensor, control: Tensor) -> None:
        super().__init__()
        knots, basis = local_basis(levels.numpy())
        self.register_buffer("levels", levels.clone())
        self.register_buffer("knots", torch.from_numpy(knots))
        self.register_buffer("basis", torch.from_numpy(basis))
        self.register_buffer("control", control.clone())
        self.mirror_ends()

    @staticmethod
    def control_points(levels: Array, values: Array) -> Array:
        """Return the coefficients ``(K, K, F)`` of functions whose values at all pairs of levels are ``(F, K, K)``."""
        along_s = spline(levels, values).c  # scipy puts the interpolated axis first: (K_s, F, K_t)
        along_t: Array = spline(levels, along_s).c  # (K_t, K_s, F)
        return along_t

    def narrowed(self) -> dict[str, Tensor]:
        """Return rounded tables, polynomials about the cells' middles, and the levels where cells begin as high + low.

        About a cell's end, terms of a polynomial cancel at the other end.
        """
        half = torch.cat([self.knots[1:], -self.levels[-1:].log()]).sub(self.knots) / 2
        starts = (-self.knots).exp()
        high = starts.float()
        return {
            "control": self.control.float(),
            "starts": torch.stack([high, (starts - high).float()]),
            "half_widths": half.float(),
            "basis": recentred(self.basis, half).float(),
        }

    def forward(self, t: Tensor, s: Tensor) -> Tensor:
        """Return the functions' values. Shapes: ``t`` and ``s`` alike, the result ``(F, *t.shape)``."""
        # the first B-spline that is not 0 at each level, and the values of it and the next ones: of both levels
        # together, and so never by an index of one number, which the host would read
        cells, places = self._place(torch.stack([t, s]))
        (cell_t, cell_s), (weight_t, weight_s) = cells, local_weights(self.basis[cells], places)
        local = torch.arange(self.basis.shape[-1], device=t.device)
        index = (cell_t[..., None] + local)[..., None] * len(self.levels) + (cell_s[..., None] + local)[..., None, :]
        # index_select copies rows, many times faster than indexing
        points = self.control.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, (*t.shape, len(local) ** 2))
        weight = (weight_t[..., :, None] * weight_s[..., None, :]).flatten(-2).to(points.dtype)
        with without_autocast(t.device):
            values: Tensor = weight[..., None, :] @ points
        return values.squeeze(-2).movedim(-1, 0)

    def _place(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return each level's cell, and where it is in it: what the cell's polynomials are of."""
        if self.narrow_device is None:
            lam = -t.log()
            cell = (lam.detach()[..., None] >= self.knots[1:]).sum(-1).clamp(max=len(self.basis) - 1)
            return cell, lam - self.knots[cell]
        # from the levels' difference: lambda itself has too few digits
        cell = (t.detach()[..., None] <= self.starts[0, 1:]).sum(-1).clamp(max=len(self.basis) - 1)
        high, low = self.starts[:, cell]
        return cell, (((high - t) + low) / t).log1p() / self.half_widths[cell] - 1


def local_basis(levels: Array) -> tuple[Array, Array]:
    """Return where cells begin in lambda, and in each cell its B-splines' polynomials, highest power first.

    Shapes ``(cells,)`` and ``(cells, powers, splines)``; cell m has the splines m, m + 1, ...
    """
    unit = spline(levels, np.eye(len(levels)))
    unit.c = np.eye(len(levels))
    degree = unit.k
    starts = unit.t[degree : len(levels)]
    taylor = np.stack([unit(starts, nu=p).T / math.factorial(p) for p in range(degree, -1, -1)], 1)
    return starts.copy(), np.stack([taylor[m, :, m : m + degree + 1] for m in range(len(starts))])


def local_weights(polynomials: Tensor, v: Tensor) -> Tensor:
    """Return the values of cells' B-splines, each at a place in its cell.

    Shapes ``(*shape, powers, splines)`` and ``(..., *shape)`` to ``(..., *shape, splines)``.
    """
    v = v[..., None]
    weight = polynomials[..., 0, :]
    for power in range(1, polynomials.shape[-2]):  # Horner
        weight = weight * v + polynomials[..., power, :]
    return weight


def recentred(basis: Tensor, half_widths: Tensor) -> Tensor:
    """Return polynomials of the distance from a cell's beginning as polynomials from -1 to 1 across the cell."""
    result, degree = basis.clone(), basis.shape[1] - 1
    for done in range(degree):  # repeated synthetic division by (v - half)
        for power in range(1, degree + 1 - done):
            result[:, power] += half_widths[:, None] * result[:, power - 1]
    return result * half_widths[:, None, None] ** torch.arange(degree, -1, -1, device=basis.device)[:, None]
