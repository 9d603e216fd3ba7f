"""Devices without float64, such as Apple's: the CPU plays one, and any float64 that it is asked for raises."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from analytic_precond import _precision

DEMAND = 2e-6  # relative; 17 of float32's epsilons


class NoFloat64(TorchDispatchMode):
    """Refuses every operation that takes or makes a float64 tensor on a device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device_type = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor) and (value.dtype, value.device.type) == (torch.float64, self.device_type):
                raise TypeError(f"{func} on float64")
        return result


@contextmanager
def pretence(device: str = "cpu") -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_precision, "WITHOUT_FLOAT64", (device,))
        yield


@contextmanager
def without_float64(device: str = "cpu") -> Iterator[None]:
    with pretence(device), NoFloat64(device):
        yield


def moved(module: nn.Module, device: str = "cpu") -> Any:
    """A copy that has been moved to a device without float64."""
    with pretence(device):
        return copy.deepcopy(module).to(device)
