r"""Second moments along a teacher's trajectories, the teacher asked at lower noise levels too, in one streaming pass.

With $x_i$ the state at level i, and $D_{ik}$ the teacher's answer to it when told level k (and given it scaled by
`input_scale`), they are the means over trajectories and elements of $x_i x_j$, $E_{ik} x_j$ and $E_{ik}^2$, where
$E_{ik} = D_{ik} - a_i x_i$ (`moments.reference` says why): all that a linear regression of $x_j$ on $x_i$ and $D_{ik}$
needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from .edm import input_scale
from .moments import Array, reference
from .noise_levels import expand_to
from .ode import Velocity
from .out_of_memory import BatchSize, Pieces
from .teacher import Denoiser
from .trajectories import PASSES_PER_STEP, Start, trajectory


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
