r"""Jumps by least squares along the teacher's own trajectories (docs/method.md, section 10)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..preconditionings.base import Scalings
from .fitted import FitFile, FittedPreconditioning
from .follow import FitHeader, FitRun
from .jump_regression import JumpTable, regress_samples
from .trajectory_moments import trajectory_moments


class LeastSquaresPreconditioning(FittedPreconditioning):
    r"""The best jumps of a student that starts as a copy of its teacher.

    $$(c_{skip}, c_{out})(t, s) = \arg\min E\, \| x_s - c_{skip}\, x_t - c_{out}\, D(x_t, t) \|^2$$

    over the teacher's own ODE. Neither $l_t$ nor $S$ is needed. Made by `LeastSquaresPreconditioning.fit` or
    `LeastSquaresPreconditioning.load`.

    Where D is a multiple of x, as for white Gaussian data, only a combination of the two coefficients is determined:
    then $c_{out} = 1 - s/t$, that of an Euler step, and c_skip makes up for it. c_out is never less than half of that.

    A module without parameters: its tables travel in the state dict (and fit any other instance of as many levels),
    move with ``.to(device)`` and ignore ``.half()``. Differentiable in t and s.

    ``standard_errors`` has those of c_skip and c_out for all pairs of ``levels``, t first, of shapes ``(K, K)``.

    Examples:
        >>> from analytic_precond import GaussianDenoiser
        >>> data = 0.5 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> precond = LeastSquaresPreconditioning.fit(GaussianDenoiser(0.25), data, num_trajectories=64, progress=False)
        >>> D = torch.tensor([[0.2]])  # 0.25 / (0.25 + 1) of x
        >>> precond.jump(torch.tensor([[1.0]]), D, 1.0, 0.5)  # sqrt((0.25 + 0.25) / (0.25 + 1))
        tensor([[0.6325]])
    """

    def __init__(self, table: JumpTable, header: FitHeader, sigma_data: float, standard_errors: Scalings) -> None:
        super().__init__(table, header, sigma_data)
        self.standard_errors = standard_errors

    @classmethod
    def _regressed(cls, run: FitRun) -> LeastSquaresPreconditioning:
        moments = trajectory_moments(run.trajectories)
        (a, b), (a_error, b_error) = regress_samples(moments, run.header.precision)
        tau = np.abs(1 - moments.levels / moments.levels[:, None])
        # infinite ones, of a single trajectory, are 0 on the diagonal too
        errors = (np.multiply(tau, e[0], out=np.zeros_like(tau), where=tau > 0) for e in (b_error, a_error))
        standard_errors = Scalings(*(torch.from_numpy(error) for error in errors))
        table = JumpTable.of(moments.levels, a, b)
        header = replace(run.header, num_trajectories=int(moments.counts.sum()))
        return cls(table, header, run.sigma_data, standard_errors)

    def _own_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c_skip, c_out = self.standard_errors
        return {}, {"c_skip_stderr": c_skip, "c_out_stderr": c_out}

    @classmethod
    def _parts_from(cls, file: FitFile, table: JumpTable, header: FitHeader) -> tuple[Any, ...]:
        K, names = len(table.levels), ("c_skip_stderr", "c_out_stderr")  # infinite where there was one trajectory
        errors = Scalings(*(file.tensor(name, (K, K), torch.float64, finite=False) for name in names))
        if not all(bool((error >= 0).all()) for error in errors):
            raise ValueError("standard errors must not be negative or NaN")
        return (errors,)
