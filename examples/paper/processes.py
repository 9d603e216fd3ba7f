"""Processes that work on one run, as torchrun starts them: they go on together, or stop together and say why."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# errors whose text says all, from the system and from analytic_precond
CLEAR = (SystemExit, OSError, ValueError, TypeError, ImportError)


class Processes:
    """This process among all of a run.

    Args:
        device: ``"cuda"`` or ``"cpu"``; None: the GPU of this process's number where there are GPUs.

    Attributes:
        rank: Number of this process.
        size: How many there are.
        device: Where it computes.
    """

    def __init__(self, device: str | None = None) -> None:
        self.rank, self.size = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        self._words = None
        if self.size > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
            # a fit by the first process, or a slow disk, may take longer than NCCL would wait
            self._words = dist.new_group(backend="gloo", timeout=timedelta(days=1))

    def say(self, text: str) -> None:
        """Print, once."""
        if self.rank == 0:
            print(text, flush=True)

    def gather(self, value: Any) -> list[Any]:
        """Return the value of each process, on all of them."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self._words)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do the block in every process; where it fails in one, all stop with its message."""
        own = None
        try:
            yield
        except (Exception, SystemExit) as error:
            if not isinstance(error, CLEAR):
                traceback.print_exc()
            own = str(error)
            if not isinstance(error, SystemExit) and not own.startswith("--"):  # where it is an option's fault
                own = f"{type(error).__name__}: {own}"
        problems = [(rank, text) for rank, text in enumerate(self.gather(own)) if text is not None]
        if problems:
            rank, text = problems[0]
            where = f" (process {rank} of {self.size})" if self.size > 1 else ""
            raise SystemExit(f"{own or text}{where if own is None or own == text else ''}")

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """Add up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def leave(self) -> None:
        """Say goodbye."""
        if self.size > 1:
            dist.destroy_process_group()
