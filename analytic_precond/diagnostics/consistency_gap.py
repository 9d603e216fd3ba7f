r"""The consistency gap: how far what a perfect student has to output is from what its teacher outputs.

A jump from t to s lands on the teacher's ODE if the network inside says $D^* = (x_s - c_{skip}\, x_t) / c_{out}$. A
student that starts as a copy of its teacher says $D(x_t, t)$, or what the teacher says to `Preconditioning.query`: the
gap at the start of the jump is what training has to change. The gap at the target tells which preconditionings ask for
the teacher's output there (docs/method.md, section 4).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._checks import check_batch, check_count, check_levels, check_tensor
from .._precision import wide_dtype
from ..noise_levels.per_sample import expand_to, per_sample
from ..ode.steps import Velocity, widen
from ..ode.trajectories import Point, solution
from ..preconditionings.base import Preconditioning, Scalings
from ..teachers.denoiser import Denoiser


class ConsistencyGap(NamedTuple):
    r"""Distances from the output that a jump requires; RMS over a sample's elements, one value per sample.

    Over a whole batch the RMS is ``gap.start.square().mean().sqrt()``.

    Attributes:
        start: RMS of $D^* - D(x_t, t)$; of $D^* - D(query)$ where the preconditioning asks elsewhere. Shape ``(B,)``.
        target: RMS of $D^* - D(x_s, s)$. Shape ``(B,)``.
    """

    start: Tensor
    target: Tensor


@torch.no_grad()
def consistency_gap(
    denoiser: Denoiser,
    precond: Preconditioning,
    x_t: Tensor,
    t: Tensor | float,
    s: Tensor | float,
    *,
    num_steps: int = 48,
    **condition: Any,
) -> ConsistencyGap:
    r"""Measure the consistency gap of jumps from t to s, at both ends of the jump.

    $x_s$ is the teacher's own: ``num_steps / 2`` steps of Dormand and Prince's fifth-order method, uniform in
    $t^{1/7}$, of what sets it off an Euler step: so a float32 teacher is followed as well as it answers. It is
    evaluated ``3 * num_steps + 1`` times per sample, once more where the preconditioning asks at another level. On
    smooth teachers, for jumps like 80 to 5 or 1 to 0.1, 12 give four digits, 24 six and the default eight; twice as
    many steps divide the error by 32 or more, and tell what it was.

    Args:
        denoiser: The teacher $D$.
        precond: The jumps' preconditioning.
        x_t: Noisy data at level ``t``. Shape ``(B, ...)``.
        t: Noise levels to start from. Shape ``(B,)``, or one for all.
        s: Noise levels to reach, positive and below ``t``. Shape ``(B,)``, or one for all. Off the CPU, jumps out of
            range give NaN instead of an error.
        num_steps: Twice the number of steps, so even.
        **condition: Handed to the teacher.

    Returns:
        The gap at the start and at the target, in float64 (float32 where a device has none).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape does not fit or a level is out of range.

    Examples:
        >>> from analytic_precond import CTMPreconditioning, GaussianDenoiser
        >>> teacher = GaussianDenoiser(1.0)  # D = x / (1 + t^2), x_s = x sqrt((1 + s^2) / (1 + t^2))
        >>> gap = consistency_gap(teacher, CTMPreconditioning(), torch.tensor([[3.0]]), 2.0, 1.0)
        >>> D_star = (3 * (2 / 5) ** 0.5 - 3 * 1 / 2) / (1 - 1 / 2)  # c_skip = s/t, c_out = 1 - s/t
        >>> round(gap.start.item(), 4), round(D_star - 3 / 5, 4)
        (0.1947, 0.1947)
    """
    check_batch(x_t, "x_t")
    velocity = Velocity.of(denoiser, x_t, condition)
    _check_preconditioning(precond, "precond")
    check_steps(num_steps)
    t, s = per_sample(t, x_t, "t"), per_sample(s, x_t, "s")
    precond.required_output(x_t, x_t, t, s)  # refuses levels before the teacher is called

    start, end = teacher_trajectory(velocity, x_t, [t, s], num_steps)
    gaps = _gaps(velocity, precond, start, end)
    return ConsistencyGap(*(gap.square().reshape(len(gap), -1).mean(1).sqrt().to(t.dtype) for gap in gaps))


@dataclass(frozen=True, eq=False)
class GapMap:
    """Consistency gaps of several preconditionings over a grid of jumps. Made by `gap_map`.

    Attributes:
        names: The preconditionings.
        levels: Decreasing noise levels, float64. Shape ``(K,)``.
        start: RMS gap at the start of the jump from ``levels[i]`` to ``levels[j]``, at ``[name, i, j]``; NaN where
            ``j <= i``. Shape ``(len(names), K, K)``.
        target: The same at the jump's target.
    """

    names: tuple[str, ...]
    levels: Tensor
    start: Tensor
    target: Tensor


@torch.no_grad()
def gap_map(
    denoiser: Denoiser,
    preconditionings: Mapping[str, Preconditioning],
    x_0: Tensor,
    noise: Tensor,
    levels: Tensor,
    *,
    num_steps: int = 6,
    progress: bool = True,
    **condition: Any,
) -> GapMap:
    r"""Measure the consistency gap of several preconditionings for all jumps on a grid of noise levels.

    Every level is started from afresh, at $x_t = x_0 + t n$: these are the inputs that a student is trained on. Points
    of one long trajectory from the top would cost less, but follow them only where the teacher is a perfect score. All
    preconditionings share the trajectories, all levels the same $x_0$ and $n$, so that the maps are smooth.

    With K levels the teacher is evaluated ``K (K - 1) / 2 * 3 * num_steps + K - 1`` times per sample: 819 times for 10
    levels, whatever the number of preconditionings; and once more per jump for each that asks at another level.

    Args:
        denoiser: The teacher $D$.
        preconditionings: The preconditionings by name.
        x_0: Clean data, one batch that the teacher takes at once; 64 samples are plenty. Shape ``(B, ...)``.
        noise: Standard normal noise. Shape of ``x_0``.
        levels: Decreasing noise levels, within each preconditioning's range. Shape ``(K,)``.
        num_steps: Twice the number of steps from one level to the next, as in `consistency_gap`. On a grid of 10 levels
            from 80 to 0.002 the default gives five digits of most gaps and four of all, 4 one digit less.
        progress: Show a progress bar.
        **condition: Handed to the teacher.

    Returns:
        RMS gaps over samples and elements, on the CPU. ``plot_gap_map`` draws them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape does not fit, a level is out of range, or there are no preconditionings.

    Examples:
        >>> from analytic_precond import CTMPreconditioning, GaussianDenoiser
        >>> x_0, noise = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
        >>> levels = torch.tensor([4.0, 2.0, 1.0])
        >>> teacher, preconds = GaussianDenoiser(1.0), {"CTM": CTMPreconditioning()}
        >>> gap_map(teacher, preconds, x_0, noise, levels, num_steps=16, progress=False).start[0]
        tensor([[   nan, 0.1065, 0.2687],
                [   nan,    nan, 0.1451],
                [   nan,    nan,    nan]], dtype=torch.float64)
    """
    check_batch(x_0, "x_0")
    velocity = Velocity.of(denoiser, widen(x_0), condition)
    check_tensor(noise, "noise")
    if noise.shape != x_0.shape:
        raise ValueError(f"noise must have x_0's shape {tuple(x_0.shape)}, got {tuple(noise.shape)}.")
    check_levels(levels)
    check_steps(num_steps)
    wide = wide_dtype(x_0.device)
    grid = [per_sample(level, x_0, "levels") for level in levels.to(wide)]
    _check_preconditionings(preconditionings, x_0, grid)

    size = len(grid)
    start = torch.full((len(preconditionings), size, size), torch.nan, dtype=wide, device=x_0.device)
    target = start.clone()
    with tqdm(total=size * (size - 1) // 2, desc="consistency gaps", unit="jump", disable=not progress) as bar:
        for i, t in enumerate(grid[:-1]):
            x_t = x_0 + expand_to(t, x_0).to(torch.promote_types(velocity.state_dtype(x_0), noise.dtype)) * noise
            points = teacher_trajectory(velocity, x_t, grid[i:], num_steps)
            first = next(points)
            for j, point in enumerate(points, start=i + 1):
                for p, precond in enumerate(preconditionings.values()):
                    start[p, i, j], target[p, i, j] = map(rms, _gaps(velocity, precond, first, point))
                bar.update()
    return GapMap(tuple(preconditionings), levels.detach().to("cpu", torch.float64), start.cpu(), target.cpu())


def teacher_trajectory(velocity: Velocity, x: Tensor, levels: Sequence[Tensor], num_steps: int) -> Iterator[Point]:
    """Return the points of the teacher's ODE through ``x`` at every level, each ``(B,)`` in the wide dtype.

    Half of ``num_steps`` are taken from one level to the next, uniform in t^(1/7).
    """
    per_level = num_steps // 2
    grid = [levels[0]]
    for t, s in pairwise(levels):
        ramp = torch.linspace(0, 1, per_level + 1, dtype=t.dtype, device=t.device)[1:-1, None]
        grid += [*torch.lerp(t ** (1 / 7), s ** (1 / 7), ramp) ** 7, s]
    return islice(solution(velocity, x.to(velocity.state_dtype(x)), grid), None, None, per_level)


def _gaps(velocity: Velocity, precond: Preconditioning, start: Point, end: Point) -> tuple[Tensor, Tensor]:
    """Return what a jump from a trajectory's beginning requires, less what the teacher says at its two ends."""
    change = _required_change(precond, start, end)
    at_start = change
    if precond.told_lower_level:
        q_x, q = precond.query(start.x, start.t, end.t)
        at_start = change - (velocity.denoised(q_x, q) - start.denoised)
    return at_start, change - (end.denoised - start.denoised)


