r"""What a student is distilled with (docs/distillation.md): consistency of neighbours, and of whole trajectories.

Both start from clean data and noise that the caller drew, $x_t = x_0 + t\, n$, so that they use no randomness but
dropout's. Nothing stalls the device as long as the times' indices are on the CPU; values are checked on the CPU only
(`Loss.check` does it elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import all_true, check_batch, check_callable, check_device, check_level, check_positive, check_tensor
from .._conditions import Condition
from .._precision import place, wide_dtype
from ..noise_levels.per_sample import expand_to
from ..ode.solve import heun_solve, heun_solve_between
from ..students.base import default_range
from ..teachers.denoiser import Denoiser
from .distances import squared_error
from .jump_times import JumpTimes
from .student_passes import StudentPasses
from .weightings import Distance, Loss, WeightedDistance, Weighting


def consistency_distillation_loss(
    denoiser: Denoiser | None,
    student: Callable[..., Tensor],
    target: Callable[..., Tensor],
    x_0: Tensor,
    noise: Tensor,
    times: JumpTimes,
    *,
    distance: Distance = squared_error,
    weighting: str | Weighting = "uniform",
    sigma_data: float = 0.5,
    num_steps: Tensor | int | None = None,
    share_dropout: bool = True,
    **condition: Any,
) -> Loss:
    r"""Compare a student's jumps from neighbouring points of a trajectory (Song et al. 2023).

    $$w\, d\big(f_\theta(x_t, t, s),\ \bar f(x_u, u, s)\big), \qquad x_u = \text{teacher's Heun steps from } x_t$$

    With times from `sample_adjacent_times` this is consistency distillation; without a teacher ($x_u = x_0 + u\, n$),
    consistency training, whose u may be 0 (`ect_target_times`).

    Args:
        denoiser: The teacher; None for consistency training.
        student: Called as ``student(x_t, t, s, **condition)``.
        target: What it is compared with, called likewise without gradient: its average
            (`exponential_moving_average`) or the student itself.
        x_0: Clean data. Shape ``(B, ...)``.
        noise: Standard normal noise $n$. Shape of ``x_0``.
        times: Noise levels t, u, s, shape ``(B,)``.
        distance: Maps two batches to one number per sample, shape ``(B,)``.
        weighting: A name from ``WEIGHTINGS``, or a function of t, u, s and ``sigma_data``.
        sigma_data: Standard deviation of the data, for the weighting.
        num_steps: The teacher's steps from t to u where those are no levels of a grid: one number, or one per sample.
            Default: as many as EDM's grid of 18 levels has there. Like the times, keep it on the CPU.
        share_dropout: Give student and target the same dropout masks.
        **condition: Handed to teacher, student and target. They follow the samples: see `common`.

    Returns:
        The loss and its terms.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, times are not $t \ge u \ge s$, or (on the CPU) the loss is not finite.

    Examples:
        >>> from analytic_precond import CTMPreconditioning, ConsistencyModel
        >>> student = ConsistencyModel(lambda x, c_noise: 0 * x, CTMPreconditioning())
        >>> levels = torch.tensor([2.0, 1.0, 0.002])
        >>> times = JumpTimes(*levels[:, None])
        >>> x_0 = torch.ones(1, 4)
        >>> result = consistency_distillation_loss(lambda x, t: 0 * x, student, student, x_0, 0 * x_0, times)
        >>> result.terms["estimate"]  # EDM's c_skip = 0.25 / 4.25, times 1 - s/t, plus s/t
        tensor([[0.0598, 0.0598, 0.0598, 0.0598]])
    """
    compare = WeightedDistance(distance, weighting, sigma_data)
    _check(x_0, noise, times, num_steps, (student, target))
    t, u, s, x_t, x_u = _points(denoiser, x_0, noise, times, num_steps, condition)
    passes = StudentPasses(condition, share_dropout)

    with torch.no_grad():
        start = u.where(u > 0, t)  # u = 0 is clean already, and no level to jump from
        goal = passes.jump(target, x_u, start, s).where(expand_to(u, x_u) > 0, x_u)
    estimate = passes.differentiated_jump(student, x_t, t, s)
    return compare(estimate, goal, t=t, u=u, s=s)


def trajectory_distillation_loss(
    denoiser: Denoiser | None,
    student: Callable[..., Tensor],
    target: Callable[..., Tensor],
    x_0: Tensor,
    noise: Tensor,
    times: JumpTimes,
    *,
    distance: Distance = squared_error,
    weighting: str | Weighting = "uniform",
    sigma_data: float = 0.5,
    inner: Callable[..., Tensor] | None = None,
    sigma_min: float | None = None,
    num_steps: Tensor | int | None = None,
    share_dropout: bool = True,
    **condition: Any,
) -> Loss:
    r"""Compare a student's jump with a teacher's steps and a shorter jump, in clean data (CTM, Kim et al. 2024).

    With $\varepsilon = \sigma_{min}$ and the stop-gradient student $\bar f$, soft consistency asks that

    $$w\, d\big(\bar f(f_\theta(x_t, t, s), s, \varepsilon),\ \bar f(\bar f(x_u, u, s), s, \varepsilon)\big),
      \qquad x_u = \text{teacher's Heun steps from } x_t$$

    be small. Gradients pass through $\bar f$'s input, never into its parameters. Members whose steps are done cost
    no teacher call: each has its own t, u, s.

    The arguments and the errors are those of `consistency_distillation_loss`, for a student of two times, with times
    from `sample_jump_times` or `sample_continuous_times` and the stop-gradient student as ``target``. Two more:

    - ``inner``: What jumps from u to s on the target's side, without gradient. Default: ``target``. sony/ctm takes the
      student itself, and its average for the jumps to $\varepsilon$ only.
    - ``sigma_min``: The level at which both sides are compared. Default: the last of the times' grid, else the
      cleanest that the student reaches, 0.002 where it does not say.

    Returns:
        The loss and its terms.

    Examples:
        >>> from analytic_precond import CTMPreconditioning, ConsistencyTrajectoryModel
        >>> student = ConsistencyTrajectoryModel(lambda x, c_t, c_s: 0 * x, CTMPreconditioning())
        >>> times = JumpTimes(*torch.tensor([[2.0], [1.0], [0.002]]))
        >>> x_0 = torch.ones(1, 4)
        >>> result = trajectory_distillation_loss(lambda x, t: 0 * x, student, student, x_0, 0 * x_0, times)
        >>> result.terms["target"]  # the teacher's x_u = 1/2, times EDM's 0.25 / 1.25 and so on
        tensor([[0.1008, 0.1008, 0.1008, 0.1008]])
    """
    inner = target if inner is None else inner
    compare = WeightedDistance(distance, weighting, sigma_data)
    _check(x_0, noise, times, num_steps, (student, target, inner))
    if sigma_min is not None:
        check_positive(sigma_min, "sigma_min")
    t, u, s, x_t, x_u = _points(denoiser, x_0, noise, times, num_steps, condition)
    last: Tensor | float | None = sigma_min
    if last is None:
        last = default_range(student)[0] if times.levels is None else times.levels[-1]
    end = place(last, s.device, s.dtype).expand_as(s).minimum(s)  # float32 grids end at 0.0019999996
    passes = StudentPasses(condition, share_dropout)

    # from both points to s, then on to the end through the stop-gradient student
    with torch.no_grad():
        goal = passes.jump(target, passes.jump(inner, x_u, u, s), s, end)
    x_s = passes.differentiated_jump(student, x_t, t, s)
    estimate = passes.jump_of_input(target, x_s, s, end)
    return compare(estimate, goal, t=t, u=u, s=s)


def _points(
    denoiser: Denoiser | None,
    x_0: Tensor,
    noise: Tensor,
    times: JumpTimes,
    num_steps: Tensor | int | None,
    condition: Condition,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return t, u and s where the data are, in their dtype, float32 at least: students compute in it; x_t and x_u."""
    dtype = torch.promote_types(x_0.dtype, torch.float32)
    t, u, s = (place(level, x_0.device, dtype) for level in (times.t, times.u, times.s))
    x_t = add_noise(x_0, noise, t)
    x_u = add_noise(x_0, noise, u) if denoiser is None else _follow(denoiser, x_t, times, num_steps, condition)
    return t, u, s, x_t, x_u


def add_noise(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t, computed at the levels' precision, in float32 at least: half precision cannot hold x_0 + 0.002 n."""
    return (x_0 + expand_to(t, x_0) * noise).to(torch.promote_types(x_0.dtype, torch.float32))


@torch.no_grad()
def _follow(
    denoiser: Denoiser, x_t: Tensor, times: JumpTimes, num_steps: Tensor | int | None, condition: Condition
) -> Tensor:
    """Return x_u, the teacher's. Times as they came: indices on the CPU let its steps be planned without waiting."""
    if times.levels is not None and times.t_index is not None and times.u_index is not None:
        return heun_solve(denoiser, x_t, times.levels, times.t_index, times.u_index, **condition)
    if num_steps is None:  # as many as EDM's 18 levels from 80 to 0.002 have between t and u, at least 1
        t, u = (level.to(wide_dtype(level.device)) ** (1 / 7) for level in (times.t, times.u))
        span = (t - u) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
        num_steps = (17 * span - 1e-5).ceil().clamp(min=1).long()  # a whole number is that number in float32, too
    return heun_solve_between(denoiser, x_t, times.t, times.u, num_steps, **condition)


def _check(
    x_0: Tensor, noise: Tensor, times: JumpTimes, num_steps: Tensor | int | None, students: Sequence[object]
) -> None:
    """Refuse bad arguments before any network is called."""
    check_data(x_0, noise)
    for student in students:
        check_callable(student, "student and target", "student(x_t, t, s)")
    if not isinstance(times, JumpTimes):
        raise TypeError(
            f"times must be JumpTimes, got {type(times).__name__}: take sample_jump_times, or JumpTimes(t, u, s)."
        )
    t, u, s = times.t, times.u, times.s
    for name, level in (("t", t), ("u", u), ("s", s)):
        check_level(level, f"times.{name}")
        if level.shape != x_0.shape[:1]:
            raise ValueError(f"times.{name} must have shape {tuple(x_0.shape[:1])}, got {tuple(level.shape)}.")
    if num_steps is not None and times.levels is not None and times.t_index is not None:
        raise ValueError(f"num_steps must be None, as the times' grid says how many steps to take, got {num_steps!r}.")
    falling = (t > 0) & (t >= u) & (u >= s) & (s >= 0)
    if all_true(falling) is False:
        index = int((~falling).nonzero()[0])
        raise ValueError(
            f"times must be t >= u >= s >= 0 with t > 0, got t = {t[index].item():.6g}, u = {u[index].item():.6g}, "
            f"s = {s[index].item():.6g} for sample {index}: noise levels fall from t to s."
        )


def check_data(x_0: Tensor, noise: Tensor) -> None:
    """Refuse anything but two batches of one shape."""
    check_batch(x_0, "x_0")
    check_tensor(noise, "noise")
    if x_0.shape != noise.shape:
        raise ValueError(
            f"x_0 and noise must be batches of one shape (B, ...), got {tuple(x_0.shape)} and {tuple(noise.shape)}: "
            f"draw noise with torch.randn(x_0.shape, generator=...)."
        )
    check_device(noise, x_0.device, "noise", "x_0")
