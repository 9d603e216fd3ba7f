r"""What a student is distilled with (docs/distillation.md): consistency of neighbours, and of whole trajectories.

Both start from clean data and noise that the caller drew, $x_t = x_0 + t\, n$, so that they use no randomness but
dropout's. Nothing stalls the device as long as the times' indices are on the CPU; values are checked on the CPU only
(`Loss.check` does it elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ._checks import check_positive, check_tensor
from .distances import squared_error
from .jump_times import JumpTimes
from .loss import Distance, Loss, add_noise, check_data, weighted_loss
from .noise_levels import expand_to
from .per_sample_ode import heun_solve, heun_solve_between
from .shared_dropout import SharedDropout
from .teacher import Denoiser
from .weightings import Weighting


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
    num_steps: int = 1,
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
        num_steps: The teacher's steps from t to u where those are no levels of a grid.
        share_dropout: Give student and target the same dropout masks.
        **condition: Handed to teacher, student and target.

    Returns:
        The loss and its terms.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, times are not $t \ge u \ge s$, or (on the CPU) the loss is not finite.

    Example:
        >>> from analytic_precond import CTMPreconditioning, ConsistencyModel
        >>> student = ConsistencyModel(lambda x, c_noise: 0 * x, CTMPreconditioning())
        >>> levels = torch.tensor([2.0, 1.0, 0.002])
        >>> times = JumpTimes(*levels[:, None])
        >>> x_0 = torch.ones(1, 4)
        >>> result = consistency_distillation_loss(lambda x, t: 0 * x, student, student, x_0, 0 * x_0, times)
        >>> result.terms["estimate"]  # EDM's c_skip = 0.25 / 4.25, times 1 - s/t, plus s/t
        tensor([[0.0598, 0.0598, 0.0598, 0.0598]])
    """
    times = _check(x_0, noise, times, (student, target))
    masks = _masks(share_dropout)
    x_t, x_u = _two_points(denoiser, x_0, noise, times, num_steps, condition)
    with masks:
        estimate = student(x_t, times.t, times.s, **condition)
    with torch.no_grad(), masks:
        start = times.u.where(times.u > 0, times.t)  # u = 0 is clean already, and no level to jump from
        goal = target(x_u, start, times.s, **condition)
        goal = goal.where(expand_to(times.u, x_u) > 0, x_u)
    return weighted_loss(estimate, goal, times._asdict(), distance, weighting, sigma_data)


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
    sigma_min: float = 0.002,
    num_steps: int = 1,
    share_dropout: bool = True,
    **condition: Any,
) -> Loss:
    r"""Compare a student's jump with a teacher's steps and a shorter jump, in clean data (CTM, Kim et al. 2024).

    With $\varepsilon = \sigma_{min}$ and the stop-gradient student $\bar f$, soft consistency asks that

    $$w\, d\big(\bar f(f_\theta(x_t, t, s), s, \varepsilon),\ \bar f(\bar f(x_u, u, s), s, \varepsilon)\big),
      \qquad x_u = \text{teacher's Heun steps from } x_t$$

    be small. Gradients pass through $\bar f$'s input, never into its parameters. Members whose steps are done cost
    no teacher call: each has its own t, u, s.

    Args:
        denoiser: The teacher; None to take $x_u = x_0 + u\, n$.
        student: A two-time student, called as ``student(x_t, t, s, **condition)``.
        target: The stop-gradient student $\bar f$: its average (`exponential_moving_average`) or the student itself.
        x_0: Clean data. Shape ``(B, ...)``.
        noise: Standard normal noise $n$. Shape of ``x_0``.
        times: Noise levels from `sample_jump_times` or `sample_continuous_times`.
        distance: Maps two batches to one number per sample, shape ``(B,)``.
        weighting: A name from ``WEIGHTINGS``, or a function of t, u, s and ``sigma_data``.
        sigma_data: Standard deviation of the data, for the weighting.
        sigma_min: The level at which both sides are compared.
        num_steps: The teacher's steps from t to u where those are no levels of a grid.
        share_dropout: Give all passes the same dropout masks.
        **condition: Handed to teacher, student and target.

    Returns:
        The loss and its terms.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit, times are not $t \ge u \ge s$, or (on the CPU) the loss is not finite.

    Example:
        >>> from analytic_precond import CTMPreconditioning, ConsistencyTrajectoryModel
        >>> student = ConsistencyTrajectoryModel(lambda x, c_t, c_s: 0 * x, CTMPreconditioning())
        >>> times = JumpTimes(*torch.tensor([[2.0], [1.0], [0.002]]))
        >>> x_0 = torch.ones(1, 4)
        >>> result = trajectory_distillation_loss(lambda x, t: 0 * x, student, student, x_0, 0 * x_0, times)
        >>> result.terms["target"]  # the teacher's x_u = 1/2, times EDM's 0.25 / 1.25 and so on
        tensor([[0.1008, 0.1008, 0.1008, 0.1008]])
    """
    check_positive(sigma_min, "sigma_min")
    times = _check(x_0, noise, times, (student, target))
    masks = _masks(share_dropout)
    x_t, x_u = _two_points(denoiser, x_0, noise, times, num_steps, condition)
    t, u, s = times[:3]
    end = torch.full_like(s, sigma_min).minimum(s)  # float32 grids end at 0.0019999996
    with masks:
        x_s = student(x_t, t, s, **condition)
    with masks:
        estimate = _without_parameters(target, x_s, s, end, condition)
    with torch.no_grad():
        with masks:
            goal = target(x_u, u, s, **condition)
        with masks:
            goal = target(goal, s, end, **condition)
    return weighted_loss(estimate, goal, times._asdict(), distance, weighting, sigma_data)


