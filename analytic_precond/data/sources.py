r"""Data for the estimators: any source of images as batches of clean samples, each with noise of its own.

Sample number i always gets the same noise for a given seed, whatever the batch size, the device or the process. A
source says in words what it holds, with a fingerprint of its values, so that a run can be told from another one.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .._checks import check_finite, check_tensor, warn_caller
from .._conditions import collated, rows_of
from .._modules import modules_of, tensors_of
from .batches import holds_images, look_like_samples, refuse_unclear

Range = tuple[int, int]  # samples from one number to another, that one not included


class Batch(NamedTuple):
    """Clean samples ``(B, ...)``, the first one's index in the run, and labels and the like as they came."""

    first: int
    x: Tensor
    extra: tuple[Any, ...]


def iterate_batches(data: object, num: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Yield ``num`` samples in batches of at most ``batch_size``, in the order of `open_source`."""
    source = open_source(data, batch_size, seed)
    yield from source.batches([(0, num)], batch_size)
    if source.shortage:
        warn_caller(source.shortage)


def open_source(data: object, batch_size: int, seed: int) -> IndexedSource | StreamSource:
    """Return the source of a run's samples.

    Tensors and map-style datasets, which are all objects with a length and an index, are visited in an order drawn from
    the seed, and again (in a new order) where a run exceeds their size. DataLoaders and other iterables of batches keep
    their order; what can be iterated again is, a generator that runs dry ends the run early with a warning.

    A list holds images or batches, which `holds_images` tells apart. What may be either is refused, so that no image is
    taken for a batch of its channels.

    Loading draws from torch's generator, which is seeded with the seed and the number of the sample to come: random
    transforms and shuffling loaders do not depend on what happened before. Callers restore its state.

    Raises:
        TypeError: If the source is of another kind.
        ValueError: If there are no data.
    """
    if isinstance(data, Tensor):
        check_tensor(data, "data")
        if data.ndim == 0:
            raise ValueError("data must be a tensor (N, ...), got shape (): add dimensions.")
        return IndexedSource(data, seed)
    if isinstance(data, IterableDataset):
        return open_source(DataLoader(data, batch_size, collate_fn=_collate), batch_size, seed)
    if isinstance(data, Dataset) and not hasattr(data, "__len__"):
        raise TypeError(f"data must be a Dataset with a length, got {type(data).__name__} without __len__: add it.")
    if isinstance(data, list | tuple | deque):
        return IndexedSource(data, seed) if holds_images(data) else StreamSource(data, seed, batched=True)
    if not isinstance(data, str | bytes | np.ndarray | Mapping):
        if hasattr(data, "__len__") and hasattr(data, "__getitem__"):
            return IndexedSource(data, seed)
        if isinstance(data, Iterable):
            return StreamSource(data, seed, isinstance(data, DataLoader) and data.batch_sampler is not None)
    advice = "pass one of its values" if isinstance(data, Mapping) else "wrap arrays with torch.from_numpy"
    raise TypeError(
        f"data must be a tensor (N, ...), a Dataset, a DataLoader or an iterable of batches, got "
        f"{type(data).__name__}: {advice}."
    )


class IndexedSource:
    """Samples that can be asked for by their index; ``words`` tell the data from others, as far as they can."""

    shortage = ""  # they can be visited again and again

    def __init__(self, data: Any, seed: int) -> None:
        self._data, self._seed, self._size = data, seed, len(data)
        if self._size == 0:
            raise ValueError("data must hold at least one sample, got none.")
        self.words = f"{type(data).__name__} of {self._size} samples"
        if isinstance(data, Tensor):
            self.words = f"{data.dtype} of shape {tuple(data.shape)} with values {digest(data)}"

    def head(self) -> str:
        """Return what tells this process's data from another's: nothing, since all are given the same."""
        return ""

    def batches(self, ranges: Sequence[Range], batch_size: int) -> Iterator[Batch]:
        """Yield the samples of some ranges in batches of at most ``batch_size``."""
        for start, stop in ranges:
            while start < stop:
                epoch, row = divmod(start, self._size)
                key = np.array([self._seed, 2**64 - 1 - epoch], dtype=np.uint64)  # far from the samples' keys
                order = np.random.Generator(np.random.Philox(key=key)).permutation(self._size)
                indices = order[row : row + stop - start]
                for part in np.split(indices, range(batch_size, len(indices), batch_size)):
                    x, extra = _split(self._take(part, start))
                    check_finite(x, _numbers(start, len(x)))
                    yield Batch(start, x, extra)
                    start += len(part)

    def _take(self, indices: NDArray[np.int64], first: int) -> object:
        if isinstance(self._data, Tensor):
            _seed_torch(self._seed, first)
            return self._data[torch.from_numpy(indices).to(self._data.device)]
        samples = []
        for number, index in enumerate(indices.tolist(), first):
            _seed_torch(self._seed, number)
            samples.append(self._data[index])
        return _collate(samples)


class StreamSource:
    """Samples that come in an order of their own, in batches of any size; ``batched`` if they surely are batches.

    ``words`` tell the data from others, ``shortage`` is what to tell the user once they have run out.
    """

    def __init__(self, data: Iterable[object], seed: int, batched: bool) -> None:
        self._data, self._seed, self._batched = data, seed, batched
        self._raw = self._endless()
        self._first, self._is_shard = 0, False
        self.words, self.shortage = type(data).__name__, ""

    def head(self) -> str:
        """Return what tells this process's stream from another's: its first sample."""
        first = next(self._raw, None)
        if first is None:
            return "no data"
        self._raw = chain([first], self._raw)
        return digest(first[1][:1])

    def number_from(self, first: int) -> None:
        """Take the stream for a shard, whose samples have numbers from ``first`` on; it may be empty."""
        self._first, self._is_shard = first, True

    def batches(self, ranges: Sequence[Range], batch_size: int) -> Iterator[Batch]:
        """Yield the samples of some ranges in batches of at most ``batch_size``; the others are read over."""
        if not ranges:
            return
        stop, read = ranges[-1][1] - self._first, 0
        for position, x, extra in self._raw:
            first = position + self._first
            for start, end in _cut(ranges, first, len(x), batch_size):
                rows = slice(start - first, end - first)
                check_finite(x[rows], _numbers(start, end - start))
                index = torch.arange(rows.start, rows.stop, device="cpu")
                yield Batch(start, x[rows], extra if len(index) == len(x) else rows_of(extra, index, len(x)))
            read = position + len(x)
            if read >= stop:
                return
        if read == 0 and not self._is_shard:
            raise ValueError("data must hold at least one sample, got none.")
        fewer = "fewer samples" if self._is_shard else f"num_samples={2 * read}"
        self.shortage = (
            f"data ran out after {read} of {stop} clean samples: the statistics rest on those. Pass something that can "
            f"be iterated again (a tensor, a Dataset, a DataLoader, a list), or ask for {fewer}."
        )

    def _endless(self) -> Iterator[tuple[int, Tensor, tuple[Any, ...]]]:
        """Yield position, samples and the rest, batch by batch as they come, again and again."""
        position, end = 0, object()
        while True:
            before = position
            _seed_torch(self._seed, position)
            iterator, shape = iter(self._data), None
            while (raw := next(iterator, end)) is not end:
                x, extra = _split(raw)
                if shape is not None and not self._batched:
                    if look_like_samples((shape, x.shape)):
                        refuse_unclear(raw, shape)
                    self._batched = True
                shape = x.shape
                yield position, x, extra
                position += len(x)
                _seed_torch(self._seed, position)
            if position == before or iterator is self._data:  # a generator, which cannot begin anew
                return


def _cut(ranges: Sequence[Range], first: int, count: int, batch_size: int) -> Iterator[Range]:
    """Yield the parts of ranges that lie within ``count`` samples from ``first`` on, in batches."""
    for start, stop in ranges:
        start, stop = max(start, first), min(stop, first + count)
        for begin in range(start, stop, batch_size):
            yield begin, min(begin + batch_size, stop)


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


def _split(raw: object) -> tuple[Tensor, tuple[Any, ...]]:
    """Separate a batch into samples and the rest."""
    parts = tuple(raw) if isinstance(raw, tuple | list) else (raw,)
    x = parts[0] if parts else None
    if not isinstance(x, Tensor):
        raise TypeError(
            f"data must yield tensors (B, ...) or tuples (tensor, labels, ...), got "
            f"{type(raw).__name__} of {type(x).__name__}: adapt it, e.g. (batch['image'] for batch in data), where "
            f"DataLoader(data, 64) makes batches of samples, or [torch.from_numpy(batch) for batch in data]."
        )
    check_tensor(x, "data")
    if x.ndim == 0:
        raise ValueError(
            "data must yield batches of shape (B, ...), got a 0-d tensor: if it is a sample, pass "
            "DataLoader(list(data), 64)."
        )
    if x[:1].numel() == 0 and len(x) > 0:
        raise ValueError(f"data must hold samples with elements, got samples of shape {tuple(x.shape[1:])}.")
    return x, collated(parts[1:], len(x))


def _collate(samples: list[Any]) -> object:
    try:
        return default_collate(samples)
    except RuntimeError as error:
        raise ValueError(f"data must hold samples of one shape, got others: resize them first. ({error})") from error
    except TypeError as error:
        raise TypeError(
            f"data must hold tensors, got {type(samples[0]).__name__}: transform them first. ({error})"
        ) from error


def _seed_torch(seed: int, sample: int) -> None:
    """Seed torch's generator for what is drawn while a sample is loaded: a transform, a loader's order."""
    key = np.array([seed, sample], dtype=np.uint64)  # a stream of its own, beside the sample's noise and probes
    torch.default_generator.manual_seed(int(np.random.Philox(key=key, counter=2**193).random_raw()))


def _numbers(first: int, count: int) -> str:
    return f"data (samples {first} to {first + count - 1})"


_VALUES = 4096  # of each tensor in a fingerprint


def digest(*tensors: Tensor) -> str:
    """Return a fingerprint of tensors, of values spread over all of each; on meta they have none."""
    result = hashlib.sha256()
    for x in tensors:
        result.update(str((tuple(x.shape), x.dtype)).encode())
        if not x.is_meta:
            values = x.detach().flatten()[:: max(1, x.numel() // _VALUES)]
            result.update(values.to("cpu", torch.float64).numpy().tobytes())
    return result.hexdigest()[:16]


def weights_of(denoiser: object) -> str:
    """Return a fingerprint of the parameters and buffers of a teacher's modules; nothing of other teachers."""
    return digest(*tensors_of(denoiser)) if modules_of(denoiser) else ""
