r"""The course of an estimate: batch after batch, in one process or several, from the beginning or where it was left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from .._warnings import warn_caller
from ..data.processes import Processes
from ..data.sources import Batch, IndexedSource, StreamSource
from ..statistics.moments import group_range, num_groups
from ..statistics.teacher_statistics import TeacherStatistics
from .checkpoint import Checkpoint
from .state import EstimationState, Request


class EstimationRun:
    """A process's share of an estimate, in step with the others'.

    Each process has whole groups of samples to itself, so that no sum depends on the number of processes. After every
    batch they wait for each other: all learn of a failure at once, and a checkpoint holds the same batches of all.

    Args:
        together: The processes.
        request: What to estimate.
        source: The clean samples.
        checkpoint: The file to go on from and to keep, or None.

    Attributes:
        state: The sums, of this process's share.
        num_units: Number of clean samples in the share.
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
        self._request = replace(request, shards=shards)
        _check_agreement(together, self._request, checkpoint)

        loaded = together.from_first(lambda: None if checkpoint is None else checkpoint.read(self._request))
        self.state = EstimationState(self._request) if loaded is None else loaded
        rank, num = together.rank, num_groups(self._request.num_units)
        groups = range(rank * num // together.size, (rank + 1) * num // together.size)
        self.state.keep(groups, totals=rank == 0)
        self._ranges = self.state.remaining(groups)
        self.num_units = self.state.num_done + sum(stop - start for start, stop in self._ranges)
        if shards > 1 and isinstance(source, StreamSource):
            source.number_from(group_range(groups.start, self._request.num_units)[0])

    def batches(self, batch_size: int, device: torch.device | None) -> Iterator[tuple[int, Batch]]:
        """Yield the batches that are still to be added to the state, numbered from 0, on the teacher's device.

        Yields:
            The number and the batch.

        Raises:
            KeyboardInterrupt: If the process is interrupted; the error tells how to go on.
            OSError: If the checkpoint cannot be written; nothing has been asked of the teacher yet, or the previous
                one is intact.
            RuntimeError: If another process has failed.
            ValueError: If samples have several shapes.
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
            raise KeyboardInterrupt(self._checkpoint.how_to_go_on(self._request)) from error

    def _prepare(self, batch: Batch | None) -> None:
        """Agree on what samples are like, and make sure of the checkpoint's space, before the teacher is asked."""
        kinds = self._together.exchange(None if batch is None else _kind(batch))
        for rank, kind in enumerate(kinds):
            if kind is not None:
                self.state.expect(*kind, f"process {rank}")
        if self.state.sample_shape is None:
            raise ValueError("data must hold at least one sample, got none in the processes that have a share.")
        if self._checkpoint is not None and self._together.rank == 0 and any(kinds):
            self._checkpoint.check_space(self.state.most_bytes(self._together.size))

    def _save(self, checkpoint: Checkpoint) -> None:
        whole = self._whole()
        if self._together.rank == 0:
            checkpoint.write(whole)

    def _whole(self) -> EstimationState:
        """Return the sum of all processes' states in the first one, which alone is to use it."""
        if self._together.size == 1:
            return self.state
        whole = EstimationState(self._request)
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
