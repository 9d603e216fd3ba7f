r"""Least-squares jumps that ask the network at a lower noise level (docs/method.md, section 12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._conditions import Condition
from ..data.arguments import default_levels
from ..data.memory import BatchSize
from ..interpolation.spline_table import SplineTable
from ..teachers.denoiser import Denoiser
from .fitted import FitFile, FittedPreconditioning
from .follow import FitHeader, FitRun
from .jump_regression import JumpTable
from .trajectory_moments import shift_moments

_NUM_LEVELS = 20
_SMALLEST_RATIO, _LARGEST_RATIO = 1.05, 2.0  # of neighbouring levels: 20 from 80 to 0.002 have 1.75


class ShiftedPreconditioning(FittedPreconditioning):
    r"""The best jumps of a student that starts as a copy of its teacher, asked at the best noise level q(t, s).

    $$(c_{skip}, c_{out}, q)(t, s) = \arg\min E\, \| x_s - c_{skip}\, x_t - c_{out}\, D(\kappa x_t, q) \|^2, \qquad
      \kappa = \sqrt{(q^2 + \sigma_{data}^2) / (t^2 + \sigma_{data}^2)}$$

    over the teacher's own ODE, with $s \le q \le t$ and q smooth in (t, s). Inside EDM's denoiser the network gets the
    same input $c_{in}(t)\, x_t$ and is told $c_{noise}(q)$. On a long jump the teacher at t says hardly more than the
    mean of the data; told a lower level, it takes the same noise for an image and denoises that, which is much nearer
    to where its ODE goes. Made by `ShiftedPreconditioning.fit` or `ShiftedPreconditioning.load`.

    Students, diagnostics and samplers of this library ask as they should. In other code write
    ``x_s = precond.jump(x_t, D(*precond.query(x_t, t, s)), t, s)``.

    For s = t also q = t, so boundary and read-out are those of any jump. Where D is a multiple of x, as for white
    Gaussian data, the jump is an Euler step's c_out with the c_skip that makes it exact.

    A module without parameters: its tables travel in the state dict (and fit any other instance of as many levels and
    the same ``sigma_data``), move with ``.to(device)`` and ignore ``.half()``. Differentiable in t and s.

    Examples:
        >>> from analytic_precond import GaussianDenoiser
        >>> data = 0.5 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> precond = ShiftedPreconditioning.fit(GaussianDenoiser(0.25), data, num_trajectories=64, progress=False)
        >>> x_t, t, s = torch.tensor([[1.0]]), torch.tensor([1.0]), torch.tensor([0.5])
        >>> precond.jump(x_t, GaussianDenoiser(0.25)(*precond.query(x_t, t, s)), t, s)  # sqrt(0.5 / 1.25)
        tensor([[0.6325]])
    """

    told_lower_level = True

    def __init__(self, table: JumpTable, header: FitHeader, sigma_data: float, shift: SplineTable) -> None:
        super().__init__(table, header, sigma_data)
        self.shift = shift  # ln(t / q) / ln(t / s)

    @classmethod
    def fit(  # noqa: D417  # the other arguments are described once
        cls,
        denoiser: Denoiser,
        data: object,
        levels: Tensor | None = None,
        num_trajectories: int = 512,
        batch_size: BatchSize = 256,
        seed: int = 0,
        sigma_data: float = 0.5,
        progress: bool = True,
        *,
        condition: Callable[..., Condition] | None = None,
        device: torch.device | str | None = None,
        description: str | None = None,
    ) -> ShiftedPreconditioning:
        r"""Follow the teacher's trajectories, ask it at all lower levels on the way, and regress.

        With K levels a trajectory takes ``6 K - 5 + K (K - 1) / 2`` evaluations of the teacher: 305 by default, 156,160
        in all, and about ``12 K batch_size d`` bytes of memory (24 where the teacher or the data are float64).

        Other arguments, and errors, are those of `LeastSquaresPreconditioning.fit`.

        Args:
            levels: Decreasing noise levels to regress at. Neighbours are at most a factor of 2 apart, and at least one
                of 1.05: coarser tables are not accurate between the levels, finer ones ill-conditioned. Default: 20
                from 80 to 0.002, uniform in lambda, inside what the teacher knows.
            sigma_data: Standard deviation of the data: the same as the student's, who scales by it.

        Returns:
            The preconditioning, on the CPU, for jumps between ``levels[0]`` and ``levels[-1]``.
        """
        return super().fit(
            denoiser, data, default_levels(denoiser, _NUM_LEVELS) if levels is None else levels, num_trajectories,
            batch_size, seed, sigma_data, progress, condition=condition, device=device, description=description,
        )  # fmt: skip

    @classmethod
    def _regressed(cls, run: FitRun) -> ShiftedPreconditioning:
        _check_spacing(run.trajectories.levels)
        moments = shift_moments(run.trajectories, run.sigma_data)

        from .shift_regression import regress_shifted  # imports scipy's splines and optimisers: slow, only needed here

        a, b, rate = regress_shifted(moments, run.header.precision, run.sigma_data)
        table = JumpTable.of(moments.levels, a[None], b[None])
        control = SplineTable.control_points(moments.levels, rate[None])
        shift = SplineTable(torch.from_numpy(moments.levels), torch.from_numpy(control))
        header = replace(run.header, num_trajectories=int(moments.counts.sum()))
        return cls(table, header, run.sigma_data, shift)

    def network_level(self, t: Tensor, s: Tensor | float) -> Tensor:
        """Return the noise level, from s to t, that the network is told on a jump; NaN where they are out of range."""
        dtype = torch.promote_types(t.dtype, s.dtype if isinstance(s, Tensor) else t.dtype)
        t, s = self._levels(t, s)
        rate = self.shift(t, s)[0].clamp(0, 1)
        q: Tensor = t * (-rate * ((t - s) / s).log1p()).exp()
        return q.to(dtype)

    def _own_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {}, {"shift": self.shift.state_dict()["control"]}  # in float64, whatever the device computes with

    @classmethod
    def _parts_from(cls, file: FitFile, table: JumpTable, header: FitHeader) -> tuple[Any, ...]:
        K = len(table.levels)
        return (SplineTable(table.levels, file.tensor("shift", (K, K, 1), torch.float64)),)


def _check_spacing(levels: Tensor) -> None:
    """Refuse levels so far apart, or so close, that a table of them is not accurate between them."""
    ratios = levels[:-1] / levels[1:]
    if bool((ratios > _LARGEST_RATIO).any()) or bool((ratios < _SMALLEST_RATIO).any()):
        raise ValueError(
            f"neighbouring levels must be at least a factor of {_SMALLEST_RATIO} and at most one of {_LARGEST_RATIO} "
            f"apart, got {ratios.min():.4g} to {ratios.max():.4g}: take log_noise_levels(20)."
        )
