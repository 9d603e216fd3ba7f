"""Gradients that pass through a network to its input, and into none of its parameters."""

from __future__ import annotations

from collections.abc import Callable
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
