"""One batch at one noise level: the teacher is called, and inner products come out (docs/method.md, section 5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._checks import wide_dtype
from .derivatives import Condition, JacobianForm, ode_derivative_difference, ode_derivative_jvp
from .moments import inner_products, reference
from .teacher import Denoiser

_ODE_DERIVATIVES = {"jvp": ode_derivative_jvp, "finite-difference": ode_derivative_difference}


class Measurement:
    """The estimators of l and s, as what they ask of the teacher.

    Args:
        denoiser: The teacher.
        l_method: Estimator of l.
        s_method: Estimator of s.
    """

    def __init__(self, denoiser: Denoiser, l_method: str, s_method: str) -> None:
        self.denoiser = denoiser
        self.l_method = l_method
        self.where = ""  # the level and the batch at work, for error messages
        self.jacobian_form = JacobianForm(self._teacher)
        self.ode_derivative = _ODE_DERIVATIVES.get(s_method)

    def __call__(
        self, x_0: Tensor, noise: Tensor, probes: Tensor | None, t: float, condition: Condition, where: str
    ) -> tuple[Tensor, list[Tensor]]:
        """Measure the pairs ``x_0 ± t noise``.

        Args:
            x_0: Clean samples. Shape ``(B, ...)``.
            noise: Standard normal noise in the wide dtype. Shape of ``x_0``.
            probes: Rademacher probes for both halves, or None. Shape ``(2, *x_0.shape)``.
            t: The noise level.
            condition: Keyword arguments of the teacher.
            where: The level and the batch, for error messages.

        Returns:
            The pairs' moments, shape ``(B, 7)``, and the features E, x (and y) that they are made of, each of
            shape ``(2, B, d)``; all in the wide dtype.
        """
        self.where = where
        wide, levels = wide_dtype(x_0.device), x_0.new_full((len(x_0),), t)
        halves = []
        for half, sign in enumerate((1.0, -1.0)):
            x = (x_0 + sign * t * noise).to(x_0.dtype)
            probe = None if probes is None else probes[half].to(x)
            halves.append(self._half(x, levels, probe, condition))
        D, x, *derivative = (
            torch.stack(parts).reshape(2, len(x_0), -1).to(wide)
            for parts in list(zip(*halves, strict=True))[:-1]
            if parts[0] is not None
        )
        a = float(reference(np.asarray(t)))
        features = [D - a * x, x, *(y - a * (D - x) for y in derivative)]

        if self.l_method == "stein":
            n = noise.reshape(len(x_0), -1)
            trace, norm = (n * (D[0] - D[1])).sum(-1) / (2 * t), (n * n).sum(-1)
        else:
            trace = (halves[0][-1] + halves[1][-1]) / 2
            norm = torch.full_like(trace, D.shape[-1])
        return torch.cat([trace[:, None], norm[:, None], inner_products(features)], 1), features

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
        return denoised

    def _half(
        self, x: Tensor, t: Tensor, probe: Tensor | None, condition: Condition
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return D, x, dD/dlambda if needed, and the trace estimate (0 for ``stein``, which takes both halves)."""
        trace = torch.zeros(len(x), dtype=wide_dtype(x.device), device=x.device)
        if self.l_method == "hutchinson" and probe is not None:
            denoised, trace = self.jacobian_form(x, t, probe, condition)
        elif self.l_method == "exact":
            for unit in torch.eye(x[0].numel(), dtype=x.dtype, device=x.device):
                direction = unit.reshape(x.shape[1:]).expand_as(x).clone()
                denoised, element = self.jacobian_form(x, t, direction, condition)
                trace += element
        else:
            denoised = self._teacher(x, t, **condition)
        denoised = denoised.clone()  # the teacher may reuse its output's memory
        y = None if self.ode_derivative is None else self.ode_derivative(self._teacher, x, t, denoised, condition)
        return denoised, x, y, trace
