r"""Statistics of a teacher: $l_t$, $s_t$ and the remainder's RMS per noise level, with standard errors.

The object holds sums over samples and derives everything from them (docs/method.md, sections 4 to 6). It is all that a
student needs of its teacher.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_choice, check_finite, check_levels
from .._files import read_tensors, sample_shape_of, write_tensors
from .element_statistics import PARTS, ElementStatistics
from .moments import MOMENTS, PRECISIONS, Array, is_resolved, jackknife, reference, remainder_square, scales

L_METHODS = ("stein", "hutchinson", "exact")
S_METHODS = ("transport", "jvp", "finite-difference")
_KIND = "TeacherStatistics 1"  # what the file is, and the version of its layout
_LARGEST_ELEMENT = 1e100  # products of three such numbers are finite


@dataclass(frozen=True)
class StatisticsHeader:
    """How statistics were made; it travels in the file's header.

    Attributes:
        l_method: Estimator of l: ``"stein"``, ``"hutchinson"`` or ``"exact"``.
        s_method: Estimator of s: ``"transport"``, ``"jvp"`` or ``"finite-difference"``.
        seeds: Seeds of the runs that were merged into this one.
        sample_shape: Shape of one data sample; ``()`` where runs with different ones were merged.
        precision: The dtype that the teacher was called in, e.g. ``"float32"``.
        description: The teacher, in words.
    """

    l_method: str
    s_method: str
    seeds: tuple[int, ...]
    sample_shape: tuple[int, ...]
    precision: str
    description: str

    @property
    def sample_size(self) -> int:
        """Number of elements d of one sample."""
        return math.prod(self.sample_shape)


@dataclass(frozen=True, eq=False, repr=False)
class TeacherStatistics:
    r"""Coefficients of a teacher on a grid of noise levels. Made by `estimate_statistics` or `TeacherStatistics.load`.

    All results are float64 tensors with one value per level. With $g = D - l_t x$ (minus the intercept, if any):

    - ``l`` estimates $l_t = E[tr\,\partial D / \partial x] / d$,
    - ``g_rms`` estimates $\sqrt{E|g|^2 / d}$,
    - ``s`` estimates $s_t = E\langle g, dg/d\lambda \rangle / E|g|^2$; it is 0 where g vanishes,
    - ``..._stderr`` are their standard errors: 1.96 of them to each side make a 95 % interval.

    Attributes:
        levels: Decreasing noise levels. Shape ``(K,)``.
        counts: Number of antithetic pairs per group. Shape ``(G,)``.
        sums: Moments summed per group. Shape ``(G, K, 7)``.
        header: How the statistics were made.
        mean_denoised: With an intercept: the mean of D per level. Shape ``(K, *sample_shape)``.
        mean_data: With an intercept: the mean of the data. Shape ``sample_shape``.
        element_means: With statistics per element: means of products of each. Shape ``(8 or 13, K, *sample_shape)``.
    """

    levels: Tensor
    counts: Tensor
    sums: Tensor
    header: StatisticsHeader
    mean_denoised: Tensor | None = None
    mean_data: Tensor | None = None
    element_means: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the parts against each other, wherever they come from: their sizes before their values."""
        if not 0 < self.header.sample_size < 2**60:
            raise ValueError(f"sample_shape must hold some elements, got {self.header.sample_shape}.")
        check_choice(self.header.precision, PRECISIONS, "precision")
        check_choice(self.header.l_method, L_METHODS, "l_method")
        check_choice(self.header.s_method, S_METHODS, "s_method")
        if self.levels.ndim != 1 or len(self.levels) < 2:
            check_levels(self.levels)
        groups, num_levels, shape = self.counts.numel(), len(self.levels), self.header.sample_shape
        expected: list[tuple[str, Tensor | None, tuple[int, ...]]] = [
            ("levels", self.levels, (num_levels,)),
            ("counts", self.counts, (groups,)),
            ("sums", self.sums, (groups, num_levels, len(MOMENTS))),
        ]
        if self.mean_denoised is not None or self.mean_data is not None:
            expected += [
                ("mean_denoised", self.mean_denoised, (num_levels, *shape)),
                ("mean_data", self.mean_data, shape),
            ]
        if self.element_means is not None:
            expected += [("element_means", self.element_means, (PARTS[self.header.s_method], num_levels, *shape))]
        for name, part, part_shape in expected:
            if part is None or part.shape != part_shape or part.dtype != torch.float64:
                got = "nothing" if part is None else f"{part.dtype} of shape {tuple(part.shape)}"
                raise ValueError(f"{name} must be float64 of shape {part_shape}, got {got}.")
        check_levels(self.levels)
        for name, part, _ in expected:
            check_finite(part, name)  # type: ignore[arg-type]  # all are there
        whole = (self.counts >= 1) & (self.counts < 2**53) & (self.counts == self.counts.round())
        if groups == 0 or not bool(whole.all()):
            raise ValueError(f"counts must be positive whole numbers, got {self.counts[~whole].tolist()}.")
        if not bool((self.sums[..., 1] > 0).all()):
            raise ValueError("probe norms must be positive: these sums hold no samples.")
        if self.element_means is not None:
            largest = self.element_means.abs().max().item()
            if largest >= _LARGEST_ELEMENT:
                raise ValueError(
                    f"element_means must be below {_LARGEST_ELEMENT:g}, got up to {largest:.3g}: the teacher's values "
                    f"are too large, check its weights and scale."
                )
            if not bool((self.element_means[2] > 0).all()):
                raise ValueError("element_means must hold means of squares of noise, got some that are not positive.")

    def __repr__(self) -> str:
        """Say what they are statistics of, not all their numbers."""
        header, levels = self.header, self.levels
        return (
            f"TeacherStatistics({header.description!r}, {len(levels)} levels from {levels[0]:g} to {levels[-1]:g}, "
            f"{self.num_samples} samples, {header.l_method} + {header.s_method})"
        )

    @property
    def num_samples(self) -> int:
        """Number of noisy samples per level: two for each pair."""
        return 2 * int(self.counts.sum())

    @property
    def l(self) -> Tensor:
        """The linear coefficient l_t. Shape ``(K,)``."""
        return self._estimates[0]

    @property
    def l_stderr(self) -> Tensor:
        """Standard error of `l`. Shape ``(K,)``."""
        return self._estimates[1]

    @property
    def g_rms(self) -> Tensor:
        """RMS per element of the remainder g. Shape ``(K,)``."""
        return self._estimates[2]

    @property
    def g_rms_stderr(self) -> Tensor:
        """Standard error of `g_rms`. Shape ``(K,)``."""
        return self._estimates[3]

    @property
    def s(self) -> Tensor:
        """The scaling coefficient s_t. Shape ``(K,)``."""
        return self._estimates[4]

    @property
    def s_stderr(self) -> Tensor:
        """Standard error of `s`. Shape ``(K,)``."""
        return self._estimates[5]

    @property
    def intercept(self) -> Tensor | None:
        r"""The intercept $b_t = E[D] - l_t E[x]$, shape ``(K, *sample_shape)``; None where none was asked for."""
        if self.mean_denoised is None or self.mean_data is None:
            return None
        return self.mean_denoised - self.l.reshape(-1, *[1] * self.mean_data.ndim) * self.mean_data

    @cached_property
    def elements(self) -> ElementStatistics | None:
        """The coefficients of each element by itself; None where none were asked for."""
        if self.element_means is None:
            return None
        return ElementStatistics.of(
            self.levels, self.element_means, self.num_samples // 2, self.mean_data is not None, self.header.s_method,
            self.header.precision,
        )  # fmt: skip

    @cached_property
    def _estimates(self) -> tuple[Tensor, ...]:
        """Return l, g_rms and s, each before its standard error (docs/method.md, section 6)."""
        levels, counts, sums = self.levels.numpy(), self.counts.numpy(), self.sums.numpy()
        linear = jackknife(counts, sums, lambda means: (means[..., 0] / means[..., 1],))

        # where the remainder is more than rounding of D, or of D's differences, which move l
        (l, l_stderr), a = linear[0], reference(levels)
        _, _, EE, Ex, xx, _, _ = np.moveaxis(sums.sum(0) / counts.sum(), -1, 0)
        DD = EE + 2 * a * Ex + a**2 * xx
        if self.mean_denoised is not None:  # rounding is relative to D itself, not to what centring left of it
            DD = DD + self.mean_denoised.reshape(len(DD), -1).square().sum(1).numpy()
        gg = remainder_square(EE, Ex, xx, l - a)
        resolved = is_resolved(gg, EE, DD, xx, l_stderr, self.header.precision)

        def of_remainder(means: Array) -> tuple[Array, Array]:  # shapes (R, K, 7) to (R, K)
            trace, norm, *products = np.moveaxis(means, -1, 0)
            size, s_method = self.header.sample_size, self.header.s_method
            return scales(levels, trace / norm, np.stack(products), resolved, size, s_method)

        pairs = linear + jackknife(counts, sums, of_remainder)
        return tuple(torch.from_numpy(np.ascontiguousarray(v)) for pair in pairs for v in pair)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the statistics as a safetensors file, atomically: an existing file is replaced whole or not at all.

        Args:
            path: The file to write, by custom ``.safetensors``.

        Raises:
            FileNotFoundError: If the folder does not exist.
            ValueError: If ``path`` is a folder.
        """
        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        readable = {"num_samples": self.num_samples, "num_levels": len(self.levels)}
        write_tensors(path, _KIND, {**asdict(self.header), **readable}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TeacherStatistics:
        """Read statistics written by `save`. Nothing in the file is executed.

        Args:
            path: The file.

        Returns:
            The statistics, equal to the saved ones bit for bit.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is anything but a whole file of consistent statistics.
        """
        header, tensors = read_tensors(path, _KIND)
        try:
            parts = _required(tensors)
            on_disk = cls(**parts, header=_header_from(header))
            statistics = replace(on_disk, **{name: part.clone() for name, part in parts.items()})
            with np.errstate(all="raise", under="ignore"):
                _check_estimates(statistics._estimates)
                if statistics.elements is not None:
                    for value in (statistics.elements.l, statistics.elements.g_rms, statistics.elements.s):
                        check_finite(value, "what follows from element_means")
            return statistics
        except (ValueError, TypeError, FloatingPointError, RecursionError) as error:
            raise ValueError(f"expected statistics in {path}, got parts that do not fit: {error!s:.500}") from error


_TENSORS = ("levels", "counts", "sums", "mean_denoised", "mean_data", "element_means")


def _required(tensors: dict[str, Tensor]) -> dict[str, Any]:
    missing = [name for name in _TENSORS[:3] if name not in tensors]
    if missing:
        raise ValueError(f"tensors {missing} are missing")
    return {name: tensors[name] for name in _TENSORS if name in tensors}


def _check_estimates(estimates: tuple[Tensor, ...]) -> None:
    """Refuse sums that no samples have: values or errors that are no numbers, or infinite values."""
    for value, error in zip(estimates[::2], estimates[1::2], strict=True):
        if not bool(value.isfinite().all()) or bool(error.isnan().any()):
            raise ValueError("the coefficients that follow from the sums must be finite")


def _header_from(header: dict[str, Any]) -> StatisticsHeader:
    """Check a header that came from a file, and build it."""
    seeds = header.get("seeds")
    if not isinstance(seeds, list) or not all(type(seed) is int and 0 <= seed < 2**64 for seed in seeds):
        raise ValueError(f"header field 'seeds' must be a list of integers from 0 to 2**64 - 1, got {seeds!r}")
    words = {name: header.get(name) for name in ("l_method", "s_method", "precision", "description")}
    if not all(isinstance(word, str) for word in words.values()):
        raise ValueError(f"header fields {sorted(words)} must be strings, got {words}")
    return StatisticsHeader(**words, seeds=tuple(seeds), sample_shape=sample_shape_of(header))  # type: ignore[arg-type]
