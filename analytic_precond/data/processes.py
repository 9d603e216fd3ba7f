r"""Processes that work on one result together: a torch.distributed process group, or this process alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from .._checks import warn_caller

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # with another process's slowest batch; gloo's own is 30 minutes

# The group of the last call, while its threads may still be putting tensors away: up to torch 2.6 at least, a group
# that is dropped then waits for them, with the lock that they wait for.
_finished: list[dist.ProcessGroup] = []


class Processes:
    """This process and the others of its group.

    All of them make the same calls in the same order. Each call begins with the same collective, which carries errors
    too: a process may fail anywhere, and its farewell meets the call that the others make next.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.rank, self.size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._group = group
        self._in_step = True
        self._stopped = False

    def exchange(self, value: T) -> list[T]:
        """Return the value of each process, in order; raise if another one has failed, and say with what."""
        words = self._all_gather((None, value))
        failed = [
            f"process {rank} of {self.size} stopped with {error}" for rank, (error, _) in enumerate(words) if error
        ]
        if failed:
            self._in_step, self._stopped = False, True
            raise RuntimeError("; ".join(failed))
        return [value for _, value in words]

    def from_first(self, work: Callable[[], T]) -> T:
        """Return, on all processes, what the first one's work gives."""
        return self.exchange(work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return the value of each process on the first one, nothing on the others."""
        self.exchange(None)
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        with self._connected():
            dist.gather_object(value, values, dst=0, group=self._group)
        return values or []

    def leave(self, error: BaseException) -> bool:
        """Tell the others why this process stops, unless it is interrupted; return whether all know that it is over."""
        if self._in_step and isinstance(error, Exception):
            with suppress(RuntimeError):
                self._all_gather((f"{type(error).__name__}: {error}", None))
                self._stopped = True
        return self._stopped

    def _all_gather(self, word: tuple[str | None, Any]) -> list[tuple[str | None, Any]]:
        if self._group is None:
            return [word]
        words: list[Any] = [None] * self.size
        with self._connected():
            dist.all_gather_object(words, word, group=self._group)
        return words

    @contextmanager
    def _connected(self) -> Iterator[None]:
        self._in_step = False
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"process {self.rank} of {self.size} has lost another process, which was interrupted, was killed or "
                f"did not call the same function: see that one's output. It said: {error}"
            ) from error
        self._in_step = True


@contextmanager
def processes() -> Iterator[Processes]:
    """Yield this process and the others, where torch.distributed is initialised. An error in the block stops all.

    They talk through a gloo group of their own: the sums are on the CPU, whatever the teacher runs on.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        _warn_if_nothing_is_shared()
        yield Processes(None)
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    together, all_know = Processes(group), True
    try:
        yield together
    except BaseException as error:
        all_know = together.leave(error)
        raise
    finally:
        dist.destroy_process_group(group)
        if all_know:  # the others learn of an interruption by the end of the connection
            _finished[:] = [group]


def _warn_if_nothing_is_shared() -> None:
    """Warn of processes that were launched together, as by torchrun, and do not know of each other."""
    if not dist.is_available() or dist.is_initialized() or not dist.is_torchelastic_launched():
        return
    size = os.environ.get("WORLD_SIZE", "1")
    if size != "1":
        warn_caller(
            f"this is one of {size} processes, but torch.distributed is not initialised: each does all work. "
            "To share it, call torch.distributed.init_process_group (or make accelerate's Accelerator) first."
        )
