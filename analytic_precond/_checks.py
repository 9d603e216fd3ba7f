r"""Argument checks: each raises with what was expected, what came and what to do; none converts its argument.

Warnings point at the user's own line, however deep in the package the reason is found.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterable
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

# and whose frames come between: torch's for its decorators, contextlib's for context managers
_INSIDE = (*(f"{Path(module).parent}{os.sep}" for module in (__file__, torch.__file__)), contextlib.__file__)


def check_tensor(value: object, name: str) -> None:
    """Refuse anything but a floating-point tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}: convert it with torch.as_tensor.")
    if not value.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {value.dtype}: "
            f"convert it first, e.g. images in 0..255 by x.float() / 127.5 - 1, indices by levels[index]."
        )


def check_batch(value: Tensor, name: str) -> None:
    """Refuse anything but a floating-point tensor of at least one sample."""
    check_tensor(value, name)
    if value.ndim == 0 or value.numel() == 0:
        raise ValueError(
            f"{name} must be a batch of at least one sample, shape (B, ...), got {tuple(value.shape)}: "
            f"leave empty batches out, give a single sample a batch dimension by {name}[None]."
        )


def check_device(value: Tensor, device: torch.device, name: str, owner: str) -> None:
    """Refuse a tensor on another device than what it meets."""
    if value.device != device:
        raise ValueError(
            f"{name} must be on {device}, as {owner} is, got {value.device}: move {owner} by .to('{value.device}'), or "
            f"{name} by .to('{device}')."
        )


def check_level(level: Tensor, name: str) -> None:
    """Refuse anything but a tensor of noise levels, or times, of float32 or float64; looks at no value."""
    check_tensor(level, name)
    if level.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float32 or float64, got {level.dtype}, which cannot tell neighbouring noise levels apart: "
            f"make grids in float64, pass t.float() before t is rounded, and keep times out of what casts inputs "
            f"(FSDP2: MixedPrecisionPolicy(..., cast_forward_inputs=False))."
        )


def check_noise_level(level: object, name: str) -> None:
    """Refuse what is neither a float nor a tensor of noise levels: an int is often an index."""
    if isinstance(level, Tensor):
        check_level(level, name)
    elif not isinstance(level, float):
        got, advice = type(level).__name__, "pass a Python float, or convert it with torch.as_tensor."
        if isinstance(level, Integral):
            got, advice = f"{level} ({got})", "write 80.0 for a level of 80, or look an index up in a grid."
        raise TypeError(f"{name} must be a noise level (float or floating-point tensor), got {got}: {advice}")


def may_read(value: Tensor) -> bool:
    """Whether looking at values neither stalls a device (off the CPU) nor breaks a graph (torch.compile)."""
    return value.device.type == "cpu" and not torch.compiler.is_compiling()


def all_true(valid: Tensor) -> bool | None:
    """Whether all are true; None where one may not look: see `may_read`, and under torch.vmap."""
    if not may_read(valid):
        return None
    try:
        return bool(valid.all())
    except RuntimeError:  # torch.vmap
        return None


def check_finite(value: Tensor, name: str) -> None:
    """Refuse NaN and infinity (reads the values: a device synchronisation off the CPU)."""
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite of {value.numel()} values: mend the input.")


def check_grid(levels: Tensor, name: str = "levels") -> None:
    """Refuse anything but a 1-D tensor of at least two noise levels; looks at no value."""
    check_level(levels, name)
    if levels.ndim != 1 or levels.numel() < 2:
        raise ValueError(
            f"{name} must be 1-D with at least 2 noise levels, got shape {tuple(levels.shape)}: "
            f"make a grid with log_noise_levels or karras_noise_levels."
        )


