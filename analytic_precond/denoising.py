"""Denoising score matching, the loss of teachers, and an anchor for students."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import check_noise_level
from .distances import squared_error
from .loss import Distance, Loss, add_noise, check_data, weighted_loss
from .teacher import Denoiser
from .weightings import Weighting


def denoising_loss(
    denoiser: Denoiser,
    x_0: Tensor,
    noise: Tensor,
    t: Tensor,
    *,
    distance: Distance = squared_error,
    weighting: str | Weighting = "karras",
    sigma_data: float = 0.5,
    **condition: Any,
) -> Loss:
    r"""Denoising score matching: $w(t)\, d\big(D(x_0 + t\, n, t), x_0\big)$ (Karras et al. 2022).

    CTM adds it to its trajectory loss with the student's own denoiser, weighted by `adaptive_balance`.

    Args:
        denoiser: What is trained: ``student.denoise``, or a teacher.
        x_0: Clean data. Shape ``(B, ...)``.
        noise: Standard normal noise $n$. Shape of ``x_0``.
        t: Noise levels, e.g. from `sample_lognormal_noise_levels`. Shape ``(B,)``.
        distance: Maps two batches to one number per sample, shape ``(B,)``.
        weighting: A name from ``WEIGHTINGS`` that rests on t alone, or a function; EDM's by default.
        sigma_data: Standard deviation of the data, for the weighting.
        **condition: Handed to the denoiser.

    Returns:
        The loss and its terms.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit or (on the CPU) the loss is not finite.

    Example:
        >>> from torch import ones
        >>> x_0 = ones(1, 2)
        >>> denoising_loss(lambda x, t: 0 * x, x_0, 0 * x_0, ones(1)).loss  # 1 / 1^2 + 1 / 0.5^2
        tensor(5.)
    """
    check_data(x_0, noise)
    check_noise_level(t, x_0, "t")
    t = t.to(x_0.device, non_blocking=True).reshape(-1).expand(len(x_0))
    x_t = add_noise(x_0, noise, t)
    return weighted_loss(denoiser(x_t, t.to(x_t.dtype), **condition), x_0, {"t": t}, distance, weighting, sigma_data)
