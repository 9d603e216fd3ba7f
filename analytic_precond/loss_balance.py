"""The weight that gives one loss as large a gradient as another."""

from __future__ import annotations

import torch
from torch import Tensor

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
