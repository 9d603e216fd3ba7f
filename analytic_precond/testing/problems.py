r"""Data whose law is known, with the perfect teacher's denoiser, flow, statistics and jumps, from no estimate.

$L$ is known without integrating: $(1 - l)\, d\lambda$ is the change of minus the entropy of $x_t$ per element (Guo,
Shamai and Verdu 2005: $dI / d\,\mathrm{snr}$ is half the least squared error, and $l_t$ is that error over
$t^2 d$). And $S = g_{rms}$, whose logarithm has the derivative $s_t$ (docs/method.md, section 4). What is left to a
quadrature is N.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import quad
from scipy.special import log_ndtr, logsumexp
from torch import Tensor

from ..noise_levels.per_sample import expand_to
from ..preconditionings.base import Scalings
from ..teachers.exact import GaussianDenoiser, GaussianMixtureDenoiser

Level = Tensor | float


class Problem(ABC):
    """Base of the problems: what follows from l, g_rms and L. All in float64, on the CPU, but for `flow`."""

    @abstractmethod
    def sample(self, num: int, seed: int) -> Tensor:
        """Return samples. Shape ``(num, ...)``, float64."""

    @abstractmethod
    def flow(self, x_t: Tensor, t: Level, s: Level) -> Tensor:
        """Return where the teacher's ODE carries ``x_t`` of shape ``(B, ...)`` from level ``t`` to ``s``, in its dtype.

        Levels are numbers, or tensors of shape ``(B,)``.
        """

    @abstractmethod
    def l(self, t: Level) -> Tensor:
        r"""Return $l_t$, the mean slope of the denoiser. Shape of ``t``."""

    @abstractmethod
    def g_rms(self, t: Level, intercept: bool = False) -> Tensor:
        """Return the RMS of the remainder $D - l_t x$; with an intercept, less its mean. Shape of ``t``."""

    @abstractmethod
    def s(self, t: Level, intercept: bool = False) -> Tensor:
        r"""Return $s_t = d \ln g_{rms} / d\lambda$, 0 where there is no remainder. Shape of ``t``."""

    @abstractmethod
    def log_L(self, t: Level) -> Tensor:
        r"""Return $\ln L = \int (1 - l)\, d\lambda$, up to one constant for all levels. Shape of ``t``."""

    def jump(self, t: Level, s: Level, theta: float = 1.0) -> Scalings:
        r"""Return the exact coefficients of the theta family (docs/method.md, section 3), in the broadcast shape.

        $N_s - N_t = \int L S\, d\lambda$ is taken by adaptive quadrature at a relative 1e-12.

        Args:
            t: Noise levels to start from.
            s: Noise levels to reach, at most ``t``, positive. They broadcast against ``t``.
            theta: 0 for the forward, 1 for the backward form, or between.

        Raises:
            ValueError: If a jump does not go down, or to 0.
        """
        starts, ends = torch.broadcast_tensors(_float64(t), _float64(s))
        each = zip(starts.flatten().tolist(), ends.flatten().tolist(), strict=True)
        pairs = [self._jump(start, end, theta) for start, end in each]
        return Scalings(*(torch.tensor(c, dtype=torch.float64).reshape(starts.shape) for c in zip(*pairs, strict=True)))

    def _jump(self, t: float, s: float, theta: float) -> tuple[float, float]:
        if not 0 < s <= t:
            raise ValueError(f"t and s must be noise levels with 0 < s <= t, got t = {t:g}, s = {s:g}.")
        log_L_s, S_s = float(self.log_L(s)), self._S(s)

        def density(lam: float) -> float:
            level = math.exp(-lam)
            return math.exp(float(self.log_L(level)) - log_L_s) * self._S(level) / S_s

        pieces = np.linspace(-math.log(t), -math.log(s), 2 + math.ceil(math.log(t / s)))
        r = sum(quad(density, a, b, epsabs=0, epsrel=1e-12)[0] for a, b in pairwise(pieces))
        explicit = (1 - theta) * S_s / self._S(t)
        denominator = 1 + theta * float(self.l(s)) * r
        c_skip = math.exp(float(self.log_L(t)) - log_L_s) - explicit * float(self.l(t)) * r
        return c_skip / denominator, (explicit + theta) * r / denominator

    def _S(self, t: float) -> float:
        return float(self.g_rms(t)) or 1.0  # without a remainder any S will do


class GaussianProblem(Problem):
    r"""Independent Gaussian elements: everything in closed form (docs/method.md, section 8).

    With $w_i = c_i / (c_i + t^2)$ the denoiser is $\mu_i + w_i (x_i - \mu_i)$, so $l_t$ is the mean of $w_i$.

    Args:
        variances: Variance $c_i$ of each element of a sample: a tensor of its shape, or a sequence.
        mean: Their means: a number, or a tensor that broadcasts with ``variances``.

    Attributes:
        denoiser: The perfect teacher, a `GaussianDenoiser`.

    Examples:
        >>> problem = GaussianProblem((4.0, 1.0, 0.25, 0.05, 0.01, 0.001))
        >>> c_skip, c_out = problem.jump(5.0, 1.0)
        >>> c_skip.item(), c_out.item()
        (0.20351404, 0.63857736)
        >>> GaussianProblem([3.0]).flow(torch.tensor([[2.0]]), 1.0, 0.0)  # sqrt(3 / 4) x_t
        tensor([[1.7321]])
    """

    variances: Tensor
    mean: Tensor

    def __init__(self, variances: Tensor | Sequence[float], mean: Tensor | float = 0.0) -> None:
        both = torch.broadcast_tensors(torch.atleast_1d(_float64(variances)), _float64(mean))
        self.variances, self.mean = (v.clone() for v in both)
        self.denoiser = GaussianDenoiser(self.variances, self.mean)

    def sample(self, num: int, seed: int) -> Tensor:
        """Return samples. Shape ``(num, *variances.shape)``, float64."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(num, *self.variances.shape, generator=generator, dtype=torch.float64)
        return self.mean + self.variances.sqrt() * noise

    def flow(self, x_t: Tensor, t: Level, s: Level) -> Tensor:
        """Return the mean plus ``sqrt((c + s^2) / (c + t^2))`` times the distance from it, in ``x_t``'s dtype."""
        x = x_t.to("cpu", torch.float64)
        t, s = (expand_to(_float64(level), x) for level in (t, s))
        c = self.variances
        return (self.mean + ((c + s**2) / (c + t**2)).sqrt() * (x - self.mean)).to(x_t)

    def l(self, t: Level) -> Tensor:
        """Return the mean of ``c / (c + t^2)``. Shape of ``t``."""
        return self._slopes(t)[1].mean(-1)

    def g_rms(self, t: Level, intercept: bool = False) -> Tensor:
        """Return the RMS of the remainder; with an intercept, less its mean. Shape of ``t``."""
        return self._mean_square(t, intercept)[0].sqrt()

    def s(self, t: Level, intercept: bool = False) -> Tensor:
        """Return half the derivative of the logarithm of the remainder's mean square. Shape of ``t``."""
        square, derivative = self._mean_square(t, intercept)
        return torch.where(square > 0, derivative / (2 * square), 0.0)

    def log_L(self, t: Level) -> Tensor:
        """Return minus half the mean of ``ln(c + t^2)``. Shape of ``t``."""
        return -0.5 * (self.variances.flatten() + _float64(t)[..., None] ** 2).log().mean(-1)

    def _slopes(self, t: Level) -> tuple[Tensor, Tensor]:
        """Return the variances of x_t and the denoiser's slopes w, one per element."""
        c = self.variances.flatten()
        total = c + _float64(t)[..., None] ** 2
        return total, c / total

    def _mean_square(self, t: Level, intercept: bool) -> tuple[Tensor, Tensor]:
        r"""Return E|g|^2 / d, g_i = (w_i - l) (x_i - mu_i) + (1 - l) mu_i, and its derivative in lambda."""
        t2, (total, w) = _float64(t)[..., None] ** 2, self._slopes(t)
        mu2 = 0 * w if intercept else self.mean.flatten() ** 2
        alike = bool((self.variances == self.variances.flatten()[0]).all())
        dw = 2 * w * (1 - w)  # in lambda
        # of equal variances, whose mean rounding would change, exactly no remainder is left
        l, dl = (w, dw) if alike else (v.mean(-1, keepdim=True) for v in (w, dw))
        square = (w - l) ** 2 * total + (1 - l) ** 2 * mu2
        derivative = 2 * (w - l) * (dw - dl) * total - 2 * (w - l) ** 2 * t2 - 2 * (1 - l) * dl * mu2
        return square.mean(-1), derivative.mean(-1)


