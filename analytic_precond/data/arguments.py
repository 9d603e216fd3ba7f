r"""What every pass of a teacher over data is asked with: its levels, where it runs, what it is told, its name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .._checks import check_callable, check_count, check_levels, warn_caller
from .._conditions import Condition, Ownership, on_device, plain
from .._modules import Wrapper, layers_of, modules_of, tensors_of
from ..noise_levels.grids import log_noise_levels
from ..teachers.denoiser import Denoiser
from ..teachers.guidance import GuidedDenoiser
from ..teachers.networks import noise_range_of
from .memory import BatchSize, Pieces
from .sources import Batch, iterate_batches


class TeacherPass:
    """A teacher and clean data, with how one is to see the other, once checked; levels are on the CPU in float64."""

    def __init__(
        self, denoiser: Denoiser, data: object, levels: Tensor | None, num_levels: int, batch_size: BatchSize,
        seed: int, condition: Callable[..., Condition] | None, device: torch.device | str | None,
        description: str | None,
    ) -> None:  # fmt: skip
        check_callable(denoiser, "denoiser", "denoiser(x, t)")
        levels = default_levels(denoiser, num_levels) if levels is None else levels
        check_levels(levels)
        if batch_size != "auto":
            check_count(batch_size, 1, "batch_size", 'Or let it be found: "auto".')
        check_count(seed, 0, "seed")
        if seed >= 2**64:
            raise ValueError(f"seed must be below 2**64, got {seed}.")
        if condition is not None and not callable(condition):
            raise TypeError(
                f"condition must be callable, got {type(condition).__name__}: lambda label: {{'name': label}}."
            )
        if not isinstance(description, str | None):
            raise TypeError(f"description must be a str, got {description!r}.")
        self.denoiser, self.data, self.seed = denoiser, data, seed
        self.levels = levels.detach().to("cpu", torch.float64)
        self.name = name_of(denoiser, description)
        self.device = _device_of(denoiser, data) if device is None else torch.device(device)
        self._condition, self._ownership = condition, Ownership()
        self.pieces = Pieces(batch_size)

    def warn(self) -> None:
        """Warn of what may be meant so, once callers have refused what cannot be."""
        _warn_if_training(self.denoiser)
        _warn_if_unknown(self.denoiser, self.levels)

    def rng_kept(self) -> AbstractContextManager[None]:
        """Leave the generators that a pass draws from as they were."""
        on_gpu = self.device is not None and self.device.type == "cuda"
        return torch.random.fork_rng([self.device] if on_gpu else [])

    def batches(self, num: int) -> Iterator[Batch]:
        """Yield so many clean samples, where the teacher runs; refuse samples of several shapes."""
        shape = None
        for number, batch in enumerate(iterate_batches(self.data, num, self.pieces.size, self.seed)):
            if shape is not None and batch.x.shape[1:] != shape:
                raise ValueError(
                    f"data must hold samples of one shape, got {tuple(batch.x.shape[1:])} in batch {number} after "
                    f"{tuple(shape)}: resize them first."
                )
            shape = batch.x.shape[1:]
            yield batch if self.device is None else batch._replace(x=batch.x.to(self.device))

    @cached_property
    def _takes_labels(self) -> bool:
        """Whether the teacher is one of EDM's that take labels, and no labels for zeros."""
        return any(vars(module).get("label_dim") for module in modules_of(self.denoiser))

    def conditions(self, batch: Batch) -> Condition:
        """Return what the teacher is told with a batch, made of what follows x in it, where its samples are."""
        if self._condition is None:
            if batch.extra and self._takes_labels:
                warn_caller(
                    "the teacher is class-conditional, but does not get the labels that the batches hold: pass "
                    "condition=lambda label: {'class_labels': label}, one-hot if it is EDM's."
                )
            return {}
        keywords = self._condition(*plain(batch.extra))
        if not isinstance(keywords, Mapping):
            raise TypeError(
                f"condition must return a dict of the teacher's keyword arguments, got {type(keywords).__name__}: "
                f"lambda label: {{'class_labels': label}}."
            )
        self._ownership.check(keywords, len(batch.x))
        told: Condition = on_device(keywords, batch.x.device)
        return told


def name_of(denoiser: Denoiser, description: str | None) -> str:
    """Return the teacher in words: the description, or else the name of the network inside this library's adapters."""
    *_, inner = layers_of(denoiser)
    while isinstance(inner, Wrapper) and inner.named_after is not None:
        *_, inner = layers_of(getattr(inner, inner.named_after))
    return getattr(inner, "__qualname__", type(inner).__name__) if description is None else description


_ROUNDING = 1e-6  # relative: float32 grids end next to the table's ends


def default_levels(denoiser: Denoiser, num: int) -> Tensor:
    """Return ``num`` levels uniform in lambda, from 80 to 0.002 as far as the teacher knows them."""
    low, high = noise_range_of(denoiser) or (0.0, math.inf)
    return log_noise_levels(num, max(low, 0.002), min(high, 80.0))


def _warn_if_unknown(denoiser: Denoiser, levels: Tensor) -> None:
    """Warn of levels that the teacher does not know."""
    known = noise_range_of(denoiser)
    ends = levels[-1].item(), levels[0].item()
    if known is not None and (ends[0] < known[0] * (1 - _ROUNDING) or ends[1] > known[1] * (1 + _ROUNDING)):
        finite = known[0] > 0 and known[1] < math.inf
        inside = "*denoiser.noise_range" if finite else f"{known[0] or 0.002:.4g}, {min(known[1], 80.0):.4g}"
        warn_caller(
            f"the teacher knows noise levels from {known[0]:.4g} to {known[1]:.4g}, the ends of its schedule, "
            f"but is asked at {ends[0]:.4g} to {ends[1]:.4g}: beyond, its answers are wrong. "
            f"Leave levels out, or pass log_noise_levels({len(levels)}, {inside})."
        )


def _device_of(denoiser: Denoiser, data: object) -> torch.device | None:
    """The device of the teacher's modules, else the data's if they are a tensor; offloaded parameters are on none."""
    devices = (tensor.device for tensor in tensors_of(denoiser) if not tensor.is_meta)
    return next(devices, data.device if isinstance(data, Tensor) else None)


def warn_if_guided(denoiser: Denoiser) -> None:
    """Warn of a guided teacher, whose ODE does not carry the law of the noisy data."""
    if any(isinstance(module, GuidedDenoiser) and module.guides for module in modules_of(denoiser)):
        warn_caller(
            "the teacher is guided, and s_method = 'transport' takes for granted that its ODE carries the law of the "
            "noisy data: pass s_method='jvp' or 'finite-difference'."
        )


def _warn_if_training(denoiser: Denoiser) -> None:
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
