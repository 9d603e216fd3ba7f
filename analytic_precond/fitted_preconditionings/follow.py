r"""From a teacher and data to the moments of its trajectories: what the fits of all jumps have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .._checks import check_count, check_levels
from .._precision import network_dtype, wide_dtype
from ..data.arguments import check_request, device_of, keywords_of, name_of, warn_if_training
from ..data.memory import BatchSize, largest_batch
from ..data.sources import Batch, iterate_batches, pair_noise
from ..noise_levels.grids import log_noise_levels
from ..ode.trajectories import Start
from ..statistics.moments import Array
from ..teachers.denoiser import Condition, Denoiser
from .fitted import FitHeader
from .trajectory_moments import flat

_NUM_LEVELS = 40


class Counted(Protocol):
    """Moments that know how many trajectories they are of."""

    @property
    def counts(self) -> Array:
        """Trajectories per block."""


Moments = TypeVar("Moments", bound=Counted)


class Coordinates(NamedTuple):
    """What products are averaged over.

    Attributes:
        groups: Indices of the coordinates in each group.
        to_modes: Maps samples to coordinates in an orthonormal basis. Shapes ``(B, ...)`` to ``(B, d)``.
    """

    groups: Sequence[Tensor | slice]
    to_modes: Callable[[Tensor], Tensor]


@torch.no_grad()
def measure_trajectories(
    denoiser: Denoiser,
    data: object,
    levels: Tensor | None,
    num_trajectories: int,
    batch_size: BatchSize,
    seed: int,
    condition: Callable[..., Condition] | None,
    device: torch.device | str | None,
    description: str | None,
    collect: Callable[[Iterator[Start], Tensor, Coordinates], Moments],
    coordinates: Callable[[list[Tensor], float], Coordinates] | None = None,
) -> tuple[Moments, FitHeader]:
    """Follow the teacher's ODE from noised data, and sum products.

    Args:
        denoiser: The teacher.
        data: Clean data, as for `estimate_statistics`.
        levels: Decreasing noise levels; by default 40, uniform in lambda.
        num_trajectories: Number of trajectories, each from a data sample with noise of its own.
        batch_size: Largest batch that the teacher sees, or ``"auto"``.
        seed: Seed of noise and data order.
        condition: Turns what follows ``x`` in a batch into the teacher's keyword arguments.
        device: Where the teacher runs.
        description: The teacher, in words.
        collect: Sums the products: given where trajectories begin, the levels and the coordinates.
        coordinates: Chooses coordinates, given all clean samples in batches and the cleanest level; they are then all
            held in memory.

    Returns:
        The moments, and how they were made.

    Raises:
        TypeError: If an argument has the wrong type, or data are not floating-point.
        ValueError: If an argument is out of range, or data or the teacher's answers are not as they should be.
    """
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable as denoiser(x, t), got {type(denoiser).__name__}.")
    levels = log_noise_levels(_NUM_LEVELS) if levels is None else levels
    check_levels(levels)
    check_count(num_trajectories, 1, "num_trajectories")
    check_request(batch_size, seed, condition, description)
    warn_if_training(denoiser)
    levels = levels.detach().to("cpu", torch.float64)
    device = device_of(denoiser, data) if device is None else torch.device(device)
    name = name_of(denoiser, description)

    def start(batch: Batch) -> Start:
        x_0 = batch.x
        noise = pair_noise(seed, batch.first, len(x_0), x_0.shape[1:], probes=False)[0]
        wide = wide_dtype(x_0.device)
        keywords = keywords_of(condition, batch.extra, denoiser, x_0.device)
        x = x_0.to(wide) + levels[0].item() * noise.to(x_0.device, wide)
        return Start(batch.first, x, torch.promote_types(x_0.dtype, torch.float32), keywords)

    with torch.random.fork_rng(devices=[device] if device is not None and device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)  # for a DataLoader that shuffles
        batches = _same_shapes(iterate_batches(data, num_trajectories, largest_batch(batch_size), seed), device)
        chosen = Coordinates((slice(None),), flat)
        if coordinates is not None:
            kept = list(batches)
            chosen = coordinates([batch.x for batch in kept], levels[-1].item())
            batches = iter(kept)
        first = next(batches)
        starts = (start(batch) for batch in chain([first], batches))
        moments = collect(starts, levels, chosen)
    precision = network_dtype(denoiser, torch.promote_types(first.x.dtype, torch.float32))
    return moments, FitHeader(
        int(moments.counts.sum()), seed, tuple(first.x.shape[1:]), str(precision).removeprefix("torch."), name
    )


def _same_shapes(batches: Iterator[Batch], device: torch.device | None) -> Iterator[Batch]:
    """Move batches to where the teacher runs; refuse samples of several shapes."""
    shape = None
    for number, batch in enumerate(batches):
        if shape is not None and batch.x.shape[1:] != shape:
            raise ValueError(
                f"data must hold samples of one shape, got {tuple(batch.x.shape[1:])} in batch {number} after "
                f"{tuple(shape)}: resize them first."
            )
        shape = batch.x.shape[1:]
        yield batch if device is None else batch._replace(x=batch.x.to(device))
