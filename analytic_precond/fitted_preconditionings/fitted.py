r"""What preconditionings have in common that are tables fitted to a teacher's trajectories: fit, range, file."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._checks import check_finite, check_levels
from .._conditions import Condition
from .._files import read_tensors, write_tensors
from ..data.arguments import TeacherPass
from ..data.memory import BatchSize
from ..preconditionings.base import Preconditioning, Scalings
from ..teachers.denoiser import Denoiser
from .follow import FitHeader, FitRun, fit_run
from .jump_regression import JumpTable

Fitted = TypeVar("Fitted", bound="FittedPreconditioning")
NUM_LEVELS = 40  # docs/method.md, section 10: c_out is then good to 7e-6
_LARGEST = 1e30  # far beyond any coefficient, and far from where float32 ends


class FittedPreconditioning(Preconditioning):
    """A preconditioning made of a table of jumps, and how they were fitted."""

    def __init__(self, table: JumpTable, header: FitHeader, sigma_data: float) -> None:
        super().__init__(sigma_data)
        self.table = table
        self.header = header

    @classmethod
    def fit(
        cls: type[Fitted],
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
    ) -> Fitted:
        r"""Follow the teacher's trajectories, and regress.

        A trajectory starts from a data sample with noise, $x_0 + \sigma_{max} n$. With K levels it takes ``6 K - 5``
        evaluations of the teacher: 235 by default, 481,280 in all, and ``8 K batch_size d`` bytes of memory (16 where
        the teacher or the data are float64).

        Args:
            denoiser: The teacher, in eval mode: called as ``denoiser(x, t, **condition)`` with ``x`` of shape
                ``(B, ...)`` in its parameters' dtype, or the data's where it has none, and ``t`` of shape ``(B,)``.
            data: Clean data in the teacher's range: a tensor ``(N, ...)``, a Dataset, a DataLoader or an iterable of
                batches. A batch is a tensor or a tuple ``(x, label, ...)``. Reused with new noise where it is short.
            levels: Decreasing noise levels to regress at, shape ``(K,)``, which are also the steps of the ODE; jumps
                between any others are interpolated. Default: 40 from 80 to 0.002, uniform in lambda, inside what the
                teacher knows (`NetworkDenoiser.noise_range`). Levels outside that give a warning.
            num_trajectories: Number of trajectories.
            batch_size: Largest batch that the teacher sees. ``"auto"`` begins at 256 and halves it where memory runs
                out. It does not change the result, beyond rounding.
            seed: Seed of noise and data order; the same seed gives the same numbers. The global RNG is left as it was.
            sigma_data: Standard deviation of the data, for `on_network`.
            progress: Show a progress bar.
            condition: Turns what follows ``x`` in a batch into the teacher's keyword arguments, e.g.
                ``lambda label: {"class_labels": one_hot(label)}``. Without it, labels are ignored. What it
                returns follows the samples: see `common`.
            device: Where the teacher runs. Default: the device of its parameters or buffers, else the data's.
            description: The teacher in words, for the file's header. Default: its name.

        Returns:
            The preconditioning, on the CPU, for jumps between ``levels[0]`` and ``levels[-1]``.

        Raises:
            TypeError: If an argument has the wrong type, or data are not floating-point.
            ValueError: If an argument is out of range, data are empty or not finite, or the teacher returns a wrong
                shape or a value that is not finite (the error names the level).
        """
        asked = TeacherPass(denoiser, data, levels, NUM_LEVELS, batch_size, seed, condition, device, description)
        with fit_run(asked, num_trajectories, sigma_data, progress) as run:
            return cls._regressed(run)

    @classmethod
    @abstractmethod
    def _regressed(cls: type[Fitted], run: FitRun) -> Fitted:
        """Follow the teacher, regress, and tabulate."""

    @property
    def levels(self) -> Tensor:
        """The levels that were regressed at, decreasing, on the CPU. Shape ``(K,)``."""
        return self.table.levels.cpu()

    @property
    def sigma_max(self) -> float:
        """The noisiest level."""
        return self.table.sigma_max

    @property
    def sigma_min(self) -> float:
        """The cleanest level."""
        return self.table.sigma_min

    def coefficients(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients for valid levels."""
        c_skip, c_out = self.table.jumps(t, s)
        return Scalings(c_skip[0], c_out[0])

    def extra_repr(self) -> str:
        """Say what was fitted; part of ``repr``."""
        return (
            f"{self.header.description!r}, {self.header.num_trajectories} trajectories, {len(self.levels)} levels from "
            f"{self.sigma_max:g} to {self.sigma_min:g}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a file, by custom ``.safetensors``, as `TeacherStatistics.save` does: whole or not at all.

        ``header`` is no part of a state dict: one that was loaded is written under the description of this fit.
        """
        header, tensors = self._own_parts()
        header |= {**asdict(self.header), "sigma_data": self.sigma_data}
        table = self.table.state_dict()  # the float64 tables, whatever the device computes with
        tensors |= {"levels": table["levels"], "control": table["control"]}
        write_tensors(path, self._kind(), header, {name: tensor.cpu() for name, tensor in tensors.items()})

    @classmethod
    def load(cls: type[Fitted], path: str | os.PathLike[str]) -> Fitted:
        """Read a preconditioning written by `save`. Nothing in the file is executed.

        Returns:
            The preconditioning, on the CPU, its tables equal to the saved ones bit for bit.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is anything but a whole file of consistent tables.
        """
        file = FitFile(*read_tensors(path, cls._kind()))
        try:
            table, header, sigma_data = file.table(), FitHeader.of(file.header), file.header.get("sigma_data")
            if not isinstance(sigma_data, float):
                raise ValueError(f"header field 'sigma_data' must be a number, got {sigma_data!r}")
            return cls(table, header, sigma_data, *cls._parts_from(file, table, header))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"expected a {cls.__name__} in {path}, got parts that do not fit: {error!s:.500}"
            ) from error

    @classmethod
    def _kind(cls) -> str:
        return f"{cls.__name__} 1"  # what a file is, and the version of its layout

    @abstractmethod
    def _own_parts(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what else belongs in the file: header fields and tensors."""

    @classmethod
    @abstractmethod
    def _parts_from(cls, file: FitFile, table: JumpTable, header: FitHeader) -> tuple[Any, ...]:
        """Return the constructor's other arguments, from what `_own_parts` gave."""


class FitFile(NamedTuple):
    """What a file holds, nothing of it checked yet."""

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, finite: bool = True) -> Tensor:
        """Return a copy of a tensor, or raise a ValueError unless it has this shape and dtype, and is finite."""
        tensor = self.tensors.get(name)
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            got = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ValueError(f"{name} must be {dtype} of shape {shape}, got {got}")
        tensor = tensor.clone()  # before it is looked at: the file may change
        if finite:
            check_finite(tensor, name)
        return tensor

    def table(self) -> JumpTable:
        """Return the table of jumps, or raise a ValueError."""
        if not {"levels", "control"} <= self.tensors.keys():
            raise ValueError(f"tensors levels and control are needed, got {sorted(self.tensors)}")
        levels, control = self.tensors["levels"], self.tensors["control"]
        K, functions = levels.numel(), control.shape[-1:].numel()
        if functions % 2 or not functions:
            raise ValueError(f"control must hold a and b for each group, got {functions} functions")
        control = self.tensor(
            "control", (K, K, functions), torch.float32 if control.dtype == torch.float32 else torch.float64
        )
        if bool((control.abs() > _LARGEST).any()):
            raise ValueError(f"control must be coefficients of jumps, got {control.abs().max().item():.3g}")
        levels = self.tensor("levels", (K,), torch.float64)
        check_levels(levels)
        table = JumpTable(levels, control)
        check_finite(table.basis, "splines through levels")
        return table
