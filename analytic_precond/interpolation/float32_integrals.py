r"""The integrals of `integral_table` where a device has no float64, to the last digits of float32.

A jump from t in cell i to s in cell j is cut at cells' ends. What lies between their levels $e_{i+1}$ and $e_j$ comes
from a table of all pairs of cells. The piece at either end is integrated on the spot, by Gauss's rule, over a length in
lambda that is formed from the levels themselves. Every term is positive: nothing cancels (docs/method.md, section 7).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_NODES = (0.5 - math.sqrt(0.15), 0.5, 0.5 + math.sqrt(0.15))  # Gauss's rule of three points on [0, 1]
_WEIGHTS = (5 / 18, 8 / 18)  # of the outer points, and of the one between


def float32_tables(polynomials: Tensor, running: Tensor, ends: Tensor) -> dict[str, Tensor]:
    r"""Return the float32 tables that stand for those of an `IntegralTable`.

    - ``cells``: polynomials of l, and of what ln L and ln S add since the cell's noisy end, ``(powers, 3, cells)``,
    - ``edges``: the levels of the cells' ends as high + low, ``(2, cells + 1)``,
    - ``pairs``: for cells i and j the ratios $L_i / L_j$ and $S_j / S_i$ at their noisy ends, and
      $\int_{e_{i+1}}^{e_j} L S\, d\lambda / (L_j S_j)$, ``(cells * cells, 3)``.
    """
    powers, _, num = polynomials.shape
    # 1. ln L and ln S at the cells' noisy ends, v = -1, and the polynomials of what they add since.
    signs = (-1.0) ** torch.arange(powers - 1, -1, -1, dtype=ends.dtype, device=ends.device)
    ln_L, ln_S = start = torch.tensordot(signs, polynomials[:, 1:], 1)
    cells = polynomials.clone()
    cells[-1, 1:] -= start

    # 2. The levels of the cells' ends, to twice float32's digits: a level's distance to one is then exact.
    levels = ends[0] * (ends[1] / ends[0]) ** (torch.arange(num + 1, dtype=ends.dtype, device=ends.device) / num)
    high = levels.float()

    # 3. What lies between any two cells i and j, formed in float64 and rounded once: ratios of L and of S, and the
    # integral over the whole cells from the clean end of i to the noisy end of j.
    end = torch.arange(1, num + 1, device=ends.device).clamp(max=num - 1)  # of cell i; nothing is behind the last one
    between = (running[:, 0] - running[end, 0, None]) + (running[:, 1] - running[end, 1, None])
    pairs = ((ln_L[:, None] - ln_L).exp(), (ln_S - ln_S[:, None]).exp(), between.triu(1) * (-ln_L - ln_S).exp())
    return {
        "cells": cells.float(),
        "edges": torch.stack([high, (levels - high).float()]),
        "pairs": torch.stack(pairs, -1).flatten(0, 1).float(),
    }


def float32_integrals(
    cells: Tensor, edges: Tensor, pairs: Tensor, cells_per_lambda: float, t: Tensor, s: Tensor
) -> tuple[Tensor, ...]:
    """Return l_t, l_s, L_t / L_s, S_s / S_t and r for levels of one shape, from `float32_tables`."""
    # 1. The cells i of t and j of s. A level next to an end may be given to either cell: `places` may leave them a bit.
    num, levels = cells.shape[-1], torch.stack([t, s])
    position = (edges[0, 0] / levels).log().detach() * cells_per_lambda
    i, j = position.floor().clamp(0, num - 1).nan_to_num(0).long()
    i = torch.minimum(i, j)  # where rounding parts neighbours

    # 2. l, and what ln L and ln S add since the cell's noisy end, at t and s and at Gauss's nodes of the two pieces.
    places, first, last = jump_pieces(edges, i, j, t, s)
    v = 2 * cells_per_lambda * places[:, None] - 1  # (nodes, 1, [t, s], *shape)
    coefficients = cells[:, :, torch.stack([i, j])]
    value = coefficients[0]
    for coefficient in coefficients[1:]:  # Horner
        value = value * v + coefficient
    l, ln_L, ln_S = value.unbind(1)

    # 3. r, over L S at s: the piece in t's cell, which L and S carry on to s's; whole cells; the piece in s's cell.
    L_ratio, S_ratio, between = pairs[torch.stack([i * num + j])][0].unbind(-1)
    ln_density = ln_L + ln_S
    at_s = ln_density[0, 1]
    first_mean, last_mean = gauss_mean((ln_density[1:] - at_s).exp())
    r = first * first_mean * (L_ratio / S_ratio) + between * (-at_s).exp() + last * last_mean

    # 4. The ratios from t to s: between the cells' noisy ends, times what is added inside them.
    L_ratio = L_ratio * (ln_L[0, 0] - ln_L[0, 1]).exp()
    S_ratio = S_ratio * (ln_S[0, 1] - ln_S[0, 0]).exp()
    # finite, since the backward form multiplies it by 0
    return l[0, 0], l[0, 1], L_ratio, S_ratio.clamp(max=torch.finfo(S_ratio.dtype).max), r


def jump_pieces(edges: Tensor, i: Tensor, j: Tensor, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where the pieces of a jump from cell i to cell j are, in lambda, with no digits lost beside the diagonal.

    That is, distances from the cells' noisy ends: of t and of s, then of Gauss's nodes on the two pieces, shape
    ``(4, 2, *t.shape)``; the length of the piece from t to its cell's clean end (or s), and of the rest to s.
    """
    levels, same = torch.stack([t, s]), i == j
    high, low = edges[:, torch.stack([i, j, i + 1])]  # never an index of one number, which the host would read
    # ln(e / t) for the noisy end e of each level's cell, from e - t: exact, since e is high + low and t is near
    start = (((high[:2] - levels) + low[:2]) / levels).log1p()
    # t's piece ends where its cell does, or at s if that is the same cell; then nothing is left of the other piece
    stop = torch.where(same, s, high[2])
    first = (((t - stop) - torch.where(same, 0, low[2])) / stop).log1p()
    last = torch.where(same, 0, start[1])

    length = torch.stack([first, -last])
    return torch.stack([start + node * length for node in (0.0, *_NODES)]), first, last


def gauss_mean(values: Tensor) -> Tensor:
    """Return the mean of a function over a piece from its values at Gauss's nodes, along the first dimension."""
    return _WEIGHTS[0] * (values[0] + values[2]) + _WEIGHTS[1] * values[1]
