"""A preconditioning as the checks see it: called with levels, its answers looked over, differentiated, compared."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import check_levels
from .._modules import tensors_of
from ..noise_levels.grids import log_noise_levels
from ..noise_levels.network_scalings import EDMPreconditioning
from ..preconditionings.base import Preconditioning, Scalings
from ..preconditionings.hand_crafted import CMPreconditioning

_ELEMENTS = 2**18  # coefficients computed at a time, with a graph of some dozens of tensors of this size: 100 MB

Coefficients = Callable[[Any, Any], Any]


class Jumps:
    """The jumps of a preconditioning, or of any function, on the denoiser: what `assert_preconditioning` is given."""

    def __init__(
        self, precond: Coefficients, levels: Tensor | None, target: float | None, sigma_data: float | None
    ) -> None:
        self.precond = precond
        self.sigma_data = sigma_data
        if target is None and isinstance(precond, CMPreconditioning):
            target = precond.sigma_min
        self.target = target
        if levels is None:
            low, high = precond.default_range if isinstance(precond, Preconditioning) else (target or 0.002, 80.0)
            levels = log_noise_levels(40, low or 0.002, high)
        check_levels(levels)
        tensors = tensors_of(precond)
        self.levels = levels.detach().to(tensors[0].device if tensors else "cpu", torch.float64)
        self.tail: tuple[int, ...] | None = None  # of the shape: what is a sample's, with coefficients per element
        self.tail = tuple(self(self.levels[:1], self.ends(self.levels[-1:])).c_out.shape[1:])

    @property
    def _at_a_time(self) -> int:
        return max(1, _ELEMENTS // max(1, math.prod(self.tail or ())))

    def ends(self, s: Tensor) -> Tensor:
        """Return the levels to reach, which may only be one."""
        return s if self.target is None else torch.full_like(s, self.target)

    def on(self, sigma_data: float | None) -> Jumps:
        """Return the same jumps, taken for coefficients on the denoiser, or on a network of this ``sigma_data``."""
        other = copy.copy(self)
        other.sigma_data = sigma_data
        return other

    def pairs(self, some: bool = False) -> tuple[Tensor, Tensor]:
        """Return all pairs of levels that jumps join, each with itself first, or some 64 of them."""
        if self.target is not None:
            t, s = self.levels, self.ends(self.levels)
        else:
            rows, columns = torch.triu_indices(len(self.levels), len(self.levels), device=self.levels.device)
            t, s = self.levels[rows], self.levels[columns]
        every = max(1, len(t) // 64) if some else 1
        return t[::every], s[::every]

    def between(self, low: float, high: float, num: int) -> Tensor:
        """Return levels evenly spaced in lambda, fewer if each has many coefficients."""
        num = min(num, max(64, 8 * self._at_a_time))
        return log_noise_levels(num, low, high).to(self.levels.device).flip(0) if low < high else self.levels[:0]

    def dense(self, num: int = 512) -> Tensor:
        """Return levels over the whole range."""
        return self.between(self.levels[-1].item(), self.levels[0].item(), num)

    def __call__(self, t: Tensor, s: Tensor, function: Coefficients | None = None) -> Scalings:
        """Return the coefficients on the denoiser."""
        with torch.no_grad():
            return self._in_pieces(lambda t, s: self._ask(t, s, function), t, s)

    def slopes(self, t: Tensor, s: Tensor, by: str) -> Scalings:
        """Return the derivatives of the coefficients in ``"t"`` or ``"s"``, 0 where autograd sees none."""

        def differentiate(t: Tensor, s: Tensor) -> Scalings:
            t, s = (level.detach().clone().requires_grad_() for level in (t, s))
            return Scalings(*(_slope(c, t if by == "t" else s) for c in self._ask(t, s)))

        return self._in_pieces(differentiate, t, s)

    def read_out(self) -> tuple[Tensor, Tensor, Tensor]:
        r"""Return t, $t\, \partial_s c_{skip}$ and $-t\, \partial_s c_{out}$ at s = t by autograd, both 1 if right."""
        t = self.dense()
        slopes = self.slopes(t, t, "s")
        return t, self.column(t) * slopes.c_skip, -self.column(t) * slopes.c_out

    def read_out_of_values(self, h: float = 1e-3) -> tuple[Tensor, Tensor]:
        """Return the two by differences of values over jumps as short as h t, to the second order."""
        t = self.dense()
        t = t[t * (1 - 2 * h) >= self.levels[-1]]
        here, near, far = (self(t, (1 - k * h) * t) for k in range(3))
        skip, out = ((3 * a - 4 * b + c) / (2 * h) for a, b, c in zip(here, near, far, strict=True))
        return skip, -out

    def column(self, levels: Tensor) -> Tensor:
        """Return levels shaped to multiply their coefficients."""
        return levels.reshape((*levels.shape, *[1] * len(self.tail or ())))

    def _in_pieces(self, function: Callable[[Tensor, Tensor], Scalings], t: Tensor, s: Tensor) -> Scalings:
        if t.ndim != 1 or t.shape != s.shape or len(t) <= self._at_a_time:
            return function(t, s)
        parts = [function(*part) for part in zip(t.split(self._at_a_time), s.split(self._at_a_time), strict=True)]
        return Scalings(*(torch.cat(c) for c in zip(*parts, strict=True)))

    def _ask(self, t: Tensor, s: Tensor, function: Coefficients | None = None) -> Scalings:
        """Call; refuse what is not a pair of tensors of the levels' shape."""
        try:
            answer = (function or self.precond)(t, s)
        except Exception as error:
            shapes = f"t and s of shapes {tuple(t.shape)} and {tuple(s.shape)}, {t.dtype}"
            first_line = str(error).partition("\n")[0]
            raise AssertionError(f"call: it must take {shapes}, got {type(error).__name__}: {first_line}") from error
        if not (isinstance(answer, tuple | list) and len(answer) == 2 and all(isinstance(c, Tensor) for c in answer)):
            got = type(answer).__name__
            if isinstance(answer, tuple | list):
                got += f" of ({', '.join(type(c).__name__ for c in answer)})"
            raise AssertionError(
                f"call: it must return two tensors, c_skip and c_out, got {got}. Levels come as tensors: compute with "
                f"them as they are, without .item(), float() or numpy."
            )
        levels = torch.broadcast_shapes(t.shape, s.shape)
        if self.target is not None and answer[1].shape == t.shape and t.shape != levels:  # formulas of t alone
            answer = [c.expand(levels) if c.shape == t.shape else c for c in answer]
        shape = (*levels, *(answer[1].shape[len(levels) :] if self.tail is None else self.tail))
        for name, c in zip(Scalings._fields, answer, strict=True):
            if c.shape != shape:
                raise AssertionError(
                    f"shape: levels of shapes {tuple(t.shape)} and {tuple(s.shape)} must give coefficients of shape "
                    f"{shape}, got {name} of {tuple(c.shape)}."
                )
            if t.dtype == torch.float64 and c.dtype != torch.float64:
                raise AssertionError(f"dtype: float64 levels must give float64 coefficients, got {name} in {c.dtype}.")
        c_skip, c_out = answer
        if self.sigma_data is not None:
            edm = EDMPreconditioning(self.sigma_data)(self.column(t))
            c_out = c_out / edm.c_out
            c_skip = c_skip - c_out * edm.c_skip
        return Scalings(c_skip, c_out)

    def compare(
        self,
        what: str,
        got: Tensor,
        expected: Tensor | float,
        allowed: Tensor | float,
        t: Tensor,
        s: Tensor,
        why: str | Callable[[], str],
    ) -> None:
        """Refuse numbers that are not the expected ones; say the worst, of which jump, and why, if a function tells."""
        expected, allowed = (torch.as_tensor(v, dtype=torch.float64, device=got.device) for v in (expected, allowed))
        excess = ((got - expected).abs() - allowed).nan_to_num(nan=torch.inf)
        if bool((excess > 0).any()):
            index = int(excess.argmax())
            values = [v.expand_as(excess).flatten()[index].item() for v in (got, expected)]
            level = index // excess[0].numel()
            raise AssertionError(
                f"{what}: got {values[0]:.9g}, expected {values[1]:.9g}, off by {abs(values[0] - values[1]):.2g} at "
                f"t = {t[level].item():.9g}, s = {s[level].item():.9g}. "
                f"{why if isinstance(why, str) else why()}"
            )


def _slope(c: Tensor, level: Tensor) -> Tensor:
    """Return the derivative of each level's own coefficients, however many: the gradient of a gradient."""
    if not c.requires_grad:
        return torch.zeros_like(c)
    weights = torch.ones_like(c).requires_grad_()
    weighted: tuple[Tensor | None, ...] = torch.autograd.grad(c, level, weights, create_graph=True, allow_unused=True)
    if weighted[0] is None or not weighted[0].requires_grad:  # the latter of steps, such as those of torch.round
        return torch.zeros_like(c)
    return torch.autograd.grad(weighted[0].sum(), weights, materialize_grads=True)[0]
