"""Students that jump: from any noise level to any lower one, or to the cleanest one.

Around a raw network, in EDM's scalings, or around any denoiser: what they share is in `base`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._checks import all_true, check_not_negative
from .._modules import attribute
from .._precision import place
from ..noise_levels.per_sample import one_per_sample, per_sample
from ..preconditionings.base import ROUNDING, Preconditioning
from .base import NoiseConditioning, Student, takes, third_argument

_CONDITIONS = ("class_labels", "labels", "label", "y", "context", "cond", "condition", "encoder_hidden_states")


class ConsistencyTrajectoryModel(Student):
    r"""A student that jumps from any noise level to any lower one.

    The network is called as ``network(c_in * x, c_noise_t, c_noise_s, **condition)`` and returns ``x``'s shape.

    Args:
        network: The raw network F.
        precond: The jump's preconditioning on the denoiser.
        sigma_data: Standard deviation of the data.
        noise_conditioning: What the network is told of a noise level. Default: EDM's ``ln(t) / 4``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If ``sigma_data`` is not positive.

    Examples:
        >>> from analytic_precond import CTMPreconditioning
        >>> student = ConsistencyTrajectoryModel(lambda x, c_t, c_s: 0 * x, CTMPreconditioning())
        >>> student(torch.ones(1, 2), torch.tensor([0.5]), torch.tensor([0.25]))  # s/t x + (1 - s/t) x / 2
        tensor([[0.7500, 0.7500]])
    """

    _network_takes = "c_in * x, c_noise_t, c_noise_s"

    @classmethod
    def from_denoiser(
        cls, denoiser: Callable[..., Tensor], precond: Preconditioning, target_time: str | None = None
    ) -> ConsistencyTrajectoryModel:
        r"""Make a student of a denoiser that is told two noise levels, of whatever schedule and prediction.

        Without ``target_time`` it is called as ``denoiser(x, t, s, **condition)``. With it, as
        ``denoiser(x, t, **{target_time: time}, **condition)``, where ``time`` is what the network inside is told of s,
        as it is told t: a denoiser of one level becomes one of two with a keyword of its network.

            network = TwoTimeUNet(...)  # called as network(z, time, target=time_s, class_labels=...)
            denoiser = ap.denoiser_from_network(network, "v", ap.VPCosineSchedule())
            student = ap.ConsistencyTrajectoryModel.from_denoiser(denoiser, precond, target_time="target")

        Args:
            denoiser: The denoiser, trainable: an `nn.Module`, if its parameters are to be the student's.
            precond: The jump's preconditioning on the denoiser.
            target_time: The keyword, for what `denoiser_from_network` and its kin return.

        Returns:
            The student; ``student.network`` is the denoiser.

        Raises:
            TypeError: If an argument has the wrong type, or the denoiser does not take the levels in this way.

        Examples:
            >>> from analytic_precond import CTMPreconditioning
            >>> student = ConsistencyTrajectoryModel.from_denoiser(lambda x, t, s: x / 2, CTMPreconditioning())
            >>> student(torch.ones(1, 2), torch.tensor([0.5]), torch.tensor([0.25]))  # s/t x + (1 - s/t) x / 2
            tensor([[0.7500, 0.7500]])
        """
        student = cls.__new__(cls)
        student._build(denoiser, precond, "denoiser", "x, t, s" if target_time is None else f"x, t, {target_time}=...")
        if target_time is None and not takes(denoiser, 3):
            raise TypeError(
                f"the denoiser must take a second noise level, as denoiser(x, t, s), got {type(denoiser).__name__}, "
                f"which does not: name the keyword under which its network is told s, target_time=..., or take a "
                f"ConsistencyModel."
            )
        if target_time is None and (third := third_argument(denoiser)) in _CONDITIONS:
            raise TypeError(
                f"the denoiser's third argument must be the second noise level, got {third} of "
                f"{type(denoiser).__name__}: pass a function lambda x, t, s, **condition: ... that tells the network s."
            )
        if target_time is not None and not isinstance(target_time, str):
            raise TypeError(f"target_time must be the name of a keyword, got {target_time!r}.")
        if target_time is not None and attribute(denoiser, "scalings") is None:
            raise TypeError(
                f"target_time is for denoisers around a network, which say what it is told, got "
                f"{type(denoiser).__name__}: make it with denoiser_from_network, or pass a denoiser(x, t, s) without "
                f"target_time."
            )
        student.target_time = target_time
        return student

    def forward(self, x_t: Tensor, t: Tensor | float, s: Tensor | float | None = None, **condition: Any) -> Tensor:
        """Jump from ``t`` to ``s`` in one call of the network.

        Args:
            x_t: Noisy data. Shape ``(B, ...)``.
            t: Noise levels of ``x_t``. Shape ``(B,)``, or one for all.
            s: Noise levels to reach, at most ``t``. Shape ``(B,)``, or one for all.
            **condition: Handed to the network.

        Returns:
            The data at noise level ``s``. Shape and dtype of ``x_t``.

        Raises:
            TypeError: If ``s`` is missing.
        """
        if s is None:
            raise TypeError("expected a target noise level s, got none: call student(x_t, t, s), or student.denoise.")
        t, s = one_per_sample(t, x_t, "t"), one_per_sample(s, x_t, "s")
        x, q = self.precond.query(x_t, t, s)
        return self.precond.jump(x_t, self._denoiser(x, q, s, **condition), t, s).to(x_t.dtype)

    def denoise(self, x_t: Tensor, t: Tensor | float, **condition: Any) -> Tensor:
        """Return the denoiser that the student contains: its answer for s = t. Shape and dtype of ``x_t``.

        Raises:
            ValueError: If (on the CPU) ``t`` is negative or not finite.
        """
        t = per_sample(t, x_t, "t", zero=True)
        return self._denoiser(x_t, t, t, **condition).to(x_t.dtype)


class ConsistencyModel(Student):
    r"""A student that jumps from any noise level to the cleanest one, ``sigma_min``.

    The network is called as ``network(c_in * x, c_noise_t, **condition)`` and returns ``x``'s shape.

    The other arguments are those of `ConsistencyTrajectoryModel`.

    Args:
        sigma_min: The level that all jumps reach; 0 where the preconditioning reaches it. Default: the cleanest one
            that the preconditioning was made for, 0.002 if it was made for any.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.

    Examples:
        >>> from analytic_precond import CTMPreconditioning
        >>> model = ConsistencyModel(lambda x, c_t: 0 * x, CTMPreconditioning(), sigma_min=0.125)
        >>> model(torch.ones(1, 2), torch.tensor([0.5]))  # s/t x + (1 - s/t) x / 2
        tensor([[0.6250, 0.6250]])
    """

    _network_takes = "c_in * x, c_noise_t"

    def __init__(
        self,
        network: Callable[..., Tensor],
        precond: Preconditioning,
        sigma_data: float = 0.5,
        sigma_min: float | None = None,
        noise_conditioning: NoiseConditioning | None = None,
    ) -> None:
        super().__init__(network, precond, sigma_data, noise_conditioning)
        self._reach(sigma_min)

    @classmethod
    def from_denoiser(
        cls, denoiser: Callable[..., Tensor], precond: Preconditioning, sigma_min: float | None = None
    ) -> ConsistencyModel:
        """Make a student of any denoiser, of whatever schedule and prediction: at first it jumps as its teacher would.

        Args:
            denoiser: Called as ``denoiser(x, t, **condition)``, e.g. a copy of the teacher from
                `denoiser_from_network`. Trainable: an `nn.Module`, if its parameters are to be the student's.
            precond: The jump's preconditioning on the denoiser.
            sigma_min: The level that all jumps reach. Default: the cleanest one that the preconditioning was made for
                (0.002 if for any) and that the denoiser knows (`NetworkDenoiser.noise_range`).

        Returns:
            The student; ``student.network`` is the denoiser. The errors are the constructor's.

        Examples:
            >>> from analytic_precond import CTMPreconditioning, RectifiedFlowSchedule, denoiser_from_network
            >>> flow = denoiser_from_network(lambda x, time: x, "velocity", RectifiedFlowSchedule())  # D = x / 16 at 3
            >>> model = ConsistencyModel.from_denoiser(flow, CTMPreconditioning(), sigma_min=1.5)
            >>> model(torch.tensor([[8.0]]), torch.tensor([3.0]))  # (8 + D) / 2
            tensor([[4.2500]])
        """
        student = cls.__new__(cls)
        student._build(denoiser, precond, "denoiser", "x, t")
        student._reach(sigma_min)
        return student

    def _reach(self, sigma_min: float | None) -> None:
        sigma_min = super().default_range[0] if sigma_min is None else sigma_min
        check_not_negative(sigma_min, "sigma_min")  # 0 is what ECT's training jumps reach
        self.sigma_min = float(sigma_min)

    @property
    def default_range(self) -> tuple[float, float]:
        """The level that all jumps reach, and the noisiest one to start from."""
        return self.sigma_min, super().default_range[1]

    def forward(self, x_t: Tensor, t: Tensor | float, s: Tensor | float | None = None, **condition: Any) -> Tensor:
        """Return the jump from ``t`` to ``sigma_min`` in one call of the network. Shape and dtype of ``x_t``.

        Of the arguments of `ConsistencyTrajectoryModel.forward` it takes ``x_t``, ``t`` and ``condition``. ``s`` may be
        left out, or must be ``sigma_min``, to float32 rounding: losses and samplers call all students alike.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If ``s`` is another level, or ``t`` below it. As in `Preconditioning`, such levels give NaN
                instead where looking at them would stall the device.
        """
        t = one_per_sample(t, x_t)
        # in t's dtype: a level that is sigma_min but for rounding is the boundary
        s = place(self.sigma_min, t.device, t.dtype) if s is None else self._target(s, x_t)
        x, q = self.precond.query(x_t, t, s)
        return self.precond.jump(x_t, self._denoiser(x, q, **condition), t, s).to(x_t.dtype)

    def denoise(self, x_t: Tensor, t: Tensor | float, **condition: Any) -> Tensor:
        """Return the denoiser that the student contains. Shape and dtype of ``x_t``. Raises as the two-time one's."""
        return self._denoiser(x_t, per_sample(t, x_t, "t", zero=True), **condition).to(x_t.dtype)

    def _target(self, s: Tensor | float, x: Tensor) -> Tensor:
        """Return ``s``, NaN where it is not ``sigma_min``; refuse that where the values can be read."""
        s = one_per_sample(s, x, "s")
        reached = (s - self.sigma_min).abs() <= ROUNDING * self.sigma_min
        if all_true(reached) is False:
            raise ValueError(
                f"s must be {self._only_level(s[~reached][0].item())}: leave s out, or take a "
                f"ConsistencyTrajectoryModel."
            )
        return torch.where(reached, s, torch.nan)

    def fault(self, t: float, s: float) -> str | None:
        """Return what is wrong with a sampler's jump from t to s, first of all that it ends elsewhere, or None."""
        if abs(s - self.sigma_min) <= ROUNDING * self.sigma_min:
            return super().fault(t, s)
        return (
            f"jumps must end at {self._only_level(s)}: call sample_one_step or sample_multistep with "
            f"sigma_min={self.sigma_min:g}, or take a ConsistencyTrajectoryModel."
        )

    def _only_level(self, got: float) -> str:
        return f"sigma_min = {self.sigma_min:g}, the only level that a ConsistencyModel jumps to, got {got:.9g}"
