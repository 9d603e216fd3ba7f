r"""The teacher: one interface for every trained diffusion model."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Denoiser(Protocol):
    r"""Any callable that estimates the clean data: $D(x, t) \approx E[x_0 \mid x_t = x]$.

    ``x`` is noisy data of shape ``(B, ...)`` with ``x = x_0 + t n``, ``t`` the noise levels (EDM's sigma) of shape
    ``(B,)`` in ``x``'s dtype, and the result has ``x``'s shape. Labels, prompts and other conditions are keyword
    arguments; `common` says how they follow their samples. A function, an `nn.Module` or a lambda will do; put a
    network in eval mode first.
    """

    def __call__(self, x: Tensor, t: Tensor, /, *args: Any, **condition: Any) -> Tensor:
        """Return the estimate of the clean data."""
