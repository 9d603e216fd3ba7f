"""Samples told from batches, and each piece of advice that an error of the data gives, followed."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import analytic_precond as ap
from analytic_precond.data.batches import holds_images

LEVELS = torch.tensor([2.0, 0.7, 0.2], dtype=torch.float64)
IMAGES = torch.randn(48, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.arange(48)


def teacher(x: Tensor, t: Tensor, label: Any = None) -> Tensor:
    """A denoiser that mixes the elements of a sample, so that channels taken for samples show in the numbers."""
    mean = x.mean(tuple(range(1, x.ndim)), keepdim=True)
    shift = 0 if label is None else ap.expand_to(torch.as_tensor(label).to(x), x) / 100
    return (torch.tanh(x) + mean + shift) / (1 + ap.expand_to(t, x))


def estimate(data: object, **options: Any) -> ap.TeacherStatistics:
    return ap.estimate_statistics(teacher, data, LEVELS, 96, 7, progress=False, **options)


def assert_right(data: object, expected: Tensor = IMAGES, **options: Any) -> None:
    """Every sample is visited once, in whatever order: other noise to each, so that numbers agree by their errors."""
    ours, right = estimate(data, **options), estimate(TensorDataset(expected, LABELS), **options)
    assert ours.header.sample_shape == right.header.sample_shape == tuple(expected.shape[1:])
    assert ours.num_samples == 96
    for name in ("l", "s", "g_rms"):
        value, goal = getattr(ours, name), getattr(right, name)
        stderr = getattr(ours, f"{name}_stderr").hypot(getattr(right, f"{name}_stderr"))
        assert ((value - goal).abs() < 4 * stderr).all(), name


class Indexed:
    """Data with a length and an index that are no torch Dataset, as Hugging Face's: iterable too."""

    def __init__(self, item: Callable[[int], Any], length: int = 48) -> None:
        self.item, self.length = item, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        assert isinstance(index, int)
        return self.item(index)

    def __iter__(self) -> Iterator[Any]:
        return map(self.item, range(self.length))


@pytest.mark.parametrize(
    "data",
    {
        "indexed": Indexed(lambda i: IMAGES[i]),
        "indexed, labelled": Indexed(lambda i: (IMAGES[i], i)),
        "indexed arrays": Indexed(lambda i: IMAGES[i].numpy()),
        "list of images": list(IMAGES),
        "tuple of images": tuple(IMAGES),
        "deque of images": deque(IMAGES),
        "list of labelled images": [(x, i) for i, x in enumerate(IMAGES)],
        "list of images with tensor labels": [[x, y] for x, y in zip(IMAGES, LABELS, strict=True)],
        "list of images with prompts": [(x, "abc") for x in IMAGES],
    }.items(),
    ids=lambda item: item[0],
)
def test_what_has_an_index_is_a_data_set_of_samples(data: tuple[str, Any]) -> None:
    ours, right = estimate(data[1]), estimate(IMAGES)
    for name in ("l", "s", "g_rms"):
        assert torch.equal(getattr(ours, name), getattr(right, name))  # the tensor's order too
    assert ours.header.sample_shape == (3, 8, 8)


def test_labels_of_indexed_samples_come_with_them() -> None:
    condition = lambda y: {"label": y}  # noqa: E731
    right = estimate(TensorDataset(IMAGES, LABELS), condition=condition)
    for data in (Indexed(lambda i: (IMAGES[i], i)), [(x, i) for i, x in enumerate(IMAGES)]):
        assert torch.equal(estimate(data, condition=condition).l, right.l)


@pytest.mark.parametrize("fit", [ap.LeastSquaresPreconditioning, ap.ShiftedPreconditioning])
def test_fits_take_them_too(fit: Any) -> None:
    levels, options = ap.log_noise_levels(4, 0.4, 2.0), {"num_trajectories": 8, "progress": False}
    ours, right = (fit.fit(teacher, data, levels, **options) for data in (list(IMAGES), IMAGES))
    assert torch.equal(ours(2.0, 0.4).c_out, right(2.0, 0.4).c_out)


BATCHES: dict[str, list[Tensor]] = {
    "images": list(IMAGES.split(6)),
    "a last one that is smaller": list(IMAGES[:, 0].split(20)),
    "one": [IMAGES[:, 0]],
    "vectors": list(IMAGES[:, 0, 0].split(6)),
    "of one vector": list(IMAGES[:, 0, 0].split(1)),
    "sequences, the last one smaller": list(IMAGES[:, 0, :, :5].split(20)),
    "numbers": [IMAGES[:, 0, 0, 0], IMAGES[:5, 0, 0, 0]],
    "single numbers": list(IMAGES[:, 0, 0, 0].split(1)),
}


