r"""A student's weights: taken from its teacher before training, averaged during it, by torch's own `AveragedModel`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class InitializationReport(NamedTuple):
    """What `initialize_from_teacher` did, as lists of state-dict names.

    Attributes:
        copied: Weights taken from the teacher.
        zeroed: Weights of the student set to zero.
        kept: Other weights that only the student has, left as they were.
        unused: Weights that only the teacher has.
    """

    copied: list[str]
    zeroed: list[str]
    kept: list[str]
    unused: list[str]


@torch.no_grad()
def initialize_from_teacher(network: nn.Module, teacher: nn.Module, zero: Iterable[str] = ()) -> InitializationReport:
    """Copy the weights that a student's network shares with its teacher's, by name and shape.

    A two-time student has an embedding of the target time that its teacher lacks. Where its last layer is added to the
    teacher's embedding and named in ``zero``, the student starts as the teacher: ``D_student(x, t, s) = D(x, t)``.

    Args:
        network: The student's raw network, changed in place.
        teacher: The teacher's raw network.
        zero: Names of submodules of ``network`` whose weights are set to zero, e.g. ``["embed_s.2"]``.

    Returns:
        What was copied, zeroed, kept and unused.

    Raises:
        ValueError: If nothing matches, a name in ``zero`` is unknown, or one is also the teacher's; nothing is changed.

    Examples:
        >>> student = nn.ModuleDict({"body": nn.Linear(2, 2), "embed_s": nn.Linear(1, 2)})
        >>> teacher = nn.ModuleDict({"body": nn.Linear(2, 2)})
        >>> report = initialize_from_teacher(student, teacher, zero=["embed_s"])
        >>> torch.equal(student["body"].weight, teacher["body"].weight), report.zeroed
        (True, ['embed_s.weight', 'embed_s.bias'])
    """
    own, other = network.state_dict(), teacher.state_dict()
    copied = [name for name, value in own.items() if name in other and other[name].shape == value.shape]
    if not copied:
        raise ValueError(
            f"the networks must share weights by name and shape, got none in common: the student has "
            f"{list(own)[:3]}, ..., the teacher {list(other)[:3]}, ...; unwrap both to the raw networks."
        )
    zeroed = []
    for prefix in zero:
        names = [name for name, _ in network.named_parameters() if name.startswith(prefix + ".")]
        if not names or set(names) & set(copied):
            problem = "is also the teacher's" if names else "has no parameters in the student"
            raise ValueError(
                f"zero must name submodules that only the student has, but {prefix!r} {problem}; the student's own: "
                f"{sorted(name for name in own if name not in copied)}."
            )
        zeroed += names

    for name in copied:
        own[name].copy_(other[name])
    for name in zeroed:
        own[name].zero_()
    kept = [name for name in own if name not in {*copied, *zeroed}]
    return InitializationReport(copied, zeroed, kept, [name for name in other if name not in copied])


def exponential_moving_average(student: nn.Module, decay: float) -> AveragedModel:
    r"""Return a copy of a student that follows it: $\bar\theta \leftarrow \mu \bar\theta + (1 - \mu) \theta$.

    Call ``average.update_parameters(student)`` after each optimiser step; the first call copies. The copy is called as
    the student is, needs no gradients, and its ``state_dict`` holds the number of updates, so that training resumes
    where it was. It serves as the target of `consistency_distillation_loss` and `trajectory_distillation_loss`, and
    with a larger decay as the model to sample from; ``average.module`` is the student inside. Other buffers (batch
    statistics) are copied, not averaged. Make it once the student is on its device: an average moved to a GPU reads its
    counter back at each update.

    Args:
        student: The student, without a wrapper such as DistributedDataParallel (whose ``.module`` it is).
        decay: $\mu$ in [0, 1]; the paper uses 0.999 for both.

    Returns:
        The average, on the student's device and in its mode (train or eval).

    Raises:
        TypeError: If ``student`` is not an `nn.Module`.
        ValueError: If ``decay`` is not in [0, 1].

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
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay))
    return average.requires_grad_(False)
