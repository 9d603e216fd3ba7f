r"""Preconditionings: $(t, s) \mapsto (c_{skip}, c_{out})$, the jump $x_s = c_{skip}\, x_t + c_{out}\, D(x_t)$.

They act on the student's *denoiser* D. Whatever D says, $c_{skip}(t, t) = 1$ and $c_{out}(t, t) = 0$, so that a jump
from t to t changes nothing, and $D = x_t - t\, \partial_s x_s |_{s = t}$.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .._checks import all_true, check_device, check_level, check_noise_level, check_positive, check_tensor
from .._precision import FixedPrecisionModule, place, wide_dtype
from ..noise_levels.network_scalings import EDMPreconditioning, input_scale
from ..noise_levels.per_sample import expand_to, one_per_sample
from ..noise_levels.schedules import Schedule
from .scheduled import ScheduledPreconditioning

ROUNDING = 1e-6  # relative: float32 grids end at 79.99998474 and 0.0019999996


class Scalings(NamedTuple):
    """Coefficients of a jump.

    Attributes:
        c_skip: Multiplies the noisy data.
        c_out: Multiplies the denoiser's (or, from ``on_network``, the raw network's) output.
    """

    c_skip: Tensor
    c_out: Tensor


class Preconditioning(FixedPrecisionModule):
    """Base of all preconditionings: checks, dtypes and the jump around a subclass's `coefficients`.

    Noise levels are floats or floating-point tensors that broadcast against each other, with ``s <= t`` inside the
    preconditioning's range, to float32 rounding, and finite. Levels on the CPU go where the tables are, or if there
    are none, where the other level is. Where looking at the values would stall the device (off the CPU) or break a
    graph (torch.compile, torch.vmap), levels out of range give NaN instead of an error.

    One layout throughout: coefficients have the shape ``(*levels, *coefficient_shape)``. A subclass that has more than
    one pair per jump says its shape, and in `_to_modes` and `_from_modes` what they multiply if not x itself.

    Args:
        sigma_data: Standard deviation of the data, for `on_network`.
    """

    told_lower_level: bool = False
    """Whether the network is told a lower noise level than that of its input: whether `network_level` says so."""

    def __init__(self, sigma_data: float) -> None:
        super().__init__()
        check_positive(sigma_data, "sigma_data")
        self.sigma_data = float(sigma_data)

    @property
    def sigma_max(self) -> float:
        """The largest noise level to start from."""
        return math.inf

    @property
    def sigma_min(self) -> float:
        """The smallest noise level to reach."""
        return 0.0

    @property
    def default_range(self) -> tuple[float, float]:
        """The cleanest and the noisiest level where none are given: EDM's 0.002 and 80 in place of 0 and infinity."""
        return self.sigma_min or 0.002, self.sigma_max if self.sigma_max < math.inf else 80.0

    @property
    def coefficient_shape(self) -> tuple[int, ...]:
        """The coefficients' shape at one pair of levels: of a sample or its modes; ``()`` where one pair serves all."""
        return ()

    def coefficients(self, t: Tensor, s: Tensor) -> Scalings:
        """Return the coefficients for valid levels of one shape, in their dtype: float64, or a device's float32."""
        raise NotImplementedError(f"{type(self).__name__} must say coefficients(t, s), which forward and jump go by.")

    if TYPE_CHECKING:  # torch's own is untyped

        def __call__(self, t: Tensor | float, s: Tensor | float) -> Scalings: ...  # noqa: D102

    def forward(self, t: Tensor | float, s: Tensor | float) -> Scalings:
        """Return ``c_skip`` and ``c_out`` of the jump from ``t`` to ``s``, on the denoiser.

        Args:
            t: Noise levels to start from.
            s: Noise levels to reach, at most ``t``.

        Returns:
            The coefficients in the broadcast shape, computed in float64 (float32 where a device has none) and returned
            in the levels' dtype.
        """
        c_skip, c_out = self._wide(t, s)
        dtypes = [level.dtype for level in (t, s) if isinstance(level, Tensor)] or [torch.float64]
        dtype = torch.promote_types(dtypes[0], dtypes[-1])
        if dtype == torch.float64:
            dtype = wide_dtype(c_out.device)
        return Scalings(c_skip.to(dtype), c_out.to(dtype))

    def on_network(self, t: Tensor | float, s: Tensor | float) -> Scalings:
        """Return ``c_skip`` and ``c_out`` of the same jump on a raw network F in EDM's denoiser; see `forward`.

        That is of ``x_s = c_skip x_t + c_out F(c_in x_t, ...)``, per mode or element where those of the denoiser are.
        """
        c_skip, c_out = self(t, s)
        t = place(t, c_out.device, c_out.dtype)
        q = place(self.network_level(t, s), c_out.device, c_out.dtype)
        edm = EDMPreconditioning(self.sigma_data)(q)
        scalings = (edm.c_skip, input_scale(t, q, self.sigma_data), edm.c_out)
        edm_skip, scale, edm_out = (self._per_jump(c) for c in scalings)
        return Scalings(c_skip + c_out * edm_skip * scale, c_out * edm_out)

    def network_level(self, t: Tensor, s: Tensor | float) -> Tensor:
        """Return the noise level, from s to t, that the network is told on a jump: t, where nothing else is said."""
        return t

    def query(self, x_t: Tensor, t: Tensor | float, s: Tensor | float) -> tuple[Tensor, Tensor]:
        r"""Return what the denoiser is asked for a jump: ``x_s = jump(x_t, D(*query(x_t, t, s)), t, s)``.

        That is ``(x_t, t)``, unless the preconditioning asks at another noise level q: then $x_t$ is scaled by
        $\sqrt{(q^2 + \sigma_{data}^2) / (t^2 + \sigma_{data}^2)}$, so that the network inside EDM's denoiser gets the
        same input and is only told another level. The arguments are those of `jump`.

        Returns:
            The denoiser's input and its noise level.
        """
        level = t if isinstance(t, Tensor) else place(t, x_t.device, torch.promote_types(x_t.dtype, torch.float32))
        check_level(level, "t")
        if not self.told_lower_level:
            return x_t, level
        q = self.network_level(level, s)
        scale = input_scale(place(level, x_t.device, level.dtype), q, self.sigma_data)
        return (expand_to(scale, x_t).to(torch.promote_types(x_t.dtype, torch.float32)) * x_t).to(x_t.dtype), q

    def jump(self, x_t: Tensor, denoised: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        """Return ``x_s = c_skip x_t + c_out denoised``.

        Args:
            x_t: Noisy data at level ``t``. Shape ``(B, ...)``.
            denoised: The denoiser's output, to what `query` returns: ``(x_t, t)`` but for `ShiftedPreconditioning`.
                Shape of ``x_t``.
            t: Noise levels to start from. Shape ``(B,)``, or one for all.
            s: Noise levels to reach, at most ``t``. Shape ``(B,)``, or one for all.

        Returns:
            The data at level ``s``, in the wider of the two tensors' dtypes. Shape of ``x_t``.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If the shapes do not fit.
        """
        self._check_pair(x_t, denoised, "denoised")
        return self._applied(self._for_batch(x_t, t, s), x_t, denoised)

    def required_output(self, x_t: Tensor, x_s: Tensor, t: Tensor | float, s: Tensor | float) -> Tensor:
        r"""Return the denoiser output with which the jump lands on ``x_s``: the inverse of `jump`.

        $$D^* = (x_s - c_{skip}\, x_t) / c_{out}$$

        A short jump divides by a small ``c_out``, also the rounding of its two ends: compute ``x_s`` in float64. The
        arguments are those of `jump`, with where it is to land, of ``x_t``'s shape, for ``denoised``.

        Returns:
            The output, in the wider of the two tensors' dtypes, float32 at least. Shape of ``x_t``. Off the CPU, where
            s = t is not looked for, such samples are NaN.

        Raises:
            TypeError: If an argument is not a floating-point tensor.
            ValueError: If the shapes do not fit, or s = t, where the jump ignores the denoiser.
        """
        self._check_pair(x_t, x_s, "x_s")
        c_skip, c_out = self._for_batch(x_t, t, s)
        dtype = torch.promote_types(torch.promote_types(x_t.dtype, x_s.dtype), torch.float32)
        x, beyond = (v.to(dtype) for v in (x_t, x_s))
        # x_s - x_t is exact where the jump is short, and what c_skip is less than 1 rounds no more than x_s did
        near = c_skip.reshape(len(c_skip), -1)[:, 0].round()
        modes_s = self._to_modes(torch.addcmul(beyond, expand_to(near, x).to(dtype), x, value=-1))
        return self._required(Scalings(c_skip - expand_to(near, c_skip), c_out), self._to_modes(x), modes_s)

    def _required(self, scalings: Scalings, modes_t: Tensor, modes_s: Tensor) -> Tensor:
        """Return the output that solves ``modes_s = c_skip modes_t + c_out D``, in their dtype."""
        c_skip, c_out = (c.to(modes_t.dtype) for c in scalings)
        trivial = (c_out == 0).expand_as(modes_t)
        if all_true(~trivial) is False:
            index = int(trivial.flatten().nonzero()[0]) // trivial.shape[1:].numel()  # the sample's
            raise ValueError(f"t > s needed, got s = t at position {index}: there the denoiser does not matter.")
        modes = torch.addcmul(modes_s, c_skip, modes_t, value=-1) / c_out
        return self._from_modes(torch.where(trivial, torch.nan, modes))

    def on_schedule(self, schedule: Schedule) -> ScheduledPreconditioning:
        r"""Return the same jump for students of another schedule, on $x' = \alpha x$ and between the schedule's times.

        Examples:
            >>> from analytic_precond import CTMPreconditioning, RectifiedFlowSchedule
            >>> on_flow = CTMPreconditioning().on_schedule(RectifiedFlowSchedule())
            >>> on_flow(torch.tensor(0.75), torch.tensor(0.5))  # tau_s / tau_t, and 1 - tau_s / tau_t
            Scalings(c_skip=tensor(0.6667), c_out=tensor(0.3333))
        """
        return ScheduledPreconditioning(self, schedule)

    def _applied(self, scalings: Scalings, x_t: Tensor, denoised: Tensor) -> Tensor:
        """Return the jump with the batch's coefficients, in the wider of the tensors' dtypes."""
        dtype = torch.promote_types(x_t.dtype, denoised.dtype)
        x, D = (v.to(torch.promote_types(dtype, torch.float32)) for v in (x_t, denoised))
        return self._combine(scalings, x, D).to(dtype)

    def _combine(self, scalings: Scalings, x: Tensor, D: Tensor) -> Tensor:
        """Return ``c_skip x + c_out D`` in the dtype of both, of the batch's coefficients in the widest."""
        c_skip, c_out = (c.to(x.dtype) for c in scalings)
        return c_skip * x + c_out * D

    def _to_modes(self, x: Tensor) -> Tensor:
        """Return what the coefficients multiply, of shape ``(B, *coefficient_shape)`` where there is one."""
        return x

    def _from_modes(self, modes: Tensor) -> Tensor:
        return modes

    def _check_sample(self, x_t: Tensor) -> None:
        """Refuse samples that the coefficients are not of."""

    def _check_pair(self, x_t: Tensor, other: Tensor, name: str) -> None:
        check_tensor(x_t, "x_t")
        check_tensor(other, name)
        self._check_sample(x_t)
        if other.shape != x_t.shape:
            raise ValueError(f"{name} must have x_t's shape {tuple(x_t.shape)}, got {tuple(other.shape)}.")
        check_device(other, x_t.device, name, "x_t")

    def _for_batch(self, x: Tensor, t: Tensor | float, s: Tensor | float) -> Scalings:
        """Return the coefficients in the widest dtype of x's device, shaped to multiply what `_to_modes` makes of x."""
        return self._shaped(self._wide(one_per_sample(t, x, "t"), one_per_sample(s, x, "s")), x)

    def _shaped(self, scalings: Scalings, x: Tensor) -> Scalings:
        check_device(x, scalings.c_out.device, "x_t", "the preconditioning")
        return scalings if self.coefficient_shape else Scalings(*(expand_to(c, x) for c in scalings))

    def _per_jump(self, values: Tensor) -> Tensor:
        """Return values of the levels' shape, or one that broadcasts to it, shaped to multiply coefficients."""
        return values.reshape((*values.shape, *[1] * len(self.coefficient_shape)))

    def _wide(self, t: Tensor | float, s: Tensor | float) -> Scalings:
        """Return the coefficients in the widest dtype that the levels' device has, after all checks."""
        return Scalings(*self.coefficients(*self._levels(t, s)))

    def _levels(self, t: Tensor | float, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the levels in that dtype and of one shape; t is NaN where they are not valid and nobody may look."""
        here, there = self._pair(t, s)
        valid = self._valid(here, there)
        if (all_valid := all_true(valid)) is False:
            index = int((~valid).flatten().nonzero()[0])
            t_bad, s_bad = here.flatten()[index].item(), there.flatten()[index].item()
            raise ValueError(self.fault(t_bad, s_bad, f" at position {index}"))
        return here if all_valid else torch.where(valid, here, torch.nan), there

    def _valid(self, t: Tensor, s: Tensor) -> Tensor:
        """Return which jumps there are: `fault` for tensors."""
        # each comparison is a kernel: a smallest level above 0 leaves no t at 0, a largest one none at infinity
        valid = (s <= t * (1 + ROUNDING)) & (s >= self.sigma_min * (1 - ROUNDING))
        valid &= t <= self.sigma_max * (1 + ROUNDING) if self.sigma_max < math.inf else t < math.inf
        return valid & (t > 0) if self.sigma_min == 0 else valid

    def _pair(self, t: Tensor | float, s: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return two levels of one shape in the wide dtype, where the tables are; without any, where levels are."""
        device, owner = self._device, "the preconditioning"
        for level, name in ((t, "t"), (s, "s")):
            check_noise_level(level, name)
            if isinstance(level, Tensor) and level.device.type != "cpu":
                check_device(level, device or level.device, name, owner)
                device, owner = (device, owner) if device else (level.device, "t")
        if device is None:
            given = any(isinstance(level, Tensor) for level in (t, s))
            device = torch.device("cpu") if given else torch.get_default_device()
        wide = [place(level, device, torch.float64) for level in (t, s)]
        try:
            here, there = torch.broadcast_tensors(*wide)
        except RuntimeError as error:
            shapes = " and ".join(str(tuple(level.shape)) for level in wide)
            raise ValueError(f"t and s must broadcast, got shapes {shapes}.") from error
        return here, there

    def fault(self, t: float, s: float, where: str = "") -> str | None:
        """Return what is wrong with a jump from t to s, or None: of numbers, so that no device is waited for."""
        low, high = self.sigma_min * (1 - ROUNDING), self.sigma_max * (1 + ROUNDING)
        if 0 < t < math.inf and t <= high and low <= s <= t * (1 + ROUNDING):
            return None
        inside = self.sigma_min <= s and t <= self.sigma_max
        advice = "a jump goes down" if inside else "take levels inside, or coefficients made for such levels"
        if t == math.inf:
            advice = "pure noise has no finite level, start at the sigma_max of the schedule, e.g. 80"
        return (
            f"jumps must go from t to s with {self.sigma_min:g} <= s <= t <= {self.sigma_max:g} and t > 0, got "
            f"t = {t:.9g}, s = {s:.9g}{where}: {advice}; noise levels are sigma, not indices."
        )
