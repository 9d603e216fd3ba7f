r"""Pooling statistics of one teacher from several runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from .moments import GROUPS
from .teacher_statistics import TeacherStatistics


def merge_statistics(statistics: Sequence[TeacherStatistics]) -> TeacherStatistics:
    """Pool statistics of one teacher from several runs, e.g. the jobs of an array, each with a seed of its own.

    Runs may have samples of different shapes, e.g. one for each bucket of aspect ratios, where nothing is kept per
    element: each sample counts the same, whatever its size, and the result has the sample shape ``()``.

    Args:
        statistics: At least one; levels, methods and intercept must agree, sample shapes too where there is an
            intercept or ``per_element``, seeds must differ.

    Returns:
        Statistics of all samples together.

    Raises:
        TypeError: If a part is not TeacherStatistics.
        ValueError: If there is nothing to merge or the parts do not fit together.

    Examples:
        >>> from analytic_precond import GaussianDenoiser, estimate_statistics
        >>> data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> run = lambda seed: estimate_statistics(
        ...     GaussianDenoiser(1.0), data, num_samples=64, seed=seed, progress=False)
        >>> merge_statistics([run(0), run(1)]).num_samples
        128
    """
    listed = isinstance(statistics, Sequence) and not isinstance(statistics, str)
    others = {type(part).__name__ for part in statistics} - {"TeacherStatistics"} if listed else set()
    if others or not listed:
        kind = type(statistics).__name__ + (f" with {', '.join(sorted(others))}" if others else "")
        raise TypeError(
            f"statistics must be a list of TeacherStatistics, got {kind}: write merge_statistics([a, b]), and "
            f"read files by TeacherStatistics.load first."
        )
    if not statistics:
        raise ValueError("statistics must hold at least one TeacherStatistics, got none.")
    if len({part.header.sample_shape for part in statistics}) > 1:
        statistics = [_per_element(part) for part in statistics]
    first = statistics[0]
    seeds = tuple(seed for part in statistics for seed in part.header.seeds)
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"statistics must come from runs with different seeds, got {seeds}: equal noise counts once.")
    for part in statistics[1:]:
        if not torch.equal(part.levels, first.levels):
            raise ValueError("statistics must share their noise levels: estimate them on one grid.")
        alike, got = asdict(first.header), asdict(part.header)
        names = [name for name in alike if name != "seeds" and got[name] != alike[name]]
        differences = [f"{name} {alike[name]!r} and {got[name]!r}" for name in names]
        if differences:
            raise ValueError(f"statistics must be made alike, got {', '.join(differences)}.")
        if (part.mean_data is None) != (first.mean_data is None):
            raise ValueError("statistics must agree on the intercept: estimate all with it or all without.")
        if (part.element_means is None) != (first.element_means is None):
            raise ValueError("statistics must agree on per_element: estimate all with it or all without.")

    counts = torch.cat([part.counts for part in statistics])
    sums = torch.cat([part.sums for part in statistics])
    fold = torch.arange(len(counts), device="cpu") % GROUPS  # groups are independent: pooled, their errors are right
    folded = min(GROUPS, len(counts))
    weights = [part.num_samples / (2 * float(counts.sum())) for part in statistics]
    return TeacherStatistics(
        first.levels,
        counts.new_zeros(folded).index_add_(0, fold, counts),
        sums.new_zeros(folded, *sums.shape[1:]).index_add_(0, fold, sums),
        replace(first.header, seeds=seeds),
        _weighted_mean(weights, [part.mean_denoised for part in statistics]),
        _weighted_mean(weights, [part.mean_data for part in statistics]),
        _weighted_mean(weights, [part.element_means for part in statistics]),
    )


def _per_element(part: TeacherStatistics) -> TeacherStatistics:
    """Return statistics of samples of one element, the mean of their elements; l, s and the remainder's RMS stay."""
    if part.mean_data is not None or part.element_means is not None:
        raise ValueError(
            f"statistics with an intercept or per element must share their sample shape, got "
            f"{part.header.sample_shape} beside others: estimate without, or merge each shape by itself."
        )
    return replace(part, sums=part.sums / part.header.sample_size, header=replace(part.header, sample_shape=()))


def _weighted_mean(weights: Sequence[float], values: Sequence[Tensor | None]) -> Tensor | None:
    terms = [weight * value for weight, value in zip(weights, values, strict=True) if value is not None]
    return torch.stack(terms).sum(0) if terms else None
