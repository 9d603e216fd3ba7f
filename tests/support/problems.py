"""Problems whose answers are known without the library: what the tests compare with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.integrate import quad
from torch import Tensor

import analytic_precond as ap

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Gaussian:
    """Independent Gaussians: everything in closed form, S = rms(g), only N by adaptive quadrature."""

    variances: tuple[float, ...] = (4.0, 1.0, 0.25, 0.05, 0.01, 0.001)

    def _terms(self, t: Array | float) -> tuple[Array, Array, Array]:
        c, t = np.asarray(self.variances), np.asarray(t, dtype=float)[..., None]
        w = c / (c + t**2)
        return c, t, w

    def l(self, t: Array | float) -> Array:
        return self._terms(t)[2].mean(-1)

    def g_rms(self, t: Array | float) -> Array:
        c, t, w = self._terms(t)
        return np.sqrt(((w - w.mean(-1, keepdims=True)) ** 2 * (c + t**2)).mean(-1))

    def s(self, t: Array | float) -> Array:
        c, t, w = self._terms(t)
        a = w - w.mean(-1, keepdims=True)
        dw = 2 * t**2 * c / (c + t**2) ** 2  # dw / dlambda
        dg = dw - dw.mean(-1, keepdims=True) + a * (w - 1)
        return (a * dg * (c + t**2)).sum(-1) / (a**2 * (c + t**2)).sum(-1)

    def L(self, t: float) -> float:
        """exp of the integral of 1 - l, since d ln(c + t^2) / dlambda = -2 (1 - w)."""
        return math.exp(-0.5 * np.log(np.asarray(self.variances) + t**2).mean())

    def jump(self, t: float, s: float, theta: float) -> tuple[float, float]:
        """(c_skip, c_out) from the definitions, the integral N by adaptive quadrature at 1e-12."""

        def density(lam: float) -> float:
            level = math.exp(-lam)
            return self.L(level) / self.L(s) * float(self.g_rms(level) / self.g_rms(s))

        pieces = np.linspace(-math.log(t), -math.log(s), 1 + math.ceil(abs(math.log(t / s))) + 1)
        r = sum(quad(density, a, b, epsabs=0, epsrel=1e-12)[0] for a, b in pairwise(pieces))
        ratio = float(self.g_rms(s) / self.g_rms(t))  # S_s / S_t
        denominator = 1 + theta * float(self.l(s)) * r
        c_skip = self.L(t) / self.L(s) - (1 - theta) * float(self.l(t)) * r * ratio
        return c_skip / denominator, r * (theta + (1 - theta) * ratio) / denominator

    def flow(self, x_t: Tensor, t: float, s: float) -> Tensor:
        c = torch.tensor(self.variances, dtype=x_t.dtype)
        return ((c + s**2) / (c + t**2)).sqrt() * x_t

    def sample(self, num: int, seed: int, mean: float | Tensor = 0.0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        c = torch.tensor(self.variances, dtype=torch.float64)
        return mean + c.sqrt() * torch.randn(num, len(c), generator=generator, dtype=torch.float64)

    def denoiser(self, mean: float | Tensor = 0.0) -> ap.GaussianDenoiser:
        return ap.GaussianDenoiser(torch.tensor(self.variances, dtype=torch.float64), mean)

    def tables(self, num: int) -> tuple[Tensor, Tensor, Tensor]:
        levels = ap.log_noise_levels(num)
        return levels, torch.from_numpy(self.l(levels.numpy())), torch.from_numpy(self.s(levels.numpy()))


@dataclass(frozen=True)
class ScalarMixture:
    """A mixture in one dimension: expectations over x_t by the trapezoidal rule, spectrally accurate on the line."""

    means: tuple[float, ...] = (-1.0, 0.3, 1.5)
    variances: tuple[float, ...] = (0.05, 0.01, 0.2)
    weights: tuple[float, ...] = (0.3, 0.5, 0.2)

    def denoiser(self) -> ap.GaussianMixtureDenoiser:
        means, *rest = (torch.tensor(v, dtype=torch.float64) for v in (self.means, self.variances, self.weights))
        return ap.GaussianMixtureDenoiser(means[:, None], *rest)

    def sample(self, num: int, seed: int) -> Tensor:
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.means), num, p=self.weights)
        x = np.array(self.means)[k] + np.sqrt(self.variances)[k] * rng.standard_normal(num)
        return torch.from_numpy(x)[:, None]

    def _denoised(self, x: Array, t: float) -> tuple[Array, Array]:
        """D and the density of x_t, from the components' formulas in numpy."""
        m, c, p = (np.asarray(v)[:, None] for v in (self.means, self.variances, self.weights))
        joint = p * np.exp(-((x - m) ** 2) / (2 * (c + t**2))) / np.sqrt(2 * np.pi * (c + t**2))
        density = joint.sum(0)
        return (joint * (m + c / (c + t**2) * (x - m))).sum(0) / density, density

    def coefficients(self, t: float, intercept: bool = False) -> tuple[float, float]:
        """l_t and rms(g); by parts, E[D'] = E[D x - D^2]... avoided: D' is a central difference of D."""
        m, sd = np.array(self.means), np.sqrt(np.array(self.variances) + t**2)
        x = np.linspace((m - 9 * sd).min(), (m + 9 * sd).max(), 6001)
        D, density = self._denoised(x, t)
        weight = density / density.sum()
        step = 1e-4 * float(sd.min())
        slope = (self._denoised(x + step, t)[0] - self._denoised(x - step, t)[0]) / (2 * step)
        l = float((weight * slope).sum())
        g = D - l * x
        offset = float((weight * g).sum()) if intercept else 0.0
        return l, float(np.sqrt((weight * (g - offset) ** 2).sum()))

    def s(self, t: float, intercept: bool = False) -> float:
        """d ln rms(g) / dlambda by a Richardson-extrapolated central difference over neighbouring levels."""

        def slope(h: float) -> float:
            ahead, behind = (math.log(self.coefficients(t * math.exp(k * h), intercept)[1]) for k in (-1, 1))
            return (ahead - behind) / (2 * h)

        return (4 * slope(0.01) - slope(0.02)) / 3
