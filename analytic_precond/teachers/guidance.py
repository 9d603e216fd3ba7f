r"""Classifier-free guidance: a conditional and an unconditional denoiser become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import all_true, check_answer, check_callable, check_choice
from .._conditions import plain
from .._modules import Wrapper
from .._precision import place
from ..noise_levels.per_sample import expand_to
from .denoiser import Denoiser
from .networks import noise_range_of

_OFFSETS = {"from_unconditional": 0.0, "from_conditional": 1.0}  # added to the scale, 1 is the conditional denoiser

Scale = float | Tensor | Callable[[Tensor], float | Tensor]


def guide(
    denoiser: Denoiser,
    unconditional: Denoiser,
    scale: Scale | None,
    formula: str = "from_unconditional",
    shared: Sequence[str] = (),
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
        unconditional: The unconditional denoiser $u$: give it its null label when building it, e.g.
            ``denoiser_from_edm(network, class_labels=torch.zeros(1, 10))``. Or a worse denoiser (autoguidance, Karras
            et al. 2024), with what it must be told in ``shared``.
        scale: The guidance scale $w$: a number; a tensor with one for each sample; a function of the noise levels
            ``(B,)`` that returns either, e.g. to guide in an interval only; or None, where each call says it as
            ``guidance_scale=``, which follows the samples like other conditions (latent consistency models draw one
            for each, and tell it to the student).
        formula: One of the two.
        shared: Names of conditions that go to both denoisers, e.g. ``("class_labels",)``. All others go to the
            conditional one alone.

    Returns:
        The guided denoiser; two calls for one. An `nn.Module`, so that parameters are found.

    Raises:
        TypeError: If a denoiser is not callable, or ``scale`` or ``shared`` is something else.
        ValueError: If ``formula`` is unknown, or a scale not finite; of tensors, wherever they come from, on the CPU.

    Examples:
        >>> c, u = (lambda x, t: x), (lambda x, t: 0 * x)
        >>> x, t = torch.ones(1, 2), torch.ones(1)
        >>> guide(c, u, 3.0)(x, t), guide(c, u, 3.0, formula="from_conditional")(x, t)
        (tensor([[3., 3.]]), tensor([[4., 4.]]))
        >>> guide(c, u, lambda t: 1 + 2 * (t < 5))(torch.ones(2, 1), torch.tensor([1.0, 9.0])).flatten()
        tensor([3., 1.])
        >>> guide(c, u, None)(torch.ones(2, 1), torch.ones(2), guidance_scale=torch.tensor([2.0, 7.5])).flatten()
        tensor([2.0000, 7.5000])
    """
    check_choice(formula, _OFFSETS, "formula")
    for name, value in (("denoiser", denoiser), ("unconditional", unconditional)):
        check_callable(value, name, f"{name}(x, t)")
    if scale is not None and not callable(scale):
        _check_scale(scale, "scale")
    if isinstance(shared, str) or not isinstance(shared, Sequence) or not all(isinstance(name, str) for name in shared):
        raise TypeError(f"shared must be a tuple of names, got {shared!r}: write shared=('class_labels',).")
    return GuidedDenoiser(denoiser, unconditional, scale, _OFFSETS[formula], tuple(shared))


class GuidedDenoiser(Wrapper):
    """What `guide` returns."""

    named_after = "denoiser"

    def __init__(
        self, denoiser: Denoiser, unconditional: Denoiser, scale: Scale | None, offset: float, shared: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.unconditional = unconditional
        self.scale = scale
        self.offset = offset
        self.shared = shared

    @property
    def guides(self) -> bool:
        """Whether this is more than one of the two denoisers by itself, as far as a number tells."""
        return not isinstance(self.scale, int | float) or self.scale + self.offset not in (0, 1)

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """The lowest and the highest noise level that both denoisers know, as for `NetworkDenoiser`, or None."""
        return noise_range_of(self)

    def forward(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """Return the guided estimate of the clean data. Shapes: ``x`` (B, ...), ``t`` (B,)."""
        told = plain(condition)
        scale = self._scale_at(t, told)
        missing = [name for name in self.shared if name not in told]
        if missing:
            raise TypeError(
                f"conditions shared by both denoisers must be given at each call, got no {', '.join(missing)}: names "
                f"are those of the call, here {', '.join(told) or 'none'}."
            )
        c = self.denoiser(x, t, **told)
        u = self.unconditional(x, t, **{name: told[name] for name in self.shared})
        check_answer(c, x, "denoiser")
        check_answer(u, x, "unconditional denoiser")
        dtype = torch.promote_types(x.dtype, torch.float32)
        if isinstance(scale, Tensor):
            if scale.shape not in {(), (1,), x.shape[:1]}:
                fixed = isinstance(self.scale, Tensor)
                advice = "for batches of any size write scale=None, and guidance_scale= at calls"
                raise ValueError(
                    f"the guidance scale must hold one number per sample, shape {tuple(x.shape[:1])}, got "
                    f"{tuple(scale.shape)}: {advice if fixed else 'or be one number for all'}."
                )
            scale = expand_to(place(scale, x.device, dtype), x)
        w = scale + self.offset
        return (u.to(dtype) + w * (c.to(dtype) - u.to(dtype))).to(x.dtype)

    def _scale_at(self, t: Tensor, told: dict[str, Any]) -> float | Tensor:
        """Return the scale of a call, which is no condition of the denoisers'."""
        if self.scale is None:
            if told.get("guidance_scale") is None:
                raise TypeError("guidance_scale must be given at each call, as guide got scale=None: pass a number.")
            scale = told.pop("guidance_scale")
            scale = torch.tensor(scale, device="cpu") if isinstance(scale, list) else scale  # one for each sample
            return _check_scale(scale, "guidance_scale")
        if callable(self.scale):
            return _check_scale(self.scale(t), "the scale that the function returns")
        return self.scale


def _check_scale(scale: Any, name: str) -> float | Tensor:
    """Refuse what is no scale, or is not finite as far as looking costs no waiting."""
    if isinstance(scale, bool) or not isinstance(scale, int | float | Tensor):
        raise TypeError(f"{name} must be a number or a tensor, got {scale!r} ({type(scale).__name__}): pass a float.")
    finite = all_true(scale.isfinite()) if isinstance(scale, Tensor) else -math.inf < scale < math.inf
    if finite is False:
        raise ValueError(f"{name} must be finite, got {scale}: pass finite numbers, e.g. 3.0.")
    return scale
