r"""One batch at all noise levels: the teacher is called, and inner products come out (docs/method.md, section 5)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._precision import wide_dtype
from ..data.memory import BatchSize, Pieces
from ..statistics.moments import inner_products, reference
from ..teachers.conditions import condition_rows
from ..teachers.denoiser import Condition, Denoiser
from .derivatives import JacobianForm, ode_derivative_difference, ode_derivative_jvp

_ODE_DERIVATIVES = {"jvp": ode_derivative_jvp, "finite-difference": ode_derivative_difference}


class Measured(NamedTuple):
    """What came out of consecutive samples of a batch at one level; floats in the wide dtype.

    Attributes:
        level: Index of the level.
        samples: The samples.
        moments: The pairs' moments. Shape ``(B, 7)``.
        features: E, x (and y) that the moments are made of. Each of shape ``(2, B, d)``.
    """

    level: int
    samples: slice
    moments: Tensor
    features: list[Tensor]


class Measurement:
    """The estimators of l and s, as what they ask of the teacher.

    The teacher is called on *rows*, each a noisy sample with its level. They run through levels, then samples, then the
    two halves of a pair. A call gets as many as ``batch_size`` allows: several levels share one where samples are few.

    Args:
        denoiser: The teacher.
        l_method: Estimator of l.
        s_method: Estimator of s.
        batch_size: Most rows in a call, or ``"auto"``.
    """

    def __init__(self, denoiser: Denoiser, l_method: str, s_method: str, batch_size: BatchSize) -> None:
        self.denoiser = denoiser
        self.l_method = l_method
        self.where = ""  # the levels and the batch at work, for error messages
        self.warned = False
        self.jacobian_form = JacobianForm(self._teacher)
        self.ode_derivative = _ODE_DERIVATIVES.get(s_method)
        self.pieces = Pieces(batch_size)

    def __call__(
        self, x_0: Tensor, noise: Tensor, probes: Tensor | None, levels: Tensor, condition: Condition, batch: int
    ) -> Iterator[Measured]:
        """Measure the pairs ``x_0 ± t noise`` at all levels.

        Args:
            x_0: Clean samples. Shape ``(B, ...)``.
            noise: Standard normal noise in the wide dtype. Shape of ``x_0``.
            probes: Rademacher probes for both halves, or None. Shape ``(2, *x_0.shape)``.
            levels: The noise levels, on the CPU. Shape ``(K,)``.
            condition: Keyword arguments of the teacher; tensors and lists of B entries have one for each sample.
            batch: Number of the batch, for error messages.

        Yields:
            The measurements: each level's samples in order.
        """
        first = 0
        while first < len(levels):
            here = levels[first : first + self._levels_per_call(len(x_0))]
            self.where = where(here.tolist(), first, batch)
            measure = partial(self._measure, x_0, noise, probes, here, condition)
            for samples, (moments, features) in self.pieces(len(x_0), measure, self.where):
                for k in range(len(here)):
                    yield Measured(first + k, samples, moments[k], [feature[:, k] for feature in features])
            first += len(here)

    def _levels_per_call(self, num_samples: int) -> int:
        if self.l_method != "stein":  # `JacobianForm` is checked once, most sharply on the noisiest level alone
            return 1
        return max(1, self.pieces.size // (2 * num_samples))

    def _measure(
        self,
        x_0: Tensor,
        noise: Tensor,
        probes: Tensor | None,
        levels: Tensor,
        condition: Condition,
        samples: slice,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return moments and features of some samples at some levels. Shapes ``(K, B, 7)`` and ``(2, K, B, d)``."""
        num_samples, wide = len(x_0), wide_dtype(x_0.device)
        x_0, noise, probes = x_0[samples], noise[samples], None if probes is None else probes[:, samples]
        K, B = len(levels), len(x_0)
        t, a = (
            table.to(x_0.device, wide, non_blocking=True)
            for table in (levels, torch.from_numpy(reference(levels.numpy())))
        )

        step = t.reshape(-1, *[1] * noise.ndim) * noise
        x = torch.stack([x_0 + step, x_0 - step], 2).to(x_0.dtype).flatten(0, 2)
        t_rows = t.to(x.dtype).repeat_interleave(2 * B)
        v = None if probes is None else probes.to(x).transpose(0, 1).flatten(0, 1)
        sample = torch.arange(samples.start, samples.stop, device="cpu").repeat_interleave(2).repeat(K)
        answers = [
            self._ask(x[rows], t_rows[rows], None if v is None else v[rows], condition_rows(condition, s, num_samples))
            for rows, s in _calls(sample, self.pieces.size)
        ]

        denoised, y, trace = (None if p[0] is None else torch.cat(p) for p in zip(*answers, strict=True))
        D, x, *derivative = (
            rows.reshape(K, B, 2, -1).movedim(2, 0).to(wide) for rows in (denoised, x, y) if rows is not None
        )
        a = a[:, None, None]
        features = [D - a * x, x, *(y - a * (D - x) for y in derivative)]

        if trace is None:  # stein
            n = noise.reshape(B, -1)
            trace, norm = (n * (D[0] - D[1])).sum(-1) / (2 * t[:, None]), (n * n).sum(-1).expand(K, B)
        else:
            trace = trace.reshape(K, B, 2).mean(-1)
            norm = torch.full_like(trace, D.shape[-1])
        products = inner_products([feature.flatten(1, 2) for feature in features]).reshape(K, B, -1)
        return torch.cat([trace[..., None], norm[..., None], products], -1), features

    def _teacher(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
        """Call the teacher on copies, which it may overwrite, and check what it returns."""
        denoised = self.denoiser(x.clone(), t.clone(), **condition)
        if not isinstance(denoised, Tensor) or not denoised.is_floating_point():
            got = denoised.dtype if isinstance(denoised, Tensor) else type(denoised).__name__
            raise TypeError(
                f"the teacher must return a floating-point tensor, got {got} at {self.where}: unwrap its output."
            )
        if denoised.shape != x.shape:
            raise ValueError(
                f"the teacher must return x's shape {tuple(x.shape)}, got {tuple(denoised.shape)} at {self.where}: "
                f"drop extra channels (a learned variance?) in an adapter."
            )
        if denoised.dtype.itemsize < 4 and not self.warned:
            self.warned = True
            warnings.warn(
                f"the teacher returns {denoised.dtype}, whose rounding hides what D changes of x at small noise: "
                f"compute c_skip x + c_out F in float32, as NetworkDenoiser does (docs/scale.md, Precision).",
                stacklevel=2,
            )
        return denoised

    def _ask(
        self, x: Tensor, t: Tensor, probe: Tensor | None, condition: Condition
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return D, dD/dlambda if needed, and the trace estimate (not for ``stein``, which takes both halves)."""
        trace = None
        if self.l_method == "hutchinson" and probe is not None:
            denoised, trace = self.jacobian_form(x, t, probe, condition)
        elif self.l_method == "exact":
            trace = torch.zeros(len(x), dtype=wide_dtype(x.device), device=x.device)
            for unit in torch.eye(x[0].numel(), dtype=x.dtype, device=x.device):
                direction = unit.reshape(x.shape[1:]).expand_as(x).clone()
                denoised, element = self.jacobian_form(x, t, direction, condition)
                trace += element
        else:
            denoised = self._teacher(x, t, **condition)
        denoised = denoised.clone()  # the teacher may reuse its output's memory
        y = None if self.ode_derivative is None else self.ode_derivative(self._teacher, x, t, denoised, condition)
        return denoised, y, trace


def _calls(sample: Tensor, size: int) -> Iterator[tuple[slice, Tensor]]:
    """Cut rows into calls: the rows, and their samples."""
    for first in range(0, len(sample), size):
        rows = slice(first, first + size)
        yield rows, sample[rows]


def where(levels: Sequence[float], first: int, batch: int) -> str:
    """Say which levels, from index ``first`` on, and which batch."""
    if len(levels) == 1:
        return f"noise level {levels[0]:.6g} (index {first}), batch {batch}"
    last = first + len(levels) - 1
    return f"noise levels {levels[0]:.6g} to {levels[-1]:.6g} (indices {first} to {last}), batch {batch}"
