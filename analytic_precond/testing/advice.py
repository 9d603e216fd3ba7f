"""What coefficients may have wrong whose boundary or read-out fails: what passes if it is undone comes first.

A cause is named as such only where undoing it was seen to help; else what was measured is said, and what is like it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .jumps import Jumps

ROUGHLY = 1e-3  # float32 rounds a slope by less; and where it is wrong by more, no jump is short enough to be measured

_RULE = "The student's denoiser is read out as x - t d/ds x_s at s = t."


def boundary_advice(jumps: Jumps, t: Tensor, right: Tensor) -> str:
    """Return whether coefficients that are right at some levels t look at s at all, and where they are right."""
    rule = f"Whatever the network says, a jump from a level to itself changes nothing ({t.dtype})."
    if jumps.target is not None:
        return rule
    start = jumps.levels[:1].expand_as(jumps.levels)
    if all(bool((c == c[:1]).all()) for c in jumps(start, jumps.levels)):
        return (
            f"{rule} They do not depend on s, like CM's and LCM's scalings: if all jumps end at one level, say target=."
        )
    return f"{rule}{_where(t, right)}"


def read_out_advice(jumps: Jumps, rtol: float) -> str:
    """Return what the slopes at s = t look like, in words."""
    t, skip, out = jumps.read_out()
    if not bool((skip.isfinite() & out.isfinite()).all()):
        return f"{_RULE} The slope is not finite there, as that of the root of a square."
    if not (_all_are(1.0, skip) and _all_are(1.0, out)):
        known = _of_other_output(jumps) or _cut_off(jumps, skip, out)
        if known:
            return known
    if _all_are(-1.0, skip, rtol) and _all_are(-1.0, out, rtol):
        return f"{_RULE} Both have the wrong sign, as if t and s were swapped."
    if _all_are(1.0, skip) and _all_are(-1.0, out, rtol):
        return f"{_RULE} c_out has the wrong sign."
    flat = [ratio.abs() <= ROUGHLY for ratio in (skip, out)]
    if all(bool(ratio.all()) for ratio in flat):
        return (
            f"{_RULE} Both are flat at s = t, like functions of the square of t - s, or of levels rounded to a table's."
        )
    if bool(flat[0].all()):
        return f"{_RULE} c_skip is flat at s = t, like EDM's and LCM's scalings of t - s, which are for one target."
    if bool(flat[1].all()):
        return f"{_RULE} c_out is flat at s = t, like the square of t - s."
    right = [(ratio - 1).abs() <= ROUGHLY for ratio in (skip, out)]
    if bool((flat[0] & flat[1] | right[0] & right[1]).all()) and bool(flat[0].any()):
        return f"{_RULE} Both are flat at s = t or right.{_where(t, right[0])}"
    power = skip.max().item()
    if _all_are(power, skip) and _all_are(power, out) and not _all_are(1.0, skip):
        times = f"{power:.4g} times the slope at all levels"
        return f"{_RULE} Both have {times}, like a power of s / t, or a multiple of ln(t / s), in place of s / t."
    name, ratio = ("c_skip", skip) if _all_are(1.0, out, rtol) else ("c_out", out)
    low, high = ratio.min().item(), ratio.max().item()
    if _all_are(high, ratio, rtol):
        digits = 4 if abs(high - 1) > ROUGHLY else 9
        times = f"{high:.{digits}g} times the slope at all levels"
        like = "like a power" if name == "c_skip" else "as if a factor (sigma_data?) or a power were missing or extra"
        return f"{_RULE} {name} has {times}, {like}."
    if _all_are(1.0, ratio):
        times = f"{low:.9g} to {high:.9g} times the slope"
        return f"{_RULE} {name} has {times}: rounded inside, or of noisy tables, for which a larger rtol= is meant."
    times = f"{low:.3g} to {high:.3g} times the slope"
    return f"{_RULE} {name} has {times}: perhaps a square root, a power or a shift is missing or extra."


def _where(t: Tensor, right: Tensor) -> str:
    """Return from where to where the levels are that are right, if these are in one piece."""
    right = right.reshape(len(t), -1).all(1)
    inside = t[right]
    if len(inside) < 2 or not bool(right[(t >= inside.min()) & (t <= inside.max())].all()):
        return ""
    return f" Right are those from t = {inside.min():.4g} to {inside.max():.4g}, as if levels were clamped to these."


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
