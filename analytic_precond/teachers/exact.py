r"""Denoisers in closed form: $D(x, t) = E[x_0 \mid x_0 + t n = x]$ for data whose law is known.

They serve as teachers without training: to test a method against the truth, or to ask what a perfect network would
do on a given set of images. All are differentiable, compute in float64 (float32 where a device has none), and answer
in ``x``'s dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_finite, check_tensor
from .._precision import FixedPrecisionModule, place, wide_dtype
from ..noise_levels.per_sample import expand_to


class GaussianDenoiser(FixedPrecisionModule):
    r"""The optimal denoiser of independent Gaussians, one variance per element.

    $$D(x, t) = \mu + \frac{c}{c + t^2} (x - \mu)$$

    The probability-flow ODE is then solved by $x_s = \mu + \sqrt{(c + s^2) / (c + t^2)}\,(x_t - \mu)$
    (docs/method.md, section 8).

    Args:
        variances: Variance $c \ge 0$ of each element: a number, or a tensor that broadcasts to one sample's shape.
        mean: Mean $\mu$: a number, or a tensor that broadcasts to one sample's shape.

    Raises:
        TypeError: If an argument is an integer tensor.
        ValueError: If a variance is negative or an argument is not finite.

    Examples:
        >>> teacher = GaussianDenoiser(torch.tensor([4.0, 0.0]), mean=1.0)
        >>> teacher(torch.tensor([[3.0, 3.0]]), torch.tensor([2.0]))
        tensor([[2., 1.]])
    """

    variances: Tensor
    mean: Tensor

    noise_range = None  # as of a `NetworkDenoiser`: no level is unknown

    def __init__(self, variances: Tensor | float, mean: Tensor | float = 0.0) -> None:
        super().__init__()
        given = (value.device for value in (variances, mean) if isinstance(value, Tensor))
        device = next(given, torch.device("cpu"))
        self.register_buffer("variances", _as_parameter(variances, "variances", device, nonnegative=True))
        self.register_buffer("mean", _as_parameter(mean, "mean", device))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the posterior mean. Shapes: ``x`` (B, ...), ``t`` (B,)."""
        _check_samples(x, torch.broadcast_shapes(self.variances.shape, self.mean.shape))
        wide = wide_dtype(x.device)
        c, mean = (place(b, x.device, wide) for b in (self.variances, self.mean))
        t = expand_to(t, x).to(wide)
        return (mean + c / (c + t**2) * (x.to(wide) - mean)).to(x.dtype)


