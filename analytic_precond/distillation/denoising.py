r"""Denoising score matching, the loss of teachers and an anchor for students, and the weight that CTM gives to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._conditions import plain
from ..noise_levels.per_sample import per_sample
from ..teachers.denoiser import Denoiser
from .distances import squared_error
from .losses import add_noise, check_data
from .weightings import Distance, Loss, WeightedDistance, Weighting


def denoising_loss(
    denoiser: Denoiser,
    x_0: Tensor,
    noise: Tensor,
    t: Tensor | float,
    *,
    distance: Distance = squared_error,
    weighting: str | Weighting = "karras",
    sigma_data: float = 0.5,
    **condition: Any,
) -> Loss:
    r"""Denoising score matching: $w(t)\, d\big(D(x_0 + t\, n, t), x_0\big)$ (Karras et al. 2022).

    CTM adds it to its trajectory loss with the student's own denoiser, weighted by `adaptive_balance`.

    Of the arguments of `consistency_distillation_loss` it takes ``x_0``, ``noise``, ``distance`` and ``sigma_data``.
    Its own:

    - ``denoiser``: What is trained: ``student.denoise`` (``wrapper.module.denoise`` of a wrapped one), or a teacher.
    - ``t``: Noise levels, e.g. from `sample_lognormal_noise_levels`, positive. Shape ``(B,)``, or one for all.
    - ``weighting``: A name from ``WEIGHTINGS`` that rests on t alone, or a function; EDM's by default.
    - ``condition``: Handed to the denoiser.

    Returns:
        The loss and its terms.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit or (on the CPU) t is not positive or the loss not finite.

    Examples:
        >>> from torch import ones
        >>> x_0 = ones(1, 2)
        >>> denoising_loss(lambda x, t: 0 * x, x_0, 0 * x_0, ones(1)).loss  # 1 / 1^2 + 1 / 0.5^2
        tensor(5.)
    """
    compare = WeightedDistance(distance, weighting, sigma_data)
    check_data(x_0, noise)
    t = per_sample(t, x_0, "t").to(torch.promote_types(x_0.dtype, torch.float32))
    x_t = add_noise(x_0, noise, t)
    return compare(denoiser(x_t, t, **plain(condition)), x_0, t=t)


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
