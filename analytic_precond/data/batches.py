r"""Batches told from single samples, by their shapes: an image (3, H, W) is not a batch of three."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

_CHANNELS = 4  # of images and many latents, at most


def holds_images(data: Sequence[Any]) -> bool:
    """Tell whether the items of a list are images (C, H, W), rather than batches; refuse what may be either."""
    items = [tuple(item) if isinstance(item, list | tuple) else (item,) for item in data]
    if len(items) < 2 or not all(item and isinstance(item[0], Tensor) for item in items):
        return False
    shapes = {item[0].shape for item in items}
    if not look_like_samples(shapes):
        return False
    size, *others = next(iter(shapes))
    rows = any(len(item) == size for item in items[0][1:] if getattr(item, "ndim", isinstance(item, list)))
    if len(shapes) > 1 or len(others) != 2 or size > _CHANNELS or rows:
        refuse_unclear(data[0], items[0][0].shape)
    return True


def look_like_samples(shapes: Collection[torch.Size]) -> bool:
    """Return whether items of these shapes may well be single images or vectors rather than batches of something.

    Batches seldom look so: all of at most four (H, W), or all alike and (B,), (B, D) with B = D, or (B, H, H). Two
    dimensions, (length, width), are otherwise taken for a batch of vectors, and four for one of images.
    """
    if len({shape[1:] for shape in shapes}) > 1:  # of several sizes, which is refused as such
        return False
    if all(len(shape) == 3 and shape[0] <= _CHANNELS for shape in shapes):  # some of them may be grey
        return True
    first, *dims = next(iter(shapes)) or [0]
    square = len(dims) == 2 and (dims[0] == dims[1] or (first == dims[0] and dims[1] <= _CHANNELS))
    return len(set(shapes)) == 1 and first > 1 and (square or dims in ([], [first]))


def refuse_unclear(item: object, shape: torch.Size) -> NoReturn:
    """Ask the user whether items are samples or batches."""
    joined = "torch.cat(list(data))" if isinstance(item, Tensor) else "TensorDataset(*map(torch.cat, zip(*data)))"
    raise ValueError(
        f"data must yield batches (B, ...), got one tensor of shape {tuple(shape)} after another, as single samples "
        f"are: if they are samples, pass DataLoader(list(data), 64); if they are batches, {joined}."
    )
