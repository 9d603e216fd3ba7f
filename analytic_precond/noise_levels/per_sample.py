"""One noise level per sample: from what callers write, a float or a tensor of several shapes, to what batches need.

`expand_to` states which shapes fit a batch. `one_per_sample` makes one level per sample of any of them, without looking
at the values; `per_sample` looks at them too, for callers that have no range of their own to check.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import all_true, check_noise_level, check_tensor
from .._precision import place


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
    return _expanded(t, x, "t")


def one_per_sample(level: Tensor | float, x: Tensor, name: str = "t") -> Tensor:
    """Return one level per sample on ``x``'s device. Shape ``(B,)``, their own dtype."""
    check_noise_level(level, name)
    if isinstance(level, float):  # filled on the device: a copy would wait for it
        return place(level, x.device, torch.float64).expand(x.shape[:1])
    column = _expanded(level, x, name)
    if column.shape[1:].numel() != 1:
        raise ValueError(f"{name} must hold one noise level per sample, got shape {tuple(level.shape)}.")
    values = column.reshape(column.shape[:1])
    return place(values, x.device, level.dtype).expand(x.shape[:1])


def per_sample(level: Tensor | float, x: Tensor, name: str, *, zero: bool = False) -> Tensor:
    """Return one positive level per sample in the wide dtype, NaN where that cannot be read; ``zero`` lets 0 pass."""
    levels = place(one_per_sample(level, x, name), x.device, torch.float64)
    # looked at as written: reading what is on a device would wait for it
    written = level if isinstance(level, Tensor) else torch.tensor(level, dtype=torch.float64, device="cpu")
    valid = _valid(written, zero)
    if all_true(valid) is False:
        index = int((~valid).flatten().nonzero()[0])
        raise ValueError(
            f"{name} must be finite and {'at least 0' if zero else 'positive'}, got {written.flatten()[index]:g} at "
            f"position {index}: noise levels are sigma, not indices."
        )
    return levels if isinstance(level, float) else torch.where(_valid(levels, zero), levels, torch.nan)


def _valid(levels: Tensor, zero: bool) -> Tensor:
    return ((levels >= 0) if zero else (levels > 0)) & (levels < torch.inf)


def _expanded(level: Tensor, x: Tensor, name: str) -> Tensor:
    check_tensor(level, name)
    if level.ndim == x.ndim > 0:
        fits = all(size in (1, full) for size, full in zip(level.shape, x.shape, strict=True))
    else:
        fits = level.ndim == 0 or level.shape == x.shape[:1] or level.shape == (1,)
    if not fits:
        raise ValueError(
            f"{name} must hold one noise level per sample, shape {tuple(x.shape[:1])} for x of shape "
            f"{tuple(x.shape)}, got shape {tuple(level.shape)}: pass t.expand(len(x)) for a common level."
        )
    return level if level.ndim == x.ndim else level.reshape(-1, *[1] * (x.ndim - 1))
