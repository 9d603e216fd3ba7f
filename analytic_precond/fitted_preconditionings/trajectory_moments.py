r"""Second moments along a teacher's trajectories, for all pairs of levels, in one streaming pass.

With $x_i$ the state at level i and $E_i = D(x_i, t_i) - a_i x_i$ (`moments.reference` says why), they are the means of
$x_i x_j$, $E_i x_j$ and $E_i^2$ over trajectories and over the elements of a sample, or over groups of its coordinates
in an orthonormal basis: all that a linear regression of $x_j$ on $x_i$ and $D_i$ needs.

Second moments along a teacher's trajectories, the teacher asked at lower noise levels too, in one streaming pass.

With $x_i$ the state at level i, and $D_{ik}$ the teacher's answer to it when told level k (and given it scaled by
`input_scale`), they are the means over trajectories and elements of $x_i x_j$, $E_{ik} x_j$ and $E_{ik}^2$, where
$E_{ik} = D_{ik} - a_i x_i$ (`moments.reference` says why): all that a linear regression of $x_j$ on $x_i$ and $D_{ik}$
needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..data.memory import BatchSize, Pieces
from ..noise_levels.network_scalings import input_scale
from ..noise_levels.per_sample import expand_to
from ..ode.steps import Velocity
from ..ode.trajectories import PASSES_PER_STEP, Start, trajectory
from ..statistics.moments import Array, reference
from ..teachers.denoiser import Denoiser


@dataclass(frozen=True)
class TrajectoryMoments:
    """Products averaged over a group's elements, and summed over the trajectories of a block.

    Attributes:
        levels: Decreasing noise levels. Shape ``(K,)``.
        counts: Trajectories per block; the spread between blocks gives standard errors. Shape ``(N,)``.
        sizes: Elements per group. Shape ``(G,)``.
        xx: Products of x_i and x_j. Shape ``(N, G, K, K)``.
        Ex: Products of E_i and x_j. Shape ``(N, G, K, K)``.
        EE: Squares of E_i. Shape ``(N, G, K)``.
    """

    levels: Array
    counts: Array
    sizes: Array
    xx: Array
    Ex: Array
    EE: Array

    def of_whole_samples(self) -> TrajectoryMoments:
        """Return the same with one group: in an orthonormal basis products add up."""
        share = self.sizes / self.sizes.sum()
        xx, Ex, EE = (np.einsum("g,ng...->n...", share, part)[:, None] for part in (self.xx, self.Ex, self.EE))
        return TrajectoryMoments(self.levels, self.counts, self.sizes.sum(keepdims=True), xx, Ex, EE)


def flat(x: Tensor) -> Tensor:
    """Return samples as vectors: the coordinates where no basis is asked for. Shape ``(B, d)``."""
    return x.reshape(len(x), -1)


@torch.no_grad()
def trajectory_moments(
    denoiser: Denoiser,
    starts: Iterable[Start],
    levels: Tensor,
    num_trajectories: int,
    num_blocks: int,
    groups: Sequence[Tensor | slice] = (slice(None),),
    to_modes: Callable[[Tensor], Tensor] = flat,
    progress: bool = False,
    batch_size: BatchSize = "auto",
) -> TrajectoryMoments:
    """Follow trajectories batch by batch, and sum their products.

    Memory: the trajectories of one batch, ``2 K B d`` numbers, and the sums, ``2 N G K^2``, in float64.

    Args:
        denoiser: The teacher.
        starts: Where trajectories begin, at ``levels[0]``.
        levels: Decreasing noise levels. Shape ``(K,)``.
        num_trajectories: How many there are.
        num_blocks: Number of blocks of consecutive trajectories.
        groups: The coordinates in each group.
        to_modes: Maps samples to coordinates in an orthonormal basis. Shapes ``(B, ...)`` to ``(B, d)``.
        progress: Show a progress bar.
        batch_size: Most trajectories at a time, or ``"auto"``: a batch that memory cannot hold begins anew in halves.

    Returns:
        The moments; a block left without trajectories, where starts ran out, is left out.

    Raises:
        TypeError: If the teacher does not return a floating-point tensor.
        ValueError: If it returns another shape, or a value that is not finite (the error names the level).
    """
    passes = 1 + PASSES_PER_STEP * (len(levels) - 1)
    sums, pieces = _Sums(levels, num_blocks, groups), Pieces(batch_size)

    def follow(start: Start, rows: slice) -> None:
        first, count = start.first + rows.start, rows.stop - rows.start
        bar.n = first * passes  # set back where memory has run out on the way
        states: list[Tensor] = []
        differences: list[Tensor] = []
        for x, difference in trajectory(denoiser, start.rows(rows), levels.tolist()):
            bar.update(count * (PASSES_PER_STEP if states else 1))
            states.append(to_modes(x))
            differences.append(to_modes(difference))
        blocks = torch.arange(first, first + count, device="cpu") * num_blocks // num_trajectories
        sums.add(blocks, torch.stack(states), torch.stack(differences))

    total = num_trajectories * passes
    with tqdm(total=total, desc="trajectories", unit=" passes", unit_scale=True, disable=not progress) as bar:
        for start in starts:
            for _ in pieces(len(start.x), partial(follow, start), f"trajectories from {start.first} on"):
                pass
    return sums.close()


class _Sums:
    """The moments while they are summed, on the CPU in float64."""

    def __init__(self, levels: Tensor, num_blocks: int, groups: Sequence[Tensor | slice]) -> None:
        K, shape = len(levels), (num_blocks, len(groups))
        self.levels, self.groups = levels, groups
        self.counts, self.sizes = _zeros(num_blocks), _zeros(len(groups))
        self.xx, self.Ex, self.EE = _zeros(*shape, K, K), _zeros(*shape, K, K), _zeros(*shape, K)

    def add(self, blocks: Tensor, x: Tensor, difference: Tensor) -> None:
        """Add a batch: the block of each trajectory, x and x - D(x). Shapes ``(B,)``, ``(K, B, d)`` twice."""
        a = torch.from_numpy(reference(self.levels.numpy())).to(x)
        E = (1 - a)[:, None, None] * x - difference
        finite = E.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            k = int((~finite).nonzero()[0])
            raise ValueError(
                f"the teacher must return finite values, got NaN or infinity on the way to noise level "
                f"{self.levels[k].item():.6g} (index {k}): check its weights and precision (fp16 ends at 65504), and "
                f"that data are in its range."
            )
        if self.counts.sum() == 0:
            self.sizes[:] = torch.tensor([x[0, 0, g].numel() for g in self.groups], device="cpu")
        found = []
        for block in blocks.unique().tolist():
            rows = (blocks == block).to(x.device)
            x_rows, E_rows = x[:, rows], E[:, rows]
            products = [self._products(x_rows[..., g].flatten(1), E_rows[..., g].flatten(1)) for g in self.groups]
            found.append((block, x_rows.shape[1], [torch.stack(p).cpu() for p in zip(*products, strict=True)]))
        for block, count, parts in found:  # all of a batch or, where memory ran out above, nothing
            self.counts[block] += count
            for total, part in zip((self.xx, self.Ex, self.EE), parts, strict=True):
                total[block] += part / self.sizes.reshape(-1, *[1] * (total.ndim - 2))

    @staticmethod
    def _products(x: Tensor, E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x @ x.T, E @ x.T, E.square().sum(1)

    def close(self) -> TrajectoryMoments:
        """Return the moments of the blocks that are not empty."""
        filled = self.counts > 0
        parts = (self.levels, self.counts[filled], self.sizes, self.xx[filled], self.Ex[filled], self.EE[filled])
        return TrajectoryMoments(*(part.numpy() for part in parts))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class ShiftMoments:
    """Products averaged over trajectories and elements.

    Attributes:
        levels: Decreasing noise levels. Shape ``(K,)``.
        counts: Number of trajectories. Shape ``(1,)``.
        xx: Products of x_i and x_j. Shape ``(K, K)``.
        Ex: Products of E_ik and x_j, at ``[i, k, j]``; 0 where k < i. Shape ``(K, K, K)``.
        EE: Squares of E_ik, at ``[i, k]``; 0 where k < i. Shape ``(K, K)``.
    """

    levels: Array
    counts: Array
    xx: Array
    Ex: Array
    EE: Array


@torch.no_grad()
def shift_moments(
    denoiser: Denoiser,
    starts: Iterable[Start],
    levels: Tensor,
    num_trajectories: int,
    sigma_data: float,
    progress: bool = False,
    batch_size: BatchSize = "auto",
) -> ShiftMoments:
    """Follow trajectories batch by batch, ask the teacher at each of their points, and sum the products.

    Memory: the trajectories of one batch and what they are made of, some ``5 K B d`` numbers in float64.

    Args:
        denoiser: The teacher.
        starts: Where trajectories begin, at ``levels[0]``.
        levels: Decreasing noise levels. Shape ``(K,)``.
        num_trajectories: How many there are.
        sigma_data: Standard deviation of the data.
        progress: Show a progress bar.
        batch_size: Most trajectories at a time, or ``"auto"``: a batch that memory cannot hold begins anew in halves.

    Returns:
        The moments.

    Raises:
        TypeError: If the teacher does not return a floating-point tensor.
        ValueError: If it returns another shape, or a value that is not finite (the error names the level).
    """
    grid, K = levels.tolist(), len(levels)
    a = reference(levels.numpy()).tolist()
    passes = 1 + PASSES_PER_STEP * (K - 1) + K * (K - 1) // 2
    xx, Ex, EE = (torch.zeros([K] * n, dtype=torch.float64, device="cpu") for n in (2, 3, 2))

    def follow(start: Start, rows: slice) -> int:
        count: int = rows.stop - rows.start
        bar.n = (start.first + rows.start) * passes  # set back where memory has run out on the way
        piece = start.rows(rows)
        velocity = Velocity.of(denoiser, piece.x.to(piece.dtype), piece.condition)
        points: list[tuple[Tensor, Tensor]] = []
        for point in trajectory(denoiser, piece, grid):
            bar.update(count * (PASSES_PER_STEP if points else 1))
            points.append(point)
        states = torch.stack([x.flatten() for x, _ in points])
        with_x, squares = states.new_zeros(K, K, K), states.new_zeros(K, K)
        for i, (x, difference) in enumerate(points):
            for k in range(i, K):
                answer = x - difference if k == i else _ask(velocity, x, grid[i], grid[k], sigma_data)
                bar.update(count * (k > i))
                E = (answer - a[i] * x).flatten()
                with_x[i, k], squares[i, k] = states @ E, E @ E
        products = [part.to("cpu", torch.float64) / piece.x[0].numel() for part in (states @ states.T, with_x, squares)]
        finite = products[2].isfinite().all(1)
        if not bool(finite.all()):
            i = int((~finite).nonzero()[0])
            raise ValueError(
                f"the teacher must return finite values, got NaN or infinity for a point of noise level {grid[i]:.6g} "
                f"(index {i}): check its weights and precision (fp16 ends at 65504), and that data are in its range."
            )
        for total, part in zip((xx, Ex, EE), products, strict=True):
            total += part
        return count

    pieces, count = Pieces(batch_size), 0
    total = num_trajectories * passes
    with tqdm(total=total, desc="trajectories", unit=" passes", unit_scale=True, disable=not progress) as bar:
        for start in starts:
            work = partial(follow, start)
            count += sum(n for _, n in pieces(len(start.x), work, f"trajectories from {start.first} on"))
    return ShiftMoments(levels.numpy(), np.array([count]), *((part / count).numpy() for part in (xx, Ex, EE)))


def _ask(velocity: Velocity, x: Tensor, t: float, q: float, sigma_data: float) -> Tensor:
    """Return the teacher's answer to data at level t when it is told level q."""
    t_x, q_x = (torch.full((len(x),), level, dtype=x.dtype, device=x.device) for level in (t, q))
    scaled = expand_to(input_scale(t_x, q_x, sigma_data), x) * x
    return scaled - q * velocity(scaled, q_x)
