r"""Analytic-Precond: c_skip(t, s) and c_out(t, s) from a teacher's statistics (docs/method.md, sections 2 and 3).

A table holds the integrals of l and s between any two levels; a jump is an Euler step written in them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_choice, check_finite, check_levels, check_tensor, may_read
from ..interpolation import splines
from ..interpolation.element_table import ElementTable, element_name
from ..interpolation.integral_table import Function, IntegralTable
from ..interpolation.splines import Array
from ..statistics.teacher_statistics import TeacherStatistics
from .base import Preconditioning, Scalings

_AT_ONCE = 4096  # levels: a CPU's cache then holds what is computed, which halves the time of 65,536
_ADVICE = "a negative l is noise, take more samples or clamp the table at 0."


class EulerStepPreconditioning(Preconditioning):
    """Euler steps between the levels of a table of integrals: of one pair of functions, or of each element's.

    h is taken at theta between forward (0) and backward (1). The denominator is checked at the levels s of ``targets``,
    some at a time, ``(times, some)``; ``advice`` is what to do about coefficients that are refused.
    """

    theta: Tensor

    def __init__(
        self, integrals: IntegralTable | ElementTable, theta: float, sigma_data: float, targets: Tensor, advice: str
    ) -> None:
        super().__init__(sigma_data)
        self.integrals = integrals
        self.register_buffer("theta", torch.tensor(theta, dtype=torch.float64, device="cpu"))
        self.implicit = float(theta)  # the same for Python, so that a backward step skips what it does not need
        self._check_denominator(targets, advice)

    @property
    def coefficient_shape(self) -> tuple[int, ...]:
        """The coefficients' shape at one pair of levels: a sample's, with 1 where all share a coefficient."""
        return self.integrals.shape

    @property
    def sigma_max(self) -> float:
        """The noisiest level of the statistics."""
        return self.integrals.sigma_max

    @property
    def sigma_min(self) -> float:
        """The cleanest level of the statistics."""
        return self.integrals.sigma_min

    def coefficients(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients for valid levels (docs/method.md, section 3)."""
        if may_read(t) and t.numel() > _AT_ONCE:
            pieces = zip(t.flatten().split(_AT_ONCE), s.flatten().split(_AT_ONCE), strict=True)
            whole = (torch.cat(parts) for parts in zip(*(self.coefficients(*piece) for piece in pieces), strict=True))
            return Scalings(*(c.reshape((*t.shape, *self.coefficient_shape)) for c in whole))
        shape = (*t.shape, *self.coefficient_shape)
        implicit = self.implicit
        l_t, l_s, L_ratio, S_ratio, r = self.integrals(t, s, with_S=implicit < 1)
        c_skip, c_out = L_ratio, r
        if S_ratio is not None:
            explicit = (1 - implicit) * S_ratio
            c_skip, c_out = c_skip - explicit * l_t * r, (explicit + implicit) * r
        if implicit > 0:
            denominator = 1 + (l_s if implicit == 1 else implicit * l_s) * r
            c_skip, c_out = c_skip / denominator, c_out / denominator
        return Scalings(c_skip.reshape(shape), c_out.reshape(shape))

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.implicit = self.theta.item()

    def _check_denominator(self, targets: Tensor, advice: str) -> None:
        """Refuse coefficients with a vanishing denominator; r grows with t, so the longest jumps tell."""
        for s in targets:
            _, l_s, _, _, r = self.integrals(torch.full_like(s, self.sigma_max), s, with_S=False)
            denominator = 1 + self.implicit * l_s * r
            if not bool((denominator > 0).all()):
                worst = int(denominator.argmin())
                level, element = divmod(worst, l_s.numel() // len(s))
                where = f" in {element_name(element, self.integrals.shape)}" if l_s.ndim > s.ndim else ""
                raise ValueError(
                    f"l must keep the denominator 1 + theta l_s r positive, got {denominator.flatten()[worst]:.4g}"
                    f"{where} for the jump from {self.sigma_max:g} to {s[level]:.6g}, where l = "
                    f"{l_s.flatten()[worst]:.4g}: {advice}"
                )


class AnalyticPreconditioning(EulerStepPreconditioning):
    r"""The preconditioning that follows from a teacher's $l_t$ and $S_t$.

    With $\ln L = \int (1 - l)\, d\lambda$, $\ln S = \int s_t\, d\lambda$, $dN = L S\, d\lambda$ and
    $r = (N_s - N_t) / (L_s S_s)$:

    - backward (the paper's): $c_{out} = \dfrac{r}{1 + l_s r}$, $c_{skip} = \dfrac{L_t / L_s}{1 + l_s r}$,
    - forward: $c_{out} = r \dfrac{S_s}{S_t}$, $c_{skip} = \dfrac{L_t}{L_s} - l_t\, r \dfrac{S_s}{S_t}$,
    - any $\theta$ between them (1 backward, 0 forward): an Euler step with $(1 - \theta) h_t + \theta h_s$,
      where $h = g / S$.

    A module without parameters: its tables travel in the state dict (and fit any other instance), move with
    ``.to(device)`` and ignore ``.half()``. Differentiable in t and s.

    Args:
        statistics: The teacher's statistics.
        discretization: ``"backward"`` or ``"forward"``.
        theta: A number in [0, 1] instead of a discretization.
        sigma_data: Standard deviation of the data, for `on_network`.

    Raises:
        TypeError: If ``statistics`` is something else.
        ValueError: If an option is unknown, or the coefficients make a jump singular (the error names the level).

    Examples:
        >>> levels, zero = torch.tensor([80.0, 1.0, 0.002]), torch.zeros(3)
        >>> precond = AnalyticPreconditioning.from_coefficients(levels, l=zero, s=zero)  # CTM's s/t, 1 - s/t
        >>> c_skip, c_out = precond(4.0, 1.0)
        >>> c_skip.item(), c_out.item()
        (0.25, 0.75)
    """

    def __init__(
        self,
        statistics: TeacherStatistics,
        discretization: str = "backward",
        *,
        theta: float | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        check_statistics(statistics, type(self))
        theta = theta_of(discretization, theta)
        tables = (statistics.levels, statistics.l, statistics.g_rms, statistics.s)
        levels, l, g_rms, s = (table.numpy() for table in tables)
        ln_S = splines.log_scale_spline(levels, g_rms, s, statistics.header.s_method)
        self._build(levels, splines.linear_coefficient(levels, l), ln_S, theta, sigma_data)

    @classmethod
    def from_coefficients(
        cls,
        levels: Tensor,
        l: Tensor,
        s: Tensor,
        discretization: str = "backward",
        *,
        theta: float | None = None,
        sigma_data: float = 0.5,
    ) -> AnalyticPreconditioning:
        """Build the preconditioning from tables of the coefficients.

        Args:
            levels: Decreasing noise levels. Shape ``(K,)``.
            l: Linear coefficients l_t, usually from near 0 at the noisiest level to near 1. Shape ``(K,)``.
            s: Scaling coefficients s_t (not their integral S), of either sign. Shape ``(K,)``. Nothing tells it from
                ``l``: swapped tables make another preconditioning without an error. Pass both by name.
            discretization: ``"backward"`` or ``"forward"``.
            theta: A number in [0, 1] instead of a discretization.
            sigma_data: Standard deviation of the data, for `on_network`.

        Returns:
            The preconditioning, for jumps between ``levels[0]`` and ``levels[-1]``.

        Raises:
            TypeError: If a table is not a floating-point tensor.
            ValueError: If tables do not fit together or are not finite, or as for the constructor.
        """
        check_levels(levels)
        for name, values in (("l", l), ("s", s)):
            check_tensor(values, name)
            if values.shape != levels.shape:
                raise ValueError(
                    f"{name} must hold one value per level, shape {tuple(levels.shape)}, got {tuple(values.shape)}."
                )
            check_finite(values, name)
        theta = theta_of(discretization, theta)
        sigma, l_table, s_table = (v.detach().cpu().double().numpy() for v in (levels, l, s))
        self = cls.__new__(cls)
        l_at, ln_S = splines.linear_coefficient(sigma, l_table), splines.spline(sigma, s_table).antiderivative()
        self._build(sigma, l_at, ln_S, theta, sigma_data)
        return self

    def _build(self, levels: Array, l: Function, ln_S: Function, theta: float, sigma_data: float) -> None:
        sigma_max, sigma_min = float(levels[0]), float(levels[-1])
        table = IntegralTable(sigma_max, sigma_min, l, ln_S)
        targets = np.unique(np.concatenate([levels, np.geomspace(sigma_min, sigma_max, 2048)])).clip(
            sigma_min, sigma_max
        )
        super().__init__(table, theta, sigma_data, torch.from_numpy(targets)[None], _ADVICE)

    def extra_repr(self) -> str:
        """Return what is printed of it: where between forward (0) and backward (1), and the range of levels."""
        return f"theta={self.implicit:g}, levels {self.sigma_max:g} to {self.sigma_min:g}"


def check_statistics(statistics: object, of: type) -> None:
    """Refuse anything but a teacher's statistics."""
    if not isinstance(statistics, TeacherStatistics):
        raise TypeError(
            f"statistics must be TeacherStatistics, got {type(statistics).__name__}: load a file with "
            f"TeacherStatistics.load, or use {of.__name__}.from_coefficients(levels, l, s)."
        )


def theta_of(discretization: str, theta: float | None) -> float:
    """Return the theta that is asked for, by name or as a number."""
    check_choice(discretization, ("backward", "forward"), "discretization")
    if theta is None:
        return 1.0 if discretization == "backward" else 0.0
    if discretization != "backward":
        raise ValueError(f"give a discretization or a theta, got {discretization!r} and theta = {theta}.")
    if not isinstance(theta, int | float) or not 0 <= theta <= 1:
        raise ValueError(f"theta must be a number from 0 (forward) to 1 (backward), got {theta!r}.")
    return theta
