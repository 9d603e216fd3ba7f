r"""Whole solutions of the teacher's ODE: over one grid, or with a start and a stop of its own for every sample.

Distillation needs the latter. Samples that have arrived leave the batch: the teacher sees each one exactly as often as
its own steps ask for, in batches that shrink. Compile such a teacher with ``dynamic=True``, or torch compiles it for
each size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._checks import all_true, check_choice, check_count, check_finite, check_grid, check_positive
from .._conditions import rows_of
from .._precision import place
from ..noise_levels.per_sample import per_sample
from ..teachers.denoiser import Denoiser
from .steps import Velocity, Weights, euler, heun


def solve_ode(
    denoiser: Denoiser,
    x: Tensor,
    levels: Tensor,
    method: str = "heun",
    *,
    trajectory: bool = False,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    **condition: Any,
) -> Tensor:
    r"""Carry ``x`` along the probability-flow ODE over a grid of noise levels.

    Downwards this is sampling, upwards encoding. Heun's method calls the teacher twice per step, Euler's once; the step
    to a final 0 is always an Euler step, as in EDM's sampler.

    Args:
        denoiser: The teacher $D$.
        x: Noisy data at ``levels[0]``. Shape ``(B, ...)``. To sample: ``levels[0]`` times standard normal noise.
        levels: Noise levels, strictly decreasing or strictly increasing; the last one may be 0. Shape ``(K,)`` with
            ``K >= 2``. Their values are read: on the CPU they cost no synchronisation.
        method: ``"heun"`` (second order) or ``"euler"`` (first order).
        trajectory: Return the data at every level instead of the last.
        dtype: The dtype that the data are carried in and returned in. Default: ``x``'s. torch.float64 avoids the
            rounding of many small steps; the teacher is called in its own dtype all the same.
        progress: Show a progress bar.
        **condition: Handed to the teacher.

    Returns:
        The data at ``levels[-1]``, shape of ``x``; the trajectory has shape ``(K, B, ...)`` and starts with ``x``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape does not fit, levels are not as described, or the method is unknown.

    Examples:
        >>> teacher = lambda x, t: 0 * x  # all data are 0: x / t stays what it is
        >>> solve_ode(teacher, torch.tensor([[4.0]]), torch.tensor([8.0, 2.0, 0.0]), trajectory=True).flatten()
        tensor([4., 1., 0.])
    """
    check_choice(method, ("euler", "heun"), "method")
    velocity = Velocity.of(denoiser, x, condition)
    reaches_zero = _check_grid(levels)
    x = x.to(_state_dtype(dtype, x))

    # levels, and what steps multiply by, one row for each sample: nothing is left to compute of them in a step
    grid = place(levels, x.device, torch.float64)[:, None].expand(-1, len(x))
    weights = Weights.of(grid[:-1], grid[1:], x)
    states = [x]
    for i in tqdm(range(len(grid) - 1), desc="ODE", unit="step", disable=not progress):
        if method == "euler" or (reaches_zero and i == len(grid) - 2):
            x = euler(velocity, x, grid[i], weights.euler[i])
        else:
            x = heun(velocity, x, grid[i], grid[i + 1], Weights(*(weight[i] for weight in weights)))
        if trajectory:
            states.append(x)
    return torch.stack(states) if trajectory else x


def heun_solve(
    denoiser: Denoiser,
    x: Tensor,
    levels: Tensor,
    start: Tensor | int,
    stop: Tensor | int,
    *,
    dtype: torch.dtype | None = None,
    **condition: Any,
) -> Tensor:
    r"""Carry each sample down the probability-flow ODE from its own start to its own stop on a grid of noise levels.

    Sample i takes the Heun steps ``levels[start[i]] -> levels[start[i] + 1] -> ... -> levels[stop[i]]``. The teacher
    evaluates ``2 * (stop - start).sum()`` samples in all, in two calls per step of the longest way. To a final level
    of 0 a sample takes an Euler step, with one evaluation, in a call of its own kind.

    Args:
        denoiser: The teacher $D$. What it holds itself must fit batches of any size: give per-sample conditions here.
        x: Noisy data, sample i at level ``levels[start[i]]``. Shape ``(B, ...)``.
        levels: Strictly decreasing noise levels; the last may be 0. Shape ``(K,)``.
        start: Indices into ``levels``, 0 for the noisiest. Integers of shape ``(B,)``, or one for all.
        stop: Indices into ``levels``, at least ``start``. Where equal, the sample is returned as it came. Integers of
            shape ``(B,)``, or one for all. The values of levels and indices decide what is called, so they are read:
            keep all three on the CPU to avoid a synchronisation.
        dtype: The dtype that the data are carried in and returned in, as for `solve_ode`.
        **condition: Handed to the teacher. They follow the samples still on their way: see `common`.

    Returns:
        The data, sample i at level ``levels[stop[i]]``. Shape of ``x``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape does not fit, levels are not as described, an index is not one of ``levels``, or a start
            is above its stop.

    Examples:
        >>> teacher = lambda x, t: 0 * x  # all data are 0: x / t stays what it is
        >>> x, levels = torch.tensor([[8.0], [4.0]]), torch.tensor([8.0, 4.0, 2.0, 1.0])
        >>> heun_solve(teacher, x, levels, start=torch.tensor([0, 1]), stop=torch.tensor([3, 2])).flatten()
        tensor([1., 2.])
    """
    velocity = Velocity.of(denoiser, x, condition)
    reaches_zero = _check_grid(levels)
    if levels[0] < levels[-1]:
        raise ValueError(
            f"levels must be decreasing (noisiest first), got {levels[0].item():g} to {levels[-1].item():g}: flip them "
            f"(levels.flip(0)), and the indices (len(levels) - 1 - index)."
        )
    last = len(levels) - 1
    first_index = _host_integers(start, x, "start", 0, last)
    last_index = _host_integers(stop, x, "stop", 0, last)
    steps = last_index - first_index
    if bool((steps < 0).any()):
        i = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"start must be at most stop, as indices grow towards the data, got start {int(first_index[i])} and stop "
            f"{int(last_index[i])} at position {i}: swap them."
        )
    evaluations = 2 * steps - ((steps > 0) & (last_index == last) & reaches_zero).long()

    grid = place(levels, x.device, torch.float64)
    index = first_index + torch.arange(max(steps.tolist(), default=0) + 1, device="cpu")[:, None]
    return _march(velocity, x, dtype, evaluations, grid[index.clamp(max=last).to(x.device, non_blocking=True)])


def heun_solve_between(
    denoiser: Denoiser,
    x: Tensor,
    t: Tensor | float,
    u: Tensor | float,
    num_steps: Tensor | int,
    *,
    rho: float = 7.0,
    dtype: torch.dtype | None = None,
    **condition: Any,
) -> Tensor:
    r"""Carry each sample down the probability-flow ODE from its own level t to its own level u, off any grid.

    Each sample takes its own number n of Heun steps, uniform in $t^{1/\rho}$ between the two levels:

    $$t_k = \Big(t^{1/\rho} + \tfrac{k}{n} (u^{1/\rho} - t^{1/\rho})\Big)^\rho, \qquad k = 0, \ldots, n$$

    The teacher is called twice per step of the longest way, and evaluates ``2 * num_steps.sum()`` samples in all.

    Of the arguments of `heun_solve` it takes ``denoiser``, ``dtype`` and ``condition``. Its own:

    - ``x``: Noisy data at levels ``t``. Shape ``(B, ...)``.
    - ``t``, ``u``: Noise levels to start from and to reach, $t \ge u > 0$. Shape ``(B,)``, or one for all. Off the CPU,
      levels out of range give NaN instead of an error.
    - ``num_steps``: Steps for each sample, at least 1; also where u = t, which changes nothing. Integers of shape
      ``(B,)``, or one for all. Their values are read: keep them on the CPU to avoid a synchronisation.
    - ``rho``: Exponent of the spacing, positive; large values take more steps at small noise.

    Returns:
        The data at levels ``u``. Shape of ``x``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape does not fit, a level or a number is out of range, or ``u`` is above ``t``.

    Examples:
        >>> teacher = lambda x, t: 0 * x  # all data are 0: x / t stays what it is
        >>> x, t, u = torch.tensor([[6.0], [3.0]]), torch.tensor([3.0, 1.5]), torch.tensor([1.0, 1.0])
        >>> heun_solve_between(teacher, x, t, u, num_steps=torch.tensor([3, 1])).flatten()
        tensor([2., 2.])
    """
    velocity = Velocity.of(denoiser, x, condition)
    t, u = per_sample(t, x, "t"), per_sample(u, x, "u")
    if all_true(u <= t) is False:
        i = int((u > t).nonzero()[0])
        raise ValueError(f"u must be at most t, got t = {t[i].item():g} and u = {u[i].item():g} at position {i}.")
    check_positive(rho, "rho")
    steps = _host_integers(num_steps, x, "num_steps", 1)

    target = torch.where(u <= t, u, torch.nan)
    num = num_steps if isinstance(num_steps, int) else place(steps, x.device, t.dtype)  # a number is not copied
    root_ratio = (target / t) ** (1 / rho)  # levels relative to t: no rho overflows
    step = torch.arange(max(steps.tolist(), default=0) + 1, device=x.device, dtype=t.dtype)[:, None]
    level = t * torch.lerp(torch.ones_like(root_ratio), root_ratio, step / num) ** rho
    return _march(velocity, x, dtype, 2 * steps, torch.where(step >= num, target, level))


def _check_grid(levels: Tensor) -> bool:
    """Refuse anything but a strictly monotone grid of noise levels, 0 at most at its end; return whether it ends so."""
    check_grid(levels)
    check_finite(levels, "levels")
    values = levels.detach().cpu().double()
    steps = values.diff()
    if not bool((steps < 0).all() | (steps > 0).all()):
        index = int((steps.sign() != steps[0].sign()).logical_or(steps == 0).nonzero()[0])
        raise ValueError(
            f"levels must be strictly decreasing or strictly increasing, got {values[index]:g} then "
            f"{values[index + 1]:g} at index {index}: sort them and drop duplicates."
        )
    if bool((values[:-1] <= 0).any()) or bool(values[-1] < 0):
        raise ValueError(
            f"levels must be positive noise levels (sigma), only the last may be 0, got {values.min():g} at index "
            f"{int(values.argmin())}: the ODE cannot leave 0, start at sigma_min."
        )
    return bool(values[-1] == 0)


def _state_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """Return the dtype of the state: ``x``'s by default."""
    if dtype is None:
        return x.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}: for example torch.float64.")
    return dtype


