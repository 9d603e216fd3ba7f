r"""Following a teacher's ODE from noised data: what a fit asks for, checked once, and the one loop over batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._checks import check_count, check_positive
from .._files import sample_shape_of
from .._modules import network_dtype
from ..data.arguments import TeacherPass
from ..data.memory import Pieces
from ..data.sources import Batch, pair_noise
from ..ode.trajectories import PASSES_PER_STEP, Start, trajectory
from ..teachers.denoiser import Denoiser


class Points(NamedTuple):
    """A batch's points at all levels, for whoever gets them to overwrite. Shapes ``(K, B, ...)``, dtype of the start.

    Attributes:
        bend: What sets the states off the Euler step from the first level's (`Point`): of the states themselves,
            float32 would round more than neighbouring levels differ by beyond that step.
        denoised: The teacher's outputs D(x, t).
    """

    bend: Tensor
    denoised: Tensor


@dataclass(frozen=True)
class FitHeader:
    """How jumps were fitted; it travels in the file's header.

    Attributes:
        num_trajectories: Number of the teacher's trajectories.
        seed: Seed of noise and data order.
        sample_shape: Shape of one data sample.
        precision: The dtype of the teacher, e.g. ``"float32"``.
        description: The teacher, in words.
    """

    num_trajectories: int
    seed: int
    sample_shape: tuple[int, ...]
    precision: str
    description: str

    @staticmethod
    def of(header: Mapping[str, Any]) -> FitHeader:
        """Return the part of a file's header that is the fit's, or raise a ValueError."""
        kinds = {"num_trajectories": int, "seed": int, "sample_shape": list, "precision": str, "description": str}
        for name, kind in kinds.items():
            if type(header.get(name)) is not kind:
                raise ValueError(f"header field {name!r} must be of type {kind.__name__}, got {header.get(name)!r}")
        if header["num_trajectories"] < 1 or not 0 <= header["seed"] < 2**64:
            raise ValueError(f"there must be trajectories, of a seed below 2**64, got {header}")
        return FitHeader(**{name: header[name] for name in kinds} | {"sample_shape": sample_shape_of(header)})


@dataclass(frozen=True)
class Trajectories:
    """A teacher's trajectories, to be followed once; with ``"auto"``, what memory cannot hold begins anew in halves."""

    denoiser: Denoiser
    starts: Iterable[Start]  # where they begin, at the first level
    levels: Tensor  # decreasing, (K,), float64 on the CPU
    num: int  # unless starts run out
    pieces: Pieces = field(default_factory=lambda: Pieces("auto"))
    progress: bool = False

    def follow(self, add: Callable[[Start, Points, Callable[[], object]], None], more_passes: int = 0) -> int:
        """Return the number of trajectories, once ``add`` has got each batch.

        It is called with where the batch began, its points, and what to call after each of its own ``more_passes``. If
        memory runs out in it, it is called again with fewer: it is to add all or nothing.
        """
        grid, count = self.levels.tolist(), 0
        passes = 1 + PASSES_PER_STEP * (len(grid) - 1) + more_passes

        def work(start: Start, rows: slice) -> int:
            piece = start.rows(rows)
            bar.n = piece.first * passes  # set back where memory has run out on the way
            points = Points(*(piece.x.new_empty(len(grid), *piece.x.shape) for _ in range(2)))
            for k, point in enumerate(trajectory(self.denoiser, piece, grid)):
                bar.update(len(piece.x) * (PASSES_PER_STEP if k else 1))
                points.bend[k], points.denoised[k] = point.bend, point.denoised
            add(piece, points, partial(bar.update, len(piece.x)))
            return len(piece.x)

        total = self.num * passes
        with tqdm(total=total, desc="trajectories", unit=" passes", unit_scale=True, disable=not self.progress) as bar:
            for start in self.starts:
                done = self.pieces(len(start.x), partial(work, start), f"trajectories from {start.first} on")
                count += sum(num for _, num in done)
        return count


@dataclass
class FitRun:
    """What a fit was asked for."""

    trajectories: Trajectories  # from noised data
    header: FitHeader
    sigma_data: float
    batches: Iterable[Batch]  # clean data, where the teacher runs; they can be iterated once, and `hold` keeps them

    def hold(self) -> list[Tensor]:
        """Keep all clean samples in memory, and return them in batches."""
        self.batches = list(self.batches)
        return [batch.x for batch in self.batches]


@contextmanager
def fit_run(asked: TeacherPass, num_trajectories: int, sigma_data: float, progress: bool) -> Iterator[FitRun]:
    """Check the rest of what a fit is asked for, read the first batch, and keep torch's generators while it lasts."""
    check_count(num_trajectories, 1, "num_trajectories")
    check_positive(sigma_data, "sigma_data")
    asked.warn()

    def starts() -> Iterator[Start]:
        """Yield the clean data with noise of their own, at the first level."""
        for batch in run.batches:  # once they are asked for: `hold` may come between
            x_0 = batch.x
            noise = pair_noise(asked.seed, batch.first, len(x_0), x_0.shape[1:], probes=False)[0]
            x = torch.add(x_0.to(state), noise.to(x_0.device, state), alpha=asked.levels[0].item())
            yield Start(batch.first, x, own, asked.conditions(batch))

    with torch.no_grad(), asked.rng_kept():
        batches = asked.batches(num_trajectories)
        first = next(batches)
        own = torch.promote_types(first.x.dtype, torch.float32)
        precision = network_dtype(asked.denoiser, own)
        state = torch.promote_types(own, precision)
        shape, dtype = tuple(first.x.shape[1:]), str(precision).removeprefix("torch.")
        header = FitHeader(num_trajectories, asked.seed, shape, dtype, asked.name)
        trajectories = Trajectories(asked.denoiser, starts(), asked.levels, num_trajectories, asked.pieces, progress)
        run = FitRun(trajectories, header, sigma_data, chain([first], batches))
        yield run
