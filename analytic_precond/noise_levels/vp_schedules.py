r"""Variance-preserving noise schedules: linear, cosine, and tables of discrete steps."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_finite, check_positive, check_tensor
from .._precision import TableOnDevices
from .schedules import Rates, Schedule, check_direction, wide, with_slope


@dataclass(frozen=True)
class _VariancePreserving(Schedule):
    r"""$\alpha^2 + \sigma^2 = 1$: both follow from the noise level t, their rates from $r = d \ln t / d\tau$."""

    @abstractmethod
    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level of a time, in a form without cancellation."""

    def alpha(self, time: Tensor) -> Tensor:
        """Return the factor of the clean data."""
        return (1 + self.noise_level(time) ** 2).rsqrt()

    def sigma(self, time: Tensor) -> Tensor:
        """Return the factor of the noise."""
        return self.noise_level(time) * self.alpha(time)

    def rates(self, time: Tensor) -> Rates:
        """Return the derivatives of alpha and sigma."""
        level, slope = with_slope(self.noise_level, wide(time, "time"))
        alpha, sigma, r = self.alpha(time), self.sigma(time), slope / level
        # alpha^2 does not cancel, as 1 - sigma^2 would
        return Rates(-alpha * sigma**2 * r, sigma * alpha**2 * r)


@dataclass(frozen=True)
class VPLinearSchedule(_VariancePreserving):
    r"""Variance preserving with $\beta(\tau) = \beta_{min} + \tau (\beta_{max} - \beta_{min})$ (Song et al. 2021).

    $$\alpha = e^{-B/2}, \quad \sigma = \sqrt{1 - e^{-B}}, \quad
      B = \beta_{min} \tau + \tfrac12 (\beta_{max} - \beta_{min}) \tau^2 = \ln(1 + t^2)$$

    Times run from 0 to 1; the last is noise level 152 with the default betas. Score-SDE networks want
    ``time_scale=999``. With data at time 1 (flow_matching, SiT), $1 - \tau$ takes $\tau$'s place.

    Args:
        beta_min: Rate at the data, positive.
        beta_max: Rate at the noise, at least ``beta_min``.
        data_at: The time of clean data, 0 or 1.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If a beta is not positive, ``beta_max`` is the smaller, or ``data_at`` neither 0 nor 1.

    Examples:
        >>> schedule = VPLinearSchedule()
        >>> schedule.time(schedule.noise_level(torch.tensor(0.25)))
        tensor(0.2500, dtype=torch.float64)
    """

    beta_min: float = 0.1
    beta_max: float = 20.0
    data_at: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_direction(self.data_at)
        check_positive(self.beta_min, "beta_min")
        check_positive(self.beta_max, "beta_max")
        if self.beta_max < self.beta_min:
            raise ValueError(f"beta_max must be at least beta_min = {self.beta_min}, got {self.beta_max}: swap them.")

    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level of a time."""
        tau = _from_data(wide(time, "time"), self.data_at)
        return (self.beta_min * tau + 0.5 * (self.beta_max - self.beta_min) * tau**2).expm1().sqrt()

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time of a noise level."""
        B = (wide(noise_level, "noise_level") ** 2).log1p()
        tau = 2 * B / (self.beta_min + (self.beta_min**2 + 2 * (self.beta_max - self.beta_min) * B).sqrt())
        return _from_data(tau, self.data_at)


@dataclass(frozen=True)
class VPCosineSchedule(_VariancePreserving):
    r"""Variance preserving with a cosine (Nichol & Dhariwal 2021), here $\omega = \frac{\pi}{2 (1 + offset)}$.

    $$\alpha = \frac{\cos(\phi_0 + \omega \tau)}{\cos \phi_0}, \quad \sigma = \sqrt{1 - \alpha^2}, \quad
      \phi_0 = \omega \cdot offset$$

    Times run from 0 to 1, noise levels from 0 to infinity. ``offset=0`` is $\alpha = \cos(\pi \tau / 2)$; with data at
    time 1, where $1 - \tau$ takes $\tau$'s place, it is $\alpha = \sin(\pi \tau / 2)$ (flow_matching, SiT's GVP).

    Args:
        offset: The offset s of the paper, from 0 to below 1.
        data_at: The time of clean data, 0 or 1.

    Raises:
        ValueError: If an argument is out of range.

    Examples:
        >>> VPCosineSchedule(offset=0.0).time(torch.tensor(1.0))  # cos = sin
        tensor(0.5000, dtype=torch.float64)
    """

    offset: float = 0.008
    data_at: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_direction(self.data_at)
        if not 0 <= self.offset < 1:
            raise ValueError(f"offset must be from 0 to below 1, got {self.offset}: the paper's is 0.008.")

    @property
    def _angles(self) -> tuple[float, float]:
        omega = math.pi / (2 * (1 + self.offset))
        return omega, omega * self.offset

    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level of a time."""
        omega, phi_0 = self._angles
        turned = omega * _from_data(wide(time, "time"), self.data_at)
        # cos^2 phi_0 - cos^2 phi as a product: no cancellation near time 0
        return (turned.sin() * (turned + 2 * phi_0).sin()).sqrt() / (turned + phi_0).cos()

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time of a noise level."""
        omega, phi_0 = self._angles
        t2, tan_0 = wide(noise_level, "noise_level") ** 2 / math.cos(phi_0) ** 2, math.tan(phi_0)
        tan = (t2 + tan_0**2).sqrt()
        # atan(tan) - phi_0, without their cancellation
        return _from_data((t2 / (tan + tan_0) / (1 + tan * tan_0)).atan() / omega, self.data_at)


