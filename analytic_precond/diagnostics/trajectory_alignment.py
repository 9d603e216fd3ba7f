r"""How well a student's jumps follow its teacher's ODE, noise level by noise level."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import check_answer, check_batch, check_callable, check_levels
from .._conditions import plain
from .._precision import wide_dtype
from ..noise_levels.per_sample import per_sample
from ..ode.steps import Velocity
from ..teachers.denoiser import Denoiser
from .consistency_gap import check_steps, rms, teacher_trajectory


@dataclass(frozen=True, eq=False)
class TrajectoryAlignment:
    r"""Errors of a student's jumps against its teacher's ODE. Made by `trajectory_alignment`.

    Errors are RMS over samples and elements; the relative ones are divided by the RMS of the teacher's point that the
    jump should have hit. (The length of the jump would be the wrong measure: at high levels it is nearly all noise, and
    any student removes that.) All on the CPU, float64.

    Attributes:
        levels: Decreasing noise levels. Shape ``(K,)``.
        from_start: Error of the jump from ``levels[0]`` to each of ``levels[1:]``. Shape ``(K - 1,)``; None for a
            student that reaches only the last level.
        from_start_relative: The same, relative.
        to_end: Error of the jump from the teacher's point at each of ``levels[:-1]`` to the last level. Shape
            ``(K - 1,)``.
        to_end_relative: The same, relative.
    """

    levels: Tensor
    from_start: Tensor | None
    from_start_relative: Tensor | None
    to_end: Tensor
    to_end_relative: Tensor


@torch.no_grad()
def trajectory_alignment(
    denoiser: Denoiser,
    student: Callable[..., Tensor],
    x: Tensor,
    levels: Tensor,
    *,
    to_end_only: bool = False,
    num_steps: int = 6,
    **condition: Any,
) -> TrajectoryAlignment:
    r"""Compare a student's jumps with the teacher's ODE solution through ``x``.

    With $x_t$ the teacher's point at level t, T the first level and $\varepsilon$ the last, the errors are those of
    ``student(x_T, T, s)`` against $x_s$ and of ``student(x_t, t, eps)`` against $x_\varepsilon$. A perfect student has
    none. The former tell which intermediate jumps are misaligned, the latter from which levels on the student finds
    the teacher's end.

    The teacher is evaluated ``3 * num_steps`` times per sample from each level to the next (by the
    method of `consistency_gap`) and once at the last, the student twice per level.

    Args:
        denoiser: The teacher $D$.
        student: Called as ``student(x_t, t, s, **condition)`` with levels of shape ``(B,)``; in eval mode.
        x: Noisy data at ``levels[0]``, e.g. ``levels[0]`` times standard normal noise. Shape ``(B, ...)``.
        levels: Decreasing noise levels, positive. Shape ``(K,)``.
        to_end_only: Leave out the jumps from the start, for a student that knows one target: a `ConsistencyModel`,
            whose ``sigma_min`` must then be the last level.
        num_steps: Twice the number of steps from one level to the next, so even.
        **condition: Handed to the teacher and to the student.

    Returns:
        The errors per level.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape does not fit or a level is out of range.

    Examples:
        >>> from analytic_precond import GaussianDenoiser
        >>> teacher = GaussianDenoiser(1.0)  # x_s = x sqrt((1 + s^2) / (1 + t^2))
        >>> euler = lambda x, t, s: x + (s - t)[:, None] / t[:, None] * (x - teacher(x, t))
        >>> x, levels = torch.tensor([[5.0**0.5]]), torch.tensor([2.0, 1.0, 0.5])  # through sqrt(2) and sqrt(1.25)
        >>> trajectory_alignment(teacher, euler, x, levels, num_steps=16).from_start
        tensor([0.0726, 0.2236], dtype=torch.float64)
    """
    check_batch(x, "x")
    velocity = Velocity.of(denoiser, x, condition)
    check_callable(student, "student", "student(x_t, t, s)")
    check_levels(levels)
    check_steps(num_steps)
    grid = [per_sample(level, x, "levels") for level in levels.to(wide_dtype(x.device))]
    level_dtype = torch.promote_types(x.dtype, torch.float32)

    def jump(x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        reached = student(x_t.to(x.dtype), t.to(level_dtype), s.to(level_dtype), **plain(condition))
        check_answer(reached, x, "student")
        return reached.to(s.dtype)

    # the student first: if it refuses the levels, no teacher has run in vain
    from_start = [] if to_end_only else [jump(x, grid[0], s) for s in grid[1:]]
    points = [point.x for point in teacher_trajectory(velocity, x, grid, num_steps)]
    to_end = [jump(x_t, t, grid[-1]) for x_t, t in zip(points, grid[:-1], strict=False)]

    start_errors = (None, None) if to_end_only else _errors(from_start, points[1:])
    end_errors = _errors(to_end, [points[-1]] * len(to_end))
    grid_on_cpu = levels.detach().to("cpu", torch.float64)
    return TrajectoryAlignment(grid_on_cpu, start_errors[0], start_errors[1], end_errors[0], end_errors[1])


def _errors(reached: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the RMS errors, and the same relative to the RMS of what is expected."""
    pairs = list(zip(reached, expected, strict=True))
    absolute = torch.stack([rms(a - b) for a, b in pairs]).to("cpu", torch.float64)
    return absolute, absolute / torch.stack([rms(b) for _, b in pairs]).to("cpu", torch.float64)