def _two_points(
    denoiser: Denoiser | None,
    x_0: Tensor,
    noise: Tensor,
    times: JumpTimes,
    num_steps: int,
    condition: Mapping[str, Any],
) -> tuple[Tensor, Tensor]:
    """Return x_t and x_u on one trajectory."""
    x_t = add_noise(x_0, noise, times.t)
    if denoiser is None:
        return x_t, add_noise(x_0, noise, times.u)
    with torch.no_grad():
        if times.levels is None or times.t_index is None or times.u_index is None:
            return x_t, heun_solve_between(denoiser, x_t, times.t, times.u, num_steps, **condition)
        return x_t, heun_solve(denoiser, x_t, times.levels, times.t_index, times.u_index, **condition)


def _without_parameters(
    module: Callable[..., Tensor], x: Tensor, t: Tensor, s: Tensor, condition: Mapping[str, Any]
) -> Tensor:
    """Call a student so that gradients reach its input but none of its parameters."""
    if isinstance(module, DistributedDataParallel):
        module = module.module
    if isinstance(module, nn.Module) and any(p.requires_grad for p in module.parameters()):
        constants = {name: p.detach() for name, p in module.named_parameters()}
        result: Tensor = torch.func.functional_call(module, constants, (x, t, s), dict(condition))
        return result
    return module(x, t, s, **condition)


def _masks(share: bool) -> AbstractContextManager[Any]:
    return SharedDropout() if share else nullcontext()


def _check(x_0: Tensor, noise: Tensor, times: JumpTimes, students: Sequence[object]) -> JumpTimes:
    """Refuse bad arguments before any network is called; return the times on the data's device."""
    check_data(x_0, noise)
    for student in students:
        if not callable(student):
            raise TypeError(f"student and target must be callable as student(x_t, t, s), got {type(student).__name__}.")
    if not isinstance(times, JumpTimes):
        raise TypeError(
            f"times must be JumpTimes, got {type(times).__name__}: take sample_jump_times, or JumpTimes(t, u, s)."
        )
    t, u, s = times[:3]
    for name, level in (("t", t), ("u", u), ("s", s)):
        check_tensor(level, f"times.{name}")
        if level.shape != x_0.shape[:1]:
            raise ValueError(f"times.{name} must have shape {tuple(x_0.shape[:1])}, got {tuple(level.shape)}.")
    if t.device.type == u.device.type == s.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~((t > 0) & (t >= u) & (u >= s) & (s >= 0))
        if bool(wrong.any()):
            index = int(wrong.nonzero()[0])
            raise ValueError(
                f"times must be t >= u >= s >= 0 with t > 0, got t = {t[index].item():.6g}, u = {u[index].item():.6g}, "
                f"s = {s[index].item():.6g} for sample {index}: noise levels fall from t to s."
            )
    # indices stay where they are: on the CPU the teacher's steps are planned without waiting for the device
    t, u, s = (level.to(x_0.device, non_blocking=True) for level in (t, u, s))
    return times._replace(t=t, u=u, s=s)
