"""How much full-size arithmetic is done in float64: elements of samples, where float32 moves half the bytes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FullSize(TorchDispatchMode):
    """Inside it, operations are watched that take or make large floating-point tensors.

    Args:
        size: Elements from which on a tensor counts: a batch's, or a sample's.

    Attributes:
        float64: Elements that they read and write in float64.
        all: The same in any dtype.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.float64 = self.all = 0

    @property
    def share(self) -> float:
        """The part of the elements that is float64."""
        return self.float64 / self.all

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _is_view(func):
            for value in tree_leaves((args, kwargs, result)):
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel() >= self.size:
                    self.all += value.numel()
                    self.float64 += value.numel() * (value.dtype == torch.float64)
        return result


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns if result.alias_info is not None]
    return func._schema.name.startswith("aten::empty") or any(not alias.is_write for alias in aliases)
