r"""Classifier-free guidance: a conditional and an unconditional denoiser become one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice
from .._conditions import plain
from .._modules import Wrapper
from .denoiser import Denoiser
from .networks import noise_range_of

_FORMULAS = ("from_unconditional", "from_conditional")


def guide(
    denoiser: Denoiser, unconditional: Denoiser, scale: float, formula: str = "from_unconditional"
) -> GuidedDenoiser:
    r"""Guide a denoiser away from its unconditional counterpart (Ho & Salimans 2022), with $c$ and $u$ their outputs.

    Codebases write two formulas, whose scales differ by 1:

    - ``"from_unconditional"``: $u + w (c - u)$; $w = 0$ is unconditional, 1 conditional, above 1 guided (Imagen,
      Stable Diffusion's and diffusers' ``guidance_scale``),
    - ``"from_conditional"``: $c + w (c - u)$; $w = -1$ is unconditional, 0 conditional, above 0 guided (the paper,
      latent consistency models).

    Guiding denoisers is the same as guiding epsilon, v, scores or velocities: all are affine in D, at one x and t.

    Args:
        denoiser: The conditional denoiser $c$; the conditions of a call go to it.
        unconditional: The unconditional denoiser $u$, called without conditions: give it its null label when building
            it, e.g. ``denoiser_from_edm(network, class_labels=torch.zeros(1, 10))``.
        scale: The guidance scale $w$.
        formula: One of the two.

    Returns:
        The guided denoiser; two calls for one. An `nn.Module`, so that parameters are found.

    Raises:
        TypeError: If a denoiser is not callable or ``scale`` is not a number.
        ValueError: If ``formula`` is unknown.

    Examples:
        >>> c, u = (lambda x, t: x), (lambda x, t: 0 * x)
        >>> x, t = torch.ones(1, 2), torch.ones(1)
        >>> guide(c, u, 3.0)(x, t), guide(c, u, 3.0, formula="from_conditional")(x, t)
        (tensor([[3., 3.]]), tensor([[4., 4.]]))
    """
    check_choice(formula, _FORMULAS, "formula")
    for name, value in (("denoiser", denoiser), ("unconditional", unconditional)):
        if not callable(value):
            raise TypeError(f"{name} must be callable as {name}(x, t), got {type(value).__name__}.")
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number, got {scale!r} ({type(scale).__name__}): pass a Python float.")
    return GuidedDenoiser(denoiser, unconditional, scale + 1.0 if formula == "from_conditional" else float(scale))


class GuidedDenoiser(Wrapper):
    """What `guide` returns.

    Args:
        denoiser: The conditional denoiser.
        unconditional: The unconditional denoiser.
        scale: The guidance scale, 1 for the conditional denoiser.
    """

    named_after = "denoiser"

    def __init__(self, denoiser: Denoiser, unconditional: Denoiser, scale: float) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.unconditional = unconditional
        self.scale = scale

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """The lowest and the highest noise level that both denoisers know, as for `NetworkDenoiser`, or None."""
        return noise_range_of(self)

    def forward(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """Return the guided estimate of the clean data. Shapes: ``x`` (B, ...), ``t`` (B,)."""
        c, u = self.denoiser(x, t, **plain(condition)), self.unconditional(x, t)
        if c.shape != u.shape:
            raise ValueError(
                f"expected both denoisers to return x's shape {tuple(x.shape)}, got {tuple(c.shape)} and "
                f"{tuple(u.shape)}."
            )
        dtype = torch.promote_types(x.dtype, torch.float32)
        return (u.to(dtype) + self.scale * (c.to(dtype) - u.to(dtype))).to(x.dtype)
