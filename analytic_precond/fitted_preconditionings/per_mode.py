r"""Least-squares jumps with coefficients of their own for every mode of a basis (docs/method.md, section 11)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .._conditions import Condition
from .._precision import wide_dtype, without_autocast
from ..data.arguments import TeacherPass
from ..data.memory import BatchSize
from ..preconditionings.base import Scalings
from ..teachers.denoiser import Denoiser
from .bases import CosineBasis, MatrixBasis, OrthonormalBasis, check_basis, choose_basis, tie_modes
from .fitted import NUM_LEVELS, FitFile, FittedPreconditioning
from .follow import FitHeader, FitRun, fit_run
from .jump_regression import JumpTable, regress_groups
from .trajectory_moments import trajectory_moments

# of trajectories; their spread tells what of a mode's own c_out is noise. Sums of 256 groups and 40 levels take 52 MB
_BLOCKS = 8


class PerModePreconditioning(FittedPreconditioning):
    r"""The best jumps with one pair of coefficients for each mode k of an orthonormal basis Q.

    $$x_s = Q\, \big( c_{skip} \odot Q^T x_t + c_{out} \odot Q^T D(x_t, t) \big), \qquad
      (c_{skip}, c_{out})_k = \arg\min E\, \big( x_{s,k} - c_{skip,k}\, x_{t,k} - c_{out,k}\, D_k \big)^2$$

    over the teacher's own ODE. Data whose modes are independent Gaussians are carried to any level exactly, before any
    training. Made by `PerModePreconditioning.fit` or `PerModePreconditioning.load`.

    A mode's c_out is drawn to that of `LeastSquaresPreconditioning` as far as sampling noise hides the difference, or D
    is a multiple of x there; its c_skip makes up for it. c_out is never less than half of an Euler step's $1 - s/t$.

    Called with levels, it returns coefficients of shape ``(*levels, *mode_shape)``; for ``"dct"`` the modes have the
    sample's shape, the lowest frequency first, else they are numbered. A module without parameters: tables and basis
    travel in the state dict, move with ``.to(device)`` and ignore ``.half()``. Differentiable in t and s.

    ``groups`` has the number of the group of each mode, whose coefficients it shares.

    Examples:
        >>> from analytic_precond import GaussianDenoiser
        >>> variances = torch.tensor([[1.0, 0.25], [0.04, 0.0]])
        >>> data = variances.sqrt() * torch.randn(64, 2, 2, generator=torch.Generator().manual_seed(0))
        >>> precond = PerModePreconditioning.fit(
        ...     GaussianDenoiser(variances), data, num_trajectories=64, basis=torch.eye(4), progress=False
        ... )
        >>> D = variances / (variances + 1)  # of ones
        >>> precond.jump(torch.ones(1, 2, 2), D[None], 1.0, 0.5)  # sqrt((c + 0.25) / (c + 1))
        tensor([[[0.7906, 0.6325], [0.5281, 0.5000]]])
    """

    groups: Tensor

    def __init__(
        self, table: JumpTable, header: FitHeader, sigma_data: float, basis: OrthonormalBasis, groups: Tensor
    ) -> None:
        super().__init__(table, header, sigma_data)
        self.basis = basis
        self.register_buffer("groups", groups)

    @classmethod
    def fit(  # noqa: D417  # the other arguments are described once
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
        basis: str | Tensor = "dct",
        condition: Callable[..., Condition] | None = None,
        device: torch.device | str | None = None,
        description: str | None = None,
    ) -> PerModePreconditioning:
        r"""Follow the teacher's trajectories, and regress mode by mode.

        Costs as many passes of the teacher as `LeastSquaresPreconditioning.fit`. The clean samples are held in memory,
        to choose the basis and to group modes: those of more than 256 (in a channel, of 256 divided by the number of
        channels) share coefficients where their variances in the data are close.

        Other arguments, and errors, are those of `LeastSquaresPreconditioning.fit`.

        Args:
            basis: ``"dct"``, the cosine transform of images ``(C, H, W)`` or ``(H, W)`` of any size, across channels
                too where that separates the data's modes better, as it does red, green and blue; ``"pca"``, the
                eigenvectors of the data's covariance, for up to 4096 elements; or orthonormal columns of shape
                ``(d, d)``.

        Returns:
            The preconditioning, on the CPU, for jumps between ``levels[0]`` and ``levels[-1]``.
        """
        check_basis(basis)
        asked = TeacherPass(denoiser, data, levels, NUM_LEVELS, batch_size, seed, condition, device, description)
        with fit_run(asked, num_trajectories, sigma_data, progress) as run:
            return cls._regressed(run, basis)

    @classmethod
    def _regressed(cls, run: FitRun, basis: str | Tensor = "dct") -> PerModePreconditioning:
        trajectories, samples = run.trajectories, run.hold()
        hidden = trajectories.levels[-1].item() ** 2  # variances that the least noise hides
        modes, variances = choose_basis(basis, samples, hidden)
        groups = tie_modes(variances, hidden)
        members = [(groups == g).nonzero()[:, 0].to(samples[0].device) for g in range(int(groups.max()) + 1)]
        blocks = min(_BLOCKS, trajectories.num)
        wide = wide_dtype(samples[0].device)  # small modes stand beside large ones in a sample's rounding
        moments = trajectory_moments(trajectories, blocks, members, lambda x: modes.to_modes(x.to(wide)).flatten(1))
        table = JumpTable.of(moments.levels, *regress_groups(moments, run.header.precision), torch.float32)
        header = replace(run.header, num_trajectories=int(moments.counts.sum()))
        return cls(table, header, run.sigma_data, modes.cpu(), groups)

    @property
    def coefficient_shape(self) -> tuple[int, ...]:
        """The modes' shape."""
        return self.basis.mode_shape

    def coefficients(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the modes' coefficients for valid levels. Shape ``(*t.shape, *mode_shape)``."""
        by_group = (c.movedim(0, -1) for c in self.table.jumps(t, s))
        c_skip, c_out = (c.index_select(-1, self.groups).unflatten(-1, self.basis.mode_shape) for c in by_group)
        return Scalings(c_skip, c_out)

    def _to_modes(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            return self.basis.to_modes(x)

    def _from_modes(self, modes: Tensor) -> Tensor:
        with without_autocast(modes.device):
            return self.basis.from_modes(modes)

    def _combine(self, scalings: Scalings, x: Tensor, D: Tensor) -> Tensor:
        # all modes as the first, and the others' differences: s = t leaves x as it is, to the bit
        first = [c.flatten(-len(self.coefficient_shape))[..., :1] for c in scalings]
        own_skip, own_out = ((c - self._per_jump(f[..., 0])).to(x.dtype) for c, f in zip(scalings, first, strict=True))
        first_skip, first_out = (f.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) for f in first)
        own = own_skip * self._to_modes(x) + own_out * self._to_modes(D)
        return first_skip * x + first_out * D + self._from_modes(own)

    def _check_sample(self, x_t: Tensor) -> None:
        if x_t.shape[1:] != self.basis.sample_shape:
            raise ValueError(
                f"x_t must hold samples of shape {self.basis.sample_shape}, got x_t of shape {tuple(x_t.shape)}: modes "
                f"belong to one size, fit another preconditioning for others."
            )

    def _own_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if isinstance(self.basis, CosineBasis):
            return {"basis": "dct", "mix_channels": self.basis.mix_channels}, {"groups": self.groups}
        return {"basis": "matrix"}, {"groups": self.groups, "matrix": self.basis.state_dict()["matrix"]}

    @classmethod
    def _parts_from(cls, file: FitFile, table: JumpTable, header: FitHeader) -> tuple[Any, ...]:
        size = math.prod(header.sample_shape)
        groups = file.tensor("groups", (size,), torch.int64)
        if not bool(((groups >= 0) & (groups < table.num_jumps)).all()):
            raise ValueError(f"groups must be from 0 to {table.num_jumps - 1}, got {groups.min()} to {groups.max()}")
        basis: OrthonormalBasis
        if file.header.get("basis") == "dct":
            basis = CosineBasis(header.sample_shape, file.header.get("mix_channels") is True)
        else:
            basis = MatrixBasis(header.sample_shape, file.tensor("matrix", (size, size), torch.float64))
        x = torch.ones(1, *header.sample_shape, dtype=torch.float64, device="cpu")
        if not bool(((basis.from_modes(basis.to_modes(x)) - x).abs() <= 1e-5 * size).all()):
            raise ValueError("matrix must have orthonormal columns")
        return basis, groups
