r"""What a raw network is given at a noise level: EDM's scalings, which make a denoiser of it, and how it is told t.

What it is told are functions $t \mapsto c_{noise}$, elementwise on a tensor of levels. They are computed in the levels'
own dtype, as the published codes do, and returned so. Half precision is refused: it cannot tell neighbouring levels
apart, and neither can a network to which the result is cast before its embedding.

Examples:
    >>> {name: round(c_noise(torch.tensor(80.0)).item(), 4) for name, c_noise in NOISE_CONDITIONINGS.items()}
    {'edm': 1.0955, 'cm': 1095.5067, 'raw': 80.0, 'trigflow': 1.5645}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from .._checks import check_level, check_positive
from .._precision import wide_dtype


class DenoiserScalings(NamedTuple):
    """Coefficients that make a denoiser of a raw network: ``D = c_skip x + c_out F(c_in x, c_noise)``.

    Attributes:
        c_skip: Multiplies the noisy data.
        c_out: Multiplies the network's output.
        c_in: Multiplies the noisy data on their way into the network.
        c_noise: What the network is told of the noise level.
    """

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def input_scale(t: Tensor, q: Tensor, sigma_data: float) -> Tensor:
    r"""Return $\sqrt{(q^2 + \sigma_{data}^2) / (t^2 + \sigma_{data}^2)}$, which takes data of level t to q's scale."""
    return ((q**2 + sigma_data**2) / (t**2 + sigma_data**2)).sqrt()


class EDMPreconditioning:
    r"""EDM's parameterisation of the denoiser itself (Karras et al. 2022, table 1), with $v = \sigma_{data}^2$.

    $$c_{skip} = \frac{v}{t^2 + v}, \quad c_{out} = \frac{t\, \sigma_{data}}{\sqrt{t^2 + v}}, \quad
      c_{in} = \frac{1}{\sqrt{t^2 + v}}, \quad c_{noise} = \tfrac14 \ln t$$

    Args:
        sigma_data: Standard deviation of the data, positive.

    Examples:
        >>> EDMPreconditioning(sigma_data=0.5)(torch.tensor(0.5)).c_skip
        tensor(0.5000)
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        check_positive(sigma_data, "sigma_data")
        self.sigma_data = float(sigma_data)

    def __call__(self, t: Tensor) -> DenoiserScalings:
        """Return the four coefficients at noise levels ``t``, in its shape and dtype."""
        check_level(t, "t")
        wide = t.to(wide_dtype(t.device))
        c_in = (wide**2 + self.sigma_data**2).rsqrt()
        c_data = self.sigma_data * c_in
        scalings = (c_data**2, wide * c_data, c_in, wide.log() / 4)
        return DenoiserScalings(*(c.to(t.dtype) for c in scalings))

    def c_noise(self, t: Tensor) -> Tensor:
        """Return the last of them alone."""
        return (t.to(wide_dtype(t.device)).log() / 4).to(t.dtype)


def edm_c_noise(t: Tensor) -> Tensor:
    r"""Return $\tfrac14 \ln t$ (EDM, Karras et al. 2022; also ECT and CIFAR-10 consistency models); $-\infty$ at 0."""
    check_level(t, "t")
    return t.log() / 4


def cm_c_noise(t: Tensor) -> Tensor:
    r"""Return $250 \ln(t + 10^{-44})$ (CM, openai/consistency_models, and CTM, sony/ctm, for t and for s alike).

    The small number only matters at t = 0. In float32 it is denormal, 9.8e-45 (-25333 at 0, and $-\infty$ on a device
    that flushes denormals); in float64 it is exact (-25328 at 0).
    """
    check_level(t, "t")
    return 250.0 * (t + 1e-44).log()


def raw_c_noise(t: Tensor) -> Tensor:
    """Return t itself, for networks that take sigma and embed it themselves (k-diffusion's image models)."""
    check_level(t, "t")
    return t


def trigflow_c_noise(t: Tensor, sigma_data: float = 0.5) -> Tensor:
    r"""Return the angle $\arctan(t / \sigma_{data})$, from 0 to $\pi / 2$ (TrigFlow, Lu and Song 2024).

    For another ``sigma_data`` where one argument is expected: ``functools.partial(trigflow_c_noise, sigma_data=1.0)``.
    """
    check_positive(sigma_data, "sigma_data")
    check_level(t, "t")
    return torch.atan(t / sigma_data)


NOISE_CONDITIONINGS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"edm": edm_c_noise, "cm": cm_c_noise, "raw": raw_c_noise, "trigflow": trigflow_c_noise}
)
"""The functions by name. The student's ``noise_conditioning`` takes any of them, or any other."""
