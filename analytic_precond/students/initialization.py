"""A student's weights before training: its teacher's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import warn_caller


class InitializationReport(NamedTuple):
    """What `initialize_from_teacher` did, as lists of state-dict names.

    Attributes:
        copied: Weights taken from the teacher.
        zeroed: Weights of the student set to zero.
        kept: Other weights that only the student has, left as they were.
        unused: Weights that only the teacher has.
        widened: Weights of which the teacher has a smaller one: taken as leading slices, the rest is zero.
        mismatched: Weights that both have, in shapes that do not fit: left as they were.
    """

    copied: list[str]
    zeroed: list[str]
    kept: list[str]
    unused: list[str]
    widened: list[str]
    mismatched: list[str]


@torch.no_grad()
def initialize_from_teacher(
    network: nn.Module, teacher: nn.Module, zero: Iterable[str] = (), partial: bool = False
) -> InitializationReport:
    """Copy the weights that a student's network shares with its teacher's, by name and shape.

    A two-time student has an embedding of the target time that its teacher lacks. Where its last layer is added to the
    teacher's embedding and named in ``zero``, the student starts as the teacher: ``D_student(x, t, s) = D(x, t)``. A
    layer that normalises its weight has full norm again after one step (EDM2's), or is NaN (``weight_norm``): name the
    gain behind it, e.g. ``"embed_s.2.parametrizations.weight.original0"``.

    A layer may also be wider than the teacher's, as it takes more channels or a longer embedding. With ``partial``,
    what it takes first is treated as by the teacher, and what comes after is ignored at first.

    Args:
        network: The student's raw network, changed in place.
        teacher: The teacher's raw network.
        zero: Names of submodules and parameters of ``network`` that are set to zero, e.g. ``["embed_s.2", "gain_s"]``.
        partial: Copy smaller weights of the teacher too, into leading slices of the student's, whose rest is zero.

    Returns:
        What was copied, zeroed, kept and unused; and, for weights of other shapes, widened or left.

    Raises:
        TypeError: If ``zero`` is a single string.
        ValueError: If nothing matches, a name in ``zero`` is unknown, or one is also the teacher's; nothing is changed.

    Warns:
        UserWarning: If weights are left whose shapes do not fit.

    Examples:
        >>> student = nn.ModuleDict({"body": nn.Linear(2, 2), "embed_s": nn.Linear(1, 2)})
        >>> teacher = nn.ModuleDict({"body": nn.Linear(2, 2)})
        >>> report = initialize_from_teacher(student, teacher, zero=["embed_s"])
        >>> torch.equal(student["body"].weight, teacher["body"].weight), report.zeroed
        (True, ['embed_s.weight', 'embed_s.bias'])
    """
    own, other = network.state_dict(), teacher.state_dict()
    shared = [name for name in own if name in other]
    copied = [name for name in shared if other[name].shape == own[name].shape]
    widened = [name for name in shared if name not in copied and partial and _is_wider(own[name], other[name])]
    if not copied and not widened:
        raise ValueError(
            f"the networks must share weights by name and shape, got none in common: the student has "
            f"{_some(list(own))}, the teacher {_some(list(other))}; unwrap both to the raw networks."
        )
    zeroed = _names_below(zero, network, {*copied, *widened})

    for name in copied:
        own[name].copy_(other[name])
    for name in (*widened, *zeroed):
        own[name].zero_()
    for name in widened:
        own[name][tuple(slice(size) for size in other[name].shape)].copy_(other[name])
    mismatched = [name for name in shared if name not in {*copied, *widened, *zeroed}]
    if mismatched:
        shapes = [f"{name} {tuple(own[name].shape)} and {tuple(other[name].shape)}" for name in mismatched]
        warn_caller(
            f"expected weights of the same shapes, got others, left as they were, so that the student does not start "
            f"as its teacher: {_some(shapes)}; partial=True copies smaller ones into larger."
        )
    kept = [name for name in own if name not in {*shared, *zeroed}]
    unused = [name for name in other if name not in own]
    return InitializationReport(copied, zeroed, kept, unused, widened, mismatched)


def _is_wider(own: Tensor, other: Tensor) -> bool:
    return own.ndim == other.ndim and all(size >= part for size, part in zip(own.shape, other.shape, strict=True))


def _names_below(zero: Iterable[str], network: nn.Module, taken: set[str]) -> list[str]:
    """Return the parameters that names of submodules and parameters stand for, none of them taken from the teacher."""
    if isinstance(zero, str):
        raise TypeError(f"zero must be a list of names, got the string {zero!r}: write [{zero!r}].")
    found: dict[str, None] = {}
    for prefix in zero:
        names = [name for name, _ in network.named_parameters() if name == prefix or name.startswith(prefix + ".")]
        if not names or set(names) & taken:
            problem = "is also the teacher's" if names else "has no parameters in the student"
            own = sorted(name for name, _ in network.named_parameters() if name not in taken)
            raise ValueError(
                f"zero must name submodules or parameters that only the student has, but {prefix!r} {problem}; the "
                f"student's own: {own}."
            )
        found |= dict.fromkeys(names)
    return list(found)


def _some(names: list[str]) -> str:
    """Return the beginning of a list for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
