"""Where a teacher runs, and what it is told with a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .teacher import Denoiser


def device_of(denoiser: Denoiser, data: object) -> torch.device | None:
    """The teacher's device if it is a module that has one, else the data's if they are a tensor."""
    tensor = data if isinstance(data, Tensor) else None
    if isinstance(denoiser, nn.Module):
        tensor = next(denoiser.parameters(), next(denoiser.buffers(), tensor))
    return None if tensor is None else tensor.device


def keywords_of(condition: object, device: torch.device) -> dict[str, Any]:
    """Return the conditions of a batch, on the teacher's device."""
    if not isinstance(condition, Mapping):
        raise TypeError(
            f"condition must return a dict of the teacher's keyword arguments, got {type(condition).__name__}: "
            f"lambda label: {{'class_labels': label}}."
        )
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in condition.items()}
