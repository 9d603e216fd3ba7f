r"""Random noise levels for training: EDM's lognormal ones, and those whose density Karras's grid has.

Numbers are drawn in float64 and rounded once. The result is float32 unless asked otherwise: noise levels in float64
would make ``x_0 + t * n``, and with it the whole training step, float64.

Without a generator torch's default one is used. A generator's own device decides where numbers are drawn, so one on
the CPU gives the same levels on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._checks import check_count, check_number, check_positive, check_range
from .._precision import place, wide_dtype


def sample_lognormal_noise_levels(
    batch: int,
    mean: float = -1.2,
    std: float = 1.2,
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Draw noise levels with $\ln t \sim N(mean, std^2)$.

    The defaults are EDM's (Karras et al. 2022, table 1: $P_{mean}$, $P_{std}$); ECT (Geng et al. 2024) takes -1.1 and
    2.0. The levels are not bounded.

    Args:
        batch: Number of levels B, at least 1.
        mean: Mean of $\ln t$.
        std: Standard deviation of $\ln t$, positive.
        generator: Source of the random numbers. Default: torch's own.
        device: Where the levels end. Default: the generator's device, or torch's default one.
        dtype: ``torch.float32`` or ``torch.float64``.

    Returns:
        Noise levels of shape ``(B,)``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of its range.

    Examples:
        >>> t = sample_lognormal_noise_levels(10_000, generator=torch.Generator().manual_seed(0))
        >>> round(t.log().mean().item(), 1), round(t.log().std().item(), 1)
        (-1.2, 1.2)
    """
    check_count(batch, 1, "batch", "Pass len(x).")
    check_normal(mean, std)
    device = check_destination(generator, device, dtype)
    return (mean + std * draw(torch.randn, (batch,), device, generator)).exp().to(dtype)


def sample_karras_noise_levels(
    batch: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    generator: torch.Generator | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Draw noise levels with the density of Karras's grid: $t^{1/\rho}$ is uniform between its ends.

    CTM (Kim et al. 2024) trains its denoiser half on lognormal levels and half on the noisiest 70 % of this ramp, which
    are the levels above $(0.3\, \sigma_{max}^{1/\rho} + 0.7\, \sigma_{min}^{1/\rho})^\rho$, 0.318 for EDM's range:

        t = torch.cat([sample_lognormal_noise_levels(batch // 2),
                       sample_karras_noise_levels(batch - batch // 2, sigma_min=0.318)])

    The range and the exponent are those of `karras_noise_levels`; the other arguments and the errors are those of
    `sample_lognormal_noise_levels`.

    Returns:
        Noise levels of shape ``(B,)``, between ``sigma_min`` and ``sigma_max`` as ``dtype`` rounds them.

    Examples:
        >>> t = sample_karras_noise_levels(10_000, 1.0, 9.0, rho=2.0, generator=torch.Generator().manual_seed(0))
        >>> round(t.sqrt().mean().item(), 1)  # uniform on (1, 3)
        2.0
    """
    check_count(batch, 1, "batch", "Pass len(x).")
    check_ramp(sigma_min, sigma_max, rho)
    device = check_destination(generator, device, dtype)
    return karras_level(draw(torch.rand, (batch,), device, generator), sigma_min, sigma_max, rho).to(dtype)


def karras_level(position: Tensor, sigma_min: float, sigma_max: float, rho: float) -> Tensor:
    """Return the noise level at a position on Karras's ramp, from 0 (``sigma_max``) to 1 (``sigma_min``)."""
    # scaled by sigma_max so that an extreme rho cannot overflow
    low = (sigma_min / sigma_max) ** (1 / rho)
    level: Tensor = sigma_max * (1 + position * (low - 1)) ** rho
    return level.clamp(sigma_min, sigma_max)


def draw(
    distribution: Callable[..., Tensor], shape: tuple[int, ...], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Draw ``torch.rand`` or ``torch.randn`` where the generator lives, as widely as ``device`` computes."""
    source = device if generator is None else generator.device
    return place(
        distribution(shape, generator=generator, dtype=wide_dtype(source), device=source), device, torch.float64
    )


def check_normal(mean: float, std: float) -> None:
    """Refuse what is no mean and no standard deviation of ln t."""
    check_number(mean, "mean")
    if not math.isfinite(mean):
        raise ValueError(f"mean must be finite, got {mean}: it is the mean of ln t.")
    check_positive(std, "std")


def check_generator(generator: object) -> None:
    """Refuse anything but a generator or none."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {generator!r} ({type(generator).__name__}): pass "
            f"torch.Generator().manual_seed(0)."
        )


def check_destination(generator: object, device: torch.device | str | None, dtype: torch.dtype) -> torch.device:
    """Refuse a wrong generator or dtype; return the device on which the levels are to end."""
    check_generator(generator)
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"dtype must be torch.float32 or torch.float64, got {dtype}: half precision cannot tell neighbouring "
            f"noise levels apart."
        )
    if device is not None:
        return torch.device(device)
    return generator.device if isinstance(generator, torch.Generator) else torch.get_default_device()


def check_ramp(sigma_min: float, sigma_max: float, rho: float) -> None:
    """Refuse ends and an exponent that make no ramp."""
    check_range(sigma_min, sigma_max)
    check_positive(rho, "rho")
