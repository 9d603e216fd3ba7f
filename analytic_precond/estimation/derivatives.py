r"""Derivatives of a teacher: Jacobian products and the change of D along the ODE.

Forward mode where the teacher's layers have it. Many fused attentions do not, and some have only plain reverse mode:
hence the fallbacks, and the forward-only estimators that need none of this (docs/method.md, section 5).
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from .._conditions import Condition
from ..data.memory import is_out_of_memory
from ..teachers.denoiser import Denoiser


def jvp(
    denoiser: Denoiser, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor, condition: Condition
) -> tuple[Tensor, Tensor]:
    """Return D(x, t) and its derivative in the direction (dx, dt), by forward mode."""
    pair = torch.func.jvp(lambda x, t: denoiser(x, t, **condition), (x, t), (dx, dt), strict=True)
    return cast("tuple[Tensor, Tensor]", pair)


class JacobianProduct:
    r"""J v, or J^T v once the teacher has refused a JVP, with $J = \partial D / \partial x$: either makes $v^T J v$."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser = denoiser
        self.forward_mode = True

    def __call__(self, x: Tensor, t: Tensor, v: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """Return D and the product; out of memory is not taken for a teacher without derivatives. All (B, ...)."""
        if self.forward_mode:
            try:
                return jvp(self.denoiser, x, t, v, torch.zeros_like(t), condition)
            except RuntimeError as error:  # NotImplementedError is one
                if is_out_of_memory(error):
                    raise
            self._check_reverse_mode(x, t, v, condition)
            self.forward_mode = False
        return self._by_vjp(x, t, v, condition)

    def _check_reverse_mode(self, x: Tensor, t: Tensor, v: Tensor, condition: Condition) -> None:
        """Refuse a teacher that hides part of itself from autograd: compare once with a central difference."""
        eps = float(torch.finfo(x.dtype).eps)
        step = eps ** (1 / 3) * t.reshape(-1, *[1] * (x.ndim - 1))
        ahead = self.denoiser(x + step * v, t, **condition).clone()
        difference = (ahead - self.denoiser(x - step * v, t, **condition)) / (2 * step)
        numeric, reverse = (v * difference).sum(), (v * self._by_vjp(x, t, v, condition)[1]).sum()
        rounding = 10 * eps * (v * ahead / step).abs().sum()
        # half of the value is far above the difference's own error, and far below what a hidden network leaves
        if not bool((reverse - numeric).abs() <= 0.5 * numeric.abs() + rounding):
            raise RuntimeError(
                f"expected gradients through the whole teacher, got v J v = {reverse.item():.4g} by autograd but "
                f"{numeric.item():.4g} by differences: remove torch.no_grad or detach in it, or use l_method='stein'."
            )

    def _by_vjp(self, x: Tensor, t: Tensor, v: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            denoised = self.denoiser(x, t, **condition)
            try:
                (product,) = torch.autograd.grad(denoised, x, v)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                raise RuntimeError(
                    "expected a teacher with a forward- or reverse-mode derivative in x, got neither (a no_grad "
                    f"inside it?): use l_method='stein', which needs forward passes only. It said: {error}"
                ) from error
        return denoised.detach(), product


def ode_derivative_jvp(denoiser: Denoiser, x: Tensor, t: Tensor, denoised: Tensor, condition: Condition) -> Tensor:
    r"""Return $dD/d\lambda$ along the ODE, one JVP with tangents $(D - x, -t)$. Shape of ``x``."""
    try:
        return jvp(denoiser, x, t, denoised - x, -t, condition)[1]
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            "expected a teacher with a forward-mode derivative for s_method='jvp', got a layer without one: use "
            "s_method='finite-difference' (two more forward passes) or 'transport' (none), or run fused attention "
            f"under torch.nn.attention.sdpa_kernel(SDPBackend.MATH). It said: {error}"
        ) from error


def ode_derivative_difference(
    denoiser: Denoiser, x: Tensor, t: Tensor, denoised: Tensor, condition: Condition
) -> Tensor:
    r"""Return $dD/d\lambda$ along the ODE by a central difference, two forward passes. Shape of ``x``.

    The step in lambda balances rounding against the second-order error: the cube root of the dtype's epsilon.
    """
    step = float(torch.finfo(x.dtype).eps) ** (1 / 3)
    move = step * (denoised - x)
    ahead = denoiser(x + move, t * math.exp(-step), **condition).clone()  # a teacher may reuse its output's memory
    behind = denoiser(x - move, t * math.exp(step), **condition)
    difference: Tensor = (ahead - behind) / (2 * step)
    return difference
