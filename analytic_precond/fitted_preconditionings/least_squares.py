r"""Jumps by least squares along the teacher's own trajectories (docs/method.md, section 10)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_positive
from ..data.memory import BatchSize
from ..preconditionings.base import Scalings
from ..statistics.moments import num_groups
from ..teachers.denoiser import Condition, Denoiser
from .fitted import FitHeader, FittedPreconditioning, expect
from .follow import measure_trajectories
from .jump_regression import regress_samples
from .jump_table import JumpTable
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

    Args:
        table: The coefficients.
        header: How they were fitted.
        sigma_data: Standard deviation of the data, for `on_network`.
        standard_errors: Standard errors of c_skip and c_out for all pairs of levels, t first. Shapes ``(K, K)``.

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
    def fit(
        cls,
        denoiser: Denoiser,
        data: object,
        levels: Tensor | None = None,
        num_trajectories: int = 2048,
        batch_size: BatchSize = 256,
        seed: int = 0,
        sigma_data: float = 0.5,
        progress: bool = True,
        *,
        condition: Callable[..., Condition] | None = None,
        device: torch.device | str | None = None,
        description: str | None = None,
    ) -> LeastSquaresPreconditioning:
        r"""Follow the teacher's trajectories, and regress.

        A trajectory starts from a data sample with noise, $x_0 + \sigma_{max} n$. With K levels it takes ``6 K - 5``
        evaluations of the teacher: 235 by default, 481,280 in all, and ``16 K batch_size d`` bytes of memory.

        Args:
            denoiser: The teacher, in eval mode: called as ``denoiser(x, t, **condition)`` with ``x`` of shape
                ``(B, ...)`` in its parameters' dtype, or the data's where it has none, and ``t`` of shape ``(B,)``.
            data: Clean data in the teacher's range: a tensor ``(N, ...)``, a Dataset, a DataLoader or an iterable of
                batches. A batch is a tensor or a tuple ``(x, label, ...)``. Reused with new noise where it is short.
            levels: Decreasing noise levels to regress at, shape ``(K,)``, which are also the steps of the ODE; jumps
                between any others are interpolated. Default: 40 from 80 to 0.002, uniform in lambda.
            num_trajectories: Number of trajectories.
            batch_size: Largest batch that the teacher sees. ``"auto"`` begins at 256 and halves it where memory runs
                out. It does not change the result, beyond rounding.
            seed: Seed of noise and data order; the same seed gives the same numbers. The global RNG is left as it was.
            sigma_data: Standard deviation of the data, for `on_network`.
            progress: Show a progress bar.
            condition: Turns what follows ``x`` in a batch into the teacher's keyword arguments, e.g.
                ``lambda label: {"class_labels": one_hot(label)}``. Without it, labels are ignored.
            device: Where the teacher runs. Default: the device of its parameters or buffers, else the data's.
            description: The teacher in words, for the file's header. Default: its name.

        Returns:
            The preconditioning, on the CPU, for jumps between ``levels[0]`` and ``levels[-1]``.

        Raises:
            TypeError: If an argument has the wrong type, or data are not floating-point.
            ValueError: If an argument is out of range, data are empty or not finite, or the teacher returns a wrong
                shape or a value that is not finite (the error names the level).
        """
        check_positive(sigma_data, "sigma_data")
        moments, header = measure_trajectories(
            denoiser, data, levels, num_trajectories, batch_size, seed, condition, device, description,
            lambda starts, levels, axes: trajectory_moments(
                denoiser, starts, levels, num_trajectories, num_groups(num_trajectories), *axes, progress, batch_size
            ),
        )  # fmt: skip
        (a, b), (a_error, b_error) = regress_samples(moments, header.precision)
        tau = np.abs(1 - moments.levels / moments.levels[:, None])
        errors = (np.multiply(tau, e[0], out=np.zeros_like(tau), where=tau > 0) for e in (b_error, a_error))
        standard_errors = Scalings(*(torch.from_numpy(error) for error in errors))
        return cls(JumpTable.of(moments.levels, a, b), header, sigma_data, standard_errors)

    def coefficients(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients for valid levels."""
        c_skip, c_out = self.table.jumps(t, s)
        return Scalings(c_skip[0], c_out[0])

    def _to_file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        c_skip, c_out = self.standard_errors
        return {}, {"c_skip_stderr": c_skip, "c_out_stderr": c_out}

    @classmethod
    def _from_file(
        cls,
        table: JumpTable,
        fit: FitHeader,
        sigma_data: float,
        header: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> LeastSquaresPreconditioning:
        K = len(table.levels)
        names = ("c_skip_stderr", "c_out_stderr")  # infinite where there was one trajectory
        errors = Scalings(*(expect(tensors, name, (K, K), torch.float64, finite=False) for name in names))
        if not all(bool((error >= 0).all()) for error in errors):
            raise ValueError("standard errors must not be negative or NaN")
        return cls(table, fit, sigma_data, errors)
