r"""A teacher's own trajectories from the noisiest level down, accurate enough to regress on.

A step of Dormand and Prince's fifth-order method on $dx/dt = (x - D(x, t)) / t$ leads from each level to the next. A
regression of $x_s$ on $x_t$ and D divides by the little that D adds to $x_t$: in the Gaussian of docs/method.md,
section 8, with 40 levels, Heun steps leave relative errors of 7e-2 in c_out, fourth-order steps 8e-4, these 8e-6.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._conditions import Condition, rows_of
from ..noise_levels.per_sample import expand_to
from ..teachers.denoiser import Denoiser
from .steps import Velocity

# Dormand and Prince 1980: where slopes are taken, the weights of the earlier ones on the way to each, and of all in the
# step itself
_PLACES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)

_STAGES: tuple[tuple[float, ...], ...] = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)

_STEP = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)

PASSES_PER_STEP = len(_PLACES)


class Start(NamedTuple):
    """Where trajectories begin: noisy data ``(B, ...)`` at the noisiest level, in the dtype to compute in."""

    first: int  # index in the run
    x: Tensor
    dtype: torch.dtype  # what a teacher without parameters is called in
    condition: Condition

    def rows(self, rows: slice) -> Start:
        """Return the beginning of some of them."""
        if rows == slice(0, len(self.x)):  # mostly
            return self
        index = torch.arange(rows.start, rows.stop, device="cpu")
        condition = rows_of(self.condition, index, len(self.x))
        return Start(self.first + rows.start, self.x[rows], self.dtype, condition)


def trajectory(denoiser: Denoiser, start: Start, levels: Sequence[float]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x and x - D(x, t) at each of the decreasing levels. Shapes ``(B, ...)``, dtype of the start."""
    x = start.x
    velocity = Velocity.of(denoiser, x.to(start.dtype), start.condition)
    yield from solution(velocity, x, [x.new_full((len(x),), level) for level in levels])


def solution(velocity: Velocity, x: Tensor, levels: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield x and x - D(x, t) at each level, of shape ``(B,)`` and in x's dtype, which is computed in."""
    t, *lower = levels
    slopes = [velocity(x, t)]
    yield x, expand_to(t, x) * slopes[0]
    for s in lower:
        dt = expand_to(s - t, x)
        for place, weights in zip(_PLACES[1:], _STAGES[1:], strict=True):
            slopes.append(velocity(_along(x, dt, weights, slopes), t + place * (s - t)))
        x, t = _along(x, dt, _STEP, slopes), s
        slopes = [velocity(x, t)]  # the seventh stage of one step is the first of the next
        yield x, expand_to(t, x) * slopes[0]


def _along(x: Tensor, dt: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        x = x + dt * weight * slope
    return x
