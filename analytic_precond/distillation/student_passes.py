r"""Gradients that pass through a network to its input, and into none of its parameters.

The same dropout masks for student and target, which consistency losses compare.
"""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def through_input_only(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Call a function of one tensor so that gradients reach that tensor and nothing else.

    The parameters need not be known: the function may be a module, a wrapped or compiled one, one that checkpoints its
    activations, a method, or a function around any of them.

    Args:
        function: Maps a tensor to another.
        x: Its argument.

    Returns:
        The function's value. Its gradient with respect to ``x`` can be taken, but not differentiated again.

    Examples:
        >>> layer, x = torch.nn.Linear(1, 1), torch.ones(1, requires_grad=True)
        >>> through_input_only(layer, x).backward()
        >>> torch.equal(x.grad, layer.weight[0]), layer.weight.grad
        (True, None)
    """
    result: Tensor = _InputGradient.apply(x, function)  # type: ignore[no-untyped-call]
    return result


class _InputGradient(torch.autograd.Function):
    """A graph of its own, whose backward pass is asked for the input's gradient only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        with torch.set_grad_enabled(wanted):
            start = x.detach().requires_grad_(wanted)
            end = function(start)
        ctx.save_for_backward(start, end)  # freed with the outer graph
        return end.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None]:
        start, end = ctx.saved_tensors
        if not end.requires_grad:  # constant
            return None, None
        (result,) = torch.autograd.grad(end, start, gradient, retain_graph=True, allow_unused=True)
        return result, None


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
