"""Sums over samples for each element by itself, from which its own coefficients follow (docs/method.md, section 13)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import PRODUCTS

PARTS = {"transport": 8, "jvp": 13, "finite-difference": 13}
"""Number of sums per element and level: products of half-differences, products of means, means."""


class ElementSums:
    r"""Per element and level, the sums over antithetic pairs of what E, x (and y) are there.

    With the half-difference $h_a = (a_+ - a_-) / 2$ and the mean $m_a = (a_+ + a_-) / 2$ of a feature's two halves:
    $\sum h_a h_b$ and $\sum m_a m_b$ for the `moments.PRODUCTS`, and $\sum m_a$. No groups: that would take 32
    times the memory, so elements have no jackknife errors.

    Attributes:
        values: The sums; None before there are any. Shape ``(K, parts, d)``.
    """

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels
        self.values: Tensor | None = None

    def add(self, level: int, features: Sequence[Tensor]) -> None:
        """Add one level's features of some units; shapes as for `inner_products`, ``(2, B, d)`` each."""
        differences = [(feature[0] - feature[1]) / 2 for feature in features]
        means = [(feature[0] + feature[1]) / 2 for feature in features]
        pairs = [(a, b) for a, b in PRODUCTS if b < len(features)]
        parts = [(f[a] * f[b]).sum(0) for f in (differences, means) for a, b in pairs] + [m.sum(0) for m in means]
        if self.values is None:
            self.values = parts[0].new_zeros(self.num_levels, len(parts), len(parts[0]))
        elif self.values.device != parts[0].device:  # what was loaded from a file is on the CPU
            self.values = self.values.to(parts[0])
        self.values[level] += torch.stack(parts)

    def merge(self, other: ElementSums) -> None:
        """Add the sums of other units of the same run."""
        if other.values is not None:
            self.values = other.values if self.values is None else self.values + other.values.to(self.values)

    def means(self, num_units: Tensor) -> Tensor:
        """Return the means over units, on the CPU in float64. Shape ``(parts, K, d)``."""
        assert self.values is not None
        return (self.values.to("cpu", torch.float64) / num_units).transpose(0, 1).contiguous()
