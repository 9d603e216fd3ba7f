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
from ..statistics.moments import MOMENTS, group_range, group_sizes, num_groups, reference
from ..statistics.teacher_statistics import StatisticsHeader, TeacherStatistics
from .sums import NUM_PRODUCTS, Centering, ElementSums, MomentSums

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
        own = json.loads(json.dumps(asdict(self)))
        other = {"per_element": False, "weights": "", **other}  # checkpoints from before there was a choice
        names = [name for name in own if name not in other or other[name] != own[name]]
        return ", ".join(f"{name} {other.get(name)!r:.100}, not {own[name]!r:.100}" for name in names)


class EstimationState:
    """The sums over the samples seen so far; they add up over processes, and can be kept and taken up again.

    Attributes:
        request: What was asked for.
        sample_shape: Shape of one sample; None before there is one.
        precision: What the teacher is called in.
        sums: The moments.
        centering: What an intercept needs, or None.
        elements: The sums of single elements, or None.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.sample_shape: tuple[int, ...] | None = None
        self.precision = ""
        self.sums = MomentSums(request.num_units, len(request.levels))
        self.centering = Centering(request.num_units, len(request.levels)) if request.intercept else None
        self.elements = ElementSums(len(request.levels)) if request.per_element else None

    @property
    def num_done(self) -> int:
        """Number of clean samples seen."""
        return int(self.sums.counts.sum())

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

    def groups_of(self, rank: int, size: int) -> range:
        """Return the groups of samples that are a process's share: whole ones, whose sums are then nobody else's."""
        groups = num_groups(self.request.num_units)
        return range(rank * groups // size, (rank + 1) * groups // size)

    def remaining(self, groups: range) -> list[Range]:
        """Return the numbers of the clean samples that some groups lack, in as few ranges as can be."""
        ranges: list[Range] = []
        for group in groups:
            start, stop = group_range(group, self.request.num_units)
            start += int(self.sums.counts[group])
            if ranges and ranges[-1][1] == start:
                ranges[-1] = (ranges[-1][0], stop)
            elif start < stop:
                ranges.append((start, stop))
        return ranges

    def merge(self, other: EstimationState) -> None:
        """Add what another process has, of other groups."""
        if other.sample_shape is not None:
            self.expect(other.sample_shape, other.precision, "another process")
        self.sums.merge(other.sums)
        if self.centering is not None and other.centering is not None:
            self.centering.merge(other.centering)
        if self.elements is not None and other.elements is not None:
            self.elements.merge(other.elements)

    def most_bytes(self, processes: int) -> int:
        """Return how much the state takes in a file just before the end, when there is most of it."""
        assert self.sample_shape is not None
        sizes = group_sizes(self.request.num_units)
        for rank in range(processes):
            for group in self.groups_of(rank, processes)[-1:]:
                sizes[group] -= 1
        shapes = self.shapes(self.request, sizes, math.prod(self.sample_shape))
        return _HEADER_BYTES + 8 * sum(map(math.prod, shapes.values()))

    def keep(self, groups: range, totals: bool) -> None:
        """Forget all but some groups, and the totals over whole groups unless asked to keep them."""
        self.sums.keep(groups)
        if self.centering is not None:
            self.centering.keep(groups, totals)
        if self.elements is not None and not totals:
            self.elements = ElementSums(len(self.request.levels))

    def statistics(self) -> TeacherStatistics:
        """Return the statistics of the samples seen. The state is used up."""
        request, sums = self.request, self.sums
        assert self.sample_shape is not None
        shape, levels = self.sample_shape, torch.tensor(request.levels, dtype=torch.float64, device="cpu")
        elements = None if self.elements is None else self.elements.means(sums.counts.sum())
        means = None if self.centering is None else self.centering.close(sums)
        filled = sums.counts > 0
        a = torch.from_numpy(reference(levels.numpy()))[:, None]  # D = E + a x
        return TeacherStatistics(
            levels,
            sums.counts[filled],
            sums.values[filled],
            StatisticsHeader(
                request.l_method, request.s_method, (request.seed,), shape, self.precision, request.description
            ),
            None if means is None else (means[:, 0] + a * means[:, 1]).reshape(len(levels), *shape),
            None if means is None else means[0, 1].reshape(shape),
            None if elements is None else elements.reshape(-1, len(levels), *shape),
        )

    @staticmethod
    def shapes(request: Request, counts: Sequence[int], sample_size: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that are `packed` when each group has so many units."""
        groups, levels = len(counts), len(request.levels)
        shapes: dict[str, tuple[int, ...]] = {"counts": (groups,), "values": (groups, levels, len(MOMENTS))}
        if request.intercept:
            features = 2 if request.s_method == "transport" else 3
            blocks = Centering.blocks(request.num_units, counts)
            shapes |= {name: (levels, features, sample_size) for name in blocks}
            shapes |= {"distinct": (groups, levels, NUM_PRODUCTS)}
        if request.per_element:
            shapes |= {"elements": (levels, PARTS[request.s_method], sample_size)}
        return shapes

    def packed(self) -> Packed:
        """Return the state as a header and tensors on the CPU, for a file or another process."""
        centering = {} if self.centering is None else self.centering.tensors()
        tensors = {"counts": self.sums.counts, "values": self.sums.values, **centering}
        if self.elements is not None and self.elements.values is not None:
            tensors |= {"elements": self.elements.values.cpu()}
        return {"sample_shape": self.sample_shape, "precision": self.precision}, tensors

    @classmethod
    def unpacked(cls, request: Request, packed: Packed) -> EstimationState:
        """Return the state that was `packed`."""
        state, (header, tensors) = cls(request), packed
        shape = header["sample_shape"]
        state.sample_shape, state.precision = None if shape is None else tuple(shape), header["precision"]
        state.sums.counts, state.sums.values = tensors["counts"].clone(), tensors["values"].clone()
        if state.centering is not None:
            state.centering.load(tensors)
        if state.elements is not None and "elements" in tensors:
            state.elements.values = tensors["elements"].clone()
        return state


def total(request: Request, states: Sequence[Packed]) -> EstimationState:
    """Return the sum of the processes' states."""
    whole = EstimationState(request)
    for packed in states:
        whole.merge(EstimationState.unpacked(request, packed))
    return whole
