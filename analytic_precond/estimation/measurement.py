r"""One batch at all noise levels: the teacher is called, and inner products come out (docs/method.md, section 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import warn_caller
from .._conditions import Condition, rows_of
from .._precision import wide_dtype
from ..data.memory import Pieces
from ..statistics.moments import inner_products, reference, regressed
from ..teachers.denoiser import Denoiser
from .derivatives import JacobianProduct, ode_derivative_difference, ode_derivative_jvp

_ODE_DERIVATIVES = {"jvp": ode_derivative_jvp, "finite-difference": ode_derivative_difference}


class Measured(NamedTuple):
    """What came out of consecutive samples of a batch at one level."""

    level: int  # its index
    samples: slice
    moments: Tensor  # of the pairs, in the wide dtype (B, 7)
    features: list[Tensor]  # E, x (and y) that they are made of, each (2, B, d)


class Answers(NamedTuple):
    """What the teacher says of rows, each a noisy sample with its level."""

    D: Tensor
    y: Tensor | None  # dD/dlambda along the ODE; None for transport
    trace: Tensor | None  # estimates of tr dD/dx, one for each row; None for stein, which takes a pair's difference


class Measurement:
    """The estimators of l and s, as what they ask of the teacher.

    It is called on *rows*, each a noisy sample with its level. They run through levels, then samples, then the two
    halves of a pair. A call gets as many as ``pieces`` allow: several levels share one where samples are few.
    """

    def __init__(self, denoiser: Denoiser, l_method: str, s_method: str, pieces: Pieces) -> None:
        self.denoiser = denoiser
        self.l_method = l_method
        self.where = ""  # the levels and the batch at work, for error messages
        self.warned = False
        self.jacobian_product = None if l_method == "stein" else JacobianProduct(self._teacher)
        self.ode_derivative = _ODE_DERIVATIVES.get(s_method)
        self.pieces = pieces

    def __call__(
        self, x_0: Tensor, noise: Tensor, probes: Tensor | None, levels: Tensor, condition: Condition, batch: int
    ) -> Iterator[Measured]:
        """Yield the measurements of the pairs ``x_0 ± t noise``: at each level (on the CPU), its samples in order.

        The noise is in the dtype to compute in; of Rademacher probes, ``(2, *x_0.shape)``, both halves have their own.
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
        if self.l_method != "stein":  # `JacobianProduct` is checked once, most sharply on the noisiest level alone
            return 1
        return max(1, self.pieces.size // (2 * num_samples))

    def _measure(
        self, x_0: Tensor, noise: Tensor, probes: Tensor | None, levels: Tensor, condition: Condition, samples: slice
    ) -> tuple[Tensor, list[Tensor]]:
        """Return moments and features of some samples at some levels. Shapes ``(K, B, 7)`` and ``(2, K, B, d)``."""
        a = torch.from_numpy(reference(levels.numpy()))
        t, a = (table.to(x_0.device, noise.dtype, non_blocking=True) for table in (levels, a))
        noise = noise[samples]
        # 1. Rows: every pair x_0 ± t n at every level, side by side, since the teacher takes samples of any level.
        x = _pairs(x_0[samples], noise, t)
        # 2. Answers: D there, with the derivatives that the methods ask for.
        answers = self._ask_all(x, t, probes, condition, samples, len(x_0))
        # 3. Inner products: the seven numbers of a pair and level that all statistics are sums of.
        return _inner_products(x, noise, t, a, answers)

    def _ask_all(
        self, x: Tensor, t: Tensor, probes: Tensor | None, condition: Condition, samples: slice, num_samples: int
    ) -> Answers:
        """Ask the teacher about all rows, in as many calls as ``pieces`` make necessary."""
        t_rows = t.to(x.dtype).repeat_interleave(len(x) // len(t))
        sample = torch.arange(samples.start, samples.stop, device="cpu").repeat_interleave(2).repeat(len(t))
        v = None if probes is None else probes[:, samples].to(x).transpose(0, 1).flatten(0, 1)  # there is one level
        answers = []
        for first in range(0, len(x), self.pieces.size):
            here = slice(first, first + self.pieces.size)
            keywords = rows_of(condition, sample[here], num_samples)
            answers.append(self._ask(x[here], t_rows[here], None if v is None else v[here], keywords))
        D, y, trace = (None if part[0] is None else torch.cat(part) for part in zip(*answers, strict=True))
        assert D is not None
        return Answers(D, y, trace)

    def _ask(self, x: Tensor, t: Tensor, v: Tensor | None, condition: Condition) -> Answers:
        """Ask the teacher about the rows of one call."""
        trace = None
        if self.jacobian_product is None:  # stein
            D = self._teacher(x, t, **condition)
        elif v is not None:  # hutchinson: v J v has the mean tr J
            D, product = self.jacobian_product(x, t, v, condition)
            trace = regressed(product.flatten(1), v.flatten(1))[2]
        else:  # exact: the diagonal of J, element by element
            trace = torch.zeros(len(x), dtype=wide_dtype(x.device), device=x.device)
            for i, unit in enumerate(torch.eye(x[0].numel(), dtype=x.dtype, device=x.device)):
                D, product = self.jacobian_product(x, t, unit.reshape(x.shape[1:]).expand_as(x).clone(), condition)
                trace += product.flatten(1)[:, i]
        D = D.clone()  # the teacher may reuse its output's memory
        y = None if self.ode_derivative is None else self.ode_derivative(self._teacher, x, t, D, condition)
        return Answers(D, y, trace)

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
            warn_caller(
                f"the teacher returns {denoised.dtype}, whose rounding hides what D changes of x at small noise: "
                f"compute c_skip x + c_out F in float32, as NetworkDenoiser does (docs/scale.md, Precision)."
            )
        return denoised


def _pairs(x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Return the rows x_0 ± t n, over levels, then samples, then halves. Shape ``(K B 2, ...)``, dtype of ``x_0``.

    x holds t n as well as its own dtype can: rounded once where the noise is wider, and else twice.
    """
    step = t.reshape(-1, *[1] * noise.ndim) * noise
    return torch.stack([x_0 + step, x_0 - step], 2).to(x_0.dtype).flatten(0, 2)


def _inner_products(x: Tensor, noise: Tensor, t: Tensor, a: Tensor, answers: Answers) -> tuple[Tensor, list[Tensor]]:
    """Return the moments ``(K, B, 7)`` and the features E, x (and y), ``(2, K, B, d)`` each, of the rows x.

    They are computed in the noise's dtype, if the teacher's is not wider; a is what E leaves out of D at each level.
    """
    K, B = len(t), len(noise)
    halves = [rows.reshape(K, B, 2, -1).movedim(2, 0) for rows in (answers.D, x, answers.y) if rows is not None]
    D, x, *derivative = (rows.to(torch.promote_types(rows.dtype, noise.dtype)) for rows in halves)
    # E = D - a x, and its derivative along the ODE, on which dx/dlambda = D - x
    a = a[:, None, None]
    E = torch.addcmul(D, a, x, value=-1)
    features = [E, x, *(torch.addcmul(y, a, D - x, value=-1) for y in derivative)]
    if answers.trace is None:  # stein: n.(D_+ - D_-) / 2t has the mean tr J, and n.n the mean d
        *_, difference, norm = regressed(D[0] - D[1], noise.reshape(1, B, -1))
        trace = difference / (2 * t[:, None])
    else:
        trace = answers.trace.reshape(K, B, 2).mean(-1)
        norm = torch.full_like(trace, D.shape[-1])
    products = inner_products(features).mean(0)
    return torch.cat([trace[..., None], norm.expand(K, B)[..., None], products], -1), features


def where(levels: Sequence[float], first: int, batch: int) -> str:
    """Say which levels, from index ``first`` on, and which batch."""
    if len(levels) == 1:
        return f"noise level {levels[0]:.6g} (index {first}), batch {batch}"
    last = first + len(levels) - 1
    return f"noise levels {levels[0]:.6g} to {levels[-1]:.6g} (indices {first} to {last}), batch {batch}"
