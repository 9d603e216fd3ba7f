r"""Second moments along a teacher's trajectories, for all pairs of levels, in one streaming pass.

With $x_i$ the state at level i and $E_i = D(x_i, t_i) - a_i x_i$ (`moments.reference` says why), they are the means of
$x_i x_j$, $E_i x_j$ and $E_i^2$ over trajectories and over the elements of a sample, or over groups of its coordinates
in an orthonormal basis: all that a linear regression of $x_j$ on $x_i$ and $D_i$ needs.

Where the teacher is asked at lower levels too, $D_{ik}$ is its answer to $x_i$ (scaled by `input_scale`) when told
level k, and $E_{ik} = D_{ik} - a_i x_i$ takes the place of $E_i$.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor

from .._precision import wide_dtype
from ..noise_levels.network_scalings import input_scale
from ..ode.steps import Velocity
from ..ode.trajectories import Start
from ..statistics.moments import Array, num_groups, reference
from .follow import Points, Trajectories

_PIECES = 16  # of a batch's points, which are multiplied in float64

_zeros = partial(torch.zeros, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class TrajectoryMoments:
    """Products averaged over a group's elements, and summed over the trajectories of a block."""

    levels: Array  # (K,)
    counts: Array  # trajectories per block (N,), whose spread gives standard errors
    sizes: Array  # elements per group (G,)
    xx: Array  # of x_i and x_j, (N, G, K, K)
    Ex: Array  # of E_i and x_j, (N, G, K, K)
    EE: Array  # of E_i and E_i, (N, G, K)

    def of_whole_samples(self) -> TrajectoryMoments:
        """Return the same with one group: in an orthonormal basis products add up."""
        share = self.sizes / self.sizes.sum()
        xx, Ex, EE = (np.einsum("g,ng...->n...", share, part)[:, None] for part in (self.xx, self.Ex, self.EE))
        return TrajectoryMoments(self.levels, self.counts, self.sizes.sum(keepdims=True), xx, Ex, EE)


@dataclass(frozen=True)
class ShiftMoments:
    """Products averaged over trajectories and elements; 0 where k < i."""

    levels: Array  # (K,)
    counts: Array  # the number of trajectories (1,)
    xx: Array  # of x_i and x_j, (K, K)
    Ex: Array  # of E_ik and x_j, at [i, k, j]
    EE: Array  # of E_ik and E_ik, at [i, k]


def flat(x: Tensor) -> Tensor:
    """Return samples as vectors: the coordinates where no basis is asked for. Shape ``(B, d)``."""
    return x.reshape(len(x), -1)


