r"""Random times for distillation: a jump $t \to s$ that a teacher's step $t \to u$ supervises, $t > u \ge s$.

On a grid, as CTM (several steps at a time) and CM (neighbours) draw them, and between the grid points; and ECT's map.
Every sample has its own times, nothing waits for the device, and nothing but the generator is random: without one,
torch's default generator is used; a generator's own device decides where numbers are drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import (
    all_true,
    check_choice,
    check_count,
    check_grid,
    check_level,
    check_levels,
    check_not_negative,
    check_positive,
    may_read,
)
from .._precision import wide_dtype
from ..noise_levels.random_levels import check_destination, check_generator, check_ramp, draw, karras_level
from ..students.base import default_range


class JumpTimes(NamedTuple):
    """Noise levels of one training step, one of each per sample, with ``t > u >= s``.

    ECT's pairs are ``JumpTimes(t, ect_target_times(t, stage), torch.zeros_like(t))``.

    Attributes:
        t: Where the student starts. Shape ``(B,)``.
        u: Where the teacher's steps from ``t`` end, and the target's jump starts. Shape ``(B,)``.
        s: Where both jumps end. Shape ``(B,)``.
        t_index: Index of ``t`` in ``levels``, int64; none between grid points.
        u_index: Index of ``u`` in ``levels``.
        s_index: Index of ``s`` in ``levels``.
        levels: The grid; none between grid points.
    """

    t: Tensor
    u: Tensor
    s: Tensor
    t_index: Tensor | None = None
    u_index: Tensor | None = None
    s_index: Tensor | None = None
    levels: Tensor | None = None


def sample_jump_times(
    batch: int,
    levels: Tensor,
    max_steps: int = 17,
    generator: torch.Generator | None = None,
    *,
    step_weighting: str = "weighted",
    end: str = "uniform",
) -> JumpTimes:
    r"""Draw times on a grid as the Consistency Trajectory Model does (Kim et al. 2024).

    With N levels, independently for each sample:

    - the number of teacher steps $k \in \{1, \dots, K\}$, $K = \min(max\_steps, N - 1)$, with $P(k) \propto k$
      (``"weighted"``) or all alike (``"uniform"``),
    - the start $t = t_i$ with i uniform on $\{0, \dots, N - 1 - k\}$, and $u = t_{i + k}$,
    - the target $s = t_j$ with j uniform on $\{i + k, \dots, N - 1\}$, both ends included, or always the last.

    The defaults are those of sony/ctm for CIFAR-10 (N = 18; for 64 x 64 images it takes N = 40, ``max_steps=39``),
    except that there one k serves the whole batch.

    Args:
        batch: Number of samples B, at least 1.
        levels: Noise levels, strictly decreasing, at least 2.
        max_steps: Largest number of teacher steps, at least 1; a grid with fewer steps bounds it.
        generator: Source of the random numbers. Default: torch's own.
        step_weighting: ``"weighted"`` or ``"uniform"``.
        end: How s is drawn: ``"uniform"``, or ``"smallest"`` for the last level.

    Returns:
        The times, with indices, in the levels' dtype and on their device.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range, a name unknown or the levels do not decrease (off the CPU their
            values are not looked at).

    Examples:
        >>> levels = torch.tensor([80.0, 10.0, 1.0, 0.002])
        >>> times = sample_jump_times(5, levels, end="smallest")
        >>> times.s
        tensor([0.0020, 0.0020, 0.0020, 0.0020, 0.0020])
        >>> bool((times.t > times.u).all()), torch.equal(times.t, levels[times.t_index])
        (True, True)
    """
    check_times(batch, levels, generator)
    check_count(max_steps, 1, "max_steps")
    check_choice(step_weighting, ("weighted", "uniform"), "step_weighting")
    check_choice(end, ("uniform", "smallest"), "end")
    N = len(levels)
    uniform_k, uniform_i, uniform_j = draw(torch.rand, (3, batch), levels.device, generator)
    steps = torch.arange(1, min(max_steps, N - 1) + 1, device=levels.device)
    cumulative = (steps if step_weighting == "weighted" else torch.ones_like(steps)).cumsum(0)
    k = 1 + torch.searchsorted(cumulative, _below(cumulative[-1], uniform_k), right=True)
    i = _below(N - k, uniform_i)
    u = i + k
    j = u + _below(N - u, uniform_j) if end == "uniform" else torch.full_like(u, N - 1)
    return JumpTimes(levels[i], levels[u], levels[j], i, u, j, levels)


def sample_adjacent_times(batch: int, levels: Tensor, generator: torch.Generator | None = None) -> JumpTimes:
    r"""Draw times on a grid as consistency distillation does (Song et al. 2023, algorithm 2).

    $t = t_i$ with i uniform on $\{0, \dots, N - 2\}$, u the next level, s the last one.

    Of the arguments of `sample_jump_times` it takes ``batch``, ``levels`` and ``generator``; the errors are as there.

    Returns:
        The times, with indices, in the levels' dtype and on their device.

    Examples:
        >>> sample_adjacent_times(3, torch.tensor([2.0, 1.0])).u
        tensor([1., 1., 1.])
    """
    return sample_jump_times(batch, levels, 1, generator, end="smallest")


def sample_continuous_times(
    batch: int,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    generator: torch.Generator | None = None,
    *,
    max_span: float = 17 / 18,
    end: str = "uniform",
    student: object = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> JumpTimes:
    r"""Draw times anywhere between two noise levels, as CTM's continuous scheme does.

    On Karras's ramp, $t(\tau) = (\sigma_{max}^{1/\rho} + \tau (\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho}))^\rho$
    with $0 \le \tau \le 1$, independently for each sample:

    - the span $\delta$ of the teacher's steps is uniform on $[0, max\_span)$,
    - $\tau_t$ is uniform on $[0, 1 - \delta)$, and $\tau_u = \tau_t + \delta$,
    - $\tau_s$ is uniform on $[\tau_u, 1)$, or 1.

    Spans that ``dtype`` cannot resolve are widened to the next number below t. sony/ctm has one span for the whole
    batch; its ``max_span`` is the number of steps over the number of grid points.

    Args:
        batch: Number of samples B, at least 1.
        sigma_min: Smallest noise level, positive. Default: the cleanest that ``student`` reaches, 0.002 without one.
        sigma_max: Largest noise level, above ``sigma_min``. Default: the noisiest that ``student`` starts from, 80
            without one.
        rho: Exponent of the ramp, positive.
        generator: Source of the random numbers. Default: torch's own.
        max_span: Largest share of the ramp between t and u, above 0 and at most 1.
        end: How s is drawn: ``"uniform"``, or ``"smallest"`` for ``sigma_min``.
        student: Whose jumps the times are for, alone or inside a wrapper.
        device: Where the times end. Default: the generator's device, or torch's default one.
        dtype: ``torch.float32`` or ``torch.float64``; in float64 the whole training step would become float64.

    Returns:
        The times, without indices or grid, ``sigma_max >= t > u >= s >= sigma_min`` as ``dtype`` rounds the ends.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range or a name unknown.

    Examples:
        >>> times = sample_continuous_times(5, sigma_max=4.0)
        >>> bool((4 >= times.t).all() and (times.t > times.u).all() and (times.u >= times.s).all())
        True
    """
    check_count(batch, 1, "batch", "Pass len(x).")
    cleanest, noisiest = default_range(student)
    sigma_min, sigma_max = cleanest if sigma_min is None else sigma_min, noisiest if sigma_max is None else sigma_max
    check_ramp(sigma_min, sigma_max, rho)
    check_positive(max_span, "max_span")
    if max_span > 1:
        raise ValueError(f"max_span must be at most 1, the whole ramp, got {max_span}: divide steps by grid points.")
    check_choice(end, ("uniform", "smallest"), "end")
    device = check_destination(generator, device, dtype)

    uniform_span, uniform_t, uniform_s = draw(torch.rand, (3, batch), device, generator)
    span = max_span * uniform_span
    tau_t = uniform_t * (1 - span)
    tau_u = tau_t + span
    tau_s = tau_u + uniform_s * (1 - tau_u) if end == "uniform" else torch.ones_like(tau_u)
    t, u, s = (karras_level(tau, sigma_min, sigma_max, rho).to(dtype) for tau in (tau_t, tau_u, tau_s))

    # rounding keeps the order, but may merge neighbours
    lowest = torch.full_like(t, sigma_min)
    t = torch.maximum(t, torch.nextafter(lowest, t.new_full((), torch.inf)))
    u = torch.minimum(u, torch.nextafter(t, lowest))
    return JumpTimes(t, u, torch.minimum(s, u))


def ect_target_times(t: Tensor, stage: int = 0, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Tensor:
    r"""Map t to the target's noise level r as Easy Consistency Tuning does (Geng et al. 2024).

    $$r = t \max\Big(0,\; 1 - q^{-(stage + 1)} \Big(1 + \frac{k}{1 + e^{b t}}\Big)\Big)$$

    Each stage brings r nearer to t, by the factor q. At first small t have r = 0, the clean data, where the target is
    the data and not a network's answer; the student's own jumps end at 0, too (``CMPreconditioning(sigma_min=0.0)``).
    The defaults are locuslab/ect's; ``k=0`` is its constant ratio.

    Args:
        t: Noise levels, positive. Any shape.
        stage: Number of completed stages, from 0.
        q: Factor of one stage, above 1.
        k: Height of the sigmoid, at least 0.
        b: Steepness of the sigmoid, positive.

    Returns:
        The noise levels r, ``0 <= r < t``. Shape and dtype of ``t``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range, a level not positive (off the CPU this is not looked at), or the
            stage so late that r would round to t.

    Examples:
        >>> ect_target_times(torch.tensor([1.0, 80.0]))  # at stage 0, r = 0 up to ln 7
        tensor([ 0., 40.])
    """
    check_level(t, "t")
    check_count(stage, 0, "stage")
    check_positive(q, "q")
    check_positive(b, "b")
    check_not_negative(k, "k")
    if q <= 1:
        raise ValueError(f"q must be above 1, got {q}: it divides the distance of t and r at every stage.")
    valid = (t > 0) & (t < torch.inf)
    if all_true(valid) is False:
        raise ValueError(f"t must be positive finite noise levels, got {t[~valid][0].item()}: pass sigma, not indices.")
    decay = float(q) ** -(stage + 1)
    if decay < torch.finfo(t.dtype).eps:
        raise ValueError(f"stage must leave r below t in {t.dtype}, got stage {stage} with q = {q}: stop earlier.")

    wide = t.to(wide_dtype(t.device))
    ratio = 1 - decay * (1 + k * torch.sigmoid(-b * wide))
    return (wide * ratio.clamp(min=0)).to(t.dtype)


def _below(bound: Tensor, uniform: Tensor) -> Tensor:
    """Return integers uniform on {0, ..., bound - 1}; in floating point bound * (1 - eps / 2) stays below bound."""
    return (bound * uniform).long()


def check_times(batch: object, levels: Tensor, generator: object) -> None:
    """Refuse bad arguments of what draws times on a grid; levels are read on the CPU only, where nothing stalls."""
    check_count(batch, 1, "batch", "Pass len(x).")
    check_generator(generator)
    check_grid(levels)
    if may_read(levels):
        check_levels(levels)
