"""What coefficients may have wrong whose read-out fails: what passes if it is undone comes first."""

from __future__ import annotations

import torch
from torch import Tensor

from .jumps import Jumps

ROUGHLY = 1e-3  # float32 rounds a slope by less; and where it is wrong by more, no jump is short enough to be measured

_RULE = "The student's denoiser is read out as x - t d/ds x_s at s = t."


def read_out_advice(jumps: Jumps, rtol: float) -> str:
    """Return what the slopes at s = t look like, in words."""
    skip, out = jumps.read_out()[1:]
    if not bool((skip.isfinite() & out.isfinite()).all()):
        return f"{_RULE} The slope is not finite there, as that of the root of a square."
    if not (_all_are(1.0, skip) and _all_are(1.0, out)):
        known = _of_other_output(jumps) or _cut_off(jumps, skip, out)
        if known:
            return known
    if _all_are(-1.0, skip, rtol) and _all_are(-1.0, out, rtol):
        return f"{_RULE} Both have the wrong sign: t and s are swapped."
    if _all_are(1.0, skip) and _all_are(-1.0, out, rtol):
        return f"{_RULE} c_out has the wrong sign."
    power = skip.max().item()
    if _all_are(power, skip) and _all_are(power, out) and not (_all_are(0.0, skip) or _all_are(1.0, skip)):
        return f"{_RULE} Both have {power:.4g} times the slope: it is a power of s / t that should be s / t."
    if _all_are(0.0, skip) and not _all_are(1.0, out):
        return f"{_RULE} c_skip is flat at s = t, like EDM's and LCM's scalings of t - s, which are for one target."
    name, ratio = ("c_skip", skip) if _all_are(1.0, out, rtol) else ("c_out", out)
    low, high = ratio.min().item(), ratio.max().item()
    if _all_are(high, ratio, rtol):
        digits = 4 if abs(high - 1) > ROUGHLY else 9
        times = f"{high:.{digits}g} times the slope at all levels"
        return f"{_RULE} {name} has {times}: a factor, as sigma_data, is missing or extra."
    if _all_are(1.0, ratio):
        times = f"{low:.9g} to {high:.9g} times the slope"
        return f"{_RULE} {name} has {times}: rounded inside, or of noisy tables, for which a larger rtol= is meant."
    return f"{_RULE} {name} has {low:.3g} to {high:.3g} times the slope: a square root or a power is missing or extra."


def _all_are(value: float, ratio: Tensor, allowed: float = ROUGHLY) -> bool:
    return ratio.numel() > 0 and bool(((ratio - value).abs() <= allowed).all())


def _of_other_output(jumps: Jumps) -> str | None:
    """Return of which output the coefficients are right, if not of the one that they were checked for."""
    t, skip, out = jumps.on(None).read_out()
    if _all_are(1.0, skip) and _all_are(1.0, out):
        return "They pass as coefficients on the denoiser: leave sigma_data out."
    if _all_are(0.0, skip) and _all_are(-1.0, out / jumps.column(t)):
        return "They multiply epsilon = (x_t - D) / t. On the denoiser they are (c_skip + c_out / t, -c_out / t)."
    # on a network -t d/ds c_out at s = t is EDM's c_out, and 1 / c_out^2 = 1 / t^2 + 1 / sigma_data^2
    inverse = (1 / out[-1] ** 2 - 1 / t[-1] ** 2).flatten()[0].item()
    if not 0 < inverse < torch.inf:
        return None
    sigma_data = float(f"{inverse**-0.5:.8g}")
    _, skip, out = jumps.on(sigma_data).read_out()
    if not (_all_are(1.0, skip) and _all_are(1.0, out)):
        return None
    given = "" if jumps.sigma_data is None else f", not {jumps.sigma_data:g}"
    return f"They pass as coefficients on a raw network in EDM's denoiser: say sigma_data={sigma_data:.8g}{given}."


def _cut_off(jumps: Jumps, skip: Tensor, out: Tensor) -> str | None:
    """Return which gradients are wrong of values that are right."""
    if not all(_all_are(1.0, ratio) for ratio in jumps.read_out_of_values()):
        return None
    names = " and ".join(name for name, ratio in (("c_skip", skip), ("c_out", out)) if not _all_are(1.0, ratio))
    return (
        f"The values are right, but the gradient of {names} at s = t is cut off, as by torch.where, relu or an early "
        f"return at t == s. Leave that away: formulas with (t - s) / t give 1 and 0 there by themselves."
    )
