r"""What all students share: the denoiser inside, which a preconditioning makes jumps of.

It is given, or made of a raw network F by EDM's scalings:

$$D_\theta = c^{EDM}_{skip}\, x + c^{EDM}_{out}\, F(c^{EDM}_{in}\, x, c_{noise}), \qquad
  x_s = c_{skip}(t, s)\, x_t + c_{out}(t, s)\, D_\theta$$

A network is called in its own dtype, but is told the noise levels in float32 at least: half precision cannot tell
neighbouring levels apart. Coefficients are computed in float64 and cast once.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_answer, check_callable
from .._conditions import plain
from .._modules import NetworkWrapper, attribute, layers_of, modules_of, names_no_argument
from ..noise_levels.network_scalings import DenoiserScalings, EDMPreconditioning
from ..noise_levels.per_sample import expand_to
from ..preconditionings.base import Preconditioning

NoiseConditioning = Callable[[Tensor], Tensor]


def _is_denoiser(network: object) -> bool:
    """Whether it is one of this library's, or EDM's or EDM2's with their scalings, told by what only these have."""
    for layer in layers_of(network):
        edm2 = hasattr(layer, "logvar_fourier") and hasattr(layer, "sigma_data")
        if edm2 or any(hasattr(layer, name) for name in ("noise_range", "scalings", "round_sigma")):
            return True
    return False


class Student(NetworkWrapper):
    """A preconditioning, and a raw network or a denoiser, called ``network`` in both cases."""

    edm: EDMPreconditioning | None
    """EDM's scalings around the raw network; None where the network is a denoiser itself."""

    target_time: str | None
    """The keyword under which a denoiser is told the target; None where it takes the level itself, if it has one."""

    _network_takes: str  # what a raw network is called with, for messages

    def __init__(
        self,
        network: Callable[..., Tensor],
        precond: Preconditioning,
        sigma_data: float = 0.5,
        noise_conditioning: NoiseConditioning | None = None,
    ) -> None:
        if _is_denoiser(network):
            raise TypeError(
                f"network must be a raw network, got {type(network).__name__}, which is a denoiser already: write "
                f"{type(self).__name__}.from_denoiser(denoiser, precond), or pass the network inside."
            )
        self._build(network, precond, "network", self._network_takes)
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
        self.edm = EDMPreconditioning(sigma_data)
        self.noise_conditioning = noise_conditioning

    def _build(self, network: Callable[..., Tensor], precond: Preconditioning, name: str, arguments: str) -> None:
        """Set what all students have; by itself, they are around a denoiser."""
        check_callable(network, name, f"{name}({arguments})")
        if student_behind(network) is not None:
            raise TypeError(
                f"{name} must not be a student, which jumps, got {type(network).__name__}: pass its denoise."
            )
        super().__init__(network)
        if not isinstance(precond, Preconditioning):
            raise TypeError(
                f"precond must be a Preconditioning, got {type(precond).__name__}: for example "
                f"AnalyticPreconditioning(statistics) or CTMPreconditioning()."
            )
        self.precond = precond
        self.edm = self.noise_conditioning = self.target_time = None
        self._casts = any(isinstance(module, NetworkWrapper) for module in modules_of(network))  # what it gets

    if TYPE_CHECKING:  # torch's own is untyped

        def __call__(  # noqa: D102
            self, x_t: Tensor, t: Tensor | float, s: Tensor | float | None = None, **condition: Any
        ) -> Tensor: ...

    @property
    def default_range(self) -> tuple[float, float]:
        """The cleanest and the noisiest level where none are given.

        Those that the preconditioning was made for and, where the student is around a denoiser, the denoiser knows.
        """
        low, high = self.precond.default_range
        known = attribute(self.network, "noise_range") if self.edm is None else None
        return (low, high) if known is None else (max(low, known[0]), min(high, known[1]))

    def fault(self, t: float, s: float) -> str | None:
        """Return what is wrong with a jump from t to s, or None: of numbers, so that no device is waited for."""
        return self.precond.fault(t, s)

    def scalings(self, t: Tensor) -> DenoiserScalings:
        """Return what makes the denoiser of the raw network at noise levels ``t``, in their dtype or a wider one.

        Raises:
            TypeError: If the student is around a denoiser that does not say.
        """
        if self.edm is None:
            inner = attribute(self.network, "scalings")
            if inner is None:
                raise TypeError(
                    f"expected a denoiser that says how it is made of a raw network, got "
                    f"{type(self.network).__name__}: make it with denoiser_from_network."
                )
            return DenoiserScalings(*inner(t))
        edm = self.edm(t)
        return edm if self.noise_conditioning is None else edm._replace(c_noise=self.noise_conditioning(t))

    def _denoiser(self, x: Tensor, *levels: Tensor, **condition: Any) -> Tensor:
        """Return D in float32 or wider, for one or two levels per sample, the first of them x's own."""
        wide = torch.promote_types(x.dtype, torch.float32)
        levels = tuple(level.to(wide) for level in levels)
        if self.edm is None:
            denoised: Tensor = self._ask_denoiser(x.to(wide), levels, plain(condition))
            check_answer(denoised, x, "denoiser")
            return denoised.to(wide)
        *factors, c_noise_t = self.scalings(levels[0])
        c_skip, c_out, c_in = (expand_to(c, x) for c in factors)
        dtype = self._network_dtype(x.dtype)
        told = torch.promote_types(dtype, torch.float32)  # float64 grids must not reach a float32 network's embedding
        c_noise = (c_noise_t, *((self.noise_conditioning or self.edm.c_noise)(level) for level in levels[1:]))
        output: Tensor = self.network((c_in * x).to(dtype), *(c.to(told) for c in c_noise), **plain(condition))
        check_answer(output, x, "network")
        return c_skip * x + c_out * output

    def _ask_denoiser(self, x: Tensor, levels: tuple[Tensor, ...], condition: dict[str, Any]) -> Tensor:
        """Call a denoiser with the levels, or with the first one and the network's time of the second."""
        own = self._network_dtype(x.dtype)
        if self.target_time is not None and len(levels) == 2:
            time = self.scalings(levels[1]).c_noise
            if time.is_floating_point():
                dtype = attribute(self.network, "time_dtype") or torch.promote_types(own, torch.float32)
                time = time.to(dtype)  # as the denoiser tells its own
            levels, condition = levels[:1], {**condition, self.target_time: time}
        # the denoiser may overwrite what it gets
        x, *levels_ = (v.clone() for v in (x if self._casts else x.to(own), *levels))
        output: Tensor = self.network(x, *levels_, **condition)
        return output


