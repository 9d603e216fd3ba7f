r"""The file that an interrupted estimate goes on from: what was asked for, and the sums so far."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_finite, check_tensor, warn_caller
from .._files import check_space, read_tensors, remove_leftovers, sample_shape_of, target_of, write_tensors
from ..statistics.element_statistics import PARTS
from ..statistics.moments import MOMENTS, group_sizes
from .sums import NUM_PRODUCTS, open_groups

_KIND = "EstimationState 1"
_HEADER_BYTES = 2**16  # more than 120 levels and the rest take

Packed = tuple[dict[str, Any], dict[str, Tensor]]
"""A header and tensors on the CPU: the state of an estimate, in a file or on the way to another process."""


@dataclass(frozen=True)
class Request:
    """What decides the statistics, as far as it can be compared: the arguments of `estimate_statistics`."""

    levels: tuple[float, ...]
    num_samples: int
    l_method: str
    s_method: str
    seed: int
    intercept: bool
    condition: bool  # whether there is one
    description: str
    data: str  # in words
    weights: str = ""  # a fingerprint, where the teacher is a module
    per_element: bool = False
    shards: int = 1  # processes with data of their own; 1 where all have the same

    @property
    def num_units(self) -> int:
        """Number of antithetic pairs, which are numbered from 0."""
        return self.num_samples // 2

    def differences(self, other: Mapping[str, Any]) -> str:
        """Say in what another request, perhaps from a file, is another one; nothing where it is the same."""
        own = json.loads(json.dumps(asdict(self)))  # as a file gives it back
        names = [name for name in own if name not in other or other[name] != own[name]]
        return ", ".join(f"{name} {other.get(name)!r:.100}, not {own[name]!r:.100}" for name in names)


class Checkpoint:
    """A file with an estimate's state, replaced whole or not at all, every so many batches.

    Another ``batch_size`` than before changes the rounding, and is told.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, batch_size: int | str) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"resume must be the path of a file, got {path!r}.")
        check_count(every, 1, "checkpoint_every", "It counts batches.")
        self.every = every
        self._path, self._batch_size, self._num_saved = target_of(Path(path)), batch_size, 0

    def read(self, request: Request) -> Packed | None:
        """Return the state in the file, None where there is no file yet; refuse another one, or another request's."""
        if not self._path.parent.is_dir():
            raise FileNotFoundError(
                f"resume must name a file in an existing folder, got {self._path.parent}: create it first."
            )
        if not self._path.exists():
            return None
        try:
            header, tensors = read_tensors(self._path, _KIND)
            found = header.get("request")
            differences = request.differences(found if isinstance(found, dict) else {})
            if not differences:
                _check(header, tensors, request)
        except ValueError as error:
            raise ValueError(
                f"resume must name a checkpoint or a file yet to come, got {self._path}: name another. {error}"
            ) from error
        if differences:
            raise ValueError(
                f"resume must name a checkpoint of this request, got {self._path} with {differences}: ask for the same "
                f"again, or name another file."
            )
        if header.get("batch_size") != self._batch_size:
            warn_caller(
                f"the checkpoint {self._path} was made with batch_size={header.get('batch_size')!r}, not "
                f"{self._batch_size!r}: the result equals that of an uninterrupted run up to rounding only."
            )
        self._num_saved = int(tensors["counts"].sum())
        return header, tensors

    def check_space(self, request: Request, sample_size: int, num_open: int) -> None:
        """Refuse a place without the space that the file comes to need with so many open groups."""
        remove_leftovers(self._path)
        most = _HEADER_BYTES + 8 * sum(map(math.prod, _shapes(request, sample_size, num_open).values()))
        held = self._path.stat().st_size if self._path.exists() else 0
        needed = 2 * most - held  # a file is replaced by one that was written beside it
        try:
            check_space(self._path.parent, needed)
        except OSError as error:
            raise self._explained(error, f"{needed} bytes cannot be written beside it") from error

    def write(self, request: Request, packed: Packed) -> None:
        """Replace the file; if that fails, it is what it was."""
        header, tensors = packed
        try:
            header = {**header, "request": asdict(request), "batch_size": self._batch_size}
            write_tensors(self._path, _KIND, header, tensors)
        except OSError as error:
            raise self._explained(error, "it cannot be written") from error
        self._num_saved = int(tensors["counts"].sum())

    def how_to_go_on(self, request: Request) -> str:
        """Say what an interrupted estimate leaves behind."""
        return (
            f"{self._num_saved} of {request.num_units} clean samples (two noisy ones each) are kept in {self._path}: "
            f"call estimate_statistics again with the same arguments to go on from there."
        )

    def _explained(self, error: OSError, what: str) -> OSError:
        held = f"It still holds {self._num_saved} clean samples; free" if self._num_saved else "Free"
        return OSError(
            error.errno, f"the checkpoint {self._path}: {what} ({error.strerror}). {held} space or name another file"
        )


def _shapes(request: Request, sample_size: int, num_open: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors in the file while so many groups are open."""
    groups, levels = len(group_sizes(request.num_units)), len(request.levels)
    shapes: dict[str, tuple[int, ...]] = {"counts": (groups,), "values": (groups, levels, len(MOMENTS))}
    if request.intercept:
        sums = (levels, 2 if request.s_method == "transport" else 3, sample_size)
        shapes |= {"distinct": (groups, levels, NUM_PRODUCTS), "open": (num_open, *sums), "whole": (2, *sums)}
    if request.per_element:
        shapes |= {"elements": (levels, PARTS[request.s_method], sample_size)}
    return shapes


def _check(header: dict[str, Any], tensors: dict[str, Tensor], request: Request) -> None:
    """Refuse a damaged file: its parts must fit together."""
    size = math.prod(sample_shape_of(header))
    if not isinstance(header.get("precision"), str):
        raise ValueError(f"Its header field 'precision' must be a string, got {header.get('precision')!r:.100}.")
    sizes = torch.tensor(group_sizes(request.num_units), dtype=torch.float64, device="cpu")
    counts = tensors.get("counts", sizes[:0])
    if counts.shape != sizes.shape or not bool(((counts >= 0) & (counts <= sizes) & (counts == counts.round())).all()):
        raise ValueError("It has no number of samples per group.")
    expected = _shapes(request, size, len(open_groups(request.num_units, counts)))
    if {name: tuple(part.shape) for name, part in tensors.items()} != expected:
        raise ValueError("Its sums do not fit the request's levels, samples and groups.")
    for name, part in tensors.items():
        check_tensor(part, name)
        check_finite(part, name)
    if not torch.equal((counts > 0)[:, None].expand_as(tensors["values"][..., 1]), tensors["values"][..., 1] > 0):
        raise ValueError("Its groups with sums are not those with samples.")
