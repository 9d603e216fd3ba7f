r"""The file that an interrupted estimate goes on from."""

from __future__ import annotations

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .._checks import check_count, check_finite, check_tensor
from .._files import check_space, read_tensors, remove_leftovers, sample_shape_of, target_of, write_tensors
from .._warnings import warn_caller
from ..statistics.moments import group_sizes
from .state import EstimationState, Request, open_groups

_KIND = "EstimationState 1"


class Checkpoint:
    """A file with an estimate's state, replaced whole or not at all.

    Args:
        path: The file.
        every: Batches from one checkpoint to the next.
        batch_size: As asked for: another one changes the rounding.

    Attributes:
        every: Batches from one checkpoint to the next.
    """

    def __init__(self, path: str | os.PathLike[str], every: int, batch_size: int | str) -> None:
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"resume must be the path of a file, got {path!r}.")
        check_count(every, 1, "checkpoint_every", "It counts batches.")
        self.every = every
        self._path, self._batch_size, self._num_saved = target_of(Path(path)), batch_size, 0

    def read(self, request: Request) -> EstimationState | None:
        """Return the state in the file, or None where there is no file yet.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If the file is another one, is damaged, or belongs to another request.
        """
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
        state = EstimationState(request)
        state.merge((header, tensors))
        self._num_saved = state.num_done
        return state

    def check_space(self, most_bytes: int) -> None:
        """Refuse a place that has not enough space for what the file may come to hold.

        Raises:
            OSError: If there is too little, or nothing can be written there at all.
        """
        remove_leftovers(self._path)
        held = self._path.stat().st_size if self._path.exists() else 0
        needed = 2 * most_bytes - held  # a file is replaced by one that was written beside it
        try:
            check_space(self._path.parent, needed)
        except OSError as error:
            raise self._explained(error, f"{needed} bytes cannot be written beside it") from error

    def write(self, state: EstimationState) -> None:
        """Replace the file.

        Raises:
            OSError: If that fails; the file is what it was then.
        """
        header, tensors = state.packed()
        header |= {"request": asdict(state.request), "batch_size": self._batch_size}
        try:
            write_tensors(self._path, _KIND, header, tensors)
        except OSError as error:
            raise self._explained(error, "it cannot be written") from error
        self._num_saved = state.num_done

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


def _check(header: dict[str, Any], tensors: dict[str, Tensor], request: Request) -> None:
    """Refuse a damaged file: its parts must fit together."""
    size = math.prod(sample_shape_of(header))
    if not isinstance(header.get("precision"), str):
        raise ValueError(f"Its header field 'precision' must be a string, got {header.get('precision')!r:.100}.")
    sizes = torch.tensor(group_sizes(request.num_units), dtype=torch.float64, device="cpu")
    counts = tensors.get("counts", sizes[:0])
    if counts.shape != sizes.shape or not bool(((counts >= 0) & (counts <= sizes) & (counts == counts.round())).all()):
        raise ValueError("It has no number of samples per group.")
    expected = EstimationState.shapes(request, len(open_groups(request.num_units, counts)), size)
    if {name: tuple(part.shape) for name, part in tensors.items()} != expected:
        raise ValueError("Its sums do not fit the request's levels, samples and groups.")
    for name, part in tensors.items():
        check_tensor(part, name)
        check_finite(part, name)
    if not torch.equal((counts > 0)[:, None].expand_as(tensors["values"][..., 1]), tensors["values"][..., 1] > 0):
        raise ValueError("Its groups with sums are not those with samples.")