@pytest.mark.parametrize("batches", BATCHES.values(), ids=BATCHES.keys())
def test_batches_stay_batches(batches: list[Tensor]) -> None:
    expected = torch.cat(batches)
    streams = (
        [] if batches[0].ndim == 3 else [iter(batches), ((x, x) for x in batches)]
    )  # see nothing but the first two
    for data in (batches, tuple(batches), [(x, x) for x in batches], *streams):
        assert estimate(data).header.sample_shape == tuple(expected.shape[1:])


UNCLEAR: dict[str, Tensor] = {
    "vectors or batches of numbers": IMAGES[:, 0, 0],
    "grey images or batches of vectors": IMAGES[:, 0],
    "latents or batches of grey images": IMAGES.repeat(1, 4, 1, 1),
    "channels last": IMAGES.movedim(1, -1),
}
WHICH = r"data must yield batches \(B, \.\.\.\), got one tensor of shape {} after another, as single samples are"


@pytest.mark.parametrize("x", UNCLEAR.values(), ids=UNCLEAR.keys())
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("kind", ["list", "generator", "DataLoader without batches"])
def test_what_may_be_either_is_refused_and_both_answers_are_right(x: Tensor, labels: bool, kind: str) -> None:
    items: list[Any] = [(sample, torch.full((len(sample),), i)) for i, sample in enumerate(x)] if labels else list(x)
    make: Callable[[], Any] = {
        "list": lambda: items,
        "generator": lambda: (item for item in items),
        "DataLoader without batches": lambda: DataLoader(items, batch_size=None),
    }[kind]
    data = make()
    with pytest.raises(ValueError, match=WHICH.format(re.escape(str(tuple(x.shape[1:]))))) as error:
        estimate(data)
    data = make()  # what the advice calls data; a generator begins anew
    assert "if they are samples, pass DataLoader(list(data), 64);" in str(error.value)
    assert_right(DataLoader(list(data), 64), x)
    data, advice = make(), str(error.value).rpartition("if they are batches, ")[2].removesuffix(".")
    assert advice in ("torch.cat(list(data))", "TensorDataset(*map(torch.cat, zip(*data)))")
    joined = eval(advice, {"torch": torch, "TensorDataset": TensorDataset, "data": data})
    assert estimate(joined).header.sample_shape == tuple(x.shape[2:])
    assert len(joined) == len(x) * x.shape[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda: (x for x in IMAGES),
        lambda: iter(IMAGES),
        lambda: DataLoader(TensorDataset(IMAGES), batch_size=None),
        lambda: (row["image"] for row in ({"image": x} for x in IMAGES)),
        lambda: ((x, i) for i, x in enumerate(IMAGES)),
        lambda: [(x, torch.arange(3)) for x in IMAGES],  # three labels: of channels or of samples?
        lambda: [IMAGES[0], *IMAGES[:, :1]],  # one in colour
        lambda: (x for x in [IMAGES[0], *IMAGES[:, :1]]),
    ],
)
def test_single_images_are_no_batches_of_their_channels(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError, match=WHICH.format(r"\([13], 8, 8\)")):
        estimate(make())


def test_what_is_visited_again_is_not_compared_with_itself() -> None:
    for x in (IMAGES[:3, 0], IMAGES[:8, 0]):
        for data in ([x], (x,), DataLoader([x], batch_size=None)):
            assert estimate(data).header.sample_shape == (8, 8)
    assert not holds_images([torch.ones(()), torch.ones(())])
    loader = DataLoader(IMAGES[:, 0].tolist(), batch_size=8, collate_fn=torch.tensor)  # surely batches, of (8, 8)
    assert estimate(loader).header.sample_shape == (8, 8)


# the other advice


def refused(data: object, match: str, error: type[Exception] = ValueError) -> None:
    with pytest.raises(error, match=match):
        estimate(data)


def test_advice_add_dimensions() -> None:
    refused(IMAGES[0, 0, 0, 0], r"got shape \(\): add dimensions")
    assert estimate(IMAGES[0, 0, 0, 0][None]).header.sample_shape == ()


