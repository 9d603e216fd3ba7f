r"""Noise schedules: how other codebases add noise, and their time as a noise level and back.

They diffuse data as $x' = \alpha x_0 + \sigma n = \alpha (x_0 + t n)$: divided by $\alpha$ this is noisy data at
the noise level $t = \sigma / \alpha$ (docs/method.md, section 1). A schedule is $\alpha$ and $\sigma$ as functions of
its own time $\tau$, with the exact conversions $\tau \leftrightarrow t$. All methods take and return tensors of any
shape, compute in float64 (float32 where a device has none) and are differentiable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_level, check_positive
from .._precision import wide_dtype

_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Rates(NamedTuple):
    r"""Derivatives of a schedule in its own time: what `Schedule.rates` returns.

    Attributes:
        alpha: $d\alpha / d\tau$.
        sigma: $d\sigma / d\tau$.

    Examples:
        >>> RectifiedFlowSchedule().rates(torch.tensor(0.25)).sigma
        tensor(1., dtype=torch.float64)
    """

    alpha: Tensor
    sigma: Tensor


@dataclass(frozen=True)
class Schedule(ABC):
    r"""Base of all schedules. One that is not here is a `FunctionSchedule`.

    Args:
        time_scale: Networks are told ``time_scale`` times the schedule's time, e.g. 1000 for a flow network that
            counts from 0 to 1000. `rates`, and so flow velocities, are derivatives in the time without this factor.

    Raises:
        TypeError: If ``time_scale`` is not a number.
        ValueError: If it is not positive.
    """

    _: KW_ONLY
    time_scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self.time_scale, "time_scale")

    def _set(self, **attributes: object) -> None:
        for name, value in attributes.items():
            object.__setattr__(self, name, value)  # schedules are frozen

    @abstractmethod
    def alpha(self, time: Tensor) -> Tensor:
        """Return the factor of the clean data."""

    @abstractmethod
    def sigma(self, time: Tensor) -> Tensor:
        """Return the factor of the noise."""

    def rates(self, time: Tensor) -> Rates:
        """Return the derivatives of alpha and sigma in the schedule's time."""
        tau = wide(time, "time")
        return Rates(with_slope(self.alpha, tau)[1], with_slope(self.sigma, tau)[1])

    @abstractmethod
    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time at which sigma / alpha is ``noise_level``."""

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """The lowest and the highest noise level that a network was trained at; None if the schedule does not say."""
        return None

    def noise_level(self, time: Tensor) -> Tensor:
        """Return sigma / alpha."""
        return self.sigma(time) / self.alpha(time)

    def network_time(self, noise_level: Tensor) -> Tensor:
        """Return what a network is told of ``noise_level``."""
        return self.told(self.time(noise_level))

    def told(self, time: Tensor) -> Tensor:
        """Return what a network is told at a time."""
        return self.time_scale * time


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    r"""No scaling, $\alpha = 1$, and the time is the noise level: $\sigma = \tau$ (EDM, variance exploding).

    Times and noise levels run from 0 to infinity.

    Examples:
        >>> EDMSchedule().time(torch.tensor([0.5, 80.0]))
        tensor([ 0.5000, 80.0000], dtype=torch.float64)
    """

    def alpha(self, time: Tensor) -> Tensor:
        """Return 1."""
        return torch.ones_like(wide(time, "time"))

    def sigma(self, time: Tensor) -> Tensor:
        """Return the time."""
        return wide(time, "time")

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the noise level."""
        return wide(noise_level, "noise_level")


