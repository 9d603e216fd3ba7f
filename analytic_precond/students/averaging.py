"""Averages of a student's weights during training, as torch's `AveragedModel`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def exponential_moving_average(student: nn.Module, decay: float) -> AveragedModel:
    r"""Return a copy of a student that follows it: $\bar\theta \leftarrow \mu \bar\theta + (1 - \mu) \theta$.

    Call ``average.update_parameters(student)`` after each optimiser step; the first call copies. The copy is called as
    the student is, in the student's dtype, and needs no gradients. It serves as the target of
    `consistency_distillation_loss` and `trajectory_distillation_loss`, and with a larger decay as the model to sample
    from; ``average.module`` is the student inside. Other buffers (batch statistics) are copied, not averaged.

    Weights are averaged in float32 at least: to a bfloat16 weight of 1, a step of 0.001 is none. Where the student's
    are narrower, the averages are held beside the copy, which has them rounded. The ``state_dict`` holds them and the
    number of updates, so that training resumes where it was. Nothing waits for a GPU: that number stays on the CPU.

    With FSDP2, make the average first, then shard both alike: ``fully_shard(average.module)`` as ``student``.

    Args:
        student: The student, without a wrapper such as DistributedDataParallel (whose ``.module`` it is).
        decay: $\mu$ in [0, 1]; the paper uses 0.999 for both.

    Returns:
        The average, on the student's device and in its mode (train or eval).

    Raises:
        TypeError: If ``student`` is not an `nn.Module` that can be copied.
        ValueError: If ``decay`` is not in [0, 1]; in an update, if the student has other weights.

    Examples:
        >>> student = nn.Linear(1, 1)
        >>> average = exponential_moving_average(student, decay=0.75)
        >>> for value in (0.0, 1.0):
        ...     _ = nn.init.constant_(student.weight, value)
        ...     average.update_parameters(student)
        >>> average.module.weight.item()  # 0.75 * 0 + 0.25 * 1
        0.25
    """
    if not isinstance(student, nn.Module):
        raise TypeError(f"student must be an nn.Module, got {type(student).__name__}: only modules have parameters.")
    if isinstance(decay, bool) or not isinstance(decay, int | float) or not 0 <= decay <= 1:
        raise ValueError(f"decay must be a number in [0, 1], got {decay!r}: 0.999 averages about 1000 steps.")
    try:
        average = _ExponentialAverage(student, decay)
    except (AssertionError, RuntimeError) as error:  # FSDP's modules; tensors that are results
        raise TypeError(
            f"student must be a module that can be copied, got {type(student).__name__}: make the average before "
            f"fully_shard, and shard average.module like the student. ({error})"
        ) from error
    return average.requires_grad_(False)


class _ExponentialAverage(AveragedModel):
    """An average whose narrow weights (below float32) are the rounded image of float32 ones, buffers of ``means``."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student)
        self.n_averaged = torch.zeros((), dtype=torch.long, device="cpu")  # whatever the default device is
        self.decay = decay
        self.means = nn.Module()
        self._hold({name: p.detach() for name, p in self.module.named_parameters()})

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average the weights of ``model``, the student, and copy its buffers."""
        for module in chain(self.modules(), model.modules()):
            if callable(reshard := getattr(module, "reshard", None)):  # FSDP2's root stays gathered without a backward
                reshard()
        self._shard()
        own, others = list(self._weights()), [p.detach() for p in model.parameters()]
        if [_form(weight) for weight, _ in own] != [_form(p) for p in others]:
            raise ValueError(
                "student must have the weights that are averaged, got others by shape or sharding: pass the student "
                "that the average was made of; under FSDP2, shard average.module like it."
            )
        self.n_averaged = self.n_averaged.cpu()  # fully_shard moves it
        copies = int(self.n_averaged) == 0

        together: dict[object, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for (weight, mean), value in zip(own, others, strict=True):
            if copies or not (mean.is_floating_point() or mean.is_complex()):
                mean.copy_(value)
            elif mean is weight:
                means, values = together[type(mean), mean.device, mean.dtype]
                means.append(mean)
                values.append(value.to(mean.device, mean.dtype))
            else:  # one by one: a wide copy of all would take twice the student's memory
                mean.lerp_(value.to(mean.device, mean.dtype), 1 - self.decay)
            if mean is not weight:
                weight.copy_(mean)
        for means, values in together.values():
            torch._foreach_lerp_(means, values, 1 - self.decay)
        for buffer, other in zip(self.module.buffers(), model.buffers(), strict=True):
            buffer.copy_(other)
        self.n_averaged += 1

    def _weights(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each weight of the copy with its average, which is itself if it is wide."""
        for name, parameter in self.module.named_parameters():
            weight = parameter.detach()
            mean = self.means._buffers.get(_flat(name))
            yield weight, weight if mean is None else mean

    def _hold(self, exact: dict[str, Tensor]) -> None:
        """Hold the averages of the weights that are narrow now, and give them to those that are no longer."""
        held, self.means = self.means, nn.Module()
        for name, parameter in self.module.named_parameters():
            mean = exact[name]
            mean = torch.empty_like(mean, device=parameter.device) if mean.is_meta else mean.to(parameter.device)
            if parameter.is_floating_point() and parameter.dtype.itemsize < 4:
                self.means.register_buffer(_flat(name), mean.to(torch.float32, copy=True))
            elif _flat(name) in held._buffers:
                parameter.detach().copy_(mean)

    def _shard(self) -> None:
        """Shard the averages of weights that fully_shard has sharded since."""
        for name, parameter in self.module.named_parameters():
            if (mean := self.means._buffers.get(_flat(name))) is not None:
                self.means._buffers[_flat(name)] = _sharded_like(parameter, mean)

    def _save_to_state_dict(self, *args: Any) -> None:
        self._shard()
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._shard()
        for name, parameter in self.module.named_parameters():
            given = state_dict.get(f"{prefix}module.{name}")  # all that torch's own average has
            if given is not None and _flat(name) in self.means._buffers:
                key = f"{prefix}means.{_flat(name)}"
                state_dict[key] = _sharded_like(parameter, state_dict.get(key, given))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _ExponentialAverage:
        names = (name for name, _ in self.module.named_parameters())
        exact = {name: mean for name, (_, mean) in zip(names, self._weights(), strict=True)}
        count = self.n_averaged
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.n_averaged = count
        self._hold(exact)  # .half() must not round them
        return self


def _form(weight: Tensor) -> tuple[torch.Size, object]:
    """What the weights of a student and of its average have in common."""
    return weight.shape, getattr(weight, "placements", None)  # of FSDP2's


def _sharded_like(weight: Any, mean: Tensor) -> Tensor:
    if not hasattr(weight, "placements") or hasattr(mean, "placements"):
        return mean
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(mean, weight.device_mesh, weight.placements)


def _flat(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name has no dots