def _required_change(precond: Preconditioning, start: Point, end: Point) -> Tensor:
    r"""Return how far `required_output` is from what the teacher says, $D^* - D$, without rounding of x_t and D.

    With $x_s = x_t + \frac{s - t}t (x_t - D) + w$ it is $(w + (1 - \frac st - c_{out}) D + (\frac st - c_{skip})\,
    x_t) / c_{out}$. Of an Euler step's coefficients only w is left.
    """
    t, s = start.t, end.t
    c_skip, c_out = precond._for_batch(start.x, t, s)
    modes_t, D, w = (precond._to_modes(v) for v in (start.x, start.denoised, end.bend))
    ratio, tau = (expand_to(v, modes_t) for v in (s / t, (t - s) / t))
    left = torch.addcmul(w, (tau - c_out).to(D.dtype), D)
    return precond._required(Scalings(c_skip - ratio, c_out), modes_t, left)


def rms(x: Tensor) -> Tensor:
    """Return the RMS over all elements."""
    return x.square().mean().sqrt()


def check_steps(num_steps: int) -> None:
    """Refuse a number of steps that cannot be halved."""
    check_count(num_steps, 2, "num_steps")
    if num_steps % 2:
        raise ValueError(f"num_steps must be even, as half as many steps of fifth order are taken, got {num_steps}.")


def _check_preconditionings(preconditionings: object, x: Tensor, grid: Sequence[Tensor]) -> None:
    """Refuse what is no preconditioning, or does not reach from each level to the next."""
    if not isinstance(preconditionings, Mapping):
        raise TypeError(
            f"preconditionings must be a dict of them by name, got {type(preconditionings).__name__}: "
            f"{{'CTM': CTMPreconditioning()}}."
        )
    if not preconditionings:
        raise ValueError("preconditionings must hold at least one, got an empty dict.")
    for name, precond in preconditionings.items():
        _check_preconditioning(precond, f"preconditionings[{name!r}]")
        for t, s in pairwise(grid):
            precond.required_output(x, x, t, s)


def _check_preconditioning(precond: object, name: str) -> None:
    if not isinstance(precond, Preconditioning):
        raise TypeError(f"{name} must be a Preconditioning, got {type(precond).__name__}: e.g. CTMPreconditioning().")
