r"""Is this the denoiser of these data? Identities that hold for the perfect one, checked per noise level.

For $D = E[x_0 \mid x_t]$ (docs/method.md, sections 4 to 6, derives the first two):

- the remainder's scale changes along the ODE as it changes between levels: $s_t$ by ``transport`` is $s_t$ by ``jvp``,
- the slope is the posterior variance: $l_t = E|x_0 - D|^2 / (d\, t^2)$, Stein's and Tweedie's identities together,
- no denoiser has a smaller error, not even the best affine one, whose is $d\, v\, t^2 / (v + t^2)$ with v the variance
  of the data's elements.

All three need only the moments that `estimate_statistics` sums up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_callable, check_count
from .._conditions import Condition
from .._modules import Wrapper
from .._precision import wide_dtype
from ..data.arguments import default_levels, name_of
from ..data.memory import BatchSize, is_out_of_memory, largest_batch
from ..data.sources import iterate_batches
from ..estimation.estimate import estimate_statistics
from ..statistics.moments import PRECISIONS, Array, jackknife, reference
from ..statistics.teacher_statistics import TeacherStatistics
from ..teachers.denoiser import Denoiser
from .teacher_report import LevelCheck, TeacherReport

# A perfect teacher is off by sampling, rounding and interpolation; "close" is what trained networks are. Measured on
# digits and photographs: small trained networks stay within 0.8 of these limits; with one of the faults named below the
# worst level reaches 1.4 to 1e11 of them. A factor 2 in t is the mildest: t / 2 has 1.1 to 4, and 0.8 on one teacher.
_S_LIMITS = (0.01, 0.2)
_L_LIMITS, _L_RELATIVE = (0.001, 0.0125), 0.25  # in l, and the part of the larger l that "close" allows in addition
_ERROR_LIMITS = (0.01, 0.25)

# A remainder below is the teacher's rounding, relative to x where D is c_skip x + c_out F or x - t F, rather than to D.
# In units of the precision and x: exact float32 networks for white Gaussian data (of v, epsilon or x_0) left at most
# 0.45, the ideal denoiser of digits at least 80,000.
_ROUNDING_OF_X = 3.0


@torch.no_grad()
def check_teacher(
    denoiser: Denoiser,
    data: object,
    levels: Tensor | None = None,
    num_samples: int = 512,
    batch_size: BatchSize = 256,
    seed: int = 0,
    progress: bool = True,
    *,
    condition: Callable[..., Condition] | None = None,
    device: torch.device | str | None = None,
) -> TeacherReport:
    r"""Check that a teacher is, nearly, the optimal denoiser of the data, before anything is built on it.

    It finds data in another range than the teacher's, another noise convention, outputs that are not D, networks left
    in train mode or far from trained. It takes the time of ``estimate_statistics(..., s_method="jvp")`` on as many
    samples and levels; where a layer has no forward-mode derivative, ``"finite-difference"`` is used.

    The arguments and the errors are those of `estimate_statistics`, but for

    - ``data``: Clean data, visited twice, so not a generator,
    - ``levels``: By default 40 from 80 to 0.002, inside what the teacher knows; few levels make s_t inexact,
    - ``num_samples``: Noisy samples per level, at least 32.

    Returns:
        The report. ``report.verdict`` is ``"consistent"`` (nothing found beyond sampling error), ``"close"`` (a trained
        network) or ``"inconsistent"``, the worst of all levels; ``print(report)`` says where and what it may mean.

    Raises:
        TypeError: If ``data`` is a generator.
        RuntimeError: As the teacher raised it, out of memory for one.

    Examples:
        >>> from analytic_precond import GaussianDenoiser
        >>> data = 0.5 * torch.randn(1024, 8, generator=torch.Generator().manual_seed(0))
        >>> check_teacher(GaussianDenoiser(0.25), data, progress=False).verdict
        'consistent'
        >>> check_teacher(GaussianDenoiser(0.25), 127.5 * data, progress=False).verdict
        'inconsistent'
    """
    check_callable(denoiser, "denoiser", "denoiser(x, t)")
    if isinstance(data, Iterator):
        raise TypeError(f"data must be something to visit twice, got a {type(data).__name__}: pass list(data).")
    check_count(num_samples, 32, "num_samples", "Standard errors need groups of samples.")
    levels = default_levels(denoiser, 40) if levels is None else levels
    name = name_of(denoiser, None)
    teacher = _AskedTwice(denoiser)
    settings: dict[str, Any] = {"seed": seed, "progress": progress, "condition": condition, "device": device}
    estimate = partial(estimate_statistics, teacher, data, levels, num_samples, batch_size, "stein", **settings)
    try:
        statistics = estimate(s_method="jvp", description=name)
    except RuntimeError as error:  # no forward mode; an error of the teacher's own comes again
        if is_out_of_memory(error):
            raise
        statistics = estimate(s_method="finite-difference", description=name)
    variance = _element_variance(data, num_samples // 2, largest_batch(batch_size), seed)
    return TeacherReport(
        statistics, _check_transport(statistics), *_check_error(statistics, variance), teacher.difference or 0.0
    )


def _check_transport(statistics: TeacherStatistics) -> LevelCheck:
    """Compare s_t by transport with s_t by derivative, both from the same sums."""
    xx = statistics.sums[..., 4].sum(0) / statistics.counts.sum() / statistics.header.sample_size
    rounding = _ROUNDING_OF_X * PRECISIONS[statistics.header.precision] * xx.sqrt()
    counts_where = (statistics.g_rms > rounding).numpy()

    def both(counts: Tensor, sums: Tensor) -> tuple[Array, Array]:
        by_derivative = replace(statistics, counts=counts, sums=sums)
        by_transport = replace(by_derivative, header=replace(statistics.header, s_method="transport"))
        return by_transport.s.numpy() * counts_where, by_derivative.s.numpy() * counts_where

    def difference(means: Array) -> tuple[Array]:
        one, rows = torch.ones(1, dtype=torch.float64, device="cpu"), torch.from_numpy(means)
        return (np.stack([np.subtract(*both(one, row[None])) for row in rows]),)

    [(_, stderr)] = jackknife(statistics.counts.numpy(), statistics.sums.numpy(), difference)
    return _level_check(*both(statistics.counts, statistics.sums), stderr, *_S_LIMITS)


def _check_error(statistics: TeacherStatistics, variance: float) -> tuple[LevelCheck, LevelCheck]:
    r"""Compare l_t with E|x_0 - D|^2 / (d t^2), and that with the best affine denoiser's."""
    t = statistics.levels.numpy()
    a = reference(t)

    def identity(means: Array) -> tuple[Array, Array, Array]:
        trace, norm, EE, Ex, xx, _, _ = np.moveaxis(means, -1, 0)
        # x_0 - D = (1 - a) x -+ t n - E on the halves x = x_0 +- t n, and n.(E_+ - E_-) / 2t = trace - a norm
        squared_error = EE + (1 - a) * (xx - 2 * t**2 * norm - 2 * Ex) + t**2 * (2 * trace + (1 - 2 * a) * norm)
        l, from_error = trace / norm, squared_error / (t**2 * norm)
        return l, from_error, l - from_error

    pairs = jackknife(statistics.counts.numpy(), statistics.sums.numpy(), identity)
    (l, _), (from_error, from_error_stderr), (_, stderr) = pairs
    close = _L_LIMITS[1] + _L_RELATIVE * np.maximum(np.abs(l), np.abs(from_error))
    slope = _level_check(l, from_error, stderr, _L_LIMITS[0], close)
    affine = variance / (variance + t**2)
    ratio = from_error / affine
    return slope, _level_check(ratio, ratio.clip(max=1), from_error_stderr / affine, *_ERROR_LIMITS)


