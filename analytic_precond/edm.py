"""EDM's scalings around a raw network, which make a denoiser of it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_positive, check_tensor, wide_dtype


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
        """Return the four coefficients at noise levels ``t``, in its shape and dtype (at least float32)."""
        check_tensor(t, "t")
        wide = t.to(wide_dtype(t.device))
        total = wide**2 + self.sigma_data**2
        c_in = total.rsqrt()
        scalings = (self.sigma_data**2 / total, wide * self.sigma_data * c_in, c_in, wide.log() / 4)
        return DenoiserScalings(*(c.to(torch.promote_types(t.dtype, torch.float32)) for c in scalings))
