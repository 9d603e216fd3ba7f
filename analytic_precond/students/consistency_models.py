r"""Students: a network, EDM's scalings around it, and a preconditioning that makes jumps of the denoiser.

$$D_\theta = c^{EDM}_{skip}\, x + c^{EDM}_{out}\, F(c^{EDM}_{in}\, x, c_{noise}), \qquad
  x_s = c_{skip}(t, s)\, x_t + c_{out}(t, s)\, D_\theta$$

The network is called in its own dtype, but is told the noise levels in float32 at least: half precision cannot tell
neighbouring levels apart. Coefficients are computed in float64 and cast once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import all_true, check_not_negative
from .._conditions import plain
from .._modules import NetworkWrapper
from ..noise_levels.network_scalings import EDMPreconditioning
from ..noise_levels.per_sample import expand_to, one_per_sample
from ..preconditionings.base import ROUNDING, Preconditioning

NoiseConditioning = Callable[[Tensor], Tensor]


class Student(NetworkWrapper):
    """What all students share: the denoiser around the network."""

    def __init__(
        self,
        network: Callable[..., Tensor],
        precond: Preconditioning,
        sigma_data: float = 0.5,
        noise_conditioning: NoiseConditioning | None = None,
    ) -> None:
        if not callable(network):
            raise TypeError(f"network must be callable, got {type(network).__name__}: pass an nn.Module.")
        super().__init__(network)
        if not isinstance(precond, Preconditioning):
            raise TypeError(
                f"precond must be a Preconditioning, got {type(precond).__name__}: for example "
                f"AnalyticPreconditioning(statistics) or CTMPreconditioning()."
            )
        if noise_conditioning is not None and not callable(noise_conditioning):
            raise TypeError(
                f"noise_conditioning must be a function of the noise level, got {noise_conditioning!r}: for example "
                f"NOISE_CONDITIONINGS['cm']."
            )
        if precond.told_lower_level and precond.sigma_data != sigma_data:
            raise ValueError(
                f"sigma_data must be {precond.sigma_data:g}, the preconditioning's, which scales the input by "
                f"it, got {sigma_data:g}: fit it again with the student's."
            )
        self.precond = precond
        self.edm = EDMPreconditioning(sigma_data)
        self.noise_conditioning = noise_conditioning

    if TYPE_CHECKING:  # torch's own is untyped

        def __call__(  # noqa: D102
            self, x_t: Tensor, t: Tensor | float, s: Tensor | float | None = None, **condition: Any
        ) -> Tensor: ...

    @property
    def default_range(self) -> tuple[float, float]:
        """The cleanest and the noisiest level of the student's jumps where none are given."""
        return self.precond.default_range

    def _denoiser(self, x: Tensor, *levels: Tensor, **condition: Any) -> Tensor:
        """Return D in float32 or wider, for one or two levels per sample, the first of them x's own."""
        wide = torch.promote_types(x.dtype, torch.float32)
        levels = tuple(level.to(wide) for level in levels)
        edm = self.edm(levels[0])
        c_skip, c_out, c_in = (expand_to(c, x) for c in (edm.c_skip, edm.c_out, edm.c_in))
        if self.noise_conditioning is not None:
            c_noise = [self.noise_conditioning(t) for t in levels]
        else:
            c_noise = [edm.c_noise, *(self.edm.c_noise(t) for t in levels[1:])]

        dtype = self._network_dtype(x.dtype)
        told = torch.promote_types(dtype, torch.float32)  # float64 grids must not reach a float32 network's embedding
        output: Tensor = self.network((c_in * x).to(dtype), *(c.to(told) for c in c_noise), **plain(condition))
        if output.shape != x.shape:
            raise ValueError(
                f"the network must return x's shape {tuple(x.shape)}, got {tuple(output.shape)}: drop extra channels, "
                f"and unwrap output objects, in an adapter around it."
            )
        return c_skip * x + c_out * output


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
        """Return the denoiser that the student contains: its answer for s = t. Shape and dtype of ``x_t``."""
        t = one_per_sample(t, x_t)
        return self._denoiser(x_t, t, t, **condition).to(x_t.dtype)


