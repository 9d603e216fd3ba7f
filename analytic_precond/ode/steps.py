r"""One step along the teacher's probability-flow ODE, $dx/dt = (x - D(x, t)) / t$, by Euler's or Heun's method.

Steps go either way: towards the data (s < t) or towards the noise (s > t). Level arithmetic is done in float64, the
rest in float32 or wider. The teacher is called in its own dtype (`NetworkDtype`), or ``x``'s where it has none; a
`NetworkDenoiser` or a student, which cast by themselves, get ``x`` in float32 or wider. Any other half-precision
teacher is told t in half precision, too, which cannot tell neighbouring levels apart: make a `NetworkDenoiser` of it.
Everything is differentiable: where no gradients are wanted, as in a distillation target, call under `torch.no_grad`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import check_answer, check_callable, check_tensor
from .._conditions import Condition, plain
from .._modules import modules_of, network_dtype
from ..noise_levels.per_sample import expand_to, per_sample
from ..students.base import Student
from ..teachers.denoiser import Denoiser
from ..teachers.networks import NetworkDenoiser


def widen(x: Tensor) -> Tensor:
    """Return ``x`` in float32 or wider, which steps are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def probability_flow_velocity(denoiser: Denoiser, x: Tensor, t: Tensor | float, **condition: Any) -> Tensor:
    r"""Return the velocity of the probability-flow ODE, $dx/dt = (x - D(x, t)) / t$.

    (Karras et al. 2022, equations 1 and 3 with $\sigma(t) = t$.)

    Of the arguments of `euler_step` it takes all but ``s``; the errors are as there.

    Returns:
        The velocity. Shape and dtype of ``x``.

    Examples:
        >>> teacher = lambda x, t: 0 * x  # all data are 0
        >>> probability_flow_velocity(teacher, torch.tensor([[3.0]]), torch.tensor([2.0]))
        tensor([[1.5000]])
    """
    velocity = Velocity.of(denoiser, x, condition)
    return velocity(widen(x), per_sample(t, x, "t")).to(x.dtype)


def euler_step(denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, **condition: Any) -> Tensor:
    r"""Carry ``x`` along the probability-flow ODE from noise level ``t`` to ``s`` by one Euler step.

    One teacher call, local error $O((t - s)^2)$; to s = 0 the step returns $D(x, t)$:

    $$x_s = x + (s - t)\, v(x, t), \qquad v(x, t) = (x - D(x, t)) / t$$

    Args:
        denoiser: The teacher $D$.
        x: Noisy data at level ``t``. Shape ``(B, ...)``.
        t: Noise levels to start from, positive. Shape ``(B,)``, or one for all. Off the CPU, and while compiling,
            levels out of range give NaN instead of an error.
        s: Noise levels to reach, above or below ``t``, at least 0. Shape ``(B,)``, or one for all.
        **condition: Handed to the teacher.

    Returns:
        The data at noise level ``s``. Shape and dtype of ``x``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a shape does not fit or a level is out of range.

    Examples:
        >>> teacher = lambda x, t: 0 * x  # all data are 0
        >>> euler_step(teacher, torch.tensor([[3.0]]), 2.0, 0.5)
        tensor([[0.7500]])
    """
    velocity = Velocity.of(denoiser, x, condition)
    t, s = per_sample(t, x, "t"), per_sample(s, x, "s", zero=True)
    return euler(velocity, x, t, Weights.of(t, s, x).euler)


def heun_step(denoiser: Denoiser, x: Tensor, t: Tensor | float, s: Tensor | float, **condition: Any) -> Tensor:
    r"""Carry ``x`` along the probability-flow ODE from noise level ``t`` to ``s`` by one step of Heun's method.

    Two teacher calls, local error $O(|t - s|^3)$:

    $$x_s = x + (s - t) \frac{v(x, t) + v(x + (s - t)\, v(x, t),\, s)}{2}, \qquad v(x, t) = (x - D(x, t)) / t$$

    Samples whose s is 0, where v is not defined, get the Euler step (Karras et al. 2022, algorithm 1).

    The arguments, what they may be and the errors are those of `euler_step`.

    Returns:
        The data at noise level ``s``. Shape and dtype of ``x``.

    Examples:
        >>> from analytic_precond import GaussianDenoiser
        >>> teacher = GaussianDenoiser(1.0)  # the flow is proportional to sqrt(1 + t^2)
        >>> x_s = heun_step(teacher, torch.tensor([[2.0]]), torch.tensor([1.0]), torch.tensor([0.9]))
        >>> round(x_s.item(), 3), round(2.0 * (1.81 / 2) ** 0.5, 3)
        (1.903, 1.903)
    """
    velocity = Velocity.of(denoiser, x, condition)
    t, s = per_sample(t, x, "t"), per_sample(s, x, "s", zero=True)
    to_zero, weights = s == 0, Weights.of(t, s, x)
    weights = weights._replace(heun_t=torch.where(to_zero, weights.euler, weights.heun_t))
    return heun(velocity, x, t, torch.where(to_zero, t, s), weights, to_zero)  # 0 has no velocity, t has one


