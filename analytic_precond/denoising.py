"""Denoising score matching, the loss of teachers, and an anchor for students."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .distances import squared_error
from .loss import Distance, Loss, add_noise, check_data, weighted_loss
from .ode_arguments import per_sample
from .teacher import Denoiser
from .weightings import Weighting


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

    Args:
        denoiser: What is trained: ``student.denoise`` (``wrapper.module.denoise`` of a wrapped one), or a teacher.
        x_0: Clean data. Shape ``(B, ...)``.
        noise: Standard normal noise $n$. Shape of ``x_0``.
        t: Noise levels, e.g. from `sample_lognormal_noise_levels`, positive. Shape ``(B,)``, or one for all.
        distance: Maps two batches to one number per sample, shape ``(B,)``.
        weighting: A name from ``WEIGHTINGS`` that rests on t alone, or a function; EDM's by default.
        sigma_data: Standard deviation of the data, for the weighting.
        **condition: Handed to the denoiser.

    Returns:
        The loss and its terms.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If shapes do not fit or (on the CPU) the loss is not finite.

    Examples:
        >>> from torch import ones
        >>> x_0 = ones(1, 2)
        >>> denoising_loss(lambda x, t: 0 * x, x_0, 0 * x_0, ones(1)).loss  # 1 / 1^2 + 1 / 0.5^2
        tensor(5.)
    """
    check_data(x_0, noise)
    t = per_sample(t, x_0, "t").to(torch.promote_types(x_0.dtype, torch.float32))
    x_t = add_noise(x_0, noise, t)
    return weighted_loss(denoiser(x_t, t, **condition), x_0, {"t": t}, distance, weighting, sigma_data)