class ConsistencyModel(Student):
    r"""A student that jumps from any noise level to the cleanest one, ``sigma_min``.

    The network is called as ``network(c_in * x, c_noise_t, **condition)`` and returns ``x``'s shape.

    Args:
        network: The raw network F.
        precond: The jump's preconditioning on the denoiser.
        sigma_data: Standard deviation of the data.
        sigma_min: The level that all jumps reach; 0 where the preconditioning reaches it. Default: the cleanest one
            that the preconditioning was made for, 0.002 if it was made for any.
        noise_conditioning: What the network is told of a noise level. Default: EDM's ``ln(t) / 4``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If a number is out of range.

    Examples:
        >>> from analytic_precond import CTMPreconditioning
        >>> model = ConsistencyModel(lambda x, c_t: 0 * x, CTMPreconditioning(), sigma_min=0.125)
        >>> model(torch.ones(1, 2), torch.tensor([0.5]))  # s/t x + (1 - s/t) x / 2
        tensor([[0.6250, 0.6250]])
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        precond: Preconditioning,
        sigma_data: float = 0.5,
        sigma_min: float | None = None,
        noise_conditioning: NoiseConditioning | None = None,
    ) -> None:
        super().__init__(network, precond, sigma_data, noise_conditioning)
        sigma_min = precond.default_range[0] if sigma_min is None else sigma_min
        check_not_negative(sigma_min, "sigma_min")  # 0 is what ECT's training jumps reach
        self.sigma_min = float(sigma_min)

    @property
    def default_range(self) -> tuple[float, float]:
        """The level that all jumps reach, and the noisiest one to start from."""
        return self.sigma_min, self.precond.default_range[1]

    def forward(self, x_t: Tensor, t: Tensor | float, s: Tensor | float | None = None, **condition: Any) -> Tensor:
        """Jump from ``t`` to ``sigma_min`` in one call of the network.

        Args:
            x_t: Noisy data. Shape ``(B, ...)``.
            t: Noise levels of ``x_t``. Shape ``(B,)``, or one for all.
            s: May be left out, or must be ``sigma_min``, to float32 rounding: losses and samplers call all students
                alike. As in `Preconditioning`, other levels give NaN where looking at them would stall the device.
            **condition: Handed to the network.

        Returns:
            The data at noise level ``sigma_min``. Shape and dtype of ``x_t``.
        """
        t, s = one_per_sample(t, x_t), self.sigma_min if s is None else self._target(s, x_t)
        x, q = self.precond.query(x_t, t, s)
        return self.precond.jump(x_t, self._denoiser(x, q, **condition), t, s).to(x_t.dtype)

    def denoise(self, x_t: Tensor, t: Tensor | float, **condition: Any) -> Tensor:
        """Return the denoiser that the student contains. Shape and dtype of ``x_t``."""
        return self._denoiser(x_t, one_per_sample(t, x_t), **condition).to(x_t.dtype)

    def _target(self, s: Tensor | float, x: Tensor) -> Tensor:
        """Return ``s``, NaN where it is not ``sigma_min``; refuse that where the values can be read."""
        s = one_per_sample(s, x, "s")
        reached = (s - self.sigma_min).abs() <= ROUNDING * self.sigma_min
        if all_true(reached) is False:
            raise ValueError(
                f"s must be sigma_min = {self.sigma_min:g}, the only level that a consistency model jumps to, got "
                f"{s[~reached][0].item():.9g}: leave s out, or take a ConsistencyTrajectoryModel."
            )
        return torch.where(reached, s, torch.nan)


def student_behind(student: object) -> Student | None:
    """Return the student inside wrappers (averaged, parallel, compiled); None of any other callable."""
    while isinstance(student, nn.Module) and not isinstance(student, Student):
        student = getattr(student, "module", getattr(student, "_orig_mod", None))
    return student if isinstance(student, Student) else None


def default_range(student: object) -> tuple[float, float]:
    """Return the cleanest and the noisiest level where none are given: a student's own, else 0.002 and 80."""
    found = student_behind(student)
    return (0.002, 80.0) if found is None else found.default_range
