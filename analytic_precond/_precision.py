"""What devices compute in: the widest dtype, numbers placed on a device, modules whose numbers keep their precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

WITHOUT_FLOAT64 = ("mps",)  # Apple's
"""Types of the devices that have no float64."""
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The widest floating dtype that the device computes in: float64, or float32 where there is none."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def place(value: Tensor | float, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return a number or a tensor on a device without waiting for it, as copying from the CPU does by default.

    In the dtype asked for, but never in a float64 that the device does not have.
    """
    if dtype == torch.float64:
        dtype = wide_dtype(device)
    if isinstance(value, Tensor):
        # the CPU would read what has not arrived; MPS goes on to read a source that is gone (pytorch issue 189690)
        return value.to(device, dtype, non_blocking=device.type not in ("cpu", "mps"))
    return torch.full((), value, dtype=dtype, device=device)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Switch autocast off, if the device has any: meta has none, nor MPS before torch 2.5, and torch refuses to try."""
    # torch 2.4 cannot compile the question
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def outlives(made: Tensor) -> bool:
    """Whether what a call has made may be kept: nothing of a trace or of torch.func's transforms, which end with it."""
    if torch.compiler.is_compiling():  # a compiler keeps values, not its own tensors
        return True
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(made)
    return type(made) is Tensor and not wrapped and not made.is_inference()  # which autograd refuses later


class TableOnDevices:
    """A table on the CPU that no module holds, with its copies on other devices, each made once."""

    def __init__(self, table: Tensor) -> None:
        self.table = _for_autograd(table)
        self._copies: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """Return the table in the widest dtype of a device."""
        if device.type == "cpu" or torch.compiler.is_compiling():
            return place(self.table, device, self.table.dtype)
        if device not in self._copies:
            copied = _for_autograd(place(self.table, device, self.table.dtype))
            if not outlives(copied):
                return copied
            self._copies[device] = copied
        return self._copies[device]

    def __getstate__(self) -> dict[str, Any]:
        return {"table": self.table}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class FixedPrecisionModule(nn.Module):
    """A module whose buffers follow ``.to(device)`` but ignore ``.half()``, ``.bfloat16()`` and ``.to(dtype)``.

    A mixed-precision training code casts the whole student; coefficients rounded to 8 bits would no longer meet the
    boundary condition.

    Where the device has no float64, float64 buffers stay on the CPU, so that what is saved, copied or moved on loses
    nothing. The device gets float32 tensors, plain attributes, which Python finds before buffers of the same name.
    """

    narrow_device: torch.device | None = None  # where the float32 tensors are, if there are any
    _narrow_names: tuple[str, ...] = ()

    @property
    def _device(self) -> torch.device | None:
        """Where this, or the first of its parts that has numbers, computes; None without any."""
        for buffer in self._buffers.values():
            if buffer is not None:
                return self.narrow_device or buffer.device
        for part in self._modules.values():
            if isinstance(part, FixedPrecisionModule) and part._device is not None:
                return part._device
        return None

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a buffer, which autograd can use even where the module is made under ``torch.inference_mode``."""
        super().register_buffer(name, _for_autograd(tensor), persistent)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what was copied or unpickled, under ``torch.inference_mode`` as well."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._buffers = {name: _for_autograd(buffer) for name, buffer in self._buffers.items()}
        self.__dict__.update({name: _for_autograd(self.__dict__[name]) for name in self._narrow_names})

    def narrowed(self) -> dict[str, Tensor]:
        """Return what a device without float64 computes with, on the CPU: the float64 buffers, rounded."""
        return {name: buffer.float() for name, buffer in self.named_buffers(recurse=False) if _is_wide(buffer)}

    def _narrow(self, device: torch.device | None) -> None:
        """Make the float32 tensors that a device computes with, None for none."""
        for name in self._narrow_names:
            del self.__dict__[name]
        narrowed = {} if device is None else self.narrowed()
        tensors = {name: _for_autograd(tensor.to(device)) for name, tensor in narrowed.items()}
        self.__dict__.update(tensors)
        self.narrow_device, self._narrow_names = device, tuple(tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FixedPrecisionModule:
        originals = dict(self._buffers)
        device = self._device_without_float64(fn)
        super()._apply(fn if device is None else lambda t: t if _is_wide(t) else fn(t), recurse)  # type: ignore[no-untyped-call]
        for name, original in originals.items():
            moved = self._buffers[name]
            if original is not None and moved is not None and moved.dtype != original.dtype:
                moved = original.to(moved.device)
            self._buffers[name] = _for_autograd(moved)
        self._narrow(device)
        return self

    def _device_without_float64(self, fn: Callable[[Tensor], Tensor]) -> torch.device | None:
        """Return where ``fn`` moves tensors if no float64 can follow: float64 tensors themselves cannot tell."""
        wide = next((buffer for buffer in self.buffers(recurse=False) if _is_wide(buffer)), None)
        if wide is None:
            return None
        device = fn(torch.empty(0, device=self.narrow_device or wide.device)).device
        return None if wide_dtype(device) == torch.float64 else device

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._narrow(self.narrow_device)


class TableModule(FixedPrecisionModule):
    """A table of a range of noise levels, whose ends Python knows too; a checkpoint that was cast is refused."""

    ends_in: str
    """The buffer whose first row, or which itself, runs from sigma_max to sigma_min."""

    def mirror_ends(self) -> None:
        """Mirror the ends in Python: reading a buffer on a training step would stall the device."""
        levels = self._buffers[self.ends_in]
        assert levels is not None
        first, *_, last = levels.reshape(-1, levels.shape[-1])[0].tolist()
        self.sigma_max, self.sigma_min = float(first), float(last)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, missing: Any, unexpected: Any,
        errors: list[str],
    ) -> None:  # fmt: skip
        for name, own in self.named_buffers(recurse=False):
            given = state_dict.get(prefix + name)
            if isinstance(given, Tensor) and given.dtype != own.dtype:
                errors.append(f"{prefix + name} must be {own.dtype}, got {given.dtype}: save the student uncast.")
                return
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        self.mirror_ends()


def _for_autograd(tensor: MaybeTensor) -> MaybeTensor:
    """Return a tensor itself, or a copy that autograd can use of one made under ``torch.inference_mode``."""
    if tensor is None or not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


def _is_wide(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float64
