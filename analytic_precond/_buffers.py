"""Modules whose numbers keep their precision."""

from __future__ import annotations

from collections.abc import Callable

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
