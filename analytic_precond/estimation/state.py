r"""How far an estimate has come: what was asked for, and the sums over the samples seen so far."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.sources import Range
from ..statistics.element_statistics import PARTS
from ..statistics.moments import MOMENTS, group_of, group_range, group_sizes, num_groups, reference
from ..statistics.teacher_statistics import StatisticsHeader, TeacherStatistics
from .sums import NUM_PRODUCTS, Centering, ElementSums

_HEADER_BYTES = 2**16  # more than 120 levels and the rest take

Packed = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass(frozen=True)
class Request:
    """What decides the statistics, as far as it can be compared.

    Attributes:
        levels: The noise levels.
        num_samples: Noisy samples per level.
        l_method: Estimator of l.
        s_method: Estimator of s.
        seed: Seed of noise and data order.
        intercept: Whether means are taken out.
        condition: Whether the teacher has conditions.
        description: The teacher, in words.
        data: The data, in words.
        weights: A fingerprint of the teacher's weights, where it is a module.
        per_element: Whether every element has coefficients of its own.
        shards: Number of processes with data of their own; 1 where all have the same.
    """

    levels: tuple[float, ...]
    num_samples: int
    l_method: str
    s_method: str
    seed: int
    intercept: bool
    condition: bool
    description: str
    data: str
    weights: str = ""
    per_element: bool = False
    shards: int = 1

    @property
    def num_units(self) -> int:
        """Number of antithetic pairs, which are numbered from 0."""
        return self.num_samples // 2

    def differences(self, other: Mapping[str, Any]) -> str:
        """Say in what another request, perhaps from a file, is another one; nothing where it is the same."""
        own = json.loads(json.dumps(asdict(self)))  # as a file gives it back
        names = [name for name in own if name not in other or other[name] != own[name]]
        return ", ".join(f"{name} {other.get(name)!r:.100}, not {own[name]!r:.100}" for name in names)


class EstimationState:
    """The sums over the samples seen so far; they add up over processes, and can be kept and taken up again.

    Attributes:
        request: What was asked for.
        sample_shape: Shape of one sample; None before there is one.
        precision: What the teacher is called in.
        counts: Clean samples per group. Shape ``(G,)``.
        values: Their moments, summed per group and level. Shape ``(G, K, 7)``.
        centering: What an intercept needs, or None.
        elements: The sums of single elements, or None.
    """

    def __init__(self, request: Request) -> None:
        groups, num_levels = num_groups(request.num_units), len(request.levels)
        self.request = request
        self.sample_shape: tuple[int, ...] | None = None
        self.precision = ""
        self.counts = torch.zeros(groups, dtype=torch.float64, device="cpu")
        self.values = torch.zeros(groups, num_levels, len(MOMENTS), dtype=torch.float64, device="cpu")
        self.centering = Centering(request.num_units, num_levels) if request.intercept else None
        self.elements = ElementSums(num_levels) if request.per_element else None

    @property
    def num_done(self) -> int:
        """Number of clean samples seen."""
        return int(self.counts.sum())

    def expect(self, sample_shape: tuple[int, ...], precision: str, where: str) -> None:
        """Take note of what samples are like, the first time; refuse others later.

        Raises:
            ValueError: If they were different before.
        """
        if self.sample_shape is None:
            self.sample_shape, self.precision = sample_shape, precision
        for what, new, old, advice in (
            ("shape", sample_shape, self.sample_shape, "resize"),
            ("dtype", precision, self.precision, "cast"),
        ):
            if new != old:
                raise ValueError(
                    f"data must hold samples of one {what}, got {new} in {where} after {old}: {advice} them first."
                )

    def add_features(self, level: int, first_unit: int, features: Sequence[Tensor]) -> None:
        """Add one level's features of consecutive samples, where they are asked for; each of shape ``(2, B, d)``."""
        if self.centering is not None:
            self.centering.add(level, first_unit, features)
        if self.elements is not None:
            self.elements.add(level, features)

    def add(self, first_unit: int, moments: Tensor) -> None:
        """Add the moments of consecutive samples. Shape ``(K, B, 7)``, float64 on the CPU."""
        groups = group_of(first_unit, moments.shape[1], self.request.num_units)
        self.counts.index_add_(0, groups, torch.ones_like(groups, dtype=torch.float64))
        self.values.index_add_(0, groups, moments.transpose(0, 1))

    def remaining(self, groups: range) -> list[Range]:
        """Return the numbers of the clean samples that some groups lack, in as few ranges as can be."""
        ranges: list[Range] = []
        for group in groups:
            start, stop = group_range(group, self.request.num_units)
            start += int(self.counts[group])
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            elif start < stop:
                ranges.append((start, stop))
        return ranges

    def keep(self, groups: range, totals: bool) -> None:
        """Forget all but some groups, and the sums over all of them unless asked to keep those."""
        others = [group for group in range(len(self.counts)) if group not in groups]
        self.counts[others], self.values[others] = 0, 0
        if self.centering is not None:
            self.centering.keep(groups, totals)
        if self.elements is not None and not totals:
            self.elements = ElementSums(len(self.request.levels))

    def packed(self) -> Packed:
        """Return the state as a header and tensors on the CPU, for a file or another process."""
        tensors = {"counts": self.counts, "values": self.values}
        for part in (self.centering, self.elements):
            tensors |= {} if part is None else part.tensors()
        return {"sample_shape": self.sample_shape, "precision": self.precision}, tensors

    def merge(self, packed: Packed) -> None:
        """Add what was `packed`: in a file, or of other groups by another process."""
        header, tensors = packed
        if header["sample_shape"] is not None:
            self.expect(tuple(header["sample_shape"]), header["precision"], "another process")
        self.counts += tensors["counts"]
        self.values += tensors["values"]
        if self.centering is not None:
            self.centering.merge(tensors, open_groups(self.request.num_units, tensors["counts"]))
        if self.elements is not None:
            self.elements.merge(tensors)

    @staticmethod
    def shapes(request: Request, num_open: int, sample_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that are `packed` while so many groups are open."""
        groups, levels = num_groups(request.num_units), len(request.levels)
        shapes: dict[str, tuple[int, ...]] = {"counts": (groups,), "values": (groups, levels, len(MOMENTS))}
        if request.intercept:
            sums = (levels, 2 if request.s_method == "transport" else 3, sample_size)
            shapes |= {"distinct": (groups, levels, NUM_PRODUCTS), "open": (num_open, *sums), "whole": (2, *sums)}
        if request.per_element:
            shapes |= {"elements": (levels, PARTS[request.s_method], sample_size)}
        return shapes

    def most_bytes(self, processes: int) -> int:
        """Return how much the state can ever take in a file: each process opens one group at a time."""
        assert self.sample_shape is not None
        num_open = processes + len(open_groups(self.request.num_units, self.counts))
        shapes = self.shapes(self.request, num_open, math.prod(self.sample_shape))
        return _HEADER_BYTES + 8 * sum(map(math.prod, shapes.values()))

    def statistics(self) -> TeacherStatistics:
        """Return the statistics of the samples seen. The state is used up."""
        request, shape = self.request, self.sample_shape
        assert shape is not None
        levels = torch.tensor(request.levels, dtype=torch.float64, device="cpu")
        elements = None if self.elements is None else self.elements.means(self.counts.sum())
        means = None if self.centering is None else self.centering.centre(self.counts, self.values)
        filled = self.counts > 0
        a = torch.from_numpy(reference(levels.numpy()))[:, None]  # D = E + a x
        return TeacherStatistics(
            levels,
            self.counts[filled],
            self.values[filled],
            StatisticsHeader(
                request.l_method, request.s_method, (request.seed,), shape, self.precision, request.description
            ),
            None if means is None else (means[:, 0] + a * means[:, 1]).reshape(len(levels), *shape),
            None if means is None else means[0, 1].reshape(shape),
            None if elements is None else elements.reshape(-1, len(levels), *shape),
        )


def open_groups(num_units: int, counts: Tensor) -> list[int]:
    """Return the groups that are begun but not whole."""
    return [g for g, (n, size) in enumerate(zip(counts.tolist(), group_sizes(num_units), strict=True)) if 0 < n < size]