def _level_check(value: Array, expected: Array, stderr: Array, exact: float, close: Array | float) -> LevelCheck:
    parts = (np.broadcast_to(part, value.shape) for part in (value, expected, stderr, exact, close))
    return LevelCheck(*(torch.tensor(part, dtype=torch.float64, device="cpu") for part in parts))


def _element_variance(data: object, num: int, batch_size: int, seed: int) -> float:
    """Return the variance of the samples that the statistics rest on, about their mean, averaged over elements."""
    count, total, squares = 0, torch.zeros((), dtype=torch.float64, device="cpu"), 0.0
    with torch.random.fork_rng(devices=[]):
        for batch in iterate_batches(data, num, batch_size, seed):
            x = batch.x.to("cpu", torch.float64)
            count, total, squares = count + len(x), total + x.sum(0), squares + float(x.square().sum())
    variance = (squares / count - float((total / count).square().sum())) / total.numel()
    if not variance > 0:
        raise ValueError(f"data must differ from sample to sample, got {count} samples of variance {variance:.3g}.")
    return variance


class _AskedTwice(Wrapper):
    """The teacher, whose first answer is asked for twice and compared."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.difference: float | None = None

    def forward(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        if self.difference is not None:
            return self.denoiser(x, t, **condition)
        before = self.denoiser(x.clone(), t.clone(), **condition)
        if isinstance(before, Tensor):  # else the statistics refuse it
            before = before.clone()  # the teacher may reuse its output's memory
            again = self.denoiser(x, t, **condition)
            distance, size = (
                float(y.to(wide_dtype(y.device)).square().mean().sqrt()) for y in (again - before, before)
            )
            self.difference = distance / size if distance > 0 else 0.0
        return before
