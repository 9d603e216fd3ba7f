r"""Coefficients of every element of a sample, or of every channel, by themselves (docs/method.md, section 13)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .._checks import check_choice
from .moments import PRODUCTS, Array, is_resolved, reference, remainder_square, scales


@dataclass(frozen=True, eq=False, repr=False)
class ElementStatistics:
    r"""Coefficients $l_t$, $s_t$ of single elements, on a grid of noise levels. From `TeacherStatistics.elements`.

    All results are float64, of shape ``(K, *shape)``, where ``shape`` is that of a sample, or after `reduce` has ones
    in the place of what was averaged over. For element i:

    - ``l`` estimates $E[\partial D_i / \partial x_i]$, from antithetic differences whatever ``l_method`` is,
    - ``g_rms`` estimates $\sqrt{E[g_i^2]}$ with $g_i = D_i - l_{t,i} x_i$ (minus the intercept, if any),
    - ``s`` estimates $E[g_i\, dg_i/d\lambda] / E[g_i^2]$; it is 0 where $g_i$ vanishes,
    - ``intercept`` is $b_t = E[D_i] - l_{t,i} E[x_i]$.

    With n pairs an element's l has a standard error of about $(\sum_{j \ne i} E[J_{ij}^2] / n)^{1/2}$, which does not
    become small next to l where there are many elements. Averages over a channel are as good as those over samples.

    Attributes:
        levels: Decreasing noise levels. Shape ``(K,)``.
        differences: Mean products of half-differences of E and x: EE, Ex, xx. Shape ``(3 or 5, K, *shape)``.
        products: Mean products of E and x (and y), without products of means if there is an intercept. Same shape.
        means: Means of E, x (and y). Shape ``(2 or 3, K, *sample_shape)``.
        removed: The squares of the means of E, x and D, where they were taken out, else 0. Shape ``(3, K, *shape)``.
        num_units: Number of antithetic pairs.
        has_intercept: Whether products of means were taken out.
        s_method: Estimator of s.
        precision: The dtype that the teacher was called in.
    """

    levels: Tensor
    differences: Tensor
    products: Tensor
    means: Tensor
    removed: Tensor
    num_units: int
    has_intercept: bool
    s_method: str
    precision: str

    @classmethod
    def of(
        cls, levels: Tensor, means: Tensor, num_units: int, has_intercept: bool, s_method: str, precision: str
    ) -> ElementStatistics:
        """Return the statistics that follow from `ElementSums.means`, of shape ``(parts, K, *sample_shape)``."""
        num = 3 if s_method == "transport" else 5
        differences, halves, features = means[:num], means[num : 2 * num], means[2 * num :]
        removed = torch.zeros_like(features[[0, 0, 0]])
        if has_intercept:
            of_means = torch.stack([features[a] * features[b] for a, b in PRODUCTS[:num]])
            halves = (halves - of_means) * (num_units / max(1, num_units - 1))  # from distinct units, so unbiased
            E, x = features[:2]
            removed = torch.stack([E, x, E + _reference(levels, E) * x]).square()
        return cls(
            levels, differences, differences + halves, features, removed, num_units, has_intercept, s_method, precision
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """The coefficients' shape at one level."""
        return tuple(self.products.shape[2:])

    @property
    def l(self) -> Tensor:
        """The linear coefficient l_t of each. Shape ``(K, *shape)``."""
        return self._estimates[0]

    @property
    def g_rms(self) -> Tensor:
        """RMS of the remainder of each. Shape ``(K, *shape)``."""
        return self._estimates[1]

    @property
    def s(self) -> Tensor:
        """The scaling coefficient s_t of each. Shape ``(K, *shape)``."""
        return self._estimates[2]

    @property
    def intercept(self) -> Tensor | None:
        r"""The intercept $b_t = E[D] - l_t E[x]$ of each element, whatever shares l; None where none was asked for."""
        if not self.has_intercept:
            return None
        return self.means[0] - (self.l - _reference(self.levels, self.l)) * self.means[1]

    def reduce(self, per: str) -> ElementStatistics:
        """Return the statistics of coefficients that several elements share: the pooled moments'.

        The intercept remains each element's own.

        Args:
            per: ``"channel"``, the first dimension of a sample, or ``"sample"``.

        Returns:
            Statistics of shape ``(C, 1, ..., 1)`` or ``(1, ..., 1)``.

        Raises:
            ValueError: If ``per`` is something else.
        """
        check_choice(per, ("channel", "sample"), "per")
        dims = tuple(range(3 if per == "channel" else 2, self.products.ndim))
        if not dims:
            return self
        return replace(
            self,
            differences=self.differences.mean(dims, keepdim=True),
            products=self.products.mean(dims, keepdim=True),
            removed=self.removed.mean(dims, keepdim=True),
        )

    @cached_property
    def _estimates(self) -> tuple[Tensor, ...]:
        levels = self.levels.numpy()
        a = reference(levels)
        hEE, hEx, hxx = (_levels_last(part) for part in self.differences[:3])
        products = np.stack([_levels_last(part) for part in self.products])
        EE, Ex, xx = products[:3]
        k = hEx / hxx
        l = k + a
        gg = remainder_square(EE, Ex, xx, k)
        # rounding is relative to E, x and D themselves, not to what centring left of them
        mean_EE, mean_xx, mean_DD = (_levels_last(part) for part in self.removed)
        DD = EE + 2 * a * Ex + a**2 * xx + mean_DD
        l_stderr = np.sqrt(remainder_square(hEE, hEx, hxx, k).clip(min=0) / (self.num_units * hxx))
        resolved = is_resolved(gg, EE + mean_EE + k**2 * mean_xx, DD, xx, l_stderr, self.precision)
        g_rms, s = scales(levels, l, products, resolved, 1, self.s_method)
        return tuple(torch.from_numpy(np.ascontiguousarray(np.moveaxis(v, -1, 0))) for v in (l, g_rms, s))


def _reference(levels: Tensor, values: Tensor) -> Tensor:
    """Return the part a of x in E, as values of shape ``(K, ...)`` broadcast with it."""
    return torch.from_numpy(reference(levels.numpy())).reshape(-1, *[1] * (values.ndim - 1))


def _levels_last(values: Tensor) -> Array:
    return np.moveaxis(values.numpy(), 0, -1)


PARTS = {"transport": 8, "jvp": 13, "finite-difference": 13}
"""Number of sums per element and level: products of half-differences, products of means, means."""