def trajectory_moments(
    trajectories: Trajectories,
    num_blocks: int | None = None,
    groups: Sequence[Tensor | slice] = (slice(None),),
    to_modes: Callable[[Tensor], Tensor] = flat,
) -> TrajectoryMoments:
    """Return the products of the points of trajectories, in groups of coordinates and blocks that were not left empty.

    ``to_modes`` maps samples to coordinates ``(B, d)`` in an orthonormal basis. By default there are as many blocks as
    statistics have groups. Memory: the trajectories of one batch, ``2 K B d`` numbers, and the sums, ``2 N G K^2``, in
    float64.

    The points are float32 where the teacher is: its rounding, not theirs, is what coefficients then err by (by 1e-4 of
    c_out at small noise on images, and as much with points in float64). Their products are float64: a regression looks
    for the little of E that is no multiple of x, which float32 matrix products, let alone TF32's, would drown.
    """
    levels, K, G = trajectories.levels, len(trajectories.levels), len(groups)
    N = num_groups(trajectories.num) if num_blocks is None else num_blocks
    taken, shares = reference(levels.numpy()).tolist(), (levels / levels[0]).tolist()
    counts, sizes = _zeros(N), _zeros(G)
    sums = _zeros(N, G, K, K), _zeros(N, G, K, K), _zeros(N, G, K)

    def add(start: Start, points: Points, _: object) -> None:
        # 1. E = D - a x, and the points' coordinates, in place: of all that is held, these are the largest
        bend, E = (part.reshape(*part.shape[:2], -1) for part in points)
        first = torch.stack([points.denoised[0], start.x])
        for k, (a, share) in enumerate(zip(taken, shares, strict=True)):
            points.denoised[k].sub_(torch.lerp(first[0], first[1], share).add_(points.bend[k]), alpha=a)
            bend[k], E[k] = to_modes(points.bend[k]), to_modes(points.denoised[k])
        first = torch.stack([to_modes(v).to(E.dtype) for v in first])
        _check_answers(torch.stack([part.isfinite().all() for part in E]), levels)
        sizes[:] = torch.tensor([E[0, 0, group].numel() for group in groups], device="cpu")
        # 2. their products, block by block (of consecutive trajectories) and group by group, where the points are
        found, begin = [], 0
        blocks = torch.arange(start.first, start.first + E.shape[1], device="cpu") * N // trajectories.num
        for block, num in zip(*(part.tolist() for part in blocks.unique(return_counts=True)), strict=True):
            rows = slice(begin, begin + num)
            products = []
            for group in groups:
                w, ends, e = (v[:, rows][..., group].flatten(1) for v in (bend, first, E))
                products.append(_along_trajectories(w, ends, e, shares, pieces=-(-_PIECES // G)))
            found.append((block, num, [torch.stack(part).cpu() for part in zip(*products, strict=True)]))
            begin += num
        # 3. the sums: all of the batch, since here memory no longer runs out
        for block, count, parts in found:
            counts[block] += count
            for total, part in zip(sums, parts, strict=True):
                total[block] += part / sizes.reshape(-1, *[1] * (total.ndim - 2))

    trajectories.follow(add)
    filled = counts > 0
    products = (total[filled].numpy() for total in sums)
    return TrajectoryMoments(levels.numpy(), counts[filled].numpy(), sizes.numpy(), *products)


def _along_trajectories(
    bend: Tensor, first: Tensor, E: Tensor, shares: Sequence[float], pieces: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the products of states and E, and the squares of E, of D and x at the first level, the bends, and E.

    A state is $(1 - share) D + share x + bend$. As float32 it would be rounded by more than neighbours at small noise
    differ by beyond a multiple of each other; so its three parts are multiplied, and their products added.
    """
    parts = zip(*(v.chunk(pieces, 1) for v in (bend, first, E)), strict=True)
    vv, Ev, EE = _added((_square(v), *_products(v, e)) for w, ends, e in parts for v in [torch.cat([w, ends])])
    share = vv.new_tensor(shares)[:, None]
    of_parts = torch.cat([torch.eye(len(bend), dtype=vv.dtype, device=vv.device), 1 - share, share], 1)
    return of_parts @ vv @ of_parts.T, Ev @ of_parts.T, EE


def _square(x: Tensor) -> Tensor:
    """Return the products of points with each other, in the wide dtype."""
    x = x.to(wide_dtype(x.device))
    return x @ x.T


def _products(x: Tensor, E: Tensor) -> tuple[Tensor, Tensor]:
    """Return the products of E with points, and the squares of E, in the wide dtype."""
    x, E = (v.to(wide_dtype(v.device)) for v in (x, E))
    return E @ x.T, E.square().sum(1)


def _added(parts: Iterable[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Return the sums of the parts' tensors, one part in memory at a time."""
    return reduce(lambda sums, part: tuple(map(Tensor.add_, sums, part)), parts)


def shift_moments(trajectories: Trajectories, sigma_data: float) -> ShiftMoments:
    """Return the products of the points of trajectories with the teacher's answers to them at all lower levels.

    Memory: the trajectories of one batch and the answers at one level, ``3 K B d`` numbers.
    """
    levels = trajectories.levels
    grid, K = levels.tolist(), len(levels)
    a = reference(levels.numpy()).tolist()
    sums = _zeros(K, K), _zeros(K, K, K), _zeros(K, K)

    def add(start: Start, points: Points, count_pass: Callable[[], object]) -> None:
        velocity = Velocity.of(trajectories.denoiser, start.x.to(start.dtype), start.condition)
        for x, level in zip(points.bend, grid, strict=True):  # bends become states, in place
            x.add_(torch.lerp(points.denoised[0], start.x, level / grid[0]))
        states, E = points.bend.flatten(1), torch.empty_like(points.bend)
        xx = _added((_square(x),) for x in states.chunk(_PIECES, 1))[0]
        Ex, EE = xx.new_zeros(K, K, K), xx.new_zeros(K, K)
        for i, (x, denoised) in enumerate(zip(*points, strict=True)):
            for k in range(i, K):
                # the trajectory's own answer serves k = i; of the others only products are kept
                answer = denoised if k == i else _ask(velocity, x, grid[i], grid[k], sigma_data)
                if k > i:
                    count_pass()
                torch.sub(answer, x, alpha=a[i], out=E[k])
            parts = zip(states.chunk(_PIECES, 1), E[i:].flatten(1).chunk(_PIECES, 1), strict=True)
            Ex[i, i:], EE[i, i:] = _added(_products(*part) for part in parts)
        _check_answers(EE.isfinite().all(1), levels)
        products = [part.to("cpu", torch.float64) / start.x[0].numel() for part in (xx, Ex, EE)]
        for total, part in zip(sums, products, strict=True):
            total += part

    count = trajectories.follow(add, K * (K - 1) // 2)
    return ShiftMoments(levels.numpy(), np.array([count]), *((total / count).numpy() for total in sums))


def _ask(velocity: Velocity, x: Tensor, t: float, q: float, sigma_data: float) -> Tensor:
    """Return the teacher's answer to data at level t when it is told level q."""
    t_x, q_x = (x.new_full((len(x),), level, dtype=wide_dtype(x.device)) for level in (t, q))
    scale = input_scale(t_x, q_x, sigma_data)[0].to(x.dtype)  # all samples are at one level
    return velocity.denoised(scale * x, q_x)


def _check_answers(finite: Tensor, levels: Tensor) -> None:
    """Refuse what is not finite at each of some levels. Shapes ``(K,)``."""
    if not bool(finite.all()):
        k = int((~finite).nonzero()[0])
        raise ValueError(
            f"the teacher must return finite values, got NaN or infinity at noise level {levels[k].item():.6g} (index "
            f"{k}) or on the way to it: check its weights and precision (fp16 ends at 65504), and that data are in its "
            f"range."
        )
