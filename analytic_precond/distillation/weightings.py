r"""Weights of a training loss, by the noise levels of its jump: functions of (t, u, s, sigma_data), in `WEIGHTINGS`.

t is where the student starts, u where the teacher's step ends, s the target; each function looks at what its formula
names. All are for an error of the denoiser or of the jump, in the data's scale, with $d = \sigma_{data}$ and
$c_{out} = t d / \sqrt{t^2 + d^2}$. Published codes have several names for the same weight; all are taken:

| name here | weight | published as |
|---|---|---|
| ``"uniform"`` | $1$ | CM and CTM ``uniform``, FastGen ``one`` |
| ``"snr"`` | $t^{-2}$ | CM and CTM ``snr``, FastGen ``sigma_sq``, k-diffusion ``snr`` |
| ``"snr+1"`` | $t^{-2} + 1$ | CM and CTM ``snr+1`` |
| ``"karras"`` | $t^{-2} + d^{-2} = c_{out}^{-2}$ | EDM, CM ``karras``, CTM ``karras_weight``, FastGen ``c_out_sq`` |
| ``"truncated-snr"`` | $\max(t^{-2}, 1)$ | CM and CTM ``truncated-snr`` |
| ``"soft-min-snr"`` | $(t^2 + d^2)^{-1}$ | k-diffusion ``soft-min-snr`` |
| ``"inverse-c_out"`` | $c_{out}^{-1}$ | FastGen ``c_out`` |
| ``"inverse-step"`` | $(t - u)^{-1}$ | ECT (its r is u; not its ImageNet branch), iCT, FastGen ``default`` |
| ``"inverse-root-step"`` | $(t - u)^{-1/2}$ | FastGen ``sqrt`` |
| ``"uniform_g"`` | $(1 - s/t)^{-1}$ | CTM ``uniform_g`` with multiplier 1 |
| ``"sq-t-inverse"`` | $\sqrt{t}$ | CTM ``sq-t-inverse``, whose formula is the inverse of its name |

CM is openai/consistency_models, CTM sony/ctm, EDM NVlabs/edm, ECT locuslab/ect, FastGen NVlabs/FastGen, k-diffusion
crowsonkb/k-diffusion; the last weighs the raw network's error, so its weights are divided by $c_{out}^2$ here. iCT is
Song and Dhariwal 2023.

Examples:
    >>> t, u, s = torch.tensor([[0.5], [0.25], [0.002]])
    >>> WEIGHTINGS["karras"](t, u, s, 0.5), WEIGHTINGS["inverse-step"](t, u, s, 0.5)
    (tensor([8.]), tensor([4.]))

The weight that gives one loss as large a gradient as another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

Weighting = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def uniform_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return 1."""
    return torch.ones_like(_at_least_float32(t))


def snr_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return 1 / t^2, the signal-to-noise ratio of data of unit variance."""
    return _at_least_float32(t) ** -2


def snr_plus_one_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return 1 / t^2 + 1."""
    return _at_least_float32(t) ** -2 + 1


def karras_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return (t^2 + d^2) / (t d)^2: at initialisation every level then has the same loss (Karras et al. 2022)."""
    return _at_least_float32(t) ** -2 + sigma_data**-2


def truncated_snr_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return max(1 / t^2, 1)."""
    return (_at_least_float32(t) ** -2).clamp(min=1)


def soft_min_snr_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return 1 / (t^2 + d^2)."""
    return 1 / (_at_least_float32(t) ** 2 + sigma_data**2)


def inverse_c_out_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return sqrt(t^2 + d^2) / (t d), the root of `karras_weighting`."""
    return karras_weighting(t, u, s, sigma_data).sqrt()


def inverse_step_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return 1 / (t - u); infinite without a step."""
    return 1 / (_at_least_float32(t) - _at_least_float32(u))


def inverse_root_step_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return 1 / sqrt(t - u); infinite without a step."""
    return (_at_least_float32(t) - _at_least_float32(u)).rsqrt()


def jump_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return t / (t - s), the inverse of the network's share of an Euler jump; infinite for s = t."""
    t = _at_least_float32(t)
    return t / (t - _at_least_float32(s))


def root_weighting(t: Tensor, u: Tensor, s: Tensor, sigma_data: float) -> Tensor:
    """Return sqrt(t)."""
    return _at_least_float32(t).sqrt()


WEIGHTINGS: Mapping[str, Weighting] = MappingProxyType(
    {
        "uniform": uniform_weighting,
        "snr": snr_weighting,
        "snr+1": snr_plus_one_weighting,
        "karras": karras_weighting,
        "truncated-snr": truncated_snr_weighting,
        "soft-min-snr": soft_min_snr_weighting,
        "inverse-c_out": inverse_c_out_weighting,
        "inverse-step": inverse_step_weighting,
        "inverse-root-step": inverse_root_step_weighting,
        "uniform_g": jump_weighting,
        "sq-t-inverse": root_weighting,
        # the same under the names of sony/ctm and of FastGen
        "karras_weight": karras_weighting,
        "one": uniform_weighting,
        "sigma_sq": snr_weighting,
        "c_out": inverse_c_out_weighting,
        "c_out_sq": karras_weighting,
        "default": inverse_step_weighting,
        "sqrt": inverse_root_step_weighting,
    }
)
"""The weightings by name: each maps t, u, s of shape ``(B,)`` and ``sigma_data`` to weights of shape ``(B,)``, in the
levels' dtype but at least float32. A loss takes any of the names, or any other such function."""


def _at_least_float32(level: Tensor) -> Tensor:
    return level.to(torch.promote_types(level.dtype, torch.float32))


_FLOOR, _LARGEST = 1e-4, 1e4


def adaptive_balance(reference: Tensor, other: Tensor, parameter: Tensor) -> Tensor:
    r"""Return the weight with which ``other`` pulls at a parameter as strongly as ``reference`` does.

    $$w = \min\Big(\frac{\lVert \nabla_\phi\, reference \rVert}{\lVert \nabla_\phi\, other \rVert + 10^{-4}},
      10^4\Big)$$

    It is how CTM adds its denoising loss (Kim et al. 2024; VQGAN's rule before), with the weights of the network's
    last layer for $\phi$. Both graphs stay, so that ``(reference + w * other).backward()`` follows.

    Args:
        reference: A scalar loss.
        other: The scalar loss to weigh.
        parameter: One parameter that both depend on.

    Returns:
        The weight, a scalar without gradient, on the losses' device.

    Raises:
        TypeError: If a loss is no tensor.
        ValueError: If a loss is not a scalar or does not depend on the parameter.

    Examples:
        >>> phi = torch.ones(2, requires_grad=True)
        >>> round(adaptive_balance(6 * phi.sum(), 2 * phi.sum(), phi).item(), 3)
        3.0
    """
    norms = []
    for name, loss in (("reference", reference), ("other", other)):
        if not isinstance(loss, Tensor):
            raise TypeError(f"{name} must be a scalar tensor, got {type(loss).__name__}: pass the .loss of a Loss.")
        if loss.numel() != 1:
            raise ValueError(f"{name} must be a scalar loss, got shape {tuple(loss.shape)}: take its mean.")
        gradient = None
        if loss.requires_grad and parameter.requires_grad:
            (gradient,) = torch.autograd.grad(loss, parameter, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ValueError(
                f"{name} must depend on the parameter, got no gradient: pass a layer that both losses use."
            )
        norms.append(torch.linalg.vector_norm(gradient))
    weight: Tensor = (norms[0] / (norms[1] + _FLOOR)).clamp(max=_LARGEST)
    return weight
