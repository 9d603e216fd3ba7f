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
from .._precision import wide_dtype
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


class Point(NamedTuple):
    """A point of the teacher's ODE."""

    t: Tensor  # its noise level (B,), in the wide dtype
    x: Tensor  # the noisy data (B, ...)
    bend: Tensor  # w = x - x_T - (t - T) / T (x_T - D_T): x beyond the Euler step from the beginning at level T
    denoised: Tensor  # the teacher's output D(x, t)


def trajectory(denoiser: Denoiser, start: Start, levels: Sequence[float]) -> Iterator[Point]:
    """Yield the points at each of the decreasing levels, in the dtype of the start."""
    velocity = Velocity.of(denoiser, start.x.to(start.dtype), start.condition)
    grid = start.x.new_tensor(levels, dtype=wide_dtype(start.x.device))
    yield from solution(velocity, start.x, list(grid[:, None].expand(-1, len(start.x))))


def solution(velocity: Velocity, x: Tensor, levels: Sequence[Tensor]) -> Iterator[Point]:
    r"""Yield the points at each level, of shape ``(B,)`` and in the wide dtype; x's dtype is computed in.

    What is followed is w, the bend, by $dw / dt = (w - (D - D_T)) / t$ from 0. These are the same steps, as those on x
    are exact along straight lines. But w is as small as the change of D, and float32 rounds it so. Of x itself, at
    t = 80, it would leave an error of 5e-6, which a jump to t = 79 divides by its c_out of 0.01.
    """
    t, *lower = levels
    begin = here = Point(t, x, torch.zeros_like(x), velocity.denoised(x, t).clone())

    def point(w: Tensor, t: Tensor) -> Point:
        x_t = torch.lerp(begin.denoised, x, _factor(t / begin.t, x)) + w
        return Point(t, x_t, w, velocity.denoised(x_t, t))

    def slope(point: Point) -> Tensor:
        return (point.bend - (point.denoised - begin.denoised)) * _factor(1 / point.t, x)

    yield here
    for s in lower:
        slopes = [slope(here)]  # the seventh stage of one step is the first of the next
        for place, weights in zip(_PLACES[1:], _STAGES[1:], strict=True):
            slopes.append(slope(point(_along(here.bend, s - t, weights, slopes), t + place * (s - t))))
        end = point(_along(here.bend, s - t, _STEP, slopes), s)
        here, t = end._replace(denoised=end.denoised.clone()), s  # a teacher may use its memory again
        yield here


def _along(w: Tensor, dt: Tensor, weights: Sequence[float], slopes: Sequence[Tensor]) -> Tensor:
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            w = torch.addcmul(w, _factor(dt * weight, w), slope)
    return w


def _factor(values: Tensor, x: Tensor) -> Tensor:
    """Return one number per sample, shaped to multiply x, in its dtype."""
    return values.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
