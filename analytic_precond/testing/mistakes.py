r"""What an adapter with one of the usual mistakes would return, by the right predictions.

A network F is not at hand, but $D = c_{skip} x + c_{out} F$ says what it predicts, of any input and at any time: so
what it answers to a wrong time or a wrong input is known too, and what becomes of that.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from statistics import median

import torch
from torch import Tensor

from ..noise_levels.per_sample import expand_to
from ..noise_levels.schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, TrigFlowSchedule
from ..noise_levels.vp_schedules import VPDiscreteSchedule, VPLinearSchedule
from ..teachers.denoiser import Denoiser
from ..teachers.networks import NetworkDenoiser
from ..teachers.predictions import PredictionScalings

_PREDICTIONS = ("epsilon", "v", "velocity", "sample")
_EXPLAINED = 0.01  # of the misfit's square may be left
_SAME = 1e-6  # of it is rounding: two mistakes that explain so much are one


def explain(
    denoiser: Denoiser, exact: Denoiser, schedule: Schedule | None, x: Tensor, t: Tensor, got: Tensor, expected: Tensor
) -> str:
    """Return the mistake that makes ``got`` of ``exact``'s answers, in words, or the list of the usual ones.

    All have the shape ``(K, B, ...)``, one level a row, where they differ; ``t`` has ``(K, B)``.
    """
    if schedule is not None:
        schedules = [schedule]
    else:
        own = _schedule_of(denoiser)
        schedules = [*([own] if own else []), VPLinearSchedule(), RectifiedFlowSchedule(), EDMSchedule()]
    per_level = [
        [
            (words, _square(answer - mistaken) / _square(answer - right))  # what is left of the misfit
            for candidate in schedules
            for words, mistaken in _mistakes(exact, candidate, x_t, levels)
        ]
        for x_t, levels, answer, right in zip(x, t, got, expected, strict=True)
    ]
    # the median over levels: codes that know whole indices only answer others by the nearest
    left = [(parts[0][0], median(part for _, part in parts)) for parts in zip(*per_level, strict=True)]
    least = min((part for _, part in left if part >= 0), default=1.0)  # NaN is no explanation
    if least < _EXPLAINED:
        words = next(words for words, part in left if part <= max(_SAME, least))
        return f"It is what comes out if {words}."
    return (
        "None of the usual mistakes alone does that (epsilon, v, velocity or x_0 taken for another, a wrong sign, time "
        "in the wrong direction or off by time_scale, sigma for an index, a missing 1 / alpha, x for alpha x): another "
        "schedule, or a network that is not in eval mode?"
    )


def explain_time_scale(
    denoiser: Denoiser,
    exact: Callable[..., Tensor],
    schedule: Schedule | None,
    x: Tensor,
    t: Tensor,
    rtol: float,
) -> str | None:
    """Return which ``time_scale`` makes both agree, if one does: of the network, of the reference's time, or of both.

    They are asked, not modelled: what a network says far beyond its times follows from nothing.
    """

    def answers(function: Denoiser) -> Tensor:
        try:
            return torch.stack([function(*row) for row in zip(x, t, strict=True)])
        except Exception:  # a time that it refuses
            return torch.full_like(x, torch.nan)

    own = _schedule_of(denoiser)
    theirs = [(scale, answers(partial(exact, time_scale=scale))) for scale in _time_scales(schedule)]
    ours = [(scale, answers(partial(_asked, denoiser, scale))) for scale in _time_scales(own)]
    size = rms(x)
    for (told, answer), (asked, expected) in product(ours, theirs):
        if bool((rms(answer - expected) <= rtol * size).all()):
            words = []
            if own and told != own.time_scale:
                words.append(
                    f"the network is told another time: build the denoiser with a schedule of time_scale={told:g}"
                )
            if schedule and asked != schedule.time_scale == 1:
                words.append(
                    f"the reference gets {asked:g} times the time: give a schedule of time_scale={asked:g} here"
                )
            elif schedule and asked != schedule.time_scale:
                words.append(
                    f"the reference gets the schedule's own time. It is given what the network is told, "
                    f"{schedule.time_scale:g} times that: divide by {schedule.time_scale:g} inside the reference"
                )
            if words:
                return f"They agree if {', and if '.join(words)}."
    return None


def _schedule_of(denoiser: Denoiser) -> Schedule | None:
    scalings = denoiser.scalings if isinstance(denoiser, NetworkDenoiser) else None
    return scalings.schedule if isinstance(scalings, PredictionScalings) else None


def _time_scales(schedule: Schedule | None) -> list[float]:
    """Return a schedule's own, and what it may have been confused with: the usual ones, of flows and of Score-SDE."""
    if schedule is None:
        return [1.0]
    if schedule.time_scale != 1:
        return [schedule.time_scale, 1.0]
    return [1.0] if isinstance(schedule, EDMSchedule | VPDiscreteSchedule) else [1.0, 1000.0, 999.0]


