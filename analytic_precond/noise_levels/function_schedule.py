r"""A noise schedule from two functions: derivatives by autograd, the time of a noise level by root finding.

The root is found in two stages. When the schedule is made, bisection over the float64 numbers themselves gives the
times of a grid of levels, exactly and however the functions bend or where their ends are. A level between them then
takes a few steps of Newton's method, which need no look at any value: nothing waits for a device, graphs stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._precision import TableOnDevices
from .schedules import Schedule, wide, with_slope

Function = Callable[[Tensor], Tensor | float]
_LOG_RANGE, _NODES = 40.0, 4097  # levels from 4e-18 to 2e17; 2 % from node to node
_NOTHING = 36.0  # an end's level of e^-36, float64's rounding of cos(pi / 2), is meant to be 0; likewise infinity
_ROUNDING = 1e-6  # relative: what float32 makes of a level at the schedule's end


class FunctionSchedule(Schedule):
    r"""Any schedule $x' = \alpha(\tau) x_0 + \sigma(\tau) n$, given the two functions.

    The noise level $\sigma / \alpha$ must rise continuously from data to noise. Near the data write $\sigma$ without
    cancellation (``torch.expm1``) where it has any: no inverse has more digits than its function.

    Args:
        alpha: The factor of the data, an elementwise function of a float64 tensor of times on any device.
        sigma: The factor of the noise, likewise.
        times: The time of the cleanest data and of the noisiest, in this order, which may be infinite, e.g. ``(0, 1)``
            or ``(1, 0)``. The noise levels there may be 0 and infinity.
        network_time: What a network is told, as a function of the time. Default: the time.

    Raises:
        TypeError: If a function is not callable, or ``times`` are not two numbers.
        ValueError: If the noise level does not rise from data to noise, or jumps.

    Examples:
        The linear-VP path of flow_matching; a network told the log-SNR, which is the time here (VDM):

        >>> path = FunctionSchedule(lambda u: u, lambda u: (1 - u**2).sqrt(), times=(1.0, 0.0))
        >>> path.time(torch.tensor(0.75))
        tensor(0.8000, dtype=torch.float64)
        >>> told_log_snr = FunctionSchedule(
        ...     lambda g: g.sigmoid().sqrt(), lambda g: (-g).sigmoid().sqrt(), times=(torch.inf, -torch.inf))
        >>> told_log_snr.network_time(torch.tensor(2.0))  # -2 ln 2
        tensor(-1.3863, dtype=torch.float64)
    """

    __eq__, __hash__ = object.__eq__, object.__hash__  # by what they hold they cannot be compared

    _alpha: Function
    _sigma: Function
    _told: Function | None
    times: tuple[float, float]
    _ends: tuple[float, float]  # noise levels
    _start: float  # ln t of the first node
    _stop: float
    _nodes: TableOnDevices  # times
    _num_steps: int = 0

    def __init__(
        self, alpha: Function, sigma: Function, times: tuple[float, float], network_time: Function | None = None
    ) -> None:
        for name, function in (("alpha", alpha), ("sigma", sigma), ("network_time", network_time)):
            if not callable(function) and not (name == "network_time" and function is None):
                raise TypeError(f"{name} must be a function of the time, got {type(function).__name__}.")
        ends = tuple(times) if isinstance(times, tuple | list) else ()
        if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, int | float) for end in ends):
            raise TypeError(f"times must be two numbers, the data's time and the noise's, got {times!r}: e.g. (0, 1).")
        super().__init__()
        self._set(_alpha=alpha, _sigma=sigma, _told=network_time, times=tuple(map(float, ends)))
        low, high = self._log_level(torch.tensor(self.times, dtype=torch.float64, device="cpu")).tolist()
        if not high - low > _ROUNDING:
            raise ValueError(
                f"the noise level must rise from data to noise, got {_level(low):g} at time {ends[0]} and "
                f"{_level(high):g} at {ends[1]}: times are (data's, noise's); let both functions take the ends."
            )
        self._set(_ends=(_level(low), _level(high)))
        start, stop = max(low, -_LOG_RANGE), min(high, _LOG_RANGE)
        log_levels = torch.linspace(start, stop, _NODES, dtype=torch.float64, device="cpu")
        self._set(_start=start, _stop=stop, _nodes=TableOnDevices(self._bisected(log_levels)))
        self._check_continuity(log_levels)
        self._set(_num_steps=self._steps_needed(log_levels))

    def alpha(self, time: Tensor) -> Tensor:
        """Return the factor of the clean data."""
        return _evaluated(self._alpha, wide(time, "time"))

    def sigma(self, time: Tensor) -> Tensor:
        """Return the factor of the noise."""
        return _evaluated(self._sigma, wide(time, "time"))

    @property
    def noise_range(self) -> tuple[float, float] | None:
        """The noise levels of the ends, e.g. from 0 to 152; None if they are 0 and infinity."""
        return None if self._ends == (0, math.inf) else self._ends

    def time(self, noise_level: Tensor) -> Tensor:
        """Return the time of a noise level; NaN of one that is not between those of the ends, but for rounding."""
        level = wide(noise_level, "noise_level")
        low, high = self._ends
        log_t = level.clamp(math.exp(self._start), math.exp(self._stop)).log()
        position = (log_t - self._start) * ((_NODES - 1) / (self._stop - self._start))
        i = position.detach().long().clamp(0, _NODES - 2)
        nodes = self._nodes.on(level.device)
        before, after = nodes[torch.stack([i, i + 1])]  # never an index of one number, which the host would read
        tau = before + (position - i) * (after - before)
        for _ in range(self._num_steps):
            tau, before, after = self._improved(tau, log_t, before, after)
        at_data, at_noise = self.times
        tau = torch.where(level <= low, at_data, torch.where(level >= high, at_noise, tau))
        inside = (level >= low * (1 - _ROUNDING)) & (level <= high * (1 + _ROUNDING))
        return torch.where(inside, tau, torch.nan)

    def told(self, time: Tensor) -> Tensor:
        """Return what a network is told at a time."""
        return time if self._told is None else _evaluated(self._told, time)

    def _log_level(self, time: Tensor) -> Tensor:
        """Return ln(sigma / alpha); a factor that rounding makes negative at an end counts as 0."""
        return self.sigma(time).clamp(min=0).log() - self.alpha(time).clamp(min=0).log()

    def _improved(self, time: Tensor, log_t: Tensor, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step of Newton's method, of bisection where that leads out of the bracket.

        Returns:
            The time, the same where floating point leaves no slope (at the ends), and a narrower bracket.
        """
        log_level, slope = with_slope(self._log_level, time)
        usable = torch.isfinite(log_level) & torch.isfinite(slope) & (slope != 0)
        step = torch.where(usable, log_level - log_t, 0.0) / torch.where(usable, slope, 1.0)
        below, now = log_level.detach() < log_t.detach(), time.detach()
        before, after = torch.where(below, now, before), torch.where(below, after, now)
        new = time - step
        # a step within rounding of the bracket's ends is Newton's, whose derivatives are the inverse's
        slack = 1e-12 * (before.abs() + after.abs())
        inside = (new >= torch.minimum(before, after) - slack) & (new <= torch.maximum(before, after) + slack)
        return torch.where(inside | ~usable, new, (before + after) / 2), before, after

    def _bisected(self, log_levels: Tensor) -> Tensor:
        """Return the times of levels by bisection over all float64 numbers between the ends."""
        data_side, noise_side = (_ordered(torch.full_like(log_levels, end).view(torch.int64)) for end in self.times)
        for _ in range(64):
            # their mean, rounded down, without overflow
            middle = (data_side & noise_side) + ((data_side ^ noise_side) >> 1)
            below = self._log_level(_ordered(middle).view(torch.float64)) < log_levels
            data_side, noise_side = torch.where(below, middle, data_side), torch.where(below, noise_side, middle)
        return _ordered(noise_side).view(torch.float64)

    def _check_continuity(self, log_levels: Tensor) -> None:
        """Refuse functions whose level at the times found is another, or falls between, as far as rounding tells."""
        readable = log_levels.abs() < 12  # 6e-6 to 160,000
        nodes, known = self._nodes.table[readable], log_levels[readable]
        inside = nodes.diff().isfinite()  # there is nothing to look at between a node and infinity
        inner = [nodes[:-1] + share * nodes.diff() for share in (0.25, 0.5, 0.75)]
        between = [(times[inside], known[:-1][inside], known[1:][inside]) for times in inner]
        for times, low, high in ((nodes, known, known), *between):
            found = self._log_level(times)
            wrong = ~((found > low - 1e-3) & (found < high + 1e-3))
            if bool(wrong.any()):
                time, got, least, most = (v[wrong][0].item() for v in (times, found.exp(), low.exp(), high.exp()))
                at_node = least == most
                raise ValueError(
                    f"the noise level must rise continuously from data to noise, got {got:g} at time {time:g}, where "
                    f"it should be {f'{least:g}' if at_node else f'between {least:g} and {most:g}'}: "
                    f"{'interpolate tables, and ' if at_node else ''}restrict times to where it rises."
                )

    def _steps_needed(self, log_levels: Tensor) -> int:
        """Return how many steps give the times of levels between the nodes."""
        between = (log_levels[:-1] + log_levels[1:]) / 2
        between = torch.cat([between, log_levels[:-1] + 0.1 * log_levels.diff()])
        between = between[between.abs() < 12]  # 6e-6 to 160,000
        for steps in (3, 8, 60):  # two would do, to the last digits and three derivatives, if nothing had a kink
            self._set(_num_steps=steps)
            # what rounding leaves of a level, beside what rounding of the time does to it
            found_times = self.time(between.exp())
            log_level, slope = with_slope(self._log_level, found_times)
            allowed = 1e-11 + 1e-14 * (slope * found_times).abs().nan_to_num(posinf=1e300)
            if bool(((log_level - between).abs() <= allowed).all()):
                return steps
        return 60


def _ordered(bits: Tensor) -> Tensor:
    """Return the bits of float64 numbers as integers in the same order, and back."""
    return bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)


def _evaluated(function: Function, time: Tensor) -> Tensor:
    """Return a function's value at each time; it may return a number."""
    value = function(time)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=time.dtype, device=time.device)
    return value.expand_as(time)


def _level(log_level: float) -> float:
    """Return the noise level of an end."""
    return 0.0 if log_level < -_NOTHING else math.inf if log_level > _NOTHING else math.exp(log_level)
