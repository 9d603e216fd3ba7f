"""The most memory that tensors take at a time, counted rather than measured: the same on every machine."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryPeak(TorchDispatchMode):
    """Inside it, ``bytes`` is the largest total of the tensors that were made inside and were alive together."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {v.untyped_storage()._cdata for v in tree_leaves((args, kwargs)) if isinstance(v, Tensor)}
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known
            ):  # neither a view nor in place
                storage = tensor.untyped_storage()
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: value for key, value in self._alive.items() if not value[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result
