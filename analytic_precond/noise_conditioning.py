r"""What a network is told of its noise level: functions $t \mapsto c_{noise}$, elementwise on a tensor of levels.

Computed in the levels' own dtype, as the published codes do, but at least in float32, and returned so: half precision
cannot tell neighbouring levels apart, and neither can a network to which the result is cast before its embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from ._checks import check_positive, check_tensor


def edm_c_noise(t: Tensor) -> Tensor:
    r"""Return $\tfrac14 \ln t$ (EDM, Karras et al. 2022; also ECT and CIFAR-10 consistency models); $-\infty$ at 0.

    Examples:
        >>> edm_c_noise(torch.tensor([1.0, 80.0]))
        tensor([0.0000, 1.0955])
    """
    return _at_least_float32(t).log() / 4


def cm_c_noise(t: Tensor) -> Tensor:
    r"""Return $250 \ln(t + 10^{-44})$ (CM, openai/consistency_models, and CTM, sony/ctm, for t and for s alike).

    The small number only matters at t = 0. In float32 it is denormal, 9.8e-45 (-25333 at 0, and $-\infty$ on a device
    that flushes denormals); in float64 it is exact (-25328 at 0).

    Examples:
        >>> cm_c_noise(torch.tensor([1.0, 80.0]))
        tensor([   0.0000, 1095.5067])
    """
    return 250.0 * (_at_least_float32(t) + 1e-44).log()


def raw_c_noise(t: Tensor) -> Tensor:
    """Return t itself, for networks that take sigma and embed it themselves (k-diffusion's image models).

    Examples:
        >>> raw_c_noise(torch.tensor([1.0, 80.0]))
        tensor([ 1., 80.])
    """
    return _at_least_float32(t)


def trigflow_c_noise(t: Tensor, sigma_data: float = 0.5) -> Tensor:
    r"""Return the angle $\arctan(t / \sigma_{data})$, from 0 to $\pi / 2$ (TrigFlow, Lu and Song 2024).

    For another ``sigma_data`` where one argument is expected: ``functools.partial(trigflow_c_noise, sigma_data=1.0)``.

    Examples:
        >>> trigflow_c_noise(torch.tensor([0.0, 0.5]))
        tensor([0.0000, 0.7854])
    """
    check_positive(sigma_data, "sigma_data")
    return (_at_least_float32(t) / sigma_data).atan()


NOISE_CONDITIONINGS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {"edm": edm_c_noise, "cm": cm_c_noise, "raw": raw_c_noise, "trigflow": trigflow_c_noise}
)
"""The functions by name. The student's ``noise_conditioning`` takes any of them, or any other."""


def _at_least_float32(t: Tensor) -> Tensor:
    check_tensor(t, "t")
    return t.to(torch.promote_types(t.dtype, torch.float32))