class GaussianMixtureDenoiser(FixedPrecisionModule):
    r"""The optimal denoiser of a mixture of Gaussians with diagonal covariances.

    $$D(x, t) = \sum_k r_k(x, t) \Big(\mu_k + \frac{c_k}{c_k + t^2} (x - \mu_k)\Big), \qquad
      r_k \propto \pi_k \, N(x; \mu_k, c_k + t^2)$$

    Args:
        means: Means $\mu_k$ of the components. Shape ``(K, ...)``.
        variances: Variances $c_k \ge 0$: a number, one per component of shape ``(K,)``, or a tensor with as many
            dimensions as ``means`` that broadcasts to it. 0 makes a component a point.
        weights: Weights $\pi_k \ge 0$ of shape ``(K,)``, normalised to sum 1; equal by default.

    Raises:
        TypeError: If an argument is an integer tensor.
        ValueError: If shapes do not fit, a variance or weight is negative, or an argument is not finite.

    Examples:
        >>> teacher = GaussianMixtureDenoiser(torch.tensor([[-1.0], [1.0]]), 0.0)
        >>> teacher(torch.tensor([[0.5]]), torch.tensor([1.0])).item()  # tanh(x / t^2)
        0.46211716
    """

    means: Tensor
    variances: Tensor
    log_weights: Tensor

    noise_range = None

    def __init__(self, means: Tensor, variances: Tensor | float, weights: Tensor | None = None) -> None:
        super().__init__()
        check_tensor(means, "means")
        means = _as_parameter(means, "means", means.device)
        if means.ndim < 2 or means.numel() == 0:
            raise ValueError(f"means must have shape (K, ...) with K >= 1 components, got {tuple(means.shape)}.")
        c = _as_parameter(variances, "variances", means.device, nonnegative=True)
        if c.ndim == 1 and c.shape[0] == means.shape[0]:
            c = c.reshape(-1, *[1] * (means.ndim - 1))
        same_rank = c.ndim == means.ndim and all(a in (1, b) for a, b in zip(c.shape, means.shape, strict=True))
        if c.ndim != 0 and not same_rank:
            raise ValueError(
                f"variances must be a number, of shape ({len(means)},) or broadcast to the means' shape "
                f"{tuple(means.shape)}, got shape {tuple(c.shape)}."
            )
        given = torch.ones(len(means), device=means.device) if weights is None else weights
        w = _as_parameter(given, "weights", means.device, nonnegative=True)
        if w.shape != means.shape[:1] or not bool(w.sum() > 0):
            raise ValueError(f"weights must have shape ({len(means)},) and a positive sum, got {w.tolist()}.")
        self.register_buffer("means", means)
        self.register_buffer("variances", c.expand_as(means).clone())
        self.register_buffer("log_weights", (w / w.sum()).log())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the posterior mean. Shapes: ``x`` (B, ...), ``t`` (B,)."""
        _check_samples(x, self.means.shape[1:])
        wide = wide_dtype(x.device)
        z, t = x.to(wide), expand_to(t, x).to(wide)

        log_r, posterior_means = [], []
        for mean, c, log_weight in zip(
            *(place(b, x.device, wide) for b in (self.means, self.variances, self.log_weights)), strict=True
        ):
            total = c + t**2
            log_density = -0.5 * ((z - mean) ** 2 / total + total.log())
            log_r.append(log_weight + log_density.flatten(1).sum(1))
            posterior_means.append(mean + c / total * (z - mean))

        r = torch.stack(log_r).softmax(0)
        return sum((expand_to(r_k, z) * m for r_k, m in zip(r, posterior_means, strict=True)), z * 0).to(x.dtype)


class EmpiricalDenoiser(FixedPrecisionModule):
    r"""The ideal denoiser of a finite data set: a mean of its points, weighted by their likelihood.

    $$D(x, t) = \sum_i r_i \, y_i, \qquad r_i \propto \exp\Big(-\frac{|x - y_i|^2}{2 t^2}\Big)$$

    (Karras et al. 2022, appendix B.3.) $|x|^2$ cancels in the weights and is never formed, the largest exponent is
    taken out, and points are visited in chunks: safe at ``t = 0.002``, and memory does not grow with the data.

    Args:
        data: The points $y_i$. Shape ``(N, ...)``.

    Raises:
        TypeError: If ``data`` is not a floating-point tensor.
        ValueError: If ``data`` is empty or not finite.

    Examples:
        >>> teacher = EmpiricalDenoiser(torch.tensor([[0.0], [1.0]]))
        >>> teacher(torch.tensor([[0.9], [0.5]]), torch.tensor([0.002, 0.002]))
        tensor([[1.0000], [0.5000]])
    """

    data: Tensor
    center: Tensor
    half_squares: Tensor

    noise_range = None

    def __init__(self, data: Tensor) -> None:
        super().__init__()
        check_tensor(data, "data")
        if data.ndim < 2 or data.numel() == 0:
            raise ValueError(f"data must have shape (N, ...) with N >= 1 points, got {tuple(data.shape)}.")
        check_finite(data, "data")
        self.register_buffer("data", data.detach().clone())
        wide = wide_dtype(data.device)
        self.register_buffer("center", data.detach().to(wide).mean(0))  # near 0 the squares below cancel least
        squares = [0.5 * (y.to(wide) - self.center).square().sum() for y in data]
        self.register_buffer("half_squares", torch.stack(squares))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the posterior mean. Shapes: ``x`` (B, ...), ``t`` (B,)."""
        _check_samples(x, self.data.shape[1:])
        wide = wide_dtype(x.device)
        inverse_t2 = expand_to(t, x).to(wide).reshape(-1, 1) ** -2
        center = place(self.center, x.device, wide)
        z = (x.to(wide) - center).flatten(1)

        # softmax over chunks of points: running largest exponent, sum of weights, weighted sum of points
        top = z.new_full((len(z), 1), float("-inf"))
        weight_sum, weighted = torch.zeros_like(top), torch.zeros_like(z)
        chunk = max(1, _CHUNK_ELEMENTS // max(len(z), z.shape[1]))
        for points, half_squares in zip(self.data.split(chunk), self.half_squares.split(chunk), strict=True):
            y = (place(points, x.device, wide) - center).flatten(1)
            exponent = (z @ y.T - place(half_squares, x.device, wide)) * inverse_t2
            new_top = torch.maximum(top, exponent.detach().amax(1, keepdim=True))
            decay, weight = (top - new_top).exp(), (exponent - new_top).exp()
            weight_sum = weight_sum * decay + weight.sum(1, keepdim=True)
            weighted = weighted * decay + weight @ y
            top = new_top
        return (center + (weighted / weight_sum).reshape(x.shape)).to(x.dtype)


_CHUNK_ELEMENTS = 2**22  # 32 MiB of float64 for each of the chunk's two largest arrays


def _check_samples(x: Tensor, shape: torch.Size) -> None:
    """Refuse samples to which parameters of this shape do not broadcast."""
    check_tensor(x, "x")
    sizes = x.shape[1:][max(0, x.ndim - 1 - len(shape)) :]
    if len(sizes) != len(shape) or any(own not in (1, size) for own, size in zip(shape, sizes, strict=True)):
        raise ValueError(f"x must hold samples of shape {tuple(shape)}, got x of shape {tuple(x.shape)}.")


def _as_parameter(value: Tensor | float, name: str, device: torch.device, nonnegative: bool = False) -> Tensor:
    """Return a private float64 copy of a parameter of the data's law, checked, on a device."""
    if isinstance(value, int | float):
        value = torch.tensor(float(value), device=device)
    check_tensor(value, name)
    check_finite(value, name)
    if nonnegative and bool((value < 0).any()):
        raise ValueError(f"{name} must not be negative, got {value.min().item()}.")
    return value.detach().to(device).to(wide_dtype(device), copy=True)
