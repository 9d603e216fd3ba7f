r"""Hand-crafted preconditionings of published models, next to `CTMPreconditioning`.

Called, each gives the jump on a denoiser D, in EDM's variable $x_t = x_0 + t\, n$; ``on_network`` gives the same jump
on the raw network F that the model was published with, in that network's sign. Where the target s is free, D is what
the jump itself implies, $x_t - t\, \partial_s x_s |_{s = t}$. Here $\varepsilon = \sigma_{min}$, $v = \sigma_{data}^2$.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .._checks import check_choice, check_not_negative, check_positive
from .._precision import place, wide_dtype
from .base import ROUNDING, Preconditioning, Scalings


class CTMPreconditioning(Preconditioning):
    r"""The Consistency Trajectory Model's hand-crafted jumps (Kim et al. 2024), on the denoiser.

    With $V(t) = (t - \sigma_{min})^2 + \sigma_{data}^2$ and an outer factor $g$ on $x_t$:

    - ``"euler"``: $g = s / t$, one Euler step of the probability-flow ODE,
    - ``"variance"``: $g = \sqrt{V(s) / V(t)}$,
    - ``"euler_variance_mixed"``: $g = (s + \sqrt{V(s) / V(t)}) / (t + 1)$.

    The network's share is $c_{out} = 1 - s/t$ in all three, and
    $c_{skip} = g - (1 - s/t)(1 - t\, \partial_s g|_{s=t})$: for the last two, CTM's own network output differs from
    the denoiser by that multiple of $x_t$.

    Args:
        outer: One of the three.
        sigma_data: Standard deviation of the data.
        sigma_min: The shift in V.

    Raises:
        ValueError: If ``outer`` is unknown or a number is not positive.

    Examples:
        >>> CTMPreconditioning()(torch.tensor(4.0), torch.tensor(1.0))
        Scalings(c_skip=tensor(0.2500), c_out=tensor(0.7500))
    """

    def __init__(self, outer: str = "euler", sigma_data: float = 0.5, sigma_min: float = 0.002) -> None:
        check_choice(outer, ("euler", "variance", "euler_variance_mixed"), "outer")
        check_positive(sigma_min, "sigma_min")
        super().__init__(sigma_data)
        self.outer = outer
        self.shift = float(sigma_min)

    def coefficients(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients for valid levels."""
        c_skip = s / t
        if self.outer != "euler":  # what g adds to s / t, without differences of nearly equal large numbers
            v_t, v_s = ((level - self.shift) ** 2 + self.sigma_data**2 for level in (t, s))
            g = (v_s / v_t).sqrt()
            c_skip = c_skip + (t - s) * ((t - self.shift) * g - (s - self.shift)) / (v_t * (1 + g))
        if self.outer == "euler_variance_mixed":
            c_skip = (s + c_skip) / (t + 1)
        return Scalings(c_skip, (t - s) / t)


