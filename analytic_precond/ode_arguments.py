"""What the ODE solvers accept: noise levels per sample, grids of them, the dtype of the state."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_finite, check_noise_level, check_tensor, wide_dtype
from .noise_levels import expand_to


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
    if not all_true(valid):
        index = int((~valid).nonzero()[0])
        raise ValueError(
            f"{name} must be finite and {'at least 0' if zero else 'positive'}, got {level[index].item():g} at "
            f"position {index}: noise levels are sigma, not indices."
        )
    wide = wide_dtype(x.device)
    if number is not None:  # filled on the device: a copy would wait for it
        return torch.full((len(x),), number, dtype=wide, device=x.device)
    return torch.where(valid, level, torch.nan).to(x.device, wide, non_blocking=True).expand(len(x))


def all_true(valid: Tensor) -> bool:
    """Whether all are true; yes, too, where looking would stall a device (off the CPU) or break a graph."""
    if valid.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    try:
        return bool(valid.all())
    except RuntimeError:  # torch.vmap
        return True


def check_grid(levels: Tensor) -> bool:
    """Refuse anything but a strictly monotone grid of noise levels, 0 at most at its end; return whether it ends so."""
    check_tensor(levels, "levels")
    if levels.ndim != 1 or levels.numel() < 2:
        raise ValueError(
            f"levels must be 1-D with at least 2 noise levels, got shape {tuple(levels.shape)}: make a grid with "
            f"karras_noise_levels."
        )
    check_finite(levels, "levels")
    values = levels.detach().cpu().double()
    steps = values.diff()
    if not bool((steps < 0).all() | (steps > 0).all()):
        index = int((steps.sign() != steps[0].sign()).logical_or(steps == 0).nonzero()[0])
        raise ValueError(
            f"levels must be strictly decreasing or strictly increasing, got {values[index]:g} then "
            f"{values[index + 1]:g} at index {index}: sort them and drop duplicates."
        )
    if bool((values[:-1] <= 0).any()) or bool(values[-1] < 0):
        raise ValueError(
            f"levels must be positive noise levels (sigma), only the last may be 0, got {values.min():g} at index "
            f"{int(values.argmin())}: the ODE cannot leave 0, start at sigma_min."
        )
    return bool(values[-1] == 0)


def state_dtype(dtype: torch.dtype | None, x: Tensor) -> torch.dtype:
    """Return the dtype of the state: ``x``'s by default."""
    if dtype is None:
        return x.dtype
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}: for example torch.float64.")
    return dtype


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider, which steps are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