def _asked(denoiser: Denoiser, time_scale: float, x: Tensor, t: Tensor) -> Tensor:
    """Return the answer of a denoiser whose network is told times under another ``time_scale``."""
    own = _schedule_of(denoiser)
    if own and isinstance(denoiser, NetworkDenoiser) and own.time_scale != time_scale:
        denoiser = copy.copy(denoiser)
        assert isinstance(denoiser.scalings, PredictionScalings)
        denoiser.scalings = replace(denoiser.scalings, schedule=replace(own, time_scale=time_scale))
    return denoiser(x, t)


def rms(x: Tensor) -> Tensor:
    """Return the root mean square of each sample at each level. Shape ``(K, B, ...)`` to ``(K, B)``."""
    return x.flatten(2).double().square().mean(-1).sqrt()


def _square(difference: Tensor) -> float:
    return difference.double().square().sum().item()


def _mistakes(exact: Denoiser, schedule: Schedule, x: Tensor, t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield mistakes and what each returns."""
    times = schedule.time(t)
    alpha = expand_to(schedule.alpha(times), x).to(x.dtype)
    yield "1 / alpha is missing: what it returns is alpha times the clean data", alpha * exact(x, t)
    yield "x is taken for alpha x: the network gets its input undivided", exact(x / alpha, t)
    for prediction in _PREDICTIONS:
        network = _Network(exact, schedule, prediction)
        output = network(alpha * x, times)

        def denoised(output: Tensor, prediction: str = prediction, sign: float = 1.0) -> Tensor:
            c_skip, c_out, *_ = PredictionScalings(prediction, schedule)(t)
            return expand_to(c_skip, x).to(x.dtype) * x + sign * expand_to(c_out, x).to(x.dtype) * output

        if prediction != "sample":
            yield f"the network's {prediction} is returned, not the clean data", output
            yield f"the sign of {prediction} is wrong", denoised(output, sign=-1.0)
        for other in _PREDICTIONS:
            if other != prediction:
                yield f"the network predicts {prediction} and it is taken for {other}", denoised(output, other)
        yield "the network gets x where it wants alpha x", denoised(network(x, times))
        for told, words in _wrong_times(schedule, times, t):
            output = network(alpha * x, told)
            yield words, denoised(output)
            if prediction == "velocity":
                yield f"{words}, and the velocity has the other sign", denoised(output, sign=-1.0)


def _wrong_times(schedule: Schedule, times: Tensor, t: Tensor) -> Iterator[tuple[Tensor, str]]:
    if isinstance(schedule, EDMSchedule):
        return
    known, own = schedule.noise_range, getattr(schedule, "times", None)
    if own is not None and all(map(math.isfinite, own)):
        ends = t.new_tensor(own)
    else:
        ends = schedule.time(t.new_tensor(known)) if known else t.new_tensor([0.0, 1.0])
    if isinstance(schedule, TrigFlowSchedule):
        ends = ends * torch.pi / 2
    yield ends.sum() - times, "time runs in the wrong direction: data and noise at each other's ends"
    if ends.max() < 2:
        scale = schedule.time_scale if schedule.time_scale != 1 else 1000.0
        yield times / scale, f"the network is told the schedule's time where it wants time_scale={scale:g} times that"
    for told, words in ((t, "sigma"), (t.log() / 4, "ln(sigma) / 4"), (times / ends.max(), "a time from 0 to 1")):
        inside = told.clamp(ends.min(), ends.max()).to(t.dtype)
        yield inside, f"the network is told {words} where it wants the time or index of its schedule"


@dataclass(frozen=True)
class _Network:
    """The network behind exact answers, if it predicts this under this schedule."""

    exact: Denoiser
    schedule: Schedule
    prediction: str

    def __call__(self, z: Tensor, times: Tensor) -> Tensor:
        times = times.expand(z.shape[:1])
        t = self.schedule.noise_level(times)
        known = t.isfinite() & ~self.schedule.time(t).isnan()  # a wrong time may be none at all
        alpha = torch.where(known, self.schedule.alpha(times), torch.nan)
        low, high = self.schedule.noise_range or (0.0, torch.inf)
        some_level = min(max(low, 1.0), high)
        coefficients = PredictionScalings(self.prediction, self.schedule)(torch.where(known, t, some_level))[:2]
        alpha, c_skip, c_out = (expand_to(c, z).to(z.dtype) for c in (alpha, *coefficients))
        return (self.exact(z / alpha, t.to(z.dtype)) - c_skip * (z / alpha)) / c_out