class MixtureProblem(Problem):
    r"""A mixture of Gaussians in one dimension: expectations over $x_t$ by the trapezoidal rule, exact to rounding.

    Args:
        means: Means of the components.
        variances: Their variances, positive.
        weights: Their weights, normalised to sum 1; equal by default.

    Attributes:
        denoiser: The perfect teacher, a `GaussianMixtureDenoiser` of samples of shape ``(1,)``.

    Raises:
        ValueError: If the numbers are not one per component, or a variance or weight is not positive.

    Examples:
        >>> two = MixtureProblem(means=(-1.0, 1.0), variances=(0.04, 0.04))
        >>> two.l(0.001).item(), two.l(1000.0).item()  # 1, and the variance of all over t^2
        (0.999975, 1.04e-06)
    """

    def __init__(
        self, means: Sequence[float], variances: Sequence[float], weights: Sequence[float] | None = None
    ) -> None:
        given = (means, variances, [1.0] * len(means) if weights is None else weights)
        self.means, self.variances, self.weights = (_float64(values) for values in given)
        if not self.means.shape == self.variances.shape == self.weights.shape == (len(means),):
            shapes = [tuple(values.shape) for values in (self.means, self.variances, self.weights)]
            raise ValueError(f"means, variances and weights must hold one number per component, got shapes {shapes}.")
        if not bool((self.variances > 0).all() & (self.weights > 0).all()):
            raise ValueError(
                f"variances and weights must be positive, got {self.variances.tolist()} and {self.weights.tolist()}."
            )
        self.weights = self.weights / self.weights.sum()
        self.denoiser = GaussianMixtureDenoiser(self.means[:, None], self.variances, self.weights)

    def sample(self, num: int, seed: int) -> Tensor:
        """Return samples. Shape ``(num, 1)``, float64."""
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.means), num, p=self.weights.numpy())
        x = self.means.numpy()[k] + self.variances.sqrt().numpy()[k] * rng.standard_normal(num)
        return torch.from_numpy(x)[:, None]

    def flow(self, x_t: Tensor, t: Level, s: Level) -> Tensor:
        """Return the points that have the same quantiles at level ``s``, by bisection, in ``x_t``'s dtype.

        Where the density at ``s`` is below 1e-16, between modes, quantiles do not tell points apart.
        """
        x = x_t.to("cpu", torch.float64)
        starts, ends = (expand_to(_float64(level), x).expand_as(x).reshape(-1, 1).numpy() for level in (t, s))
        m, c, log_p = self.means.numpy(), self.variances.numpy(), self.weights.log().numpy()
        sd_t, sd_s = (np.sqrt(c + level**2) for level in (starts, ends))
        z = (x.flatten().numpy()[:, None] - m) / sd_t
        sign = np.where(logsumexp(log_p + log_ndtr(z), axis=1) > math.log(0.5), -1.0, 1.0)[:, None]  # the nearer tail
        tail = logsumexp(log_p + log_ndtr(sign * z), axis=1)
        low = (m + sd_s * z.min(1, keepdims=True)).min(1)
        high = (m + sd_s * z.max(1, keepdims=True)).max(1)
        for _ in range(100):
            middle = (low + high) / 2
            reached = logsumexp(log_p + log_ndtr(sign * (middle[:, None] - m) / sd_s), axis=1)
            above = (reached > tail) == (sign[:, 0] > 0)
            low, high = np.where(above, low, middle), np.where(above, middle, high)
        return torch.from_numpy((low + high) / 2).reshape(x.shape).to(x_t)

    def l(self, t: Level) -> Tensor:
        """Return the mean slope of the denoiser. Shape of ``t``."""
        return self._at_each(t, lambda t: self._moments(t)[0])

    def g_rms(self, t: Level, intercept: bool = False) -> Tensor:
        """Return the RMS of the remainder; with an intercept, less its mean. Shape of ``t``."""
        return self._at_each(t, lambda t: self._moments(t, intercept)[1].sqrt())

    def s(self, t: Level, intercept: bool = False) -> Tensor:
        """Return the derivative of ``ln g_rms`` in ``lambda``, by automatic differentiation. Shape of ``t``."""

        def slope(t: Tensor) -> Tensor:
            t = t.requires_grad_()
            (gradient,) = torch.autograd.grad(0.5 * self._moments(t, intercept)[1].log(), t)
            return -t.detach() * gradient

        return self._at_each(t, slope)

    def log_L(self, t: Level) -> Tensor:
        """Return minus the entropy of ``x_t``. Shape of ``t``."""
        return self._at_each(t, lambda t: self._moments(t)[2])

    def _at_each(self, t: Level, function: Callable[[Tensor], Tensor]) -> Tensor:
        levels = _float64(t)
        return torch.stack([function(level.clone()).detach() for level in levels.flatten()]).reshape(levels.shape)

    def _moments(self, t: Tensor, intercept: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Return E[D'], E[g^2] and E[ln q] of the noisy data's density q at one level."""
        m, c, p = (v[:, None] for v in (self.means, self.variances, self.weights))
        total = c + t**2
        sd = total.detach().sqrt()
        low, high = float((m - 9 * sd).min()), float((m + 9 * sd).max())
        # 64 points in the narrowest deviation; poles of D lie about that far from the line, the error is exp(-2 pi 64)
        x = torch.linspace(low, high, 2 + int(64 * (high - low) / float(sd.min())), dtype=torch.float64)
        log_joint = p.log() - (x - m) ** 2 / (2 * total) - 0.5 * (2 * math.pi * total).log()
        log_q = log_joint.logsumexp(0)
        r, weight = (log_joint - log_q).exp(), log_q.exp() * (x[1] - x[0])
        posterior, score = m + c / total * (x - m), (m - x) / total
        D = (r * posterior).sum(0)
        slope = (r * (c / total + (score - (r * score).sum(0)) * (posterior - D))).sum(0)
        l = (weight * slope).sum()
        g = D - l * x
        if intercept:
            g = g - (weight * g).sum()
        return l, (weight * g**2).sum(), (weight * log_q).sum()


def _float64(value: Tensor | Sequence[float] | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
