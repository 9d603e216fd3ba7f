r"""The levels of a sampler as users write them: noise levels or grid indices, noisy to clean or the other way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral, Real

from torch import Tensor

from .._checks import check_callable, check_level, check_not_negative
from ..preconditionings.base import ROUNDING
from ..students.base import student_behind

Levels = Tensor | Sequence[float] | Sequence[int]


def resolve_levels(levels: Levels, grid: Levels | None = None, sigma_min: float = 0.002) -> list[float]:
    """Return noise levels (floats), or those at indices (ints) into a grid, from the noisiest to the cleanest.

    Published codes write the same levels differently: consistency models give ascending indices that end with the
    grid's last, diffusers descending ones without it, EDM's grids end with 0, which stands for ``sigma_min``. The last
    level is at least that, to float32 rounding, the first above it.

    Raises:
        TypeError: If an argument does not hold numbers, or both indices and noise levels.
        ValueError: If levels are missing, not monotone or out of range, or only one of indices and a grid is given.
    """
    check_not_negative(sigma_min, "sigma_min")
    numbers = _numbers(levels, "levels")
    integers = [isinstance(number, Integral) for number in numbers]
    if any(integers) and not all(integers):
        raise TypeError(
            f"levels must be noise levels (floats) or indices (ints), got both in {_shown(numbers)}: write 80.0 for a "
            f"noise level of 80."
        )
    if all(integers):
        numbers = _look_up(numbers, grid)
    elif grid is not None:
        raise ValueError(
            f"grid is for indices, got noise levels {_shown(numbers)}: leave grid out, or pass levels as ints."
        )
    values = _decreasing(numbers, "levels")
    if values[-1] == 0:
        values.pop()
        if not values or not is_cleanest(values[-1], sigma_min):
            values.append(float(sigma_min))
    if values[-1] < sigma_min * (1 - ROUNDING):
        raise ValueError(
            f"levels must not lie below sigma_min = {sigma_min:g}, the cleanest level that jumps reach, got "
            f"{values[-1]:.9g}: leave it out, or pass the student's sigma_min."
        )
    if is_cleanest(values[0], sigma_min):
        raise ValueError(
            f"levels must start above sigma_min = {sigma_min:g}, got {_shown(values)}: start with the level of x."
        )
    return values


def is_cleanest(level: float, sigma_min: float) -> bool:
    """Tell whether a level is ``sigma_min``, to float32 rounding: nothing is left to jump."""
    return level <= sigma_min * (1 + ROUNDING)


def check_jumps(student: object, jumps: Sequence[tuple[float, float]]) -> None:
    """Refuse jumps (t, s) that a student's preconditioning does not make; of a plain function nothing is known."""
    check_callable(student, "student", "student(x, t, s)")
    found = student_behind(student)
    for t, s in jumps:
        fault = None if found is None else found.fault(t, s)
        if fault is not None:
            raise ValueError(f"levels must lie in the student's range: {fault}")


def _numbers(values: Levels, name: str) -> list[float]:
    """Return a 1-D tensor or sequence as Python's or NumPy's numbers."""
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise ValueError(f"{name} must be 1-D, got a tensor of shape {tuple(values.shape)}: flatten it.")
        if values.is_floating_point():  # else they are indices
            check_level(values, name)
        values = values.tolist()
    try:
        numbers = list(values)
    except TypeError as error:
        raise TypeError(
            f"{name} must be a 1-D tensor or a sequence of numbers, got {values!r}: write [{values}]."
        ) from error
    if not numbers:
        raise ValueError(f"{name} must hold at least one level, got none.")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(
                f"{name} must hold floats or ints, got {number!r} ({type(number).__name__}): a tensor's number is its "
                f".item()."
            )
    return numbers


def _look_up(indices: list[float], grid: Levels | None) -> list[float]:
    """Return the grid's levels at the indices."""
    if grid is None:
        raise ValueError(
            f"levels must be noise levels where no grid is given, got the ints {_shown(indices)}: write 80.0, or pass "
            f"the grid that they are indices of, e.g. grid=preset('openai_cm').multistep_levels(40)."
        )
    values = _numbers(grid, "grid")
    _decreasing(values, "grid")
    for position, index in enumerate(indices):
        if not 0 <= index < len(values):
            raise ValueError(
                f"levels must be indices from 0 to {len(values) - 1}, the end of the grid, got {index} at position "
                f"{position}."
            )
    return [values[int(index)] for index in indices]


def _decreasing(numbers: list[float], name: str) -> list[float]:
    """Return noise levels from the largest to the smallest; refuse what is no level, disorder and duplicates."""
    for position, value in enumerate(numbers):
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{name} must be finite noise levels (sigma), not negative, got {float(value)} at position {position}."
            )
    values = [float(number) for number in numbers]
    ordered = values if values[0] >= values[-1] else values[::-1]
    for a, b in pairwise(ordered):
        if a <= b:
            raise ValueError(
                f"{name} must decrease or increase strictly, got {_shown(values)}, with {a:.9g} beside {b:.9g}: sort "
                f"them and drop duplicates."
            )
    return ordered


def _shown(values: list[float]) -> str:
    """Return a list for an error message, cut where it is long."""
    shown = ", ".join(f"{value:.9g}" for value in values[:8])
    return f"[{shown}{', ...' if len(values) > 8 else ''}]"