@dataclass(frozen=True)
class RectifiedFlowSchedule(Schedule):
    r"""Straight lines between data and noise (rectified flow, flow matching with the optimal-transport path).

    $$\alpha = 1 - \tau, \; \sigma = \tau \quad (\text{data at time 0}), \qquad
      \alpha = \tau, \; \sigma = 1 - \tau \quad (\text{data at time 1})$$

    Times run from 0 to 1, noise levels from 0 to infinity: $t = \sigma / (1 - \sigma)$. The velocity is
    $n - x_0$ with data at time 0 (Stable Diffusion 3, diffusers), $x_0 - n$ with data at time 1 (Liu et al. 2023).

    Args:
        data_at: The time of clean data, 0 or 1.

    Raises:
        ValueError: If ``data_at`` is neither.

    Examples:
        >>> RectifiedFlowSchedule().time(torch.tensor(4.0)), RectifiedFlowSchedule(data_at=1).time(torch.tensor(4.0))
        (tensor(0.8000, dtype=torch.float64), tensor(0.2000, dtype=torch.float64))
    """

    data_at: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_direction(self.data_at)

    def alpha(self, time: Tensor) -> Tensor:
        """Return the share of the data."""
        tau = wide(time, "time")
        return tau if self.data_at else 1 - tau

    def sigma(self, time: Tensor) -> Tensor:
        """Return the share of the noise."""
        return 1 - self.alpha(time)

    def rates(self, time: Tensor) -> Rates:
        """Return 1 and -1 with data at time 1, the opposite with data at time 0."""
        one = torch.ones_like(wide(time, "time"))
        return Rates(one, -one) if self.data_at else Rates(-one, one)

    def time(self, noise_level: Tensor) -> Tensor:
        """Return 1 / (1 + t) with data at time 1, t / (1 + t) with data at time 0."""
        t = wide(noise_level, "noise_level")
        return 1 / (1 + t) if self.data_at else t / (1 + t)


@dataclass(frozen=True)
class TrigFlowSchedule(Schedule):
    r"""A rotation from data to noise of the data's scale (Lu & Song 2025); networks get their input over sigma_data.

    $$\alpha = \cos(\tau) / \sigma_{data}, \quad \sigma = \sin(\tau), \quad t = \sigma_{data} \tan(\tau)$$

    Times run from 0 to $\pi / 2$, noise levels from 0 to infinity. The raw network F of TrigFlow, with
    $D = \cos(\tau)\, x_\tau - \sin(\tau)\, \sigma_{data} F(x_\tau / \sigma_{data}, \tau)$, predicts the
    ``"velocity"`` of $x' = x_\tau / \sigma_{data}$.

    Args:
        sigma_data: Standard deviation of the data, positive.

    Raises:
        TypeError: If ``sigma_data`` is not a number.
        ValueError: If it is not positive.

    Examples:
        >>> TrigFlowSchedule(sigma_data=0.5).time(torch.tensor(0.5)) * 4
        tensor(3.1416, dtype=torch.float64)
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self.sigma_data, "sigma_data")

    def alpha(self, time: Tensor) -> Tensor:
        """Return the factor of the clean data, 1 / sigma_data included."""
        return wide(time, "time").cos() / self.sigma_data

    def sigma(self, time: Tensor) -> Tensor:
        """Return the factor of the noise."""
        return wide(time, "time").sin()

    def rates(self, time: Tensor) -> Rates:
        """Return the derivatives of alpha and sigma."""
        tau = wide(time, "time")
        return Rates(-tau.sin() / self.sigma_data, tau.cos())

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the angle."""
        return (wide(noise_level, "noise_level") / self.sigma_data).atan()


def check_direction(data_at: object) -> None:
    """Refuse what is no end of the times 0 to 1."""
    if data_at not in (0, 1):
        raise ValueError(f"data_at must be 0 or 1, the time of clean data, got {data_at!r}.")


def with_slope(function: Callable[[Tensor], Tensor], time: Tensor) -> tuple[Tensor, Tensor]:
    """Return an elementwise function of the time, and its derivative there."""
    pair: Any
    if torch.compiler.is_compiling():  # torch.export cannot trace a vjp
        pair = torch.func.jvp(function, (time,), (torch.ones_like(time),))
        return pair[0], pair[1]
    pair = torch.func.vjp(function, time)  # ten times as fast as a jvp on the CPU
    return pair[0], pair[1](torch.ones_like(pair[0]))[0]


def wide(value: Tensor, name: str) -> Tensor:
    """Return a time or noise level, checked to be one, in the widest dtype of its device; a time may be an integer."""
    if name != "time" or not isinstance(value, Tensor) or value.dtype not in _WHOLE:
        check_level(value, name)
    return value.to(wide_dtype(value.device))
