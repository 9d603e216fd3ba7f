r"""Times of improved consistency training (iCT): discretised log-normal levels on a grid that grows with training."""

from __future__ import annotations

import math

import torch

from .._checks import all_true, check_count
from .._precision import wide_dtype
from ..noise_levels.random_levels import check_normal, draw
from .jump_times import JumpTimes, check_times


def sample_ict_times(
    batch: int,
    levels: torch.Tensor,
    mean: float = -1.1,
    std: float = 2.0,
    generator: torch.Generator | None = None,
) -> JumpTimes:
    r"""Draw neighbouring times on a grid with the probabilities of improved consistency training.

    $t = t_i$, u the next level, s the last one, as from `sample_adjacent_times`, but with the mass that a log-normal
    law has between the two (Song and Dhariwal 2023, section 3.5):

    $$P(i) \propto \mathrm{erf}\Big(\frac{\ln t_i - mean}{\sqrt 2\, std}\Big)
      - \mathrm{erf}\Big(\frac{\ln t_{i + 1} - mean}{\sqrt 2\, std}\Big)$$

    Of the arguments of `sample_jump_times` it takes ``batch``, ``levels`` (`ict_num_levels` of them on Karras's grid)
    and ``generator``, of those of `sample_lognormal_noise_levels` the law's ``mean`` and ``std``.

    Returns:
        The times, with indices, in the levels' dtype and on their device.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range or (on the CPU) the levels do not decrease or have no probability.

    Examples:
        >>> levels = torch.tensor([1000.0, 1.0, 0.999, 0.998])  # nearly all of the law N(3, 1) is in the first interval
        >>> sample_ict_times(3, levels, mean=3.0, std=1.0, generator=torch.Generator().manual_seed(0)).u
        tensor([1., 1., 1.])
    """
    check_times(batch, levels, generator)
    check_normal(mean, std)

    edges = torch.special.erf((levels.to(wide_dtype(levels.device)).log() - mean) / (math.sqrt(2) * std))
    if all_true(edges[:1] > edges[-1:]) is False:
        raise ValueError(
            f"mean and std must give the levels from {levels[0]:g} to {levels[-1]:g} some probability, got {mean:g} "
            f"and {std:g}: they are of ln t, e.g. -1.1 and 2.0."
        )
    share = (edges[:1] - edges[1:]) / (edges[0] - edges[-1])  # of the law below each interval's start, cumulated
    uniform = draw(torch.rand, (batch,), levels.device, generator)
    i = torch.searchsorted(share, uniform, right=True).clamp(max=len(levels) - 2)
    end = torch.full_like(i, len(levels) - 1)
    return JumpTimes(levels[i], levels[i + 1], levels[end], i, i + 1, end, levels)


def ict_num_levels(step: int, total_steps: int, first: int = 10, last: int = 1280) -> int:
    r"""Return the number of levels at a training step: it doubles at equal spans (Song and Dhariwal 2023, section 3.4).

    $$N(k) = \min\big(s_0 2^{\lfloor k / K' \rfloor}, s_1\big) + 1, \qquad
      K' = \left\lfloor \frac{K}{\log_2 \lfloor s_1 / s_0 \rfloor + 1} \right\rfloor$$

    Args:
        step: The step k, from 0.
        total_steps: Number of steps K of the training, at least 1.
        first: Number of intervals $s_0$ at first, at least 1.
        last: Number of intervals $s_1$ in the end, at least ``first``.

    Raises:
        TypeError: If an argument is not an integer.
        ValueError: If one is out of its range.

    Examples:
        >>> [ict_num_levels(k, 400_000) for k in (0, 50_000, 399_999)]
        [11, 21, 1281]
    """
    check_count(step, 0, "step")
    check_count(total_steps, 1, "total_steps")
    check_count(first, 1, "first")
    check_count(last, first, "last")
    span = math.floor(total_steps / (math.log2(last // first) + 1))
    doublings = step // max(1, span)
    return min(first << min(doublings, last.bit_length()), last) + 1
