r"""What every pass of a teacher over data asks: how, where it runs, what it is told with a batch, its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .._checks import check_count, check_levels, warn_caller
from .._conditions import Condition, Ownership, on_device, plain
from .._modules import Wrapper, modules_of, tensors_of
from ..noise_levels.grids import log_noise_levels
from ..teachers.denoiser import Denoiser
from ..teachers.guidance import GuidedDenoiser
from ..teachers.networks import noise_range_of
from .memory import BatchSize
from .sources import Batch


def check_request(batch_size: BatchSize, seed: int, condition: object, description: object) -> None:
    """Refuse what no pass over the data can be made with."""
    if batch_size != "auto":
        check_count(batch_size, 1, "batch_size", 'Or let it be found: "auto".')
    check_count(seed, 0, "seed")
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2**64, got {seed}.")
    if condition is not None and not callable(condition):
        raise TypeError(f"condition must be callable, got {type(condition).__name__}: lambda label: {{'name': label}}.")
    if not isinstance(description, str | None):
        raise TypeError(f"description must be a str, got {description!r}.")


def name_of(denoiser: Denoiser, description: str | None) -> str:
    """Return the teacher in words: the description, or else the name of the network inside this library's adapters."""
    inner: object = denoiser
    while isinstance(inner, Wrapper) and inner.named_after is not None:
        inner = getattr(inner, inner.named_after)
    return getattr(inner, "__qualname__", type(inner).__name__) if description is None else description


_ROUNDING = 1e-6  # relative: float32 grids end next to the table's ends


def default_levels(denoiser: Denoiser, num: int) -> Tensor:
    """Return ``num`` levels uniform in lambda, from 80 to 0.002 as far as the teacher knows them."""
    low, high = noise_range_of(denoiser) or (0.0, math.inf)
    return log_noise_levels(num, max(low, 0.002), min(high, 80.0))


def levels_for(denoiser: Denoiser, levels: Tensor | None, num: int) -> Tensor:
    """Return the levels once checked, the default ones for None; warn of those that the teacher does not know."""
    if levels is None:
        return default_levels(denoiser, num)
    check_levels(levels)
    known = noise_range_of(denoiser)
    ends = levels[-1].item(), levels[0].item()
    if known is not None and (ends[0] < known[0] * (1 - _ROUNDING) or ends[1] > known[1] * (1 + _ROUNDING)):
        finite = known[0] > 0 and known[1] < math.inf
        inside = "*denoiser.noise_range" if finite else f"{known[0] or 0.002:.4g}, {min(known[1], 80.0):.4g}"
        warn_caller(
            f"the teacher knows noise levels from {known[0]:.4g} to {known[1]:.4g}, the ends of its schedule, "
            f"but is asked at {ends[0]:.4g} to {ends[1]:.4g}: beyond, it is told the nearest, and its answers are "
            f"wrong. Leave levels out, or pass log_noise_levels({num}, {inside})."
        )
    return levels


def device_of(denoiser: Denoiser, data: object) -> torch.device | None:
    """The device of the teacher's modules, else the data's if they are a tensor; offloaded parameters are on none."""
    devices = (tensor.device for tensor in tensors_of(denoiser) if not tensor.is_meta)
    return next(devices, data.device if isinstance(data, Tensor) else None)


class BatchConditions:
    """What the teacher is told with each batch of a run: keyword arguments, made of what follows x in it."""

    def __init__(self, condition: Callable[..., Condition] | None, denoiser: Denoiser) -> None:
        self.condition = condition
        self.ownership = Ownership()
        # EDM's networks take no labels for zeros
        self.expects_labels = any(vars(module).get("label_dim") for module in modules_of(denoiser))

    def __call__(self, batch: Batch) -> Condition:
        """Return the conditions of a batch, where its samples are."""
        if self.condition is None:
            if batch.extra and self.expects_labels:
                warn_caller(
                    "the teacher is class-conditional, but does not get the labels that the batches hold: pass "
                    "condition=lambda label: {'class_labels': label}, one-hot if it is EDM's."
                )
            return {}
        keywords = self.condition(*plain(batch.extra))
        if not isinstance(keywords, Mapping):
            raise TypeError(
                f"condition must return a dict of the teacher's keyword arguments, got {type(keywords).__name__}: "
                f"lambda label: {{'class_labels': label}}."
            )
        self.ownership.check(keywords, len(batch.x))
        told: Condition = on_device(keywords, batch.x.device)
        return told


def warn_if_guided(denoiser: Denoiser) -> None:
    """Warn of a guided teacher, whose ODE does not carry the law of the noisy data."""
    if any(isinstance(module, GuidedDenoiser) and module.guides for module in modules_of(denoiser)):
        warn_caller(
            "the teacher is guided, and s_method = 'transport' takes for granted that its ODE carries the law of the "
            "noisy data: pass s_method='jvp' or 'finite-difference'."
        )


def warn_if_training(denoiser: Denoiser) -> None:
    """Warn of a network that is in training mode and random or changed by its input in it."""
    for module in modules_of(denoiser):
        rate = module.p if isinstance(module, _DropoutNd) else vars(module).get("dropout")
        drops = isinstance(rate, int | float) and rate > 0
        if module.training and (drops or isinstance(module, _BatchNorm)):
            warn_caller(
                f"the teacher is in training mode, with {type(module).__name__}"
                f"{f' and a dropout of {rate:g}' if drops else ''}: call .eval() on it first."
            )
            return
