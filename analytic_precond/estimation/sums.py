r"""Sums over samples for each element by itself, from which its own coefficients follow (docs/method.md, section 13).

What an intercept needs beside the moments: sums of the features themselves (docs/method.md, section 6).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..statistics.moments import MOMENTS, PRODUCTS, group_of, group_range, group_sizes, inner_products, num_groups


class MomentSums:
    """Moments summed per group and level."""

    def __init__(self, num_units: int, num_levels: int) -> None:
        self.num_units = num_units
        groups = num_groups(num_units)
        self.counts = torch.zeros(groups, dtype=torch.float64, device="cpu")
        self.values = torch.zeros(groups, num_levels, len(MOMENTS), dtype=torch.float64, device="cpu")

    def add(self, first_unit: int, moments: Tensor) -> None:
        """Add consecutive units' moments. Shape ``(levels, B, 7)``, float64 on the CPU."""
        groups = group_of(first_unit, moments.shape[1], self.num_units)
        self.counts.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
        self.values.index_add_(0, groups, moments.transpose(0, 1))

    def merge(self, other: MomentSums) -> None:
        """Add the sums of other units of the same run."""
        self.counts += other.counts
        self.values += other.values

    def keep(self, groups: Iterable[int]) -> None:
        """Forget all but some groups."""
        others = sorted(set(range(len(self.counts))) - set(groups))
        self.counts[others], self.values[others] = 0, 0


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


NUM_PRODUCTS = 5  # of E, x and y: the moments after trace and norm


class Centering:
    r"""What an intercept takes out of the sums: products of means, so that a mean of the data does not enter g.

    From a group's $\sum_i a_i \cdot b_i$ over its $m$ units goes the unbiased estimate of $m\,E[a] \cdot E[b]$ from
    distinct units, $\sum_{i \ne j} a_i \cdot b_j / (m - 1)$. Vectors of whole groups are added up in a binary tree, so
    that their rounding does not depend on who added which group first. Memory: at most 6 vectors per feature and level.

    Attributes:
        distinct: $\sum_{i \ne j} a_i \cdot b_j$. Shape ``(G, K, 5)``.
        open: Per level, the sums of E, x (and y) over a group that is not whole yet. Shapes ``(F, d)``.
        closed: Per level the same over blocks of whole groups, by first group and number of groups.
    """

    def __init__(self, num_units: int, num_levels: int) -> None:
        self.num_units = num_units
        self.open: list[dict[int, Tensor]] = [{} for _ in range(num_levels)]
        self.closed: list[dict[tuple[int, int], Tensor]] = [{} for _ in range(num_levels)]
        self.distinct = torch.zeros(num_groups(num_units), num_levels, NUM_PRODUCTS, dtype=torch.float64, device="cpu")

    def add(self, level: int, first_unit: int, features: Sequence[Tensor]) -> None:
        """Add one level's features of consecutive units; shapes as for `inner_products`."""
        means = torch.stack([f.mean(0) for f in features])
        groups, sizes = group_of(first_unit, means.shape[1], self.num_units).unique(return_counts=True)
        for group, rows in zip(groups.tolist(), means.split(sizes.tolist(), 1), strict=True):
            before = self.open[level].get(group)
            self.open[level][group] = rows.sum(1) if before is None else before.to(rows.device) + rows.sum(1)
            self.distinct[group, level] -= inner_products(list(rows[:, None])).sum(0).cpu()
            first_unit += rows.shape[1]
            if first_unit == group_range(group, self.num_units)[1]:
                self._close(level, group)

    def _close(self, level: int, group: int) -> None:
        sums = self.open[level].pop(group)
        self.distinct[group, level] += inner_products(list(sums[:, None, None]))[0].cpu()
        self._add_block(level, group, 1, sums)

    def _add_block(self, level: int, group: int, size: int, sums: Tensor) -> None:
        """Add the sums over a block of groups, and join it with its sibling in the binary tree if that is there."""
        while (sibling := self.closed[level].pop((group ^ size, size), None)) is not None:
            sums = sums + sibling.to(sums.device)  # what was loaded from a file is on the CPU
            group, size = group & ~size, 2 * size
        self.closed[level][group, size] = sums

    def merge(self, other: Centering) -> None:
        """Add what other units gave, of other groups."""
        self.distinct += other.distinct
        for level, (opened, closed) in enumerate(zip(other.open, other.closed, strict=True)):
            self.open[level].update(opened)
            for (group, size), sums in closed.items():
                self._add_block(level, group, size, sums)

    def keep(self, groups: Iterable[int], totals: bool) -> None:
        """Forget all but some groups, and the totals over whole groups unless asked to keep them."""
        groups = set(groups)
        self.distinct[sorted(set(range(len(self.distinct))) - groups)] = 0
        self.open = [{group: sums for group, sums in level.items() if group in groups} for level in self.open]
        if not totals:
            self.closed = [{} for _ in self.closed]

    def close(self, sums: MomentSums) -> Tensor:
        """Centre the sums in place. A group left with a single unit, where data ran out, is emptied.

        Args:
            sums: The uncentred sums of the same units.

        Returns:
            The means of E, x (and y) per level, float64. Shape ``(levels, F, d)``.

        Raises:
            ValueError: If all groups are empty then.
        """
        for level, opened in enumerate(self.open):
            for group in sorted(opened):
                self._close(level, group)
        blocks = [torch.stack([level[key] for key in sorted(level)]).to("cpu", torch.float64) for level in self.closed]
        means = torch.stack([block.sum(0) for block in blocks]) / sums.counts.sum()
        if not bool((sums.counts > 1).any()):
            raise ValueError("an intercept needs at least 2 clean samples, got 1: pass more data, or no intercept.")
        single = sums.counts == 1
        sums.values[..., 2:] -= self.distinct / (sums.counts - 1).clamp(min=1)[:, None, None]
        sums.values[single], sums.counts[single] = 0, 0
        return means

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts by name, on the CPU. All levels must have seen the same units."""
        open_groups = {f"open.{group}": [level[group] for level in self.open] for group in self.open[0]}
        blocks = {f"closed.{key[0]}.{key[1]}": [level[key] for level in self.closed] for key in self.closed[0]}
        return {"distinct": self.distinct} | {
            n: torch.stack(parts).cpu() for n, parts in (open_groups | blocks).items()
        }

    @classmethod
    def blocks(cls, num_units: int, counts: Sequence[int]) -> set[str]:
        """Return the names of the sums among the `tensors` when each group has so many units."""
        layout, nothing = cls(num_units, 1), torch.empty(0)
        for group, (count, size) in enumerate(zip(counts, group_sizes(num_units), strict=True)):
            if count == size:
                layout._add_block(0, group, 1, nothing)
            elif count > 0:
                layout.open[0][group] = nothing
        return set(layout.tensors()) - {"distinct"}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` returned."""
        self.distinct = tensors["distinct"].clone()
        for name, parts in tensors.items():
            kind, *numbers = name.split(".")
            for level, part in enumerate(parts.clone() if kind in ("open", "closed") else ()):
                if kind == "open":
                    self.open[level][int(numbers[0])] = part
                else:
                    self.closed[level][int(numbers[0]), int(numbers[1])] = part
