r"""Analytic-Precond with coefficients for every channel or element (docs/method.md, section 14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import check_choice, check_finite, check_levels, check_tensor
from ..interpolation import splines
from ..interpolation.element_table import ElementTable
from ..interpolation.splines import Array
from ..statistics.teacher_statistics import TeacherStatistics
from .analytic import EulerStepPreconditioning, check_statistics, theta_of

_NOISE = "noise of few samples, or of a teacher's half precision: take more samples, a teacher in float32, or"
_ADVICE = {"element": f"{_NOISE} per='channel'.", "channel": f"{_NOISE} AnalyticPreconditioning."}
_ADVICE_ON_TABLES = "check sign and scale (s multiplies d lambda, with lambda = -ln t; l is between 0 and 1)."


class PerElementPreconditioning(EulerStepPreconditioning):
    r"""`AnalyticPreconditioning` with $l_{t,i}$ and $S_{t,i}$ of each element i of a sample, or of each channel.

    $$x_{s,i} = c_{skip,i}(t, s)\, x_{t,i} + c_{out,i}(t, s)\, D_i(x_t, t)$$

    with the same formulas for each i. Data with independent Gaussian elements are carried to any level exactly by the
    forward form before any training, and by the backward form with the teacher's output at the jump's end.

    Called with levels, it returns coefficients of shape ``(*levels, *shape)``, where ``shape`` is a sample's or
    ``(C, 1, 1)``. A module without parameters: its tables travel in the state dict, move with ``.to(device)``, ignore
    ``.half()``. Differentiable in t and s. A jump costs what section 14 of docs/method.md says.

    Args:
        statistics: The teacher's statistics, made with ``per_element=True``.
        discretization: ``"backward"`` or ``"forward"``.
        per: ``"element"`` or ``"channel"``: what has coefficients of its own.
        theta: A number in [0, 1] instead of a discretization.
        sigma_data: Standard deviation of the data, for `on_network`.

    Raises:
        TypeError: If ``statistics`` is something else.
        ValueError: If there are no statistics per element, an option is unknown, or the coefficients make a jump
            singular (the error names the level and the element).

    Examples:
        >>> from analytic_precond import GaussianDenoiser, estimate_statistics
        >>> variances = torch.tensor([1.0, 0.04])
        >>> data = variances.sqrt() * torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
        >>> stats = estimate_statistics(GaussianDenoiser(variances), data, per_element=True, num_samples=512,
        ...     progress=False)
        >>> precond = PerElementPreconditioning(stats, "forward")
        >>> D = variances / (variances + 1)  # of ones
        >>> precond.jump(torch.ones(1, 2), D[None], 1.0, 0.5)  # sqrt((c + 0.25) / (c + 1))
        tensor([[0.7906, 0.5281]])
    """

    def __init__(
        self,
        statistics: TeacherStatistics,
        discretization: str = "backward",
        *,
        per: str = "element",
        theta: float | None = None,
        sigma_data: float = 0.5,
    ) -> None:
        check_statistics(statistics, type(self))
        check_choice(per, ("element", "channel"), "per")
        elements = statistics.elements
        if elements is None:
            raise ValueError(
                "statistics must hold sums per element, got none: call estimate_statistics with per_element=True."
            )
        if per == "channel":
            elements = elements.reduce(per)
        theta = theta_of(discretization, theta)
        levels, s_method = statistics.levels.numpy(), elements.s_method
        l, g_rms, s = (_rows(v) for v in (elements.l, elements.g_rms, elements.s))

        def ln_S(some: slice) -> Any:
            return splines.log_scale_spline(levels, g_rms[some], s[some], s_method)

        table = ElementTable(levels, l, ln_S, elements.shape, _ADVICE[per])
        self._build(table, statistics.header.sample_shape, theta, sigma_data, _ADVICE[per])

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
    ) -> PerElementPreconditioning:
        """Build the preconditioning from tables of the coefficients, as `AnalyticPreconditioning.from_coefficients`.

        ``l`` has the shape ``(K, *shape)``: a sample's shape, with 1 where all share a coefficient; ``s`` has that of
        ``l``, or one that broadcasts with it.

        Returns:
            The preconditioning, for jumps between ``levels[0]`` and ``levels[-1]``.

        Raises:
            TypeError: If a table is not a floating-point tensor.
            ValueError: If tables do not fit together, are empty or not finite, or as for the constructor.
        """
        check_levels(levels)
        for name, values in (("l", l), ("s", s)):
            check_tensor(values, name)
            if values.ndim < 2 or len(values) != len(levels) or values.ndim != l.ndim:
                raise ValueError(
                    f"{name} must be of shape (levels, *shape) with {len(levels)} levels, got {tuple(values.shape)}: "
                    f"AnalyticPreconditioning takes tables of one value per level."
                )
            check_finite(values, name)
        try:
            l, s = torch.broadcast_tensors(l, s)
        except RuntimeError as error:
            raise ValueError(f"l and s must broadcast, got shapes {tuple(l.shape)} and {tuple(s.shape)}.") from error
        if l.numel() == 0:
            raise ValueError(f"l and s must hold coefficients of some elements, got shape {tuple(l.shape)}.")
        theta = theta_of(discretization, theta)
        sigma = levels.detach().cpu().double().numpy()
        l_rows, s_rows = (_rows(v.detach().cpu().double()) for v in (l, s))

        def ln_S(some: slice) -> Any:
            return splines.spline(sigma, s_rows[some]).antiderivative()

        table = ElementTable(sigma, l_rows, ln_S, tuple(l.shape[1:]), _ADVICE_ON_TABLES)
        sample_shape = tuple(None if size == 1 else size for size in table.shape)
        self = cls.__new__(cls)
        self._build(table, sample_shape, theta, sigma_data, _ADVICE_ON_TABLES)
        return self

    def _build(
        self, table: ElementTable, sample_shape: tuple[int | None, ...], theta: float, sigma_data: float, advice: str
    ) -> None:
        super().__init__(table, theta, sigma_data, table.edges[0, 1:, None], advice)
        self.sample_shape = sample_shape  # None for any size

    @property
    def shape(self) -> tuple[int, ...]:
        """The coefficients' shape at one pair of levels: a sample's, with 1 where all share a coefficient."""
        return self.coefficient_shape

    def _check_sample(self, x_t: Tensor) -> None:
        if not self._fits(x_t.shape[1:]):
            expected = ", ".join(["B", *("any" if size is None else str(size) for size in self.sample_shape)])
            advice = (
                "add a batch dimension, x_t[None]."
                if self._fits(x_t.shape)
                else "coefficients belong to elements, estimate statistics of data of this shape."
            )
            raise ValueError(f"x_t must be of shape ({expected}), got {tuple(x_t.shape)}: {advice}")

    def _fits(self, shape: tuple[int, ...]) -> bool:
        own = self.sample_shape
        return len(own) == len(shape) and all(n is None or n == m for n, m in zip(own, shape, strict=True))


def _rows(values: Tensor) -> Array:
    """Return a view of tables of shape ``(K, *shape)`` with one row per element, ``(n, K)``."""
    return values.reshape(len(values), -1).T.numpy()