def _from_data(time: Tensor, data_at: int) -> Tensor:
    """Return the time as counted from the data, or back."""
    return 1 - time if data_at else time


@dataclass(frozen=True, eq=False)
class VPDiscreteSchedule(_VariancePreserving):
    r"""Variance preserving on a table: $\alpha_i = \sqrt{\bar\alpha_i}$, $i = 0, 1, \ldots$ (DDPM, Stable Diffusion).

    The time is the index, or the table's own ``timesteps``; between them $\ln t$ is linear in it, as in k-diffusion.
    Beyond the table the last intervals go on, but a network is told the nearest time of the table.

    Args:
        alphas_cumprod: $\bar\alpha$, strictly decreasing inside (0, 1), to 0.9 at most. Shape ``(T,)``, T at least 2.
        quantize: Tell the network a time of the table, the nearest in $\ln t$, instead of one between, in the dtype of
            ``timesteps`` (int64 for indices) when ``time_scale`` is 1.
        timesteps: The times of the table, strictly increasing, instead of 0, 1, ...: what a network is told on a
            respaced table, e.g. 250 of the 1000 steps that it was trained on. Shape ``(T,)``.

    Raises:
        TypeError: If ``alphas_cumprod`` is not a floating-point tensor, or ``timesteps`` no tensor.
        ValueError: If they are not as described.

    Examples:
        >>> schedule = VPDiscreteSchedule(torch.tensor([0.9, 0.5, 0.1]))
        >>> schedule.time(torch.tensor([1 / 3, 1.0, 3.0, 3.0**0.5]))
        tensor([0.0000, 1.0000, 2.0000, 1.5000], dtype=torch.float64)
        >>> respaced = VPDiscreteSchedule(schedule.alphas_cumprod[::2], timesteps=torch.tensor([0, 2]))
        >>> respaced.time(torch.tensor([1 / 3, 1.0, 3.0]))
        tensor([0.0000, 1.0000, 2.0000], dtype=torch.float64)
    """

    __eq__, __hash__ = object.__eq__, object.__hash__  # by what they hold they cannot be compared

    alphas_cumprod: Tensor
    quantize: bool = False
    timesteps: Tensor | None = None

    if TYPE_CHECKING:  # else they would be fields of the dataclass
        _table: TableOnDevices = field(init=False)  # ln t and the times
        _times: TableOnDevices = field(init=False)  # in their own dtype

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.quantize, bool):
            raise TypeError(
                f"quantize must be True or False, got {type(self.quantize).__name__}: name the other, timesteps=..."
            )
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
        if table[-1] > 0.9:  # the noisiest of a low-noise expert's is less
            raise ValueError(
                f"alphas_cumprod must end in noise, got {table[-1].item():.6g}: of alphas = 1 - betas pass "
                f"alphas.cumprod(0)."
            )
        steps = torch.arange(len(table), device="cpu") if self.timesteps is None else self.timesteps
        if not isinstance(steps, Tensor):
            raise TypeError(f"timesteps must be a tensor, got {type(steps).__name__}: pass torch.tensor(timesteps).")
        steps = steps.detach().to("cpu", copy=True)
        if steps.shape != table.shape or not bool((steps.diff() > 0).all()):
            raise ValueError(
                f"timesteps must increase strictly and be as many as alphas_cumprod, {len(table)}, got shape "
                f"{tuple(steps.shape)}, {steps.flatten()[:3].tolist()}...: pass one for each, the cleanest first "
                f"(timesteps.flip(0) of a sampler's)."
            )
        log_levels = 0.5 * ((-table).log1p() - table.log())
        self._set(alphas_cumprod=table, timesteps=steps)
        self._set(_table=TableOnDevices(torch.stack([log_levels, steps.double()])), _times=TableOnDevices(steps))

    @property
    def noise_range(self) -> tuple[float, float]:
        """The noise levels of the table's ends, from 0.029 to 14.6 for Stable Diffusion's."""
        lowest, *_, highest = self._table.table[0].exp().tolist()
        return lowest, highest

    def noise_level(self, time: Tensor) -> Tensor:
        """Return the noise level of a time."""
        tau, (log_levels, steps) = wide(time, "time"), self._table.on(time.device)
        return _interpolate(tau, steps, log_levels).exp()

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time of a noise level."""
        log_t, (log_levels, steps) = wide(noise_level, "noise_level").log(), self._table.on(noise_level.device)
        return _interpolate(log_t, log_levels, steps)

    def told(self, time: Tensor) -> Tensor:
        """Return what a network is told at a time: one inside the table, or of it."""
        _, steps = self._table.on(time.device)
        if not self.quantize:
            return self.time_scale * time.clamp(steps[0], steps[-1])
        nearest: Tensor = self._times.on(time.device)[_interval(time, (steps[1:] + steps[:-1]) / 2)[None]][0]
        return nearest if self.time_scale == 1 else self.time_scale * nearest


def _interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Return the piecewise linear function through (xs, ys), whose first and last interval go on."""
    i = _interval(x, xs[1:-1])
    ends = torch.stack([i, i + 1])  # together, and so never an index of one number, which the host would read
    (x_0, x_1), (y_0, y_1) = xs[ends], ys[ends]
    y: Tensor = y_0 + (x - x_0) * ((y_1 - y_0) / (x_1 - x_0))
    return y


def _interval(x: Tensor, bounds: Tensor) -> Tensor:
    """Return how many of the increasing bounds are at most x."""
    return (x.unsqueeze(-1) >= bounds).sum(-1)
