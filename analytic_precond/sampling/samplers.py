r"""Samplers: from noise to data in a few jumps of a student.

Each takes ``(student, x, levels, ...)`` with ``x`` at the noisiest level, ``levels[0]`` times standard normal noise
(`draw_noise`), calls ``student(x, t, s, **condition)`` once for each jump, t and s of shape ``(B,)``, and returns the
data in ``x``'s dtype. A student is a `ConsistencyModel`, a `ConsistencyTrajectoryModel`, either one inside a wrapper,
or any function. Call its ``eval()`` first; gradients are off.

``levels`` are noise levels, or indices into a ``grid``, in either order (`resolve_levels`); a final 0 stands for
``sigma_min``, by default the cleanest level that the student reaches. A sample depends neither on the batch size nor on
the rest of the batch, as far as the network keeps to that (`draw_noise`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._checks import check_answer, check_number, check_tensor
from .._conditions import plain
from ..students.base import default_range
from .levels import Levels, check_jumps, is_cleanest, resolve_levels
from .noise import Generators, noise_source


@dataclass(frozen=True)
class SamplingStep:
    """What a callback is given after each jump, before noise is added again.

    A tensor that the callback returns takes the place of ``x``, e.g. with known pixels put back (zero-shot inpainting,
    Song et al. 2023, algorithm 4). Whatever else it returns is ignored.

    Attributes:
        index: Number of the jump, from 0.
        num_steps: How many there are.
        t: Noise level that the jump started from.
        s: Noise level that it reached.
        x: The data there. Shape ``(B, ...)``.

    Examples:
        >>> student = lambda x, t, s: 0 * x + 5.0  # data that are all 5
        >>> known, mask = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[True, True, False]])
        >>> paint = lambda step: torch.where(mask, known + step.s * torch.ones(1, 3), step.x)
        >>> sample_multistep(student, torch.zeros(1, 3), [80.0, 1.0], sigma_min=0.5, callback=paint)
        tensor([[1.5000, 2.5000, 5.0000]])
    """

    index: int
    num_steps: int
    t: float
    s: float
    x: Tensor


Callback = Callable[[SamplingStep], object]


class _Jump(NamedTuple):
    """A jump from t to s, and the standard deviation of the noise to add; None after the last."""

    t: float
    s: float
    noise: float | None


def sample_one_step(
    student: Callable[..., Tensor],
    x: Tensor,
    t: float | None = None,
    sigma_min: float | None = None,
    **condition: Any,
) -> Tensor:
    """Jump from ``t`` to ``sigma_min``.

    Args:
        student: Called as ``student(x, t, s, **condition)``.
        x: Noise at level ``t``. Shape ``(B, ...)``.
        t: Noise level of ``x``. Default: the noisiest that the student's jumps start from, 80 where it does not say.
        sigma_min: The level to reach. Default: the cleanest that the student reaches, 0.002 where it does not say.
        **condition: Handed to the student.

    Returns:
        The data at ``sigma_min``. Shape and dtype of ``x``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a level is out of its or the student's range.

    Examples:
        >>> student = lambda x, t, s: (s / t)[:, None] * x  # exact for data that are all 0
        >>> sample_one_step(student, torch.tensor([[80.0]]), sigma_min=1.0)
        tensor([[1.]])
    """
    sigma_min = _cleanest(student, sigma_min)
    (start,) = resolve_levels([default_range(student)[1] if t is None else t], sigma_min=sigma_min)
    return _run(student, x, [_Jump(start, sigma_min, None)], condition)


def sample_multistep(
    student: Callable[..., Tensor],
    x: Tensor,
    levels: Levels,
    *,
    grid: Levels | None = None,
    sigma_min: float | None = None,
    subtract_sigma_min: bool = True,
    generator: Generators = None,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **condition: Any,
) -> Tensor:
    r"""Jump to ``sigma_min`` from every level, with new noise in between (Song et al. 2023, algorithm 1).

    $$x_{i+1} = G(x_i, t_i, \sigma_{min}) + \sqrt{t_{i+1}^2 - \sigma_{min}^2}\; z$$

    The result is at ``sigma_min``: a last level of ``sigma_min`` or 0 means no further call.

    Args:
        student: Called as ``student(x, t, s, **condition)``; one that jumps to ``sigma_min`` only will do.
        x: Noise at the noisiest level. Shape ``(B, ...)``.
        levels: Noise levels to jump from, or their indices into ``grid``. In either order.
        grid: Noise levels that indices refer to.
        sigma_min: The level to reach. Default: the cleanest that the student reaches, 0.002 where it does not say.
        subtract_sigma_min: False for ECT's $t_{i+1}\, z$.
        generator: For z: one generator per sample, or one from which they are seeded; torch's default by default.
        noise: The draws of z instead, one for each jump but the last. Shape ``(K, B, ...)``.
        callback: Called with a `SamplingStep` after each jump; a tensor that it returns takes the place of x.
        progress: Show a progress bar.
        **condition: Handed to the student.

    Returns:
        The data at ``sigma_min``. Shape and dtype of ``x``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If levels, generators or noise do not fit.

    Examples:
        >>> student = lambda x, t, s: (s / t)[:, None] * x  # exact for data that are all 0
        >>> x = torch.tensor([[80.0]])
        >>> sample_multistep(student, x, [80.0, 5.0], sigma_min=3.0, noise=torch.ones(1, 1, 1))  # (3 + 4) 3/5
        tensor([[4.2000]])
    """
    sigma_min = _cleanest(student, sigma_min)
    starts = [level for level in resolve_levels(levels, grid, sigma_min) if not is_cleanest(level, sigma_min)]
    removed = sigma_min if subtract_sigma_min else 0.0
    added: list[float | None] = [math.sqrt(u**2 - removed**2) for u in starts[1:]]
    jumps = [_Jump(t, sigma_min, std) for t, std in zip(starts, [*added, None], strict=True)]
    return _run(student, x, jumps, condition, generator, noise, callback, progress)


def sample_gamma(
    student: Callable[..., Tensor],
    x: Tensor,
    levels: Levels,
    gamma: float,
    *,
    grid: Levels | None = None,
    sigma_min: float | None = None,
    generator: Generators = None,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **condition: Any,
) -> Tensor:
    r"""Jump below every next level and add noise up to it: CTM's $\gamma$-sampling (Kim et al. 2024).

    $$x_{i+1} = G(x_i, t_i, s_i) + \sqrt{t_{i+1}^2 - s_i^2}\; z, \qquad
      s_i = \sigma_{min} + \sqrt{1 - \gamma^2}\, (t_{i+1} - \sigma_{min})$$

    as in sony/ctm; the paper's $s_i = \sqrt{1 - \gamma^2}\, t_{i+1}$ falls below ``sigma_min`` at the end. $\gamma = 0$
    is deterministic, 1 is `sample_multistep`.

    Of the arguments of `sample_multistep` it takes all but ``subtract_sigma_min``, with these differences:

    - ``student``: One that jumps to any level.
    - ``levels``: At least two, of which the last is reached: end with ``sigma_min`` or 0, which stands for it.
    - ``gamma``: How much noise is new, from 0 to 1.
    - ``noise``: One draw for each level after the first and above ``sigma_min``, whatever $\gamma$.

    Returns:
        The data at the last level. Shape and dtype of ``x``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If levels, gamma, generators or noise do not fit.

    Examples:
        >>> student = lambda x, t, s: (s / t)[:, None] * x  # exact for data that are all 0
        >>> x = torch.tensor([[80.0]])
        >>> sample_gamma(student, x, [80.0, 5.0], 0.6, sigma_min=0.0, noise=torch.ones(1, 1, 1))  # 4 + 3
        tensor([[7.]])
    """
    check_number(gamma, "gamma")
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be from 0 (deterministic) to 1 (all noise is new), got {gamma}.")
    sigma_min = _cleanest(student, sigma_min)
    kept = math.sqrt(1 - gamma**2)
    jumps = []
    for t, u in pairwise(_route(levels, grid, sigma_min)):
        s = sigma_min + kept * (u - sigma_min)
        fall = gamma**2 / (1 + kept) * (u - sigma_min)  # u - s without cancellation: exactly 0 for gamma = 0
        jumps.append(_Jump(t, s, None if is_cleanest(u, sigma_min) else math.sqrt(fall * (u + s))))
    return _run(student, x, jumps, condition, generator, noise, callback, progress)


def sample_deterministic(
    student: Callable[..., Tensor],
    x: Tensor,
    levels: Levels,
    *,
    grid: Levels | None = None,
    sigma_min: float | None = None,
    callback: Callback | None = None,
    progress: bool = False,
    **condition: Any,
) -> Tensor:
    r"""Jump from level to level, $x_{i+1} = G(x_i, t_i, t_{i+1})$, without new noise.

    It is `sample_gamma` with $\gamma = 0$, and takes of its arguments all but ``gamma``, ``generator`` and ``noise``;
    the errors are as there.

    Returns:
        The data at the last level. Shape and dtype of ``x``.

    Examples:
        >>> student = lambda x, t, s: (s / t)[:, None] * x  # exact for data that are all 0
        >>> sample_deterministic(student, torch.tensor([[80.0]]), [80.0, 5.0, 0.5])
        tensor([[0.5000]])
    """
    jumps = [_Jump(t, s, None) for t, s in pairwise(_route(levels, grid, _cleanest(student, sigma_min)))]
    return _run(student, x, jumps, condition, callback=callback, progress=progress)


def _cleanest(student: object, sigma_min: float | None) -> float:
    return default_range(student)[0] if sigma_min is None else sigma_min


def _route(levels: Levels, grid: Levels | None, sigma_min: float) -> list[float]:
    """Return at least two levels: a start and a target."""
    route = resolve_levels(levels, grid, sigma_min)
    if len(route) < 2:
        raise ValueError(
            f"levels must hold at least 2, where x is and where to jump, got {route}: add the level to reach, "
            f"e.g. {sigma_min:g}."
        )
    return route


def _run(
    student: Callable[..., Tensor],
    x: Tensor,
    jumps: list[_Jump],
    condition: dict[str, Any],
    generator: Generators = None,
    noise: Tensor | None = None,
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Take the jumps and add the noise."""
    check_tensor(x, "x")
    if x.ndim == 0:
        raise ValueError("x must have shape (B, ...), got a 0-d tensor.")
    check_jumps(student, [(t, s) for t, s, _ in jumps])
    told = plain(condition)
    draw = noise_source(x, sum(jump.noise is not None for jump in jumps), generator, noise)
    with torch.no_grad(), tqdm(jumps, desc="sampling", unit=" jumps", disable=not progress) as bar:
        for index, (t, s, added) in enumerate(bar):
            x = _after(SamplingStep(index, len(jumps), t, s, _jump(student, x, t, s, told)), callback)
            if added:
                x = x + added * draw(index)
    return x


def _jump(student: Callable[..., Tensor], x: Tensor, t: float, s: float, condition: dict[str, Any]) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)  # half precision cannot tell neighbouring levels apart
    levels = (torch.full((len(x),), level, dtype=dtype, device=x.device) for level in (t, s))
    reached = student(x, *levels, **condition)
    check_answer(reached, x, "student")
    return reached.to(x.dtype)


def _after(step: SamplingStep, callback: Callback | None) -> Tensor:
    """Return the data with which to go on: the callback's, if it returns any."""
    returned = None if callback is None else callback(step)
    if not isinstance(returned, Tensor):
        return step.x
    if returned.shape != step.x.shape:
        raise ValueError(
            f"expected the callback to return x's shape {tuple(step.x.shape)}, got {tuple(returned.shape)}: return "
            f"None to leave x as it is."
        )
    return returned.to(step.x)