@dataclass  # not a named tuple or frozen, which older torch.compile cannot call
class Velocity:
    """The velocity of a teacher's ODE as a function of x and t, the teacher called in its own dtype."""

    denoiser: Denoiser
    dtype: torch.dtype
    condition: Condition

    @staticmethod
    def of(denoiser: Denoiser, x: Tensor, condition: Condition) -> Velocity:
        """Return the velocity for data that come as ``x`` does, once both are checked."""
        check_callable(denoiser, "denoiser", "denoiser(x, t)")
        check_tensor(x, "x")
        if x.ndim == 0:
            raise ValueError("x must be a batch of shape (B, ...), got shape (): add dimensions.")
        # what casts by itself, also inside a guided denoiser or a compiled one
        if any(isinstance(module, NetworkDenoiser | Student) for module in modules_of(denoiser)):
            return Velocity(denoiser, torch.promote_types(x.dtype, torch.float32), condition)
        return Velocity(denoiser, network_dtype(denoiser, x.dtype), condition)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """Return (x - D) / t in x's dtype. Shapes: ``x`` (B, ...), ``t`` (B,)."""
        return self.removed(x, t) / expand_to(t, x).to(x.dtype)

    def removed(self, x: Tensor, t: Tensor) -> Tensor:
        """Return x - D in x's dtype: t times the velocity."""
        return x - self.denoised(x, t)

    def denoised(self, x: Tensor, t: Tensor) -> Tensor:
        """Return D in x's dtype."""
        own = (tensor.to(self.dtype, copy=True) for tensor in (x, t))  # the teacher may overwrite what it gets
        denoised = self.denoiser(*own, **plain(self.condition))
        check_answer(denoised, x, "teacher")
        return denoised.to(x.dtype)

    def state_dtype(self, x: Tensor) -> torch.dtype:
        """Return what a state that starts at x is kept in: the wider of x's and the teacher's, float32 at least."""
        return torch.promote_types(torch.promote_types(x.dtype, self.dtype), torch.float32)


class Weights(NamedTuple):
    """What steps multiply x - D by, of the levels' shape: the division by t is in them, done where it is cheap."""

    euler: Tensor  # (s - t) / t, of an Euler step
    heun_t: Tensor  # half of that: what x - D at t counts in a step of Heun's method
    heun_s: Tensor  # (s - t) / (2 s): what x - D at s counts

    @staticmethod
    def of(t: Tensor, s: Tensor, x: Tensor) -> Weights:
        """Return them in the dtype that steps of ``x`` are computed in; ``heun_s`` is 0 where s is."""
        end = torch.where(s == 0, t, s)
        ratios = ((s - t) / t, (end - t) / end)
        ratio_t, ratio_s = (ratio.to(torch.promote_types(x.dtype, torch.float32)) for ratio in ratios)
        return Weights(ratio_t, ratio_t / 2, ratio_s / 2)


def euler(velocity: Velocity, x: Tensor, t: Tensor, weight: Tensor) -> Tensor:
    """Take an Euler step from valid levels of shape (B,)."""
    z = widen(x)
    return torch.addcmul(z, expand_to(weight, z), velocity.removed(z, t)).to(x.dtype)


def heun(velocity: Velocity, x: Tensor, t: Tensor, s: Tensor, weights: Weights, alone: Tensor | None = None) -> Tensor:
    """Take a step of Heun's method between valid levels of shape (B,), not to 0; of some, x - D at t counts alone."""
    z = widen(x)
    whole, half_t, half_s = (expand_to(weight, z) for weight in weights)

    at_t = velocity.removed(z, t)
    at_s = velocity.removed(torch.addcmul(z, whole, at_t), s)
    if alone is not None:
        at_s = torch.where(alone.reshape(-1, *[1] * (z.ndim - 1)), 0, at_s)
    return torch.addcmul(torch.addcmul(z, half_t, at_t), half_s, at_s).to(x.dtype)
