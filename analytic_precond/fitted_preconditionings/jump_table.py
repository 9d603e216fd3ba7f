r"""Tables of jumps: c_skip(t, s) and c_out(t, s) between the levels at which they were regressed.

What is interpolated is $(a - 1) / w$ and $b / w$ with $w = \ln(t / s)$ (`jump_regression` defines a and b). They are
smooth across s = t, and whatever they are, jumps from t to t change nothing and $D = x_t - t\, \partial_s x_s|_{s=t}$;
no difference of nearly equal numbers is formed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..interpolation.spline_table import SplineTable
from ..interpolation.splines import Array, derivative
from ..preconditionings.base import Scalings


class JumpTable(SplineTable):
    """Coefficients of G jumps at a time.

    Args:
        levels: Decreasing noise levels. Shape ``(K,)``, float64.
        control: B-spline coefficients of each jump's (a - 1) / w, then of b / w. Shape ``(K, K, 2 G)``.
    """

    @staticmethod
    def of(levels: Array, a: Array, b: Array, dtype: torch.dtype = torch.float64) -> JumpTable:
        """Return the table through given values at all pairs of levels. Shapes ``(K,)``, ``(G, K, K)`` twice."""
        change = np.concatenate([a - 1, b])
        w = np.log(levels[:, None] / levels)
        diagonal = np.diagonal(derivative(levels, change), axis1=1, axis2=2)  # the limit of change / w
        i = np.arange(len(levels))
        w[i, i] = 1
        ratio = change / w
        ratio[:, i, i] = diagonal
        control = torch.from_numpy(SplineTable.control_points(levels, ratio))
        return JumpTable(torch.from_numpy(levels), control.to(dtype))

    @property
    def num_jumps(self) -> int:
        """Number of jumps G."""
        return self.control.shape[-1] // 2

    def jumps(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients. Shapes: ``t`` and ``s`` alike, the results ``(G, *t.shape)``."""
        a_slope, b_slope = self(t, s).chunk(2)
        w, tau = ((t - s) / s).log1p(), (t - s) / t
        return Scalings(s / t + tau * (w * b_slope), tau * (1 + w * a_slope))
