"""Estimates that run in processes of their own, where nothing of pytest is: what tests of scale compare."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import analytic_precond as ap

LEVELS = torch.tensor([2.0, 0.5, 0.05], dtype=torch.float64)
DATA = torch.linspace(-1, 1, 100 * 3, dtype=torch.float64).mul(37).sin().reshape(100, 3)


def rational_teacher(x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
    """Only operations that IEEE rounds correctly: its answers do not depend on the batch, nor on SIMD lanes."""
    t = ap.expand_to(t, x)
    shift = sum(ap.expand_to(value.to(x), x) for value in condition.values())
    return x / (1 + t * t) + (x - 0.3) / (2 + x * x) / (3 + shift)


def estimate(data: object, denoiser: ap.Denoiser = rational_teacher, **options: Any) -> ap.TeacherStatistics:
    # 32 pairs in 16 groups of two: a batch of two is a group, whoever measures it
    options = {"levels": LEVELS, "num_samples": 64, "batch_size": 2, "progress": False, **options}
    return ap.estimate_statistics(denoiser, data, **options, description="a teacher")


def same_bits(a: ap.TeacherStatistics, b: ap.TeacherStatistics) -> bool:
    """Whether all parts are equal, bit for bit."""
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


class Flipped(Dataset[Any]):
    """Samples with a random sign, which know who has asked for them, and labels."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.asked.append(index)
        return DATA[index] * (2 * torch.randint(2, ()) - 1), index


class Stream(IterableDataset[Any]):
    """Samples one by one."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(DATA)


# what all processes are given alike
SOURCES: dict[str, tuple[Callable[[], object], dict[str, Any]]] = {
    "tensor": (lambda: DATA, {}),
    "tensor twice over": (lambda: DATA[:20], {}),
    "intercept": (lambda: DATA, {"intercept": True}),
    "hutchinson": (lambda: DATA, {"l_method": "hutchinson", "num_samples": 16}),
    "derivatives with intercept": (lambda: DATA, {"s_method": "finite-difference", "intercept": True}),
    "random Dataset with labels": (Flipped, {"condition": lambda y: {"label": y}}),
    "shuffling DataLoader twice over": (lambda: DataLoader(TensorDataset(DATA[:20]), 6, shuffle=True), {}),
    "random DataLoader": (lambda: DataLoader(Flipped(), 4, shuffle=True), {"condition": lambda y: {"label": y}}),
    "IterableDataset": (Stream, {}),
    "generator": (lambda: (b for b in DATA.split(4)), {"intercept": True}),
    "one pair": (lambda: DATA, {"num_samples": 2}),
    "three groups": (lambda: DATA, {"num_samples": 14, "intercept": True}),
}


@cache
def all_sources() -> dict[str, ap.TeacherStatistics]:
    return {name: estimate(make(), **options) for name, (make, options) in SOURCES.items()}


class Failing:
    """A teacher that fails at some call, if at all, and counts them."""

    def __init__(self, at: int | None = None, error: type[BaseException] = ValueError) -> None:
        self.at, self.error, self.calls = at, error, 0

    def __call__(self, x: Tensor, t: Tensor, **condition: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise self.error("a tired teacher")
        return rational_teacher(x, t, **condition)


def outcome(work: Callable[[], Any]) -> Any:
    """Return what comes of it: the result, or the error in words."""
    try:
        return work()
    except (Exception, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error}"


def in_processes(size: int, folder: Path, work: Callable[[int, int, Path], Any]) -> list[Any]:
    """Return what each process of a gloo group makes of the work; None where one was killed."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=_process, args=(rank, size, folder, work)) for rank in range(size)]
    for process in started:
        process.start()
    for process in started:
        process.join(120)
        if process.is_alive():
            process.kill()
            raise TimeoutError("a process hangs")
    results = [folder / f"result {rank}" for rank in range(size)]
    return [pickle.loads(result.read_bytes()) if result.exists() else None for result in results]


def _process(rank: int, size: int, folder: Path, work: Callable[[int, int, Path], Any]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    result = work(rank, size, folder)
    (folder / f"result {rank}").write_bytes(pickle.dumps(result))
    dist.destroy_process_group()


def killed_run(checkpoint: Path, result: Path, calls: Connection) -> None:
    """Estimate with a teacher that tells of each call, so that the parent can kill the process at a chosen one."""

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        calls.send_bytes(b"call")
        return rational_teacher(x, t)

    torch.set_num_threads(1)
    estimate(DATA, teacher, intercept=True, num_samples=320, resume=checkpoint).save(result)


if __name__ == "__main__":  # for torchrun
    dist.init_process_group("gloo")
    estimate(DATA, intercept=True).save(Path(sys.argv[1]) / f"{dist.get_rank()}.safetensors")
    dist.destroy_process_group()
