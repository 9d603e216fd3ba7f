r"""Sums that not every estimate keeps: of each element's products, and of what an intercept takes out of the moments.

The first are for coefficients of single elements (docs/method.md, section 13), the second for a remainder without its
mean (section 6). Both hold vectors, so they are kept per level only, while moments are kept per group of samples.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence

import torch
from torch import Tensor

from ..statistics.moments import PRODUCTS, group_of, group_range, group_sizes, inner_products, num_groups


class ElementSums:
    r"""Per element and level, the sums over antithetic pairs of what E, x (and y) are there.

    With the half-difference $h_a = (a_+ - a_-) / 2$ and the mean $m_a = (a_+ + a_-) / 2$ of a feature's two halves:
    $\sum h_a h_b$ and $\sum m_a m_b$ for the `moments.PRODUCTS`, and $\sum m_a$. No groups: that would take 32
    times the memory, so elements have no jackknife errors.
    """

    def __init__(self, num_levels: int) -> None:
        self.num_levels = num_levels
        self.values: Tensor | None = None  # the sums (K, parts, d), once there are any

    def add(self, level: int, features: Sequence[Tensor]) -> None:
        """Add one level's features of some units, each of shape ``(2, B, d)``."""
        differences = [(feature[0] - feature[1]) / 2 for feature in features]
        means = [(feature[0] + feature[1]) / 2 for feature in features]
        num = sum(b < len(features) for _, b in PRODUCTS)
        products = [part for f in (differences, means) for part in inner_products(f, 0).unbind(-1)[:num]]
        parts = products + [m.sum(0).to(products[0]) for m in means]
        if self.values is None:
            self.values = parts[0].new_zeros(self.num_levels, len(parts), len(parts[0]))
        elif self.values.device != parts[0].device:  # what was loaded from a file is on the CPU
            self.values = self.values.to(parts[0])
        self.values[level] += torch.stack(parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts by name, on the CPU."""
        return {} if self.values is None else {"elements": self.values.cpu()}

    def merge(self, tensors: Mapping[str, Tensor]) -> None:
        """Add what other units' `tensors` returned."""
        if "elements" in tensors:
            self.values = tensors["elements"].clone() if self.values is None else self.values + tensors["elements"]

    def means(self, num_units: Tensor) -> Tensor:
        """Return the means over units, on the CPU in float64. Shape ``(parts, K, d)``."""
        assert self.values is not None
        return (self.values.to("cpu", torch.float64) / num_units).transpose(0, 1).contiguous()


NUM_PRODUCTS = 5  # of E, x and y: the moments after trace and norm


class Centering:
    r"""What an intercept takes out of the sums: products of means, so that a mean of the data does not enter g.

    From a group's $\sum_i a_i \cdot b_i$ over its $m$ units goes the unbiased estimate of $m\,E[a] \cdot E[b]$ from
    distinct units, $\sum_{i \ne j} a_i \cdot b_j / (m - 1)$ (docs/method.md, section 6).
    """

    def __init__(self, num_units: int, num_levels: int) -> None:
        self.num_units = num_units
        # the sums of a_i . b_j over i != j
        self.distinct = torch.zeros(num_groups(num_units), num_levels, NUM_PRODUCTS, dtype=torch.float64, device="cpu")
        # per level, the sums of E, x (and y) over groups that are not whole yet, (F, d) each
        self.open: list[dict[int, Tensor]] = [{} for _ in range(num_levels)]
        # those over all whole groups, and what rounding has left out of them, (2, K, F, d) in float64 on the CPU
        self.whole: Tensor | None = None
        self._arriving: list[tuple[int, int, Tensor]] = []  # group and level of products that are still on the device
        self._closing: list[tuple[int, Tensor]] = []  # level of sums over a group that are

    def add(self, level: int, first_unit: int, features: Sequence[Tensor]) -> None:
        """Add one level's features of consecutive units, each of shape ``(2, B, d)`` in the wide dtype."""
        means = torch.stack([f.mean(0) for f in features])
        if self.whole is None:
            size = (2, len(self.open), len(features), means.shape[-1])
            self.whole = torch.zeros(size, dtype=torch.float64, device="cpu")
        groups, sizes = group_of(first_unit, means.shape[1], self.num_units).unique(return_counts=True)
        for group, rows in zip(groups.tolist(), means.split(sizes.tolist(), 1), strict=True):
            before = self.open[level].get(group)  # what was loaded from a file is on the CPU
            self.open[level][group] = rows.sum(1) if before is None else before.to(rows) + rows.sum(1)
            # all pairs of a group are the square of its sum, from which the units with themselves go at once
            self._arriving.append((group, level, -inner_products(list(rows)).sum(0)))
            first_unit += rows.shape[1]
            if first_unit == group_range(group, self.num_units)[1]:
                self._close(level, group)

    def _close(self, level: int, group: int) -> None:
        sums = self.open[level].pop(group)
        self._arriving.append((group, level, inner_products(list(sums))))
        self._closing.append((level, sums))

    def fetch(self) -> None:
        """Take what was added since from the device, all at once: it waits, as each transfer would."""
        arriving, closing = self._arriving, self._closing
        self._arriving, self._closing = [], []
        if arriving:
            products = torch.stack([part for *_, part in arriving]).to("cpu", torch.float64)
            for (group, level, _), part in zip(arriving, products, strict=True):
                self.distinct[group, level] += part
        if closing:
            whole = torch.stack([sums for _, sums in closing]).to("cpu", torch.float64)
            for (level, _), sums in zip(closing, whole, strict=True):
                self._add_whole(level, sums)

    def _add_whole(self, level: int | slice, sums: Tensor, rounding: Tensor | float = 0.0) -> None:
        """Add to the sums over whole groups, with the rounding of the addition beside them (Knuth's two-sum).

        Whoever adds which group first, the two together then differ by less than 2^-90 of the terms, so that the
        float64 made of them has the same bits whatever the number of processes (but for odds of 2^-37, at worst).
        """
        assert self.whole is not None
        total, left_out = self.whole[:, level]
        new = total + sums
        taken = new - total
        left_out += (total - (new - taken)) + (sums - taken) + rounding
        total.copy_(new)

    def keep(self, groups: Container[int], totals: bool) -> None:
        """Forget all but some groups, and the sums over whole groups unless asked to keep them."""
        self.distinct[[group for group in range(len(self.distinct)) if group not in groups]] = 0
        self.open = [{group: sums for group, sums in level.items() if group in groups} for level in self.open]
        if self.whole is not None and not totals:
            self.whole.zero_()

    def centre(self, counts: Tensor, values: Tensor) -> Tensor:
        """Centre the same units' moments in place; return the means of E, x (and y) per level. Shape ``(K, F, d)``."""
        for level, opened in enumerate(self.open):
            for group in sorted(opened):
                self._close(level, group)
        self.fetch()
        assert self.whole is not None
        means = self.whole.sum(0) / counts.sum()
        if not bool((counts > 1).any()):
            raise ValueError("an intercept needs at least 2 clean samples, got 1: pass more data, or no intercept.")
        values[..., 2:] -= self.distinct / (counts - 1).clamp(min=1)[:, None, None]
        # a group of a single unit, where data ran out, is emptied
        values[counts == 1], counts[counts == 1] = 0, 0
        return means

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts by name, on the CPU, the open groups in order. All levels must have seen the same units."""
        if self.whole is None:
            return {"distinct": self.distinct}
        parts = [torch.stack([level[group] for level in self.open]) for group in sorted(self.open[0])]
        opened = torch.stack(parts).to("cpu", torch.float64) if parts else self.whole[:0]
        return {"distinct": self.distinct, "open": opened, "whole": self.whole}

    def merge(self, tensors: Mapping[str, Tensor], open_groups: Sequence[int]) -> None:
        """Add what the `tensors` of other units returned, of other groups."""
        self.distinct += tensors["distinct"]
        if "whole" in tensors:
            self.whole = torch.zeros_like(tensors["whole"]) if self.whole is None else self.whole
            self._add_whole(slice(None), *tensors["whole"])
            for group, sums in zip(open_groups, tensors["open"].clone(), strict=True):
                for level, part in zip(self.open, sums, strict=True):
                    level[group] = part


def open_groups(num_units: int, counts: Tensor) -> list[int]:
    """Return the groups that are begun but not whole, given the units in each."""
    return [g for g, (n, size) in enumerate(zip(counts.tolist(), group_sizes(num_units), strict=True)) if 0 < n < size]
