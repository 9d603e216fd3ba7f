"""What a network is told beside x and t, and which of it belongs to samples: one rule, asked everywhere.

Of a batch of B samples, these hold one entry for each:

- a tensor or array whose first size is B,
- a list of B entries, unless one of them is made of such tensors: then the list is a structure of them. Tensors that
  differ in their first size only are the samples' own all the same: tokens of prompts, one of which may have B.

Both also inside mappings, lists, tuples, named tuples and dataclasses, which keep their type. A tuple is structure,
never samples. Everything else is the same for all, and so is what `common` marks, whatever its shape.

What belongs to samples follows them: into batches that shrink or repeat samples. What a denoiser is built with is that
of one sample, repeated for each batch.

It is decided once, against the batch in which the condition came. Marks stay until then, and come off before any
network or function of the user's is called.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._precision import place

Condition = Mapping[str, Any]
_ARRAYS = (Tensor, np.ndarray)  # torch 2.4 compiles no isinstance of a union


@dataclass(frozen=True, eq=False)
class Common:
    """What `common` returns."""

    value: Any


def common(value: Any) -> Any:
    """Say that a condition is the same for all samples of a batch, whatever its shape.

    Conditions follow their samples: of a batch of B, a tensor or array of B rows and a list of B entries hold one for
    each, also inside mappings, lists, tuples and dataclasses. A table or list that happens to be as long as the batch
    must say that it is not the samples'.

    Args:
        value: A condition, or a part of one.

    Returns:
        The value, marked. The library takes the mark off before it calls a network or a function of yours.

    Examples:
        >>> import torch
        >>> from analytic_precond import GaussianDenoiser, common, heun_solve
        >>> def teacher(x, t, gains):  # two gains, for batches of any size
        ...     return gains.prod() * GaussianDenoiser(1.0)(x, t)
        >>> x, levels = torch.ones(2, 1), torch.tensor([2.0, 1.0, 0.5])
        >>> heun_solve(teacher, x, levels, 0, torch.tensor([1, 2]), gains=common(torch.tensor([2.0, 0.5]))).flatten()
        tensor([0.6500, 0.5200])
    """
    return Common(plain(value))


def plain(condition: Any) -> Any:
    """Return a condition without marks."""
    return _mapped(condition, lambda part: part.value if isinstance(part, Common) else part)


def detached(condition: Any) -> Any:
    """Return a condition that no gradient passes through."""
    return _mapped(condition, lambda part: part.detach() if getattr(part, "requires_grad", False) else part)


def rows_of(condition: Any, index: Tensor, batch: int) -> Any:
    """Return the condition of ``batch`` samples for rows that are samples ``index`` (on the CPU), without marks."""

    def of(part: Any) -> Any:
        if isinstance(part, Common):
            return part.value
        if isinstance(part, list) and _are_samples(part, batch):
            return _list_like(part, [part[i] for i in index.tolist()])
        if not _has_rows(part, batch):
            return part
        return part[place(index, part.device, index.dtype) if isinstance(part, Tensor) else index.numpy()]

    return _mapped(condition, of)


def expanded(condition: Any, batch: int) -> Any:
    """Return the condition of one sample for a batch, without marks: what a denoiser was built with."""

    def of(part: Any) -> Any:
        if isinstance(part, Common):
            return part.value
        if isinstance(part, list) and _are_samples(part, 1):
            return _list_like(part, part * batch)
        if not _has_rows(part, 1):
            return part
        return part.expand(batch, *part.shape[1:]) if isinstance(part, Tensor) else part.repeat(batch, 0)

    return _mapped(condition, of)


def collated(condition: Any, batch: int) -> Any:
    """Return what a loader adds to a batch as the rule has it: torch makes tuples of strings, and lists of fields."""

    def of(part: Any) -> Any:
        if _is_unstacked(part, batch):
            return list(part)
        if type(part) is list and any(_is_unstacked(entry, batch) for entry in part):
            return tuple(_mapped(entry, of) for entry in part)
        return part

    return _mapped(condition, of)


def on_device(condition: Any, device: torch.device) -> Any:
    """Return a condition whose tensors are on a device, marks and all."""

    def of(part: Any) -> Any:
        if isinstance(part, Common):
            return Common(on_device(part.value, device))
        if not isinstance(part, Tensor) or part.device == device:
            return part
        return place(part, device, part.dtype)

    return _mapped(condition, of)


class Ownership:
    """Remembers what of a run's conditions was the samples', and refuses what is theirs in some batches only."""

    def __init__(self) -> None:
        self._theirs: dict[str, bool] = {}

    def check(self, condition: Any, batch: int, name: str = "condition") -> None:
        """Refuse conditions of ``batch`` samples of which a part is the samples' and was not before, or vice versa."""
        if isinstance(condition, Common):
            return
        theirs = _has_rows(condition, batch) or (isinstance(condition, list) and _are_samples(condition, batch))
        has_entries = isinstance(condition, list) or (isinstance(condition, _ARRAYS) and condition.ndim > 0)
        size = len(condition) if has_entries else 1
        if size > 1 and self._theirs.setdefault(name, theirs) != theirs:  # a single one is as good as repeated
            raise ValueError(
                f"{name} must hold one entry for each sample in all batches or in none, got {size} entries beside "
                f"{batch} samples, which {'do' if theirs else 'do not'} belong to them, unlike those before: return as "
                f"many as samples, or ap.common(...) if they are the same for all."
            )
        if not (theirs and isinstance(condition, list)):
            for key, part in _parts(condition).items():
                self.check(part, batch, f"{name}[{key!r}]")