def _host_integers(value: Tensor | int, x: Tensor, name: str, low: int, high: int | None = None) -> Tensor:
    """Return one checked integer per sample, int64 on the CPU, shape ``(B,)``."""
    if not isinstance(value, Tensor):
        check_count(value, low, name)
        value = torch.tensor([value], device="cpu")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {value.dtype}: pass indices or counts, not noise levels.")
    if value.shape not in {(), (1,), x.shape[:1]}:
        raise ValueError(
            f"{name} must hold one integer per sample, shape {tuple(x.shape[:1])} for x of shape {tuple(x.shape)}, got "
            f"shape {tuple(value.shape)}."
        )
    value = value.to("cpu", torch.int64).reshape(-1).expand(len(x))
    wrong = value < low if high is None else (value < low) | (value > high)
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        expected = f"at least {low}" if high is None else f"an index from {low} to {high}"
        raise ValueError(f"{name} must be {expected}, got {int(value[i])} at position {i}.")
    return value


def _march(velocity: Velocity, x: Tensor, dtype: torch.dtype | None, evaluations: Tensor, levels: Tensor) -> Tensor:
    """Return the data where each sample has used up its teacher evaluations, of shape ``(B,)`` on the CPU.

    ``levels`` are those of all samples after any number of steps, shape ``(steps + 1, B)``.
    """
    # 1. Sorted by evaluations, the samples still on their way are always the first ones
    order = evaluations.argsort(descending=True, stable=True)
    left = evaluations[order].tolist()
    together = bool(left) and left[0] == left[-1] > 0
    rows = slice(None) if together else order.to(x.device, non_blocking=True)
    way, levels, arrived = x[rows].to(_state_dtype(dtype, x)), levels[:, rows], []
    weights = Weights.of(levels[:-1], levels[1:], way)

    for step in range(len(levels) - 1):
        # 2. Two evaluations left are a Heun step, a single one an Euler step, none an arrival
        num, num_heun = (sum(own > spent for own in left) for spent in (2 * step, 2 * step + 1))
        arrived.append(way[num:])
        pieces = []
        for is_heun, part in ((True, slice(0, num_heun)), (False, slice(num_heun, num))):
            if part.start < part.stop:
                own = replace(velocity, condition=rows_of(velocity.condition, order[part], len(x)))
                now = Weights(*(weight[step, part] for weight in weights))
                x_t, t, s = way[part], levels[step, part], levels[step + 1, part]
                pieces.append(heun(own, x_t, t, s, now) if is_heun else euler(own, x_t, t, now.euler))
        way = torch.cat(pieces) if len(pieces) > 1 else pieces[0]

    # 3. Those that arrived last stand first; back to the order of x
    way = torch.cat([way, *reversed(arrived)])
    return way if together else way[order.argsort().to(x.device, non_blocking=True)]
