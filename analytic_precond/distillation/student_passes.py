r"""The passes of students in one training step: with one set of dropout masks, and with gradients where they belong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from .._checks import check_answer
from .._conditions import Condition, detached, plain

StudentFunction = Callable[..., Tensor]


class StudentPasses:
    """Jumps of students ``student(x_t, t, s, **condition)`` that are to be compared.

    A layer may rewrite its weights in each pass in train mode (EDM2 normalises them), and autograd refuses a graph
    whose weights were rewritten since. So the differentiated jump comes last, but for a jump of its result. Shared
    dropout masks are those of the differentiated jump.
    """

    def __init__(self, condition: Condition, share_dropout: bool) -> None:
        self.condition = plain(condition)
        self.masks: AbstractContextManager[Any] = SharedDropout() if share_dropout else nullcontext()
        self._holder: nn.Module = _Holder(None)
        self._rewritten: dict[str, nn.Parameter] = {}
        with self.masks:  # keeps the generators as the differentiated jump will find them
            pass

    def jump(self, student: StudentFunction, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the student's jump from t to s, of x's shape, a function of x alone; the generators stay."""
        with self.masks:
            return self._pass(student, x, t, s, detached(self.condition))

    def differentiated_jump(self, student: StudentFunction, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the jump that training differentiates, which moves the generators on."""
        self._holder = _Holder(getattr(student, "__self__", student))
        before = {name: (p, p._version) for name, p in _weights(self._holder)}
        reached = self._pass(student, x, t, s, self.condition)
        for name, p in _weights(self._holder):
            known, version = before.get(name, (None, 0))
            if p is known and p._version > version:  # not FSDP2's, which come and go
                self._rewritten[name] = p
        return reached

    def _pass(self, student: StudentFunction, x: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        reached = student(x, t, s, **condition)
        check_answer(reached, x, "student")
        return reached

    def jump_of_input(self, student: StudentFunction, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Return the jump; gradients reach its input, but none of the student's parameters."""
        if isinstance(student, DistributedDataParallel):  # whose reducer expects every pass to reach the parameters
            student = student.module
        if isinstance(student, nn.Module) and not any(p.requires_grad for p in student.parameters()):
            return self.jump(student, x, t, s)
        copies = {name: weight.detach().clone() for name, weight in self._rewritten.items()}  # to be rewritten instead

        def function(start: Tensor) -> Tensor:
            if not copies:
                return self.jump(student, start, t, s)
            reached: Tensor = functional_call(self._holder, copies, (self.jump, student, start, t, s))
            return reached

        jumped: Tensor = _InputGradient.apply(x, function)  # type: ignore[no-untyped-call]
        return jumped


class _Holder(nn.Module):
    """A module, if it is one, whose weights may be exchanged for a call of any function."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.held = held

    def forward(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        return function(*arguments)


def _weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters that count how often they are written to; none while torch.compile traces."""
    if torch.compiler.is_compiling():
        return []
    return [(name, p) for name, p in module.named_parameters() if not p.is_inference()]


class _InputGradient(torch.autograd.Function):
    """A function of one tensor as a graph of its own, whose backward pass is asked for that tensor's gradient only.

    The function may be a module, a wrapped or compiled one, one that checkpoints its activations, or a method: its
    parameters need not be known. The gradient cannot be differentiated again.
    """

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

    def __exit__(self, *error: object) -> None:
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