def _mapped(value: Any, of: Callable[[Any], Any]) -> Any:
    """Return nested containers with ``of`` of their parts, which are not entered where ``of`` changed them.

    What nothing changes in is returned itself.
    """
    new = of(value)
    if new is not value:
        return new
    changed = {}
    for key, part in _parts(value).items():
        new = _mapped(part, of)
        if new is not part:
            changed[key] = new
    return _replaced(value, changed) if changed else value


def _parts(value: Any) -> Mapping[Any, Any]:
    """Return what a container holds, by key, position or name; nothing of anything else."""
    if isinstance(value, Tensor):
        return {}
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type | Common):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return {}


def _replaced(value: Any, changed: dict[Any, Any]) -> Any:
    """Return a container of the same type with some of its parts replaced."""
    if isinstance(value, tuple):
        parts = [changed.get(i, part) for i, part in enumerate(value)]
        return value._make(parts) if hasattr(value, "_make") else type(value)(parts)
    if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, MutableMapping)):
        same_type: Any = type(value)
        return same_type({**value, **changed})
    if isinstance(value, list):
        return _list_like(value, [changed.get(i, part) for i, part in enumerate(value)])
    new = copy.copy(value)
    for key, part in changed.items():
        if isinstance(value, MutableMapping):
            new[key] = part
        else:
            object.__setattr__(new, key, part)  # frozen dataclasses too
    return new


def _list_like(value: list[Any], entries: list[Any]) -> list[Any]:
    if type(value) is list:
        return entries
    new = copy.copy(value)
    new[:] = entries
    return new


def _has_rows(value: object, batch: int) -> bool:
    return isinstance(value, _ARRAYS) and value.shape[:1] == (batch,)


def _are_samples(entries: list[Any], batch: int) -> bool:
    return len(entries) == batch and (_is_ragged(entries) or not any(_holds_rows(entry, batch) for entry in entries))


def _is_unstacked(value: Any, batch: int) -> bool:
    """Whether a tuple is what a loader makes of samples that cannot be stacked."""
    if type(value) is not tuple or len(value) != batch:
        return False
    return _is_ragged(value) or all(isinstance(entry, str | bytes) for entry in value)


def _is_ragged(entries: list[Any] | tuple[Any, ...]) -> bool:
    """Whether entries are tensors that differ in their first size only."""
    if not all(isinstance(entry, Tensor) and entry.ndim > 0 for entry in entries):
        return False
    return len({entry.shape[1:] for entry in entries}) == 1 < len({len(entry) for entry in entries})


def _holds_rows(value: Any, batch: int) -> bool:
    """Whether samples' rows, or a mark, are somewhere in it."""
    if isinstance(value, Common) or _has_rows(value, batch):
        return True
    return any(_holds_rows(part, batch) for part in _parts(value).values())
