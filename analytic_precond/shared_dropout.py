"""The same dropout masks for student and target, which consistency losses compare."""

from __future__ import annotations

from types import TracebackType

import torch
from torch import Tensor


class SharedDropout:
    """Replay the random numbers of a first ``with`` block in every later one, on the CPU and on all CUDA devices.

    Dropout draws from the global generators of the devices it runs on, so that two passes get the same masks if those
    start from the same state. Later blocks leave the generators as they found them: a training step advances them by
    one pass, however many passes share its masks. Not possible while a CUDA graph is captured.

    Examples:
        >>> images, masks = torch.ones(1, 8), SharedDropout()
        >>> with masks:
        ...     first = torch.nn.functional.dropout(images)
        >>> with masks:
        ...     second = torch.nn.functional.dropout(images)
        >>> torch.equal(first, second)
        True
    """

    def __init__(self) -> None:
        self._first: list[Tensor] | None = None
        self._outside: list[Tensor] | None = None

    def __enter__(self) -> SharedDropout:
        """Record the generators' states, or go back to the recorded ones."""
        states = _states()
        if self._first is None:
            self._first = states
        else:
            self._outside = states
            _restore(self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the generators as a later block found them."""
        if self._outside is not None:
            _restore(self._outside)
            self._outside = None


def _states() -> list[Tensor]:
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *on_gpus]


def _restore(states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if states[1:]:
        torch.cuda.set_rng_state_all(states[1:])
