r"""Conditions that hold one entry per sample, for other rows than the samples in order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from .._precision import place


def condition_rows(condition: Any, index: Tensor, num: int) -> Any:
    """Return a condition for rows that are samples ``index``.

    Tensors, arrays and lists with one entry for each of ``num`` samples are indexed, also inside dicts, lists and
    tuples; anything else is common to all samples and returned as it is.

    Args:
        condition: The condition of ``num`` samples, or a dict of conditions.
        index: The sample of each row, on the CPU.
        num: Number of samples.

    Returns:
        The condition of the rows.

    Examples:
        >>> import torch
        >>> condition = {"label": torch.tensor([5, 7]), "prompt": ["a", "b"], "scale": 2.0}
        >>> condition_rows(condition, torch.tensor([0, 0, 1]), num=2)
        {'label': tensor([5, 5, 7]), 'prompt': ['a', 'a', 'b'], 'scale': 2.0}
    """
    if isinstance(condition, Mapping):
        return {name: condition_rows(value, index, num) for name, value in condition.items()}
    if isinstance(condition, Tensor):
        return condition[place(index, condition.device, index.dtype)] if _has_rows(condition, num) else condition
    if isinstance(condition, np.ndarray):
        return condition[index.numpy()] if _has_rows(condition, num) else condition
    if isinstance(condition, list | tuple):
        make = getattr(condition, "_make", type(condition))  # a named tuple takes its fields one by one
        if len(condition) == num and not any(_has_rows(part, num) for part in condition):
            return make(condition[i] for i in index.tolist())
        return make(condition_rows(part, index, num) for part in condition)
    return condition


def _has_rows(part: object, num: int) -> bool:
    return isinstance(part, Tensor | np.ndarray) and part.shape[:1] == (num,)
