r"""Batches that fit the memory: work is cut into pieces, which are halved where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import torch

T = TypeVar("T")
BatchSize = int | Literal["auto"]
_FIRST_SIZE = 256  # where "auto" begins: fills a GPU with most networks, and is the functions' default

# CUDA, MPS and XPU's drivers; the CPU's allocator; cuBLAS, which has an allocation of its own
_MESSAGES = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. Only CUDA's has a type of its own."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)
    )


def largest_batch(batch_size: BatchSize) -> int:
    """Return the most samples that a batch of data is to have."""
    return _FIRST_SIZE if batch_size == "auto" else batch_size


class Pieces:
    """Work on rows, at most so many at a time; with ``"auto"`` 256, halved for good whenever memory runs out."""

    def __init__(self, batch_size: BatchSize) -> None:
        self.size = largest_batch(batch_size)
        self.adapts = batch_size == "auto"

    def __call__(self, num: int, work: Callable[[slice], T], where: str) -> Iterator[tuple[slice, T]]:
        """Yield each piece of ``num`` rows with what ``work`` makes of it; an error says where memory ended."""
        done = 0
        while done < num:
            piece = slice(done, min(done + self.size, num))
            try:
                result = work(piece)
            except RuntimeError as error:
                if not (self.adapts and is_out_of_memory(error)):
                    raise
                if self.size == 1:
                    raise torch.cuda.OutOfMemoryError(
                        f"memory must hold the teacher's work on one sample, got too little at {where}: free some, "
                        f"run the teacher in half precision (torch.autocast) or elsewhere. It said: {error}"
                    ) from error
            else:
                yield piece, result
                done = piece.stop
                continue
            # out here the error is gone, and with its traceback what the frames held
            self.size //= 2
            gc.collect()
            torch.cuda.empty_cache()