def test_advice_add_a_length() -> None:
    class Endless(Dataset[Tensor]):
        def __getitem__(self, index: int) -> Tensor:
            return IMAGES[index]

    refused(Endless(), "Endless without __len__: add it", TypeError)
    Endless.__len__ = lambda self: len(IMAGES)  # type: ignore[attr-defined]
    assert torch.equal(estimate(Endless()).l, estimate(IMAGES).l)


def test_advice_for_arrays_and_mappings() -> None:
    refused(IMAGES.numpy(), "wrap arrays with torch.from_numpy", TypeError)
    assert torch.equal(estimate(torch.from_numpy(IMAGES.numpy())).l, estimate(IMAGES).l)
    splits = {"train": Indexed(lambda i: IMAGES[i])}
    refused(splits, "got dict: pass one of its values", TypeError)
    assert torch.equal(estimate(splits["train"]).l, estimate(IMAGES).l)


def test_advice_for_batches_of_other_kinds() -> None:
    advice = r"adapt it, e\.g\. \(batch\['image'\] for batch in data\), where DataLoader\(data, 64\) makes batches"
    loader = DataLoader(Indexed(lambda i: {"image": IMAGES[i], "label": i}), 6)  # type: ignore[arg-type]
    for data in (loader, [{"image": x} for x in IMAGES.split(6)]):
        refused(data, advice, TypeError)
        assert_right(batch["image"] for batch in data)
    rows: Any
    for rows in (Indexed(lambda i: {"image": IMAGES[i], "label": i}), [{"image": x} for x in IMAGES]):
        refused(rows, advice, TypeError)
        assert_right(batch["image"] for batch in DataLoader(rows, 64))
        refused((batch["image"] for batch in rows), "single samples")  # the first half of the advice only
    for size in (5, 1):
        data = [x.squeeze(0).numpy() for x in IMAGES.split(size)]
        refused(data, r"got ndarray of ndarray.*or \[torch\.from_numpy\(batch\) for batch in data\]", TypeError)
        assert_right([torch.from_numpy(batch) for batch in data])


def test_advice_for_numbers() -> None:
    data = list(IMAGES[:, 0, 0, 0])
    refused(data, r"got a 0-d tensor: if it is a sample, pass DataLoader\(list\(data\), 64\)")
    assert_right(DataLoader(list(data), 64), IMAGES[:, 0, 0, 0])


def test_advice_resize() -> None:
    data = [x[:, : 6 + i % 2] for i, x in enumerate(IMAGES)]
    resized = [interpolate(x[None], (8, 8))[0] for x in data]
    for make in (lambda x: Indexed(x.__getitem__), lambda x: DataLoader(Stream(x), 1), lambda x: Stream(x)):
        refused(make(data), "one shape, got .*: resize them first")
        assert_right(make(resized), torch.stack(resized))
    refused(data, "one shape, got .*: resize them first")
    assert_right(resized, torch.stack(resized))


class Stream(IterableDataset[Tensor]):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def test_advice_transform() -> None:
    class Picture:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    for transform in (lambda x: x, Picture):
        data = Indexed(lambda i, transform=transform: transform(IMAGES[i]))
        if transform is Picture:
            refused(data, "data must hold tensors, got Picture: transform them first", TypeError)
        else:
            assert_right(data)


def test_advice_of_a_generator_that_runs_dry() -> None:
    few = IMAGES[:12]
    with pytest.warns(UserWarning, match=r"\(a tensor, a Dataset, a DataLoader, a list\), or ask for num_samples=24"):
        estimate(x for x in few.split(5))
    for data in (few, TensorDataset(few), DataLoader(TensorDataset(few), 5), list(few.split(5))):
        assert estimate(data).num_samples == 96
    ap.estimate_statistics(teacher, (x for x in few.split(5)), LEVELS, 24, progress=False)


def test_advice_of_a_check_that_visits_twice() -> None:
    data = (x for x in IMAGES.split(6))
    with pytest.raises(TypeError, match=r"pass list\(data\)"):
        ap.check_teacher(teacher, data, LEVELS, 32, progress=False)
    report = ap.check_teacher(teacher, list(data), LEVELS, 32, progress=False)
    assert report.statistics.header.sample_shape == (3, 8, 8)


def test_arrays_of_numpy_scalars_are_labels() -> None:
    data = [(x, np.int64(i)) for i, x in enumerate(IMAGES)]
    right = estimate(TensorDataset(IMAGES, LABELS), condition=lambda y: {"label": y})
    assert torch.equal(estimate(data, condition=lambda y: {"label": y}).l, right.l)