def takes(function: object, positional: int, *, alone: bool = False) -> bool:
    """Whether a function or a module, as far as it says, takes so many positional arguments; ``alone``: no others."""
    try:
        signature = _signature(function)
        (signature.bind if alone else signature.bind_partial)(*[None] * positional)
    except TypeError:
        return False
    except ValueError:  # has no signature
        return True
    return True


def third_argument(function: object) -> str:
    """Return the name of a function's or a module's third positional argument, as far as it says."""
    try:
        names = list(_signature(function).parameters)
    except (TypeError, ValueError):
        return ""
    return names[2] if len(names) > 2 else ""


def _signature(function: object) -> inspect.Signature:
    """Return the signature of a function or a module; of a wrapper that takes anything, that of what is inside."""
    for layer in layers_of(function):
        function = getattr(layer, "forward", layer)
        if not names_no_argument(function):  # type: ignore[arg-type]
            break
    return inspect.signature(function)  # type: ignore[arg-type]


def student_behind(student: object) -> Student | None:
    """Return the student inside wrappers (averaged, parallel, compiled); None of any other callable."""
    return next((layer for layer in layers_of(student) if isinstance(layer, Student)), None)


def default_range(student: object) -> tuple[float, float]:
    """Return the cleanest and the noisiest level where none are given: a student's own, else 0.002 and 80."""
    found = student_behind(student)
    return (0.002, 80.0) if found is None else found.default_range
