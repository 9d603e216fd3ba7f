r"""What every pass of a teacher over data asks: how, where it runs, what it is told with a batch, its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .._checks import check_count, warn_caller
from .._conditions import Condition, Ownership, on_device, plain
from ..teachers.denoiser import Denoiser, modules_of
from ..teachers.diffusers_models import _TimestepByKeyword
from ..teachers.guidance import GuidedDenoiser
from ..teachers.networks import NetworkDenoiser
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


_ADAPTERS: dict[type, str] = {NetworkDenoiser: "network", GuidedDenoiser: "denoiser", _TimestepByKeyword: "model"}


def name_of(denoiser: Denoiser, description: str | None) -> str:
    """Return the teacher in words: the description, or else the name of the network inside this library's adapters."""
    inner: object = denoiser
    while attribute := next((name for kind, name in _ADAPTERS.items() if isinstance(inner, kind)), None):
        inner = getattr(inner, attribute)
    return getattr(inner, "__qualname__", type(inner).__name__) if description is None else description


def device_of(denoiser: Denoiser, data: object) -> torch.device | None:
    """The teacher's device if it is a module that has one, else the data's if they are a tensor."""
    tensor = data if isinstance(data, Tensor) else None
    if isinstance(denoiser, nn.Module):
        tensor = next(denoiser.parameters(), next(denoiser.buffers(), tensor))
    return None if tensor is None else tensor.device


class BatchConditions:
    """What the teacher is told with each batch of a run.

    Args:
        condition: Turns what follows x in a batch into keyword arguments.
        denoiser: The teacher.
    """

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