class BCMPreconditioning(CTMPreconditioning):
    r"""The Bidirectional Consistency Model's jump (Li and He 2024, arXiv 2403.18035), in the denoising direction.

    On the network, compared with the authors' code (``get_scalings_for_bcm`` in ``BCM/cm/karras_diffusion.py`` of
    github.com/Mosasaur5526/BCM-iCT-torch, commit 74ad31f), with t and s for its ``sigma`` and ``sigma_end``:

    $$c_{skip}^F = \frac{t s + v}{t^2 + v}, \quad c_{out}^F = \frac{\sigma_{data} (t - s)}{\sqrt{t^2 + v}}$$

    That is CTM's ``"euler"`` around EDM's denoiser, and TrigFlow's rotation in EDM's sign: $s/t$, $1 - s/t$ on the
    denoiser. No shift: s = 0 is allowed.

    Args:
        sigma_data: Standard deviation of the data.

    Examples:
        >>> BCMPreconditioning().on_network(torch.tensor(1.0), torch.tensor(0.5))  # 0.75 / 1.25
        Scalings(c_skip=tensor(0.6000), c_out=tensor(0.2236))
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__("euler", sigma_data)


class CMPreconditioning(Preconditioning):
    r"""The Consistency Model's jump to $\varepsilon = \sigma_{min}$ (Song et al. 2023, and openai/consistency_models).

    On the network, shifted so that the boundary lies at $\varepsilon$, except under the root:

    $$c_{skip}^F = \frac{v}{(t - \varepsilon)^2 + v}, \quad
      c_{out}^F = \frac{\sigma_{data} (t - \varepsilon)}{\sqrt{t^2 + v}}$$

    With EDM's denoiser around the same F (EDM's sign): $c_{out} = 1 - \varepsilon / t$ and
    $c_{skip} = c_{skip}^F - (1 - \varepsilon / t)\, v / (t^2 + v)$. There is no other target, hence no read-out.

    ECT (Geng et al. 2024) trains with ``sigma_min=0.0``, which is EDM's denoiser itself, and samples with ``0.003``.

    Args:
        sigma_data: Standard deviation of the data.
        sigma_min: The level that all jumps reach; 0 is allowed.

    Raises:
        ValueError: If a number is out of its range.

    Examples:
        >>> CMPreconditioning(sigma_min=0.25).on_network(torch.tensor([0.75, 0.25]))
        Scalings(c_skip=tensor([0.5000, 1.0000]), c_out=tensor([0.2774, 0.0000]))
    """

    def __init__(self, sigma_data: float = 0.5, sigma_min: float = 0.002) -> None:
        super().__init__(sigma_data)
        check_not_negative(sigma_min, "sigma_min")
        self._sigma_min = float(sigma_min)

    @property
    def sigma_min(self) -> float:
        """The level that all jumps reach."""
        return self._sigma_min

    @property
    def default_range(self) -> tuple[float, float]:
        """The level that all jumps reach, and 80."""
        return self.sigma_min, 80.0

    if TYPE_CHECKING:

        def __call__(self, t: Tensor | float, s: Tensor | float | None = None) -> Scalings: ...  # noqa: D102

    def forward(self, t: Tensor | float, s: Tensor | float | None = None) -> Scalings:
        """Return the coefficients on the denoiser; ``s`` may be left out, or must be ``sigma_min``."""
        return super().forward(t, self._target(t, s))

    def on_network(self, t: Tensor | float, s: Tensor | float | None = None) -> Scalings:
        """Return the coefficients on the network; ``s`` may be left out, or must be ``sigma_min``."""
        return super().on_network(t, self._target(t, s))

    def jump(self, x_t: Tensor, denoised: Tensor, t: Tensor | float, s: Tensor | float | None = None) -> Tensor:
        """Return ``x_s = c_skip x_t + c_out denoised``; ``s`` may be left out, or must be ``sigma_min``."""
        return super().jump(x_t, denoised, t, self._target(t, s))

    def coefficients(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients for valid levels."""
        v = self.sigma_data**2
        # the difference of two fractions over their common denominator: only positive terms are left
        c_skip = s / t * (v * (3 * t * (t - s) + s**2 + v)) / (((t - s) ** 2 + v) * (t**2 + v))
        return Scalings(c_skip, (t - s) / t)

    def _target(self, t: Tensor | float, s: Tensor | float | None) -> Tensor | float:
        """Return ``s`` or else ``sigma_min``; a float becomes what ``t``'s dtype makes of it: an exact boundary."""
        s = self.sigma_min if s is None else s
        if isinstance(t, Tensor) and isinstance(s, float):
            return torch.full((), s, dtype=t.dtype, device=t.device)
        return s

    def _valid(self, t: Tensor, s: Tensor) -> Tensor:
        """Only jumps to ``sigma_min``, to float32 rounding."""
        return super()._valid(t, s) & ((s - self.sigma_min).abs() <= ROUNDING * self.sigma_min)

    def fault(self, t: float, s: float, where: str = "") -> str | None:
        """Return what is wrong with a jump, its target included."""
        fault = super().fault(t, s, where)
        if fault is not None or abs(s - self.sigma_min) <= ROUNDING * self.sigma_min:
            return fault
        return (
            f"s must be sigma_min = {self.sigma_min:g}, the only level that a consistency model jumps to, got s = "
            f"{s:.9g}{where}: leave s out, or take CTMPreconditioning."
        )


