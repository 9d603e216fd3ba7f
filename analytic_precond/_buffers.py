"""Modules whose numbers keep their precision."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class FixedPrecisionModule(nn.Module):
    """A module whose buffers follow ``.to(device)`` but ignore ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    A mixed-precision training code casts the whole student; coefficients rounded to 8 bits would no longer meet the
    boundary condition.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedPrecisionModule:
        originals = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in originals.items():
            moved = self._buffers[name]
            if original is not None and moved is not None and moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        return self


class TableModule(FixedPrecisionModule):
    """A table of a range of noise levels, whose ends Python knows too; a checkpoint that was cast is refused."""

    @abstractmethod
    def mirror_ends(self) -> None:
        """Mirror the ends in Python: reading a buffer on a training step would stall the device."""

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        for name, own in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                errors.append(f"{prefix + name} must be {own.dtype}, got {given.dtype}: save the student uncast.")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.mirror_ends()
