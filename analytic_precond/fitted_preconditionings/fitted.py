r"""What preconditionings have in common that are tables fitted to a teacher's trajectories: range, header, file."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._checks import check_finite, check_levels
from .._files import read_tensors, sample_shape_of, write_tensors
from ..preconditionings.base import Preconditioning
from .jump_table import JumpTable

Fitted = TypeVar("Fitted", bound="FittedPreconditioning")

_LARGEST = 1e30  # far beyond any coefficient, and far from where float32 ends


@dataclass(frozen=True)
class FitHeader:
    """How jumps were fitted; it travels in the file's header.

    Attributes:
        num_trajectories: Number of the teacher's trajectories.
        seed: Seed of noise and data order.
        sample_shape: Shape of one data sample.
        precision: The dtype of the teacher, e.g. ``"float32"``.
        description: The teacher, in words.
    """

    num_trajectories: int
    seed: int
    sample_shape: tuple[int, ...]
    precision: str
    description: str

    @staticmethod
    def of(header: Mapping[str, Any]) -> FitHeader:
        """Return the header that a file's says it is, checked.

        Args:
            header: The file's header.

        Returns:
            The fit's own part of it.

        Raises:
            ValueError: If a field is missing or of another kind.
        """
        kinds = {"num_trajectories": int, "seed": int, "sample_shape": list, "precision": str, "description": str}
        for name, kind in kinds.items():
            if type(header.get(name)) is not kind:
                raise ValueError(f"header field {name!r} must be of type {kind.__name__}, got {header.get(name)!r}")
        if header["num_trajectories"] < 1 or not 0 <= header["seed"] < 2**64:
            raise ValueError(f"there must be trajectories, of a seed below 2**64, got {header}")
        return FitHeader(**{name: header[name] for name in kinds} | {"sample_shape": sample_shape_of(header)})


class FittedPreconditioning(Preconditioning):
    """A preconditioning made of a table of jumps.

    Args:
        table: The coefficients.
        header: How they were fitted.
        sigma_data: Standard deviation of the data, for `on_network`.
    """

    def __init__(self, table: JumpTable, header: FitHeader, sigma_data: float) -> None:
        super().__init__(sigma_data)
        self.table = table
        self.header = header

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

    def extra_repr(self) -> str:
        """Say what was fitted; part of ``repr``."""
        return (
            f"{self.header.description!r}, {self.header.num_trajectories} trajectories, {len(self.levels)} levels from "
            f"{self.sigma_max:g} to {self.sigma_min:g}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, atomically: an existing file is replaced whole or not at all.

        Args:
            path: The file to write, by custom ``.safetensors``.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If ``path`` is a folder.
        """
        header, tensors = self._to_file()
        header |= {**asdict(self.header), "sigma_data": self.sigma_data}
        table = self.table.state_dict()  # the float64 tables, whatever the device computes with
        tensors |= {"levels": table["levels"], "control": table["control"]}
        write_tensors(path, self._kind(), header, {name: tensor.cpu() for name, tensor in tensors.items()})

    @classmethod
    def load(cls: type[Fitted], path: str | os.PathLike[str]) -> Fitted:
        """Read a preconditioning written by `save`. Nothing in the file is executed.

        Args:
            path: The file.

        Returns:
            The preconditioning, on the CPU, its tables equal to the saved ones bit for bit.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is anything but a whole file of consistent tables.
        """
        header, tensors = read_tensors(path, cls._kind())
        try:
            table = _table_of(tensors)
            sigma_data = header.get("sigma_data")
            if not isinstance(sigma_data, float):
                raise ValueError(f"header field 'sigma_data' must be a number, got {sigma_data!r}")
            return cls._from_file(table, FitHeader.of(header), sigma_data, header, tensors)
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(
                f"expected a {cls.__name__} in {path}, got parts that do not fit: {error!s:.500}"
            ) from error

    @classmethod
    def _kind(cls) -> str:
        return f"{cls.__name__} 1"  # what a file is, and the version of its layout

    @abstractmethod
    def _to_file(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return what else belongs in the file: header fields and tensors."""

    @classmethod
    @abstractmethod
    def _from_file(
        cls: type[Fitted],
        table: JumpTable,
        fit: FitHeader,
        sigma_data: float,
        header: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
    ) -> Fitted:
        """Build the preconditioning from the parts, and what `_to_file` gave."""


def expect(
    tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype, finite: bool = True
) -> Tensor:
    """Return a copy of a tensor in a file, made once its dtype and shape are as expected.

    Args:
        tensors: The file's tensors.
        name: Which one.
        shape: Its shape.
        dtype: Its dtype.
        finite: Refuse NaN and infinity.

    Returns:
        The copy.

    Raises:
        ValueError: If it is missing, of another shape or dtype, or not finite where it must be.
    """
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
        got = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
        raise ValueError(f"{name} must be {dtype} of shape {shape}, got {got}")
    tensor = tensor.clone()
    if finite:
        check_finite(tensor, name)
    return tensor


def _table_of(tensors: Mapping[str, Tensor]) -> JumpTable:
    if not {"levels", "control"} <= tensors.keys():
        raise ValueError(f"tensors levels and control are needed, got {sorted(tensors)}")
    K, functions = tensors["levels"].numel(), tensors["control"].shape[-1:].numel()
    if functions % 2 or not functions:
        raise ValueError(f"control must hold a and b for each group, got {functions} functions")
    dtype = torch.float32 if tensors["control"].dtype == torch.float32 else torch.float64
    control = expect(tensors, "control", (K, K, functions), dtype)
    if bool((control.abs() > _LARGEST).any()):
        raise ValueError(f"control must be coefficients of jumps, got {control.abs().max().item():.3g}")
    levels = expect(tensors, "levels", (K,), torch.float64)
    check_levels(levels)
    table = JumpTable(levels, control)
    check_finite(table.basis, "splines through levels")
    return table
