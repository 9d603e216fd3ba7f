"""Exact denoisers as other codebases' raw networks: every prediction and schedule, from the definitions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import analytic_precond as ap
from analytic_precond.noise_levels.function_schedule import FunctionSchedule
from analytic_precond.noise_levels.schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, TrigFlowSchedule
from analytic_precond.noise_levels.vp_schedules import VPCosineSchedule, VPDiscreteSchedule, VPLinearSchedule

LEVELS = torch.tensor([80.0, 20.0, 2.0, 0.3, 0.02, 0.002], dtype=torch.float64)
TABLE = torch.from_numpy(np.cumprod(1 - np.linspace(1e-6, 0.03, 1000)))  # levels 0.001 to 1800

Path = Callable[[Tensor], tuple[Tensor, Tensor]]


def vp_exponent(u: Tensor) -> Tensor:
    return 0.1 * u + 0.5 * (20 - 0.1) * u**2


def vp_linear(u: Tensor) -> tuple[Tensor, Tensor]:
    B = vp_exponent(u)
    return (-B / 2).exp(), (1 - (-B).exp()).sqrt()


def sub_vp(u: Tensor) -> tuple[Tensor, Tensor]:
    B = vp_exponent(u)
    return (-B / 2).exp(), -(-B).expm1()


def vp_cosine(u: Tensor) -> tuple[Tensor, Tensor]:
    alpha = ((u + 0.008) / 1.008 * math.pi / 2).cos() / math.cos(0.008 / 1.008 * math.pi / 2)
    return alpha, (1 - alpha**2).sqrt()


def vp_discrete(index: Tensor) -> tuple[Tensor, Tensor]:
    return vp_discrete_of(TABLE, index)


def vp_discrete_of(table: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    low = index.detach().long().clamp(max=len(table) - 2)
    log_levels = 0.5 * ((1 - table) / table).log()
    log_t = torch.lerp(log_levels[low], log_levels[low + 1], index - low)
    return (1 + (2 * log_t).exp()) ** -0.5, (1 + (-2 * log_t).exp()) ** -0.5


PATHS: dict[str, tuple[Schedule, Path]] = {
    "vp-linear": (VPLinearSchedule(), vp_linear),
    "vp-linear-999": (VPLinearSchedule(time_scale=999), lambda u: vp_linear(u / 999)),
    "vp-cosine": (VPCosineSchedule(), vp_cosine),
    "vp-discrete": (VPDiscreteSchedule(TABLE), vp_discrete),
    "edm": (EDMSchedule(), lambda u: (torch.ones_like(u), u)),
    "flow-0": (RectifiedFlowSchedule(), lambda u: (1 - u, u)),
    "flow-0-1000": (RectifiedFlowSchedule(time_scale=1000), lambda u: (1 - u / 1000, u / 1000)),
    "flow-1": (RectifiedFlowSchedule(data_at=1), lambda u: (u, 1 - u)),
    "trigflow": (TrigFlowSchedule(sigma_data=0.7), lambda u: (u.cos() / 0.7, u.sin())),
}


def reversed_time(path: Path) -> Path:
    """The same path with data at time 1."""
    return lambda u: path(1 - u)


def from_path(path: Path, *times: float) -> FunctionSchedule:
    """A path as what users write of it."""
    data, noise = times
    return FunctionSchedule(lambda u: path(u)[0], lambda u: path(u)[1], (data, noise))


def log_snr(g: Tensor) -> tuple[Tensor, Tensor]:
    return g.sigmoid().sqrt(), (-g).sigmoid().sqrt()


def respaced(time: Tensor) -> tuple[Tensor, Tensor]:  # every fourth step, numbered as in a longer table
    return vp_discrete_of(TABLE[::4], (time - 7) / 4)


def ve(index: Tensor) -> tuple[Tensor, Tensor]:  # 1000 levels from 1e-3 to 100, NCSN counts from the noisiest
    return torch.ones_like(index), 0.001 * 1e5 ** ((999 - index) / 999)


def polynomial(u: Tensor) -> tuple[Tensor, Tensor]:
    return u**3, (1 - u) * (1 + u + u**2)


PATHS |= {
    "vp-linear-1": (VPLinearSchedule(data_at=1), reversed_time(vp_linear)),
    "vp-cosine-1": (VPCosineSchedule(data_at=1), reversed_time(vp_cosine)),
    "vp-discrete-respaced": (VPDiscreteSchedule(TABLE[::4], timesteps=torch.arange(7, 1007, 4)), respaced),
    "function-sub-vp": (from_path(sub_vp, 0.0, 1.0), sub_vp),
    "function-ve": (from_path(ve, 999.0, 0.0), ve),
    "function-polynomial": (from_path(polynomial, 1.0, 0.0), polynomial),
    "function-linear-vp": (
        from_path(lambda u: (u, ((1 - u) * (1 + u)).sqrt()), 1.0, 0.0),
        lambda u: (u, ((1 - u) * (1 + u)).sqrt()),
    ),
    "function-log-snr": (from_path(log_snr, math.inf, -math.inf), log_snr),
}


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Mixture:
    """A mixture of Gaussians and every prediction about it, from E[x_0 | x'] and E[n | x'] in the path's own terms."""

    def __init__(self, num: int, prediction: str = "epsilon", path: Path = vp_linear, time_scale: float = 1.0) -> None:
        self.means, self.variances = rand(num, 2, 3), 0.01 + rand(num, 2, 3, seed=1) ** 2
        self.weights = torch.arange(1.0, num + 1, dtype=torch.float64) / (num * (num + 1) / 2)
        self.prediction, self.path, self.time_scale = prediction, path, time_scale

    def denoiser(self) -> ap.GaussianMixtureDenoiser:
        return ap.GaussianMixtureDenoiser(self.means, self.variances, self.weights)

    def sample(self, t: Tensor) -> Tensor:
        return rand(len(t), 2, 3, seed=2) * (1 + t[:, None, None])

    def score(self, z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        def log_q(z: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
            components = Independent(Normal(alpha * self.means, (alpha**2 * self.variances + sigma**2).sqrt()), 2)
            return MixtureSameFamily(Categorical(self.weights), components, validate_args=False).log_prob(z)

        return torch.func.vmap(torch.func.grad(log_q))(z, alpha, sigma)

    def __call__(self, z: Tensor, time: Tensor) -> Tensor:
        (alpha, sigma), rates = torch.func.jvp(self.path, (time,), (torch.ones_like(time),))
        score = self.score(z, alpha, sigma)
        if self.prediction == "score":
            return score
        alpha, sigma, d_alpha, d_sigma = (v[:, None, None] for v in (alpha, sigma, *rates))
        n = -sigma * score
        x_0 = (z - sigma * n) / alpha
        predictions = {
            "epsilon": n,
            "sample": x_0,
            "v": alpha * n - sigma * x_0,
            "velocity": self.time_scale * (d_alpha * x_0 + d_sigma * n),
        }
        return predictions[self.prediction]
