r"""The course of an estimate: batch after batch is added up, in one process or several, from the beginning or on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch
from torch import Tensor

from .._checks import warn_caller
from ..data.processes import Processes
from ..data.sources import Batch, IndexedSource, Range, StreamSource
from ..statistics.moments import MOMENTS, group_of, group_range, num_groups, reference
from ..statistics.teacher_statistics import StatisticsHeader, TeacherStatistics
from .checkpoint import Checkpoint, Packed, Request
from .sums import Centering, ElementSums, open_groups


class EstimationState:
    """The sums over the samples seen so far; they add up over processes, and can be kept and taken up again."""

    def __init__(self, request: Request) -> None:
        groups, num_levels = num_groups(request.num_units), len(request.levels)
        self.request = request
        self.sample_shape: tuple[int, ...] | None = None  # of one sample; None before there is one
        self.precision = ""  # what the teacher is called in
        # clean samples per group, and their moments summed per group and level
        self.counts = torch.zeros(groups, dtype=torch.float64, device="cpu")
        self.values = torch.zeros(groups, num_levels, len(MOMENTS), dtype=torch.float64, device="cpu")
        self.centering = Centering(request.num_units, num_levels) if request.intercept else None
        self.elements = ElementSums(num_levels) if request.per_element else None

    @property
    def num_done(self) -> int:
        """Number of clean samples seen."""
        return int(self.counts.sum())

    def expect(self, sample_shape: tuple[int, ...], precision: str, where: str) -> None:
        """Take note of what samples are like, the first time; refuse others later."""
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
        """Add consecutive samples, whose features were added: their moments, ``(K, B, 7)`` in float64 on the CPU."""
        groups = group_of(first_unit, moments.shape[1], self.request.num_units)
        if self.centering is not None:
            self.centering.fetch()
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


class EstimationRun:
    """A process's share of an estimate, in step with the others'.

    Each process has whole groups of samples to itself, so that no sum depends on the number of processes. After every
    batch they wait for each other: all learn of a failure at once, and a checkpoint holds the same batches of all.

    ``state`` are the sums over this process's share, ``num_units`` its number of clean samples.
    """

    def __init__(
        self,
        together: Processes,
        request: Request,
        source: IndexedSource | StreamSource,
        checkpoint: Checkpoint | None,
    ) -> None:
        self._together, self._source, self._checkpoint = together, source, checkpoint
        heads = together.exchange(source.head() if together.size > 1 else "")
        shards = together.size if len(set(heads)) > 1 else 1
        request = replace(request, shards=shards)
        _check_agreement(together, request, checkpoint)

        self.state = EstimationState(request)
        packed = together.from_first(lambda: None if checkpoint is None else checkpoint.read(request))
        if packed is not None:
            self.state.merge(packed)
        rank, num = together.rank, num_groups(request.num_units)
        groups = range(rank * num // together.size, (rank + 1) * num // together.size)
        self.state.keep(groups, totals=rank == 0)
        self._ranges = self.state.remaining(groups)
        self.num_units = self.state.num_done + sum(stop - start for start, stop in self._ranges)
        if shards > 1 and isinstance(source, StreamSource):
            source.number_from(group_range(groups.start, request.num_units)[0])

    def batches(self, batch_size: int, device: torch.device | None) -> Iterator[tuple[int, Batch]]:
        """Yield the batches that are still to be added to the state, numbered from 0, on the teacher's device.

        Where the checkpoint cannot be written, the teacher has not been asked yet, or the previous one is intact.
        """
        placed = (_placed(batch, device) for batch in self._source.batches(self._ranges, batch_size))
        batch = next(placed, None)
        self._prepare(batch)
        number = 0
        while any(self._together.exchange(batch is not None)):
            if batch is not None:
                self.state.expect(*_kind(batch), f"batch {number}")
                yield number, batch
            number += 1
            if self._checkpoint is not None and number % self._checkpoint.every == 0:
                self._save(self._checkpoint)
            batch = next(placed, None)
        if self._checkpoint is not None and number % self._checkpoint.every > 0:
            self._save(self._checkpoint)
        if self._source.shortage:
            warn_caller(self._source.shortage)

    def statistics(self) -> TeacherStatistics:
        """Return the statistics of all processes' samples, in each of them. The state is used up."""
        whole = self._whole()
        return self._together.from_first(whole.statistics)

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let an interruption say how to go on."""
        try:
            yield
        except KeyboardInterrupt as error:
            if self._checkpoint is None or self._together.rank > 0:
                raise
            raise KeyboardInterrupt(self._checkpoint.how_to_go_on(self.state.request)) from error

    def _prepare(self, batch: Batch | None) -> None:
        """Agree on what samples are like, and make sure of the checkpoint's space, before the teacher is asked."""
        kinds = self._together.exchange(None if batch is None else _kind(batch))
        for rank, kind in enumerate(kinds):
            if kind is not None:
                self.state.expect(*kind, f"process {rank}")
        if self.state.sample_shape is None:
            raise ValueError("data must hold at least one sample, got none in the processes that have a share.")
        if self._checkpoint is not None and self._together.rank == 0 and any(kinds):
            # each process opens one group at a time, beside those that were left open
            num_open = self._together.size + len(open_groups(self.state.request.num_units, self.state.counts))
            self._checkpoint.check_space(self.state.request, math.prod(self.state.sample_shape), num_open)

    def _save(self, checkpoint: Checkpoint) -> None:
        whole = self._whole()
        if self._together.rank == 0:
            checkpoint.write(self.state.request, whole.packed())

    def _whole(self) -> EstimationState:
        """Return the sum of all processes' states in the first one, which alone is to use it."""
        if self._together.size == 1:
            return self.state
        whole = EstimationState(self.state.request)
        for packed in self._together.gather(self.state.packed()):
            whole.merge(packed)
        return whole


def _check_agreement(together: Processes, request: Request, checkpoint: Checkpoint | None) -> None:
    """Refuse processes that ask for different things."""
    every = 0 if checkpoint is None else checkpoint.every
    first, *others = together.exchange({**asdict(request), "checkpoint_every": every})
    for rank, other in enumerate(others, 1):
        names = [name for name in first if first[name] != other[name]]
        if names:
            difference = ", ".join(f"{name} {first[name]!r:.100} and {other[name]!r:.100}" for name in names)
            raise ValueError(f"all processes must ask for the same, got in processes 0 and {rank} {difference}.")


def _placed(batch: Batch, device: torch.device | None) -> Batch:
    """Move samples to the teacher's device; half precision cannot hold x_0 + 0.002 n."""
    x_0 = batch.x if device is None else batch.x.to(device)
    return batch._replace(x=x_0.to(torch.promote_types(x_0.dtype, torch.float32)))


def _kind(batch: Batch) -> tuple[tuple[int, ...], str]:
    return tuple(batch.x.shape[1:]), str(batch.x.dtype).removeprefix("torch.")