class _OwnNetwork(Preconditioning):
    """A preconditioning whose raw network is not EDM's."""

    @abstractmethod
    def _denoiser(self, t: Tensor) -> Scalings:
        """Return the coefficients of D = c_skip x_t + c_out F."""

    def coefficients(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients for valid levels."""
        return Scalings(s / t, (t - s) / t)

    def on_network(self, t: Tensor | float, s: Tensor | float) -> Scalings:
        """Return ``c_skip`` and ``c_out`` of the same jump on the class's own raw network."""
        c_skip, c_out = self(t, s)
        wide = place(t, c_out.device, wide_dtype(c_out.device))
        d_skip, d_out = (c.to(c_out.dtype) for c in self._denoiser(wide))
        return Scalings(c_skip + c_out * d_skip, c_out * d_out)


class TrigFlowPreconditioning(_OwnNetwork):
    r"""TrigFlow's jump between two angles (Lu and Song 2024, sCM), a rotation.

    With $\varphi_t = \arctan(t / \sigma_{data})$ and $z_t = \cos \varphi_t\, x_t$, the network sees
    $z_t / \sigma_{data}$, which is EDM's $c_{in} x_t$, and

    $$z_s = \cos(\varphi_t - \varphi_s)\, z_t - \sin(\varphi_t - \varphi_s)\, \sigma_{data} F$$

    In EDM's variable: $c_{skip}^F = \dfrac{v + t s}{v + t^2}$,
    $c_{out}^F = -\dfrac{\sigma_{data} (t - s)}{\sqrt{t^2 + v}}$. **F has the opposite sign of EDM's network**; the
    denoiser is EDM's around -F, and on it the jump is CTM's ``"euler"``: $s/t$, $1 - s/t$. No shift: s = 0 is allowed.

    Args:
        sigma_data: Standard deviation of the data.

    Examples:
        >>> TrigFlowPreconditioning().on_network(torch.tensor(1.0), torch.tensor(0.5))
        Scalings(c_skip=tensor(0.6000), c_out=tensor(-0.2236))
    """

    def __init__(self, sigma_data: float = 0.5) -> None:
        super().__init__(sigma_data)

    def _denoiser(self, t: Tensor) -> Scalings:
        total = t**2 + self.sigma_data**2
        return Scalings(self.sigma_data**2 / total, -t * self.sigma_data / total.sqrt())


class FlowMapPreconditioning(_OwnNetwork):
    r"""The flow-map jump with an average velocity u (MeanFlow, Geng et al. 2025).

    u lives on the straight path $z_\tau = (1 - \tau)\, x_0 + \tau\, n$, from data at 0 to noise at 1, and **points to
    the noise** (for one pair it is $n - x_0$); there the jump is $z_r = z_\tau - (\tau - r)\, u(z_\tau, \tau, r)$.
    A network of the other convention (data at 1, velocity towards the data) is ``-u`` at time ``1 - tau``.

    In noise levels $\tau = t / (1 + t)$, $r = s / (1 + s)$, $z_\tau = x_t / (1 + t)$: what the network is fed. Hence

    $$c_{skip}^F = \frac{1 + s}{1 + t}, \quad c_{out}^F = -\frac{t - s}{1 + t}$$

    The denoiser is $D = z_\tau - \tau u = (x_t - t u) / (1 + t)$, and on it the jump is CTM's ``"euler"``: $s/t$,
    $1 - s/t$. No shift and no $\sigma_{data}$: s = 0 is allowed. Pure noise, $\tau = 1$, is an infinite noise level:
    start below it (t = 80 is $\tau$ = 0.988).

    Examples:
        >>> FlowMapPreconditioning().on_network(torch.tensor(3.0), torch.tensor(1.0))  # z: 1, -(3/4 - 1/2)
        Scalings(c_skip=tensor(0.5000), c_out=tensor(-0.5000))
    """

    def __init__(self) -> None:
        super().__init__(sigma_data=1.0)  # takes no part in the formulas

    def _denoiser(self, t: Tensor) -> Scalings:
        return Scalings(1 / (1 + t), -t / (1 + t))


class LCMPreconditioning:
    r"""The Latent Consistency Model's boundary scalings (Luo et al. 2023, and huggingface/diffusers).

    $$c_{skip} = \frac{v}{(\kappa \tau)^2 + v}, \quad c_{out} = \frac{\kappa \tau}{\sqrt{(\kappa \tau)^2 + v}}$$

    for $f = c_{skip}\, x_\tau + c_{out}\, \hat x_0$. **Not a jump between noise levels**: $\tau$ is an index into a
    variance-preserving schedule, $x_\tau = \alpha_\tau x_0 + \sigma_\tau n$ is not EDM's variable, and the boundary is
    step 0, though some noise is left there. $c_{out}$ has no factor $\sigma_{data}$ because it multiplies the
    clean-data prediction, in the data's own scale, and not a network of unit variance. $c_{skip} + c_{out}^2 = 1$.

    Args:
        sigma_data: Standard deviation of the data.
        timestep_scaling: The factor $\kappa$.

    Examples:
        >>> LCMPreconditioning()(torch.tensor([0, 1, 999]))
        Scalings(c_skip=tensor([1.0000e+00, 2.4938e-03, 2.5050e-09]), c_out=tensor([0.0000, 0.9988, 1.0000]))
    """

    def __init__(self, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> None:
        check_positive(sigma_data, "sigma_data")
        check_positive(timestep_scaling, "timestep_scaling")
        self.sigma_data, self.timestep_scaling = float(sigma_data), float(timestep_scaling)

    def __call__(self, timestep: Tensor) -> Scalings:
        """Return the coefficients at any steps, integer or not: in their dtype, but at least float32."""
        if not isinstance(timestep, Tensor) or timestep.is_complex() or timestep.dtype == torch.bool:
            got = timestep.dtype if isinstance(timestep, Tensor) else f"{timestep!r} ({type(timestep).__name__})"
            raise TypeError(f"timestep must be a tensor of numbers, got {got}: write torch.tensor([999]).")
        scaled = timestep.to(wide_dtype(timestep.device)) * self.timestep_scaling
        total = scaled**2 + self.sigma_data**2
        scalings = (self.sigma_data**2 / total, scaled / total.sqrt())
        return Scalings(*(c.to(torch.promote_types(timestep.dtype, torch.float32)) for c in scalings))
