r"""Variance-preserving noise schedules: linear, cosine, and tables of discrete steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_finite, check_positive, check_tensor
from .._precision import TableOnDevices
from .schedules import Rates, Schedule, wide


@dataclass(frozen=True)
class _VariancePreserving(Schedule):
    r"""$\alpha^2 + \sigma^2 = 1$: both follow from the noise level t, their rates from $r = d \ln t / d\tau$."""

    @abstractmethod
    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level of a time, in a form without cancellation."""

    @abstractmethod
    def log_rate(self, time: Tensor) -> Tensor:
        """Return the derivative of ln(noise level) in the schedule's time."""

    def alpha(self, time: Tensor) -> Tensor:
        """Return the factor of the clean data."""
        return (1 + self.noise_level(time) ** 2).rsqrt()

    def sigma(self, time: Tensor) -> Tensor:
        """Return the factor of the noise."""
        return self.noise_level(time) * self.alpha(time)

    def rates(self, time: Tensor) -> Rates:
        """Return the derivatives of alpha and sigma."""
        alpha, sigma, r = self.alpha(time), self.sigma(time), self.log_rate(time)
        return Rates(-alpha * sigma**2 * r, sigma * alpha**2 * r)


@dataclass(frozen=True)
class VPLinearSchedule(_VariancePreserving):
    r"""Variance preserving with $\beta(\tau) = \beta_{min} + \tau (\beta_{max} - \beta_{min})$ (Song et al. 2021).

    $$\alpha = e^{-B/2}, \quad \sigma = \sqrt{1 - e^{-B}}, \quad
      B = \beta_{min} \tau + \tfrac12 (\beta_{max} - \beta_{min}) \tau^2 = \ln(1 + t^2)$$

    Times run from 0 to 1; the last is noise level 152 with the default betas. Score-SDE networks want
    ``time_scale=999``.

    Args:
        beta_min: Rate at time 0, positive.
        beta_max: Rate at time 1, at least ``beta_min``.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If a beta is not positive or ``beta_max`` is the smaller.

    Examples:
        >>> schedule = VPLinearSchedule()
        >>> schedule.time(schedule.noise_level(torch.tensor(0.25)))
        tensor(0.2500, dtype=torch.float64)
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        super().__post_init__()
        check_positive(self.beta_min, "beta_min")
        check_positive(self.beta_max, "beta_max")
        if self.beta_max < self.beta_min:
            raise ValueError(f"beta_max must be at least beta_min = {self.beta_min}, got {self.beta_max}: swap them.")

    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level of a time."""
        tau = wide(time, "time")
        return (self.beta_min * tau + 0.5 * (self.beta_max - self.beta_min) * tau**2).expm1().sqrt()

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time of a noise level."""
        B = (wide(noise_level, "noise_level") ** 2).log1p()
        return 2 * B / (self.beta_min + (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * B).sqrt())

    def log_rate(self, time: Tensor) -> Tensor:
        """Return the derivative of ln(noise level) in time."""
        beta = self.beta_min + (self.beta_max - self.beta_min) * wide(time, "time")
        return 0.5 * beta * (1 + self.noise_level(time) ** -2)


@dataclass(frozen=True)
class VPCosineSchedule(_VariancePreserving):
    r"""Variance preserving with a cosine (Nichol & Dhariwal 2021), here $\omega = \frac{\pi}{2 (1 + offset)}$.

    $$\alpha = \frac{\cos(\phi_0 + \omega \tau)}{\cos \phi_0}, \quad \sigma = \sqrt{1 - \alpha^2}, \quad
      \phi_0 = \omega \cdot offset$$

    Times run from 0 to 1, noise levels from 0 to infinity. ``offset=0`` is $\alpha = \cos(\pi \tau / 2)$.

    Args:
        offset: The offset s of the paper, from 0 to below 1.

    Raises:
        ValueError: If ``offset`` is out of range.

    Examples:
        >>> VPCosineSchedule(offset=0.0).time(torch.tensor(1.0))  # cos = sin
        tensor(0.5000, dtype=torch.float64)
    """

    offset: float = 0.008

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        super().__post_init__()
        if not 0 <= self.offset < 1:
            raise ValueError(f"offset must be from 0 to below 1, got {self.offset}: the paper's is 0.008.")

    @property
    def _angles(self) -> tuple[float, float]:
        omega = math.pi / (2 * (1 + self.offset))
        return omega, omega * self.offset

    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level of a time."""
        omega, phi_0 = self._angles
        turned = omega * wide(time, "time")
        # cos^2 phi_0 - cos^2 phi as a product: no cancellation near time 0
        return (turned.sin() * (turned + 2 * phi_0).sin()).sqrt() / (turned + phi_0).cos()

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time of a noise level."""
        omega, phi_0 = self._angles
        t2, tan_0 = wide(noise_level, "noise_level") ** 2 / math.cos(phi_0) ** 2, math.tan(phi_0)
        tan = (t2 + tan_0**2).sqrt()
        # atan(tan) - phi_0, without their cancellation
        return (t2 / (tan + tan_0) / (1 + tan * tan_0)).atan() / omega

    def log_rate(self, time: Tensor) -> Tensor:
        """Return the derivative of ln(noise level) in time."""
        omega, phi_0 = self._angles
        turned = omega * wide(time, "time")
        return omega * (0.5 / turned.tan() + 0.5 / (turned + 2 * phi_0).tan() + (turned + phi_0).tan())


@dataclass(frozen=True, eq=False)
class VPDiscreteSchedule(_VariancePreserving):
    r"""Variance preserving on a table: $\alpha_i = \sqrt{\bar\alpha_i}$, $i = 0, 1, \ldots$ (DDPM, Stable Diffusion).

    The time is the index; between indices $\ln t$ is linear in it, as in k-diffusion. Beyond the table the last
    intervals go on, but a network is told the nearest index of the table.

    Args:
        alphas_cumprod: $\bar\alpha$, strictly decreasing inside (0, 1). Shape ``(T,)``, T at least 2.
        quantize: Tell the network the nearest index (nearest in $\ln t$) instead of a fraction, as int64 when
            ``time_scale`` is 1.

    Raises:
        TypeError: If ``alphas_cumprod`` is not a floating-point tensor.
        ValueError: If it is not as described.

    Examples:
        >>> schedule = VPDiscreteSchedule(torch.tensor([0.9, 0.5, 0.1]))
        >>> schedule.time(torch.tensor([1 / 3, 1.0, 3.0, 3.0**0.5]))
        tensor([0.0000, 1.0000, 2.0000, 1.5000], dtype=torch.float64)
    """

    alphas_cumprod: Tensor
    quantize: bool = False

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        super().__post_init__()
        check_tensor(self.alphas_cumprod, "alphas_cumprod")
        table = self.alphas_cumprod.detach().to("cpu", torch.float64, copy=True)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(f"alphas_cumprod must have shape (T,) with T >= 2, got {tuple(table.shape)}.")
        check_finite(table, "alphas_cumprod")
        if not bool(((table > 0) & (table < 1)).all()) or not bool((table.diff() < 0).all()):
            raise ValueError(
                f"alphas_cumprod must decrease strictly inside (0, 1), got {table[0].item():.6g} to "
                f"{table[-1].item():.6g}: index 0 is the cleanest; drop a final 0, whose noise level is infinite."
            )
        object.__setattr__(self, "alphas_cumprod", table)
        object.__setattr__(self, "_log_table", 0.5 * ((-table).log1p() - table.log()))
        object.__setattr__(self, "_on_devices", TableOnDevices(self._log_table))  # type: ignore[attr-defined]

    @property
    def noise_range(self) -> tuple[float, float]:
        """The noise levels of the table's ends, from 0.029 to 14.6 for Stable Diffusion's."""
        lowest, *_, highest = self._log_table.exp().tolist()  # type: ignore[attr-defined]
        return lowest, highest

    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level of a time."""
        tau, log_levels = wide(time, "time"), self._log_levels(time)
        i = self._interval(tau)
        return (log_levels[i] + (tau - i) * (log_levels[i + 1] - log_levels[i])).exp()

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time of a noise level."""
        log_t, log_levels = wide(noise_level, "noise_level").log(), self._log_levels(noise_level)
        i = (log_t.unsqueeze(-1) >= log_levels[1:-1]).sum(-1)
        return i + (log_t - log_levels[i]) / (log_levels[i + 1] - log_levels[i])

    def log_rate(self, time: Tensor) -> Tensor:
        """Return the derivative of ln(noise level) in time."""
        i, log_levels = self._interval(wide(time, "time")), self._log_levels(time)
        return log_levels[i + 1] - log_levels[i]

    def network_time(self, noise_level: Tensor) -> Tensor:
        """Return the index that a network is told."""
        time = self.time(noise_level).clamp(0, len(self.alphas_cumprod) - 1)
        if self.quantize:
            time = time.round()
            return time.long() if self.time_scale == 1 else self.time_scale * time
        return self.time_scale * time

    def _interval(self, tau: Tensor) -> Tensor:
        return tau.detach().floor().clamp(0, len(self.alphas_cumprod) - 2).long()

    def _log_levels(self, like: Tensor) -> Tensor:
        table: TableOnDevices = self._on_devices  # type: ignore[attr-defined]
        return table.on(like.device)
