r"""A preconditioning's jump on the variable that a student of another schedule lives on, $x' = \alpha x$."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .._checks import all_true
from .._precision import wide_dtype
from ..noise_levels.network_scalings import input_scale
from ..noise_levels.per_sample import expand_to, one_per_sample
from ..noise_levels.schedules import Schedule, wide

if TYPE_CHECKING:
    from .base import Preconditioning, Scalings


class ScheduledPreconditioning(nn.Module):
    r"""What `Preconditioning.on_schedule` returns: the same jump between times of a schedule.

    With $x' = \alpha x = \alpha x_0 + \sigma n$ and noise levels $t = \sigma / \alpha$ (docs/method.md, section 1),

    $$x'_s = \frac{\alpha_s}{\alpha_t} c_{skip}(t, s)\, x'_t + \alpha_s\, c_{out}(t, s)\, D$$

    where D is the clean data as the network predicts them, $\hat x_0$, not scaled. Times are the schedule's own
    (0 to 1 of a flow, indices of a table), floats, integers or tensors of them; a time that is the end of the
    preconditioning's range but for its dtype's rounding is that end. For s = t nothing changes, to the bit.

    Args:
        precond: The preconditioning, of any kind; it moves with this module.
        schedule: The schedule.

    Raises:
        TypeError: If ``schedule`` is not a `Schedule`.
        ValueError: From its methods, if a time (on the CPU) is none of the schedule's.
    """

    def __init__(self, precond: Preconditioning, schedule: Schedule) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule must be a Schedule, got {type(schedule).__name__}: of a diffusers scheduler, take "
                f"VPDiscreteSchedule(scheduler.alphas_cumprod), or RectifiedFlowSchedule() for flow matching."
            )
        self.precond, self.schedule = precond, schedule

    if TYPE_CHECKING:  # torch's own is untyped

        def __call__(self, time_t: Tensor | float, time_s: Tensor | float) -> Scalings: ...  # noqa: D102

    def forward(self, time_t: Tensor | float, time_s: Tensor | float) -> Scalings:
        """Return ``c_skip`` and ``c_out`` of the jump from ``time_t`` to ``time_s``, on x' and the clean prediction.

        Args:
            time_t: Times to start from.
            time_s: Times to reach, at most as noisy.

        Returns:
            The coefficients in the broadcast shape (and that of modes or elements), in the times' dtype, float32 of
            integers and float64 of numbers.
        """
        devices = [time.device for time in (time_t, time_s) if isinstance(time, Tensor)]
        device = devices[0] if devices else self.precond._device or torch.get_default_device()
        start, end = (_time(time, device) for time in (time_t, time_s))
        dtype = torch.promote_types(_told_dtype(time_t), _told_dtype(time_s)) if devices else start.dtype
        scalings = self._scalings(start, end)
        return scalings._replace(c_skip=scalings.c_skip.to(dtype), c_out=scalings.c_out.to(dtype))

    def jump(self, z_t: Tensor, denoised: Tensor, time_t: Tensor | float, time_s: Tensor | float) -> Tensor:
        """Return x' at ``time_s``.

        Args:
            z_t: Noisy data x' at ``time_t``. Shape ``(B, ...)``.
            denoised: The network's prediction of the clean data, asked at what `query` returns. Shape of ``z_t``.
            time_t: Times to start from. Shape ``(B,)``, or one for all.
            time_s: Times to reach. Shape ``(B,)``, or one for all.

        Returns:
            The data x' at ``time_s``, in the wider of the two tensors' dtypes. Shape of ``z_t``.
        """
        self.precond._check_pair(z_t, denoised, "denoised")
        scalings = self._scalings(self._per_sample(time_t, z_t, "time_t"), self._per_sample(time_s, z_t, "time_s"))
        return self.precond._applied(self.precond._shaped(scalings, z_t), z_t, denoised)

    def query(self, z_t: Tensor, time_t: Tensor | float, time_s: Tensor | float) -> tuple[Tensor, Tensor]:
        """Return the noisy data x' and the time that the network is asked at for a jump.

        That is ``(z_t, time_t)``, but for `ShiftedPreconditioning`: then a cleaner time, and the data scaled to it. The
        arguments are those of `jump`.

        Returns:
            The network's input, and its time as a tensor.
        """
        if not self.precond.told_lower_level:
            return z_t, time_t if isinstance(time_t, Tensor) else _time(time_t, z_t.device)
        start, end = self._per_sample(time_t, z_t, "time_t"), self._per_sample(time_s, z_t, "time_s")
        t = self._level(start)
        q = self.precond.network_level(t, self._level(end)).to(t.dtype)
        time_q = self.schedule.time(q)
        scale = input_scale(t, q, self.precond.sigma_data) * self.schedule.alpha(time_q) / self.schedule.alpha(start)
        wide = torch.promote_types(z_t.dtype, torch.float32)
        return (expand_to(scale, z_t).to(wide) * z_t).to(z_t.dtype), time_q.to(_told_dtype(time_t))

    def _scalings(self, start: Tensor, end: Tensor) -> Scalings:
        """Return the coefficients between times, in the widest dtype."""
        c_skip, c_out = scalings = self.precond._wide(self._level(start), self._level(end))
        alpha_t, alpha_s = self.schedule.alpha(start), self.schedule.alpha(end)
        ratio, alpha_s = (self.precond._per_jump(value) for value in (alpha_s / alpha_t, alpha_s))
        return scalings._replace(c_skip=ratio * c_skip, c_out=alpha_s * c_out)

    def _level(self, time: Tensor) -> Tensor:
        """Return noise levels; of times that are rounded ends of the preconditioning's range, those ends."""
        level = self.schedule.noise_level(time)
        known = level >= 0  # not so of NaN
        if all_true(known) is False:
            index = int((~known).flatten().nonzero()[0])
            raise ValueError(
                f"times must be the schedule's own, counted without its time_scale and short of an end of pure noise, "
                f"got {time.flatten()[index]:g}, a noise level of {level.flatten()[index]:g}."
            )
        for end in (self.precond.sigma_min, self.precond.sigma_max):
            if end in (0.0, math.inf):
                continue
            end_level = torch.full_like(level, end)
            end_time = self.schedule.time(end_level)
            rounded = (time - end_time).abs() <= 2 * torch.finfo(time.dtype).eps * end_time.abs()
            level = torch.where(rounded, end_level, level)
        return level

    def _per_sample(self, time: Tensor | float, z: Tensor, name: str) -> Tensor:
        return one_per_sample(_time(time, z.device), z, name)


def _time(time: Tensor | float, device: torch.device) -> Tensor:
    """Return a time as a floating-point tensor: of floats in their dtype, of integers and numbers in the widest."""
    if isinstance(time, Tensor):
        return time if time.is_floating_point() else wide(time, "time")
    if isinstance(time, bool) or not isinstance(time, int | float):
        raise TypeError(f"a time must be a number or a tensor, got {time!r} ({type(time).__name__}).")
    return torch.full((), float(time), dtype=wide_dtype(device), device=device)


def _told_dtype(time: Tensor | float) -> torch.dtype:
    """The dtype of what is returned for a time: its own, float32 for integers and beside tensors for numbers."""
    return time.dtype if isinstance(time, Tensor) and time.is_floating_point() else torch.float32
