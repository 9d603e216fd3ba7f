r"""Argument checks: each raises with what was expected, what came and what to do; none converts its argument.

Noise levels: what ``t`` means, and grids of them.

A noise level is EDM's sigma: ``x_t = x_0 + t * n`` with standard normal ``n``. Grids are float64 and run from the
noisiest level to the cleanest. Coefficients are smooth in ``lambda = -ln t`` (docs/method.md, section 1).

What the ODE solvers accept: noise levels per sample, grids of them, the dtype of the state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import all_true, check_tensor
from .._precision import wide_dtype


def check_noise_level(t: object, x: Tensor, name: str = "t") -> None:
    """Refuse a noise level that is not one per sample of ``x`` (or a single one)."""
    check_tensor(t, name)
    assert isinstance(t, Tensor)
    if t.ndim == x.ndim > 0:
        fits = all(size in (1, full) for size, full in zip(t.shape, x.shape, strict=True))
    else:
        fits = t.ndim == 0 or t.shape == x.shape[:1] or t.shape == (1,)
    if not fits:
        raise ValueError(
            f"{name} must hold one noise level per sample, shape {tuple(x.shape[:1])} for x of shape "
            f"{tuple(x.shape)}, got shape {tuple(t.shape)}: pass t.expand(len(x)) for a common level."
        )


def expand_to(t: Tensor, x: Tensor) -> Tensor:
    """Append dimensions to ``t`` so that it broadcasts against ``x`` sample by sample.

    Args:
        t: One value per sample, shape ``(B,)``; a scalar, or a tensor that already has ``x``'s number of dimensions.
        x: A batch. Shape ``(B, ...)``.

    Returns:
        A view of ``t`` of shape ``(B, 1, ..., 1)``.

    Raises:
        TypeError: If ``t`` is not a floating-point tensor.
        ValueError: If ``t`` does not hold one value per sample.

    Examples:
        >>> expand_to(torch.ones(4), torch.zeros(4, 3, 8, 8)).shape
        torch.Size([4, 1, 1, 1])
    """
    check_noise_level(t, x)
    return t if t.ndim == x.ndim else t.reshape(-1, *[1] * (x.ndim - 1))


def per_sample(level: Tensor | float, x: Tensor, name: str, *, zero: bool = False) -> Tensor:
    """Return checked noise levels in the wide dtype, shape ``(B,)``; ``zero`` lets 0 pass."""
    if isinstance(level, int):
        raise TypeError(f"{name} must be a float or a floating-point tensor, got {level}: write 80.0, not 80.")
    number = level if isinstance(level, float) else None
    if isinstance(level, float):
        level = torch.tensor([level], dtype=torch.float64, device="cpu")
    check_noise_level(level, x, name)
    level = expand_to(level, x)
    if level.shape[1:].numel() != 1:
        raise ValueError(f"{name} must hold one noise level per sample, got shape {tuple(level.shape)}.")

    level = level.reshape(-1)
    valid = ((level >= 0) if zero else (level > 0)) & (level < torch.inf)
    if all_true(valid) is False:
        index = int((~valid).nonzero()[0])
        raise ValueError(
            f"{name} must be finite and {'at least 0' if zero else 'positive'}, got {level[index].item():g} at "
            f"position {index}: noise levels are sigma, not indices."
        )
    wide = wide_dtype(x.device)
    if number is not None:  # filled on the device: a copy would wait for it
        return torch.full((len(x),), number, dtype=wide, device=x.device)
    return torch.where(valid, level, torch.nan).to(x.device, wide, non_blocking=True).expand(len(x))
