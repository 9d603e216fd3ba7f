r"""What networks predict, and the denoiser that follows from it.

With $x' = \alpha x = \alpha x_0 + \sigma n$ and the noise level $t = \sigma / \alpha$, every prediction F is linear in
$x_0$ and $n$, so the denoiser is linear in F: $D = c_{skip} x + c_{out} F$.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import all_true, check_choice
from ..noise_levels.schedules import Schedule


@dataclass(frozen=True)
class PredictionScalings:
    """The coefficients of `NetworkDenoiser` for a prediction under a schedule: see `denoiser_from_network`."""

    prediction: str
    schedule: Schedule

    def __post_init__(self) -> None:
        """Refuse an unknown prediction or schedule."""
        check_choice(self.prediction, _COEFFICIENTS, "prediction")
        if not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"schedule must be a Schedule, got {_short(self.schedule)}: build a VPLinearSchedule, "
                f"VPCosineSchedule, VPDiscreteSchedule((1 - betas).cumprod(0)), EDMSchedule, RectifiedFlowSchedule, "
                f"TrigFlowSchedule or FunctionSchedule."
            )

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``c_skip``, ``c_out``, ``c_in`` and ``c_noise`` at noise levels ``t``, refused where it has none."""
        time = self.schedule.time(torch.where((t >= 0) & (t < math.inf), t, math.nan))  # formulas go on beyond
        if all_true(~time.isnan()) is False:  # off the CPU the result is NaN
            low, high = self.schedule.noise_range or (0.0, math.inf)
            raise ValueError(
                f"noise levels must be within the schedule's {low:.6g} to {high:.6g}, got "
                f"{t[time.isnan()][0].item():.6g}: choose levels between its ends, schedule.noise_range."
            )
        c_skip, c_out = _COEFFICIENTS[self.prediction](self.schedule, time)
        return c_skip, c_out, self.schedule.alpha(time), self.schedule.told(time)


def _short(value: object) -> str:
    return repr(value) if isinstance(value, str) else type(value).__name__  # a table has a thousand numbers


def _epsilon(schedule: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """F = n."""
    return torch.ones_like(time), -schedule.noise_level(time)


def _sample(schedule: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """F = x_0."""
    return torch.zeros_like(time), torch.ones_like(time)


def _v(schedule: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """F = alpha n - sigma x_0, from which alpha x' - sigma F = (alpha^2 + sigma^2) x_0."""
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    total = alpha**2 + sigma**2
    return alpha**2 / total, -sigma / total


def _score(schedule: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """F = -n / sigma."""
    alpha, sigma = schedule.alpha(time), schedule.sigma(time)
    return torch.ones_like(time), sigma**2 / alpha


def _velocity(schedule: Schedule, time: Tensor) -> tuple[Tensor, Tensor]:
    """F = alpha' x_0 + sigma' n, from which sigma' x' - sigma F = (alpha sigma' - sigma alpha') x_0."""
    alpha, sigma, rates = schedule.alpha(time), schedule.sigma(time), schedule.rates(time)
    total = alpha * rates.sigma - sigma * rates.alpha
    return alpha * rates.sigma / total, -sigma / total


_COEFFICIENTS: dict[str, Callable[[Schedule, Tensor], tuple[Tensor, Tensor]]] = {
    "epsilon": _epsilon,
    "v": _v,
    "sample": _sample,
    "score": _score,
    "velocity": _velocity,
}
