"""Data for the estimators: any source of images as batches of clean samples, each with noise of its own.

Sample number i always gets the same noise for a given seed, whatever the batch size or the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ._checks import check_finite, check_tensor


class Batch(NamedTuple):
    """Clean samples, and what the data set gives with them.

    Attributes:
        first: Index of the first sample in the run.
        x: The samples. Shape ``(B, ...)``.
        extra: Labels and the like, as they came.
    """

    first: int
    x: Tensor
    extra: tuple[Any, ...]


def iterate_batches(data: object, num: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield ``num`` samples in batches of at most ``batch_size``.

    Tensors and map-style datasets are visited in an order drawn from the seed, and again (in a new order) where
    ``num`` exceeds their size. DataLoaders and other iterables of batches keep their order; what can be iterated again
    is, a generator that runs dry ends the run early with a warning.

    Raises:
        TypeError: If the source or what it yields is of another kind.
        ValueError: If there are no data, or they are not finite.
    """
    if isinstance(data, Tensor):
        check_tensor(data, "data")
        if data.ndim == 0:
            raise ValueError("data must be a tensor (N, ...), got shape (): add dimensions.")
        source: Iterable[object] = (
            data[torch.from_numpy(i).to(data.device)] for i in _orders(len(data), num, batch_size, seed)
        )
    elif isinstance(data, IterableDataset):
        source = DataLoader(data, batch_size, collate_fn=_collate)
    elif isinstance(data, Dataset):
        if not hasattr(data, "__len__"):
            raise TypeError(f"data must be a Dataset with a length, got {type(data).__name__} without __len__: add it.")
        source = (_collate([data[int(i)] for i in indices]) for indices in _orders(len(data), num, batch_size, seed))
    elif isinstance(data, Iterable) and not isinstance(data, str | bytes | np.ndarray | dict):
        source = data
    else:
        raise TypeError(
            f"data must be a tensor (N, ...), a Dataset, a DataLoader or an iterable of batches, got "
            f"{type(data).__name__}: wrap arrays with torch.from_numpy."
        )

    first = 0
    while True:
        before, iterator = first, iter(source)
        for raw in iterator:
            x, extra = _split(raw)
            for start in range(0, len(x), batch_size):
                stop = min(start + batch_size, len(x), start + num - first)
                piece = x[start:stop]
                check_finite(piece, f"data (samples {first} to {first + len(piece) - 1})")
                yield Batch(first, piece, tuple(_rows(item, start, stop, len(x)) for item in extra))
                first += len(piece)
                if first == num:
                    return
        if first == 0:
            raise ValueError("data must hold at least one sample, got none.")
        if first == before or iterator is source:  # a generator, which cannot begin anew
            break
    warnings.warn(
        f"data ran out after {first} of {num} clean samples: the statistics rest on those. Pass something that can be "
        f"iterated again (a tensor, a Dataset, a DataLoader, a list), or ask for num_samples={2 * first}.",
        stacklevel=4,
    )


def pair_noise(seed: int, first: int, count: int, shape: torch.Size, probes: bool) -> tuple[Tensor, Tensor | None]:
    """Return standard normal noise (count, ...) and, if asked, Rademacher probes (2, count, ...), float64.

    A counter-based generator keyed by (seed, sample) makes each sample's draws its own.
    """
    size = shape.numel()
    noise, signs = np.empty((count, size)), np.empty((2, count, size)) if probes else None
    for row in range(count):
        key = np.array([seed, first + row], dtype=np.uint64)
        noise[row] = np.random.Generator(np.random.Philox(key=key)).standard_normal(size)
        if signs is not None:  # a stream of its own, far along the counter
            generator = np.random.Generator(np.random.Philox(key=key, counter=2**192))
            signs[:, row] = 2.0 * generator.integers(0, 2, (2, size)) - 1.0
    noise_tensor = torch.from_numpy(noise).reshape(count, *shape)
    return noise_tensor, None if signs is None else torch.from_numpy(signs).reshape(2, count, *shape)


def _orders(size: int, num: int, batch_size: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Yield indices in batches: one random order of the data after the other, up to ``num``."""
    if size == 0:
        raise ValueError("data must hold at least one sample, got none.")
    for epoch in range(-(-num // size)):
        key = np.array([seed, 2**64 - 1 - epoch], dtype=np.uint64)  # far from the samples' keys
        order = np.random.Generator(np.random.Philox(key=key)).permutation(size)
        yield from np.split(order, range(batch_size, size, batch_size))


def _split(raw: object) -> tuple[Tensor, tuple[Any, ...]]:
    """Separate a batch into samples and the rest."""
    parts = tuple(raw) if isinstance(raw, tuple | list) else (raw,)
    x = parts[0] if parts else None
    if not isinstance(x, Tensor):
        raise TypeError(
            f"data must yield tensors (B, ...) or tuples (tensor, labels, ...), got "
            f"{type(raw).__name__} of {type(x).__name__}: adapt it, e.g. (batch['image'] for batch in data)."
        )
    check_tensor(x, "data")
    if x.ndim == 0:
        raise ValueError("data must yield batches of shape (B, ...), got a 0-d tensor.")
    if x[:1].numel() == 0 and len(x) > 0:
        raise ValueError(f"data must hold samples with elements, got samples of shape {tuple(x.shape[1:])}.")
    return x, parts[1:]


def _collate(samples: list[Any]) -> object:
    try:
        return default_collate(samples)
    except RuntimeError as error:
        raise ValueError(f"data must hold samples of one shape, got others: resize them first. ({error})") from error


def _rows(item: Any, start: int, stop: int, size: int) -> Any:
    """Cut the samples' share out of whatever came with them."""
    if isinstance(item, dict):
        return {key: _rows(value, start, stop, size) for key, value in item.items()}
    if isinstance(item, list | tuple) and item and all(isinstance(part, Tensor) for part in item):
        return type(item)(_rows(part, start, stop, size) for part in item)
    has_rows = isinstance(item, list | tuple) or (isinstance(item, Tensor | np.ndarray) and item.ndim > 0)
    return item[start:stop] if has_rows and len(item) == size else item
