"""The meta device plays a GPU: what would make the host wait, copy or mix devices raises, on a machine without one.

Values cannot be read from meta tensors (``item``, ``bool``, ``tolist``, masks as indices): that raises by itself.
`AnotherDevice` adds what a GPU would do at a price, and meta tensors do silently or not at all:

- a copy from the CPU that is waited for; under ``capturing`` any, as CUDA graphs refuse memory that is not pinned,
- an index left on the CPU, which is copied at each use,
- an operation on tensors of both devices, but for single numbers, which kernels take as arguments.

It also counts launches: operations there that are neither views nor bare allocations. Where a CUDA kernel does several
of them the count is too high, where an operation takes several kernels too low; it is for comparing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COPIES = ("aten::_to_copy", "aten::copy_")
FREE = ("aten::empty", "aten::detach", "aten::alias")  # of kernels


class WaitsError(RuntimeError):
    """The host would wait for the device, or a graph's capture would end here."""


class MixesError(RuntimeError):
    """An operation takes tensors of two devices."""


class AnotherDevice(TorchDispatchMode):
    """Watches every operation of torch.

    Args:
        capturing: Whether copies that nobody waits for are refused too.
    """

    def __init__(self, capturing: bool = False) -> None:
        super().__init__()
        self.capturing = capturing
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        there = [tensor for tensor in tensors if tensor.is_meta]
        here = [tensor for tensor in tensors if not tensor.is_meta and tensor.numel()]
        arrives = torch.device(kwargs.get("device") or "cpu").type == "meta"
        if func._schema.name in COPIES:
            if here and (there or arrives):
                self._check_copy(here[-1], bool(kwargs.get("non_blocking") or any(a is True for a in args[2:])))
        elif there and here:
            _check_mixture(func, args, here)
        self.launches += bool(there or arrives) and not _is_free(func)
        return func(*args, **kwargs)

    def _check_copy(self, copied: Tensor, non_blocking: bool) -> None:
        if self.capturing or not non_blocking:
            raise WaitsError(f"a {'captured' if self.capturing else 'blocking'} copy of {tuple(copied.shape)}")


def _check_mixture(func: Any, args: Any, here: list[Tensor]) -> None:
    numbers = all(tensor.ndim == 0 for tensor in here) and torch.Tag.pointwise in func.tags
    if func._schema.name.startswith("aten::index") and args[0].is_meta and not numbers:
        raise WaitsError(f"{func} by an index on the CPU of shape {tuple(here[-1].shape)}")
    if not numbers:
        raise MixesError(f"{func} with a tensor on the CPU of shape {tuple(here[0].shape)}")


def _is_free(func: Any) -> bool:
    """Whether it launches no kernel: views of its arguments, and memory as it comes."""
    returned = [result.alias_info for result in func._schema.returns if result.alias_info is not None]
    return func._schema.name.startswith(FREE) or any(not alias.is_write for alias in returned)


@contextmanager
def another_device(capturing: bool = False) -> Iterator[AnotherDevice]:
    with AnotherDevice(capturing) as mode:
        yield mode
