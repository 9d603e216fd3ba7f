r"""Noise levels: what ``t`` means, and grids of them.

A noise level is EDM's sigma: ``x_t = x_0 + t * n`` with standard normal ``n``. Grids are float64 and run from the
noisiest level to the cleanest. Coefficients are smooth in ``lambda = -ln t`` (docs/method.md, section 1).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_count, check_levels, check_positive, check_range


def karras_noise_levels(num: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    r"""EDM's noise levels: uniform steps in $t^{1/\rho}$.

    $$t_i = \Big(\sigma_{max}^{1/\rho} + \tfrac{i}{num - 1} (\sigma_{min}^{1/\rho} - \sigma_{max}^{1/\rho})\Big)^\rho$$

    (Karras et al. 2022, equation 5, without the final 0). The two ends are exactly ``sigma_max`` and ``sigma_min``.

    Args:
        num: Number of levels, at least 2.
        sigma_min: Smallest noise level, positive.
        sigma_max: Largest noise level, above ``sigma_min``.
        rho: Exponent, positive; large values put more levels at small noise.

    Returns:
        Decreasing noise levels, float64 of shape ``(num,)``, on the CPU, where the host reads them without waiting.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If an argument is out of its range.

    Examples:
        >>> karras_noise_levels(3, sigma_min=1.0, sigma_max=4.0, rho=2.0).tolist()
        [4.0, 2.25, 1.0]
    """
    check_count(num, 2, "num")
    check_range(sigma_min, sigma_max)
    check_positive(rho, "rho")
    # scaled by sigma_max so that an extreme rho cannot overflow
    ramp = torch.linspace(1.0, (sigma_min / sigma_max) ** (1 / rho), num, dtype=torch.float64, device="cpu")
    return _pin_ends(sigma_max * ramp**rho, sigma_min, sigma_max)


def log_noise_levels(num: int = 120, sigma_min: float = 0.002, sigma_max: float = 80.0) -> Tensor:
    r"""Return noise levels uniform in $\lambda = -\ln t$, the variable in which the coefficients are smooth.

    Of the arguments of `karras_noise_levels` it takes ``num``, 120 in the paper, ``sigma_min`` and ``sigma_max``; the
    result and the errors are as there.

    Examples:
        >>> log_noise_levels(3, sigma_min=0.01, sigma_max=1.0).tolist()
        [1.0, 0.1, 0.01]
    """
    check_count(num, 2, "num")
    check_range(sigma_min, sigma_max)
    ln_t = torch.linspace(math.log(sigma_max), math.log(sigma_min), num, dtype=torch.float64, device="cpu")
    return _pin_ends(ln_t.exp(), sigma_min, sigma_max)


def _pin_ends(levels: Tensor, sigma_min: float, sigma_max: float) -> Tensor:
    """Undo the last bit of rounding at the ends, which users compare with, and refuse levels that float64 merges."""
    levels[0], levels[-1] = sigma_max, sigma_min
    check_levels(levels, "the grid")
    return levels