def check_levels(levels: Tensor, name: str = "levels") -> None:
    """Refuse anything but a strictly decreasing 1-D tensor of at least two finite positive noise levels."""
    check_grid(levels, name)
    check_finite(levels, name)
    if not bool((levels > 0).all()):
        index = int((levels <= 0).nonzero()[0])
        raise ValueError(
            f"{name} must be positive noise levels (sigma), got {levels[index].item()} at index {index}: "
            f"drop a final 0 from a sampler's grid."
        )
    if not bool((levels.diff() < 0).all()):
        index = int((levels.diff() >= 0).nonzero()[0])
        raise ValueError(
            f"{name} must be strictly decreasing (noisiest first), got {levels[index].item()} then "
            f"{levels[index + 1].item()} at index {index}: sort them (levels.sort(descending=True).values) and drop "
            f"duplicates."
        )
    if bool((levels[0].double() / levels[-1].double()).isinf()):
        raise ValueError(
            f"{name} must span a ratio that float64 holds, got {levels[0].item()} to {levels[-1].item()}: end at a "
            f"larger one."
        )


def check_count(value: object, minimum: int, name: str, advice: str = "") -> None:
    """Refuse anything but an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r} ({type(value).__name__}).{advice and ' ' + advice}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}.{advice and ' ' + advice}")


def check_number(value: object, name: str) -> None:
    """Refuse anything but one of Python's numbers."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__}): pass a Python float.")


def check_positive(value: object, name: str) -> None:
    """Refuse anything but a finite positive number."""
    check_number(value, name)
    if not 0 < value < float("inf"):  # type: ignore[operator]  # it is a number
        raise ValueError(f"{name} must be positive and finite, got {value}.")


def check_not_negative(value: object, name: str) -> None:
    """Refuse anything but 0 or a finite positive number."""
    if isinstance(value, bool) or value != 0:
        check_positive(value, name)


def check_range(sigma_min: object, sigma_max: object) -> None:
    """Refuse anything but two positive noise levels, the smaller first."""
    check_positive(sigma_min, "sigma_min")
    check_positive(sigma_max, "sigma_max")
    if sigma_min >= sigma_max:  # type: ignore[operator]  # both are numbers
        raise ValueError(f"sigma_min must be below sigma_max, got {sigma_min} and {sigma_max}: swap them.")


def check_choice(value: object, known: Iterable[str], name: str) -> None:
    """Refuse a name that is not among the known ones."""
    names = list(known)
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, names))}, got {value!r}.")


def check_callable(value: object, name: str, call: str) -> None:
    """Refuse what cannot be called."""
    if not callable(value):
        raise TypeError(
            f"{name} must be callable as {call}, got {type(value).__name__}: pass an nn.Module or a function."
        )


def check_answer(answer: object, x: Tensor, name: str) -> None:
    """Refuse what a network, teacher or student returned for ``x``, unless it is a tensor of that shape."""
    if not isinstance(answer, Tensor):
        got = type(answer).__name__
        raise TypeError(f"the {name} must return a floating-point tensor, got {got}: unwrap it in a function.")
    if not answer.is_floating_point():
        raise TypeError(
            f"the {name} must return a floating-point tensor, got {answer.dtype}: return floats, e.g. by .float()."
        )
    if answer.shape != x.shape:
        advice = "mend it in a function around it, e.g. drop extra channels."
        if answer.ndim == x.ndim > 1 and answer.shape[1] == 2 * x.shape[1]:
            advice = (
                "drop the extra channels in a function around it; if they are a network's learned variance, make "
                "its denoiser by denoiser_from_network(..., learned_variance=True)."
            )
        raise ValueError(f"the {name} must return x's shape {tuple(x.shape)}, got {tuple(answer.shape)}: {advice}")


def warn_caller(message: str) -> None:
    """Warn at the first frame outside this package and torch, rather than at one so many frames up."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame = frame.f_back
    registry = frame.f_globals.setdefault("__warningregistry__", {})  # what Python tells repeated warnings by
    warnings.warn_explicit(
        message, UserWarning, frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__"), registry
    )
