"""What a sampler shows its callback after each jump, and what the callback may change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SamplingStep:
    """What a callback is given after each jump, before noise is added again.

    A tensor that the callback returns takes the place of ``x``, e.g. with known pixels put back (zero-shot inpainting,
    Song et al. 2023, algorithm 4). Whatever else it returns is ignored.

    Attributes:
        index: Number of the jump, from 0.
        num_steps: How many there are.
        t: Noise level that the jump started from.
        s: Noise level that it reached.
        x: The data there. Shape ``(B, ...)``.

    Examples:
        >>> import torch
        >>> from analytic_precond import sample_multistep
        >>> student = lambda x, t, s: 0 * x + 5.0  # data that are all 5
        >>> known, mask = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[True, True, False]])
        >>> paint = lambda step: torch.where(mask, known + step.s * torch.ones(1, 3), step.x)
        >>> sample_multistep(student, torch.zeros(1, 3), [80.0, 1.0], sigma_min=0.5, callback=paint)
        tensor([[1.5000, 2.5000, 5.0000]])
    """

    index: int
    num_steps: int
    t: float
    s: float
    x: Tensor


Callback = Callable[[SamplingStep], object]


def after(step: SamplingStep, callback: Callback | None) -> Tensor:
    """Return the data with which to go on: the callback's, if it returns any."""
    returned = None if callback is None else callback(step)
    if not isinstance(returned, Tensor):
        return step.x
    if returned.shape != step.x.shape:
        raise ValueError(
            f"expected the callback to return x's shape {tuple(step.x.shape)}, got {tuple(returned.shape)}: return "
            f"None to leave x as it is."
        )
    return returned.to(step.x)
