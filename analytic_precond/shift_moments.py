r"""Second moments along a teacher's trajectories, the teacher asked at lower noise levels too, in one streaming pass.

With $x_i$ the state at level i, and $D_{ik}$ the teacher's answer to it when told level k (`shifted_input`), they are
the means over trajectories and elements of $x_i x_j$, $E_{ik} x_j$ and $E_{ik}^2$, where $E_{ik} = D_{ik} - a_i x_i$
(`moments.reference` says why): all that a linear regression of $x_j$ on $x_i$ and $D_{ik}$ needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .moments import Array, reference
from .noise_levels import expand_to
from .ode import Velocity
from .preconditioning import input_scale
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
) -> ShiftMoments:
    """Follow trajectories batch by batch, ask the teacher at each of their points, and sum the products.

    Memory: the trajectories of one batch, ``K B d`` numbers in float64.

    Args:
        denoiser: The teacher.
        starts: Where trajectories begin, at ``levels[0]``.
        levels: Decreasing noise levels. Shape ``(K,)``.
        num_trajectories: How many there are.
        sigma_data: Standard deviation of the data.
        progress: Show a progress bar.

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
    count = torch.zeros(1, dtype=torch.float64, device="cpu")
    with tqdm(
        total=num_trajectories * passes, desc="trajectories", unit=" passes", unit_scale=True, disable=not progress
    ) as bar:
        for start in starts:
            size, d = len(start.x), start.x[0].numel()
            velocity = Velocity.of(denoiser, start.x.to(start.dtype), start.condition)
            points = []
            for x, difference in trajectory(denoiser, start, grid):
                points.append((x, difference))
                bar.update(size * (PASSES_PER_STEP if len(points) > 1 else 1))
            flat = torch.stack([x.flatten() for x, _ in points])
            xx += (flat @ flat.T).cpu() / d
            count += size
            for i, (x, difference) in enumerate(points):
                for k in range(i, K):
                    if k == i:
                        denoised = x - difference
                    else:
                        denoised = _ask(velocity, x, grid[i], grid[k], sigma_data)
                        bar.update(size)
                    E = (denoised - a[i] * x).flatten()
                    Ex[i, k] += (flat @ E).cpu() / d
                    EE[i, k] += (E @ E).cpu() / d
                if not bool(EE[i, i:].isfinite().all()):
                    raise ValueError(
                        f"the teacher must return finite values, got NaN or infinity for a point of noise level "
                        f"{grid[i]:.6g} (index {i}): check its weights and precision (fp16 ends at 65504), and that "
                        f"data are in its range."
                    )
    return ShiftMoments(levels.numpy(), count.numpy(), *((part / count).numpy() for part in (xx, Ex, EE)))


def _ask(velocity: Velocity, x: Tensor, t: float, q: float, sigma_data: float) -> Tensor:
    """Return the teacher's answer to data at level t when it is told level q."""
    t_x, q_x = (torch.full((len(x),), level, dtype=x.dtype, device=x.device) for level in (t, q))
    scaled = expand_to(input_scale(t_x, q_x, sigma_data), x) * x
    return scaled - q * velocity(scaled, q_x)
