r"""Distances between images, one number per sample: what a consistency loss compares two jumps with.

A distance is any callable ``(x, y) -> (B,)``. Another constant is set by ``functools.partial(pseudo_huber, c=0.01)``.
With $e = x - y$ and d the number of elements of one sample:

| function | formula | used by |
|---|---|---|
| `squared_error` | $\sum_i e_i^2 / d$ | CM ("l2"), LCM, the iCT script of diffusers |
| `pseudo_huber` | $\sqrt{\sum_i e_i^2 + c^2} - c$ | iCT, ECT, FastGen |
| `pseudo_huber_elementwise` | $\sum_i (\sqrt{e_i^2 + c^2} - c) / d$ | LCM (c = 0.001), the iCT script of diffusers |

Half-precision images are compared in float32, which the result then has.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import check_positive, check_tensor


def squared_error(x: Tensor, y: Tensor) -> Tensor:
    r"""Return the mean squared error of each sample, $\frac1d \sum_i (x_i - y_i)^2$.

    Args:
        x: A batch. Shape ``(B, ...)``.
        y: What to compare it with. Shape of ``x``.

    Returns:
        One distance per sample, in the wider of the two dtypes and at least float32. Shape ``(B,)``.

    Raises:
        TypeError: If an argument is not a floating-point tensor.
        ValueError: If the shapes differ.

    Examples:
        >>> squared_error(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))
        tensor([5.])
    """
    return _error(x, y).square().mean(1)


def pseudo_huber(x: Tensor, y: Tensor, c: float | None = None) -> Tensor:
    r"""Return the pseudo-Huber distance of each sample as one vector, $\sqrt{|x - y|^2 + c^2} - c$.

    It is $|x - y|^2 / (2c)$ for errors well below c and $|x - y| - c$ well above (Song and Dhariwal 2024, iCT).
    ECT's norm without c is the limit of a small one, such as FastGen's 1e-8.

    The square turns into the norm at ``c``, by default iCT's $0.00054 \sqrt d$. The other arguments, the result and the
    errors are those of `squared_error`, and `TypeError` or `ValueError` if ``c`` is no positive finite number.

    Examples:
        >>> pseudo_huber(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), c=12.0)
        tensor([1.])
    """
    error = _error(x, y)
    return _rooted(error.square().sum(1), _scale(c, error))


def pseudo_huber_elementwise(x: Tensor, y: Tensor, c: float | None = None) -> Tensor:
    r"""Return the mean of each element's pseudo-Huber distance, $\frac1d \sum_i (\sqrt{(x_i - y_i)^2 + c^2} - c)$.

    Not a multiple of `pseudo_huber`: here a few large errors do not hide the small ones.

    The arguments, the result and the errors are those of `pseudo_huber`: ``c`` must be positive here, too. Its default
    is diffusers'.

    Examples:
        >>> pseudo_huber_elementwise(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2), c=4.0)
        tensor([0.5000])
    """
    error = _error(x, y)
    return _rooted(error.square(), _scale(c, error)).mean(1)


def _rooted(square: Tensor, c: float) -> Tensor:
    """Return sqrt(square + c^2) - c without the difference, which would cancel where the square is small."""
    return square / ((square + c**2).sqrt() + c)


def _scale(c: float | None, error: Tensor) -> float:
    if c is None:
        return 0.00054 * math.sqrt(error.shape[1])
    if c == 0:
        raise ValueError(
            "c must be positive, got 0: the norm has no gradient at x = y; pass a small one, such as 1e-8."
        )
    check_positive(c, "c")
    return c


def _error(x: Tensor, y: Tensor) -> Tensor:
    """Return x - y, one row per sample, in float32 or wider."""
    check_tensor(x, "x")
    check_tensor(y, "y")
    if x.shape != y.shape or x.ndim == 0:
        raise ValueError(
            f"x and y must be batches of one shape (B, ...), got {tuple(x.shape)} and {tuple(y.shape)}: expand one to "
            f"the other if that is meant."
        )
    wide = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
    return (x.to(wide) - y.to(wide)).reshape(x.shape[0], math.prod(x.shape[1:]))
