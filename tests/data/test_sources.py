"""Whatever the data come from: the same samples, the same numbers, and a teacher that is asked no more than needed."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle, islice
from typing import Any

import pytest
import torch
from global_rng import global_rng_untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from tqdm import tqdm

import analytic_precond as ap

LEVELS = torch.tensor([2.0, 0.7, 0.2, 0.05], dtype=torch.float64)
RESULTS = ("l", "l_stderr", "g_rms", "g_rms_stderr", "s", "s_stderr")
# sample i is around the number i, so that a teacher recognises it where noise is small
LABELS = torch.arange(24)
DATA = LABELS[:, None] + torch.tensor([0.0, 0.1, -0.1], dtype=torch.float64)
SMALL = torch.tensor([0.02, 0.01], dtype=torch.float64)  # 0.5 away from the next number is 20 standard deviations


def smooth_teacher(x: Tensor, t: Tensor, **condition: Any) -> Tensor:
    """A nonlinear denoiser, elementwise, so that no result is trivial."""
    return torch.tanh(x) / (1 + ap.expand_to(t, x))


def estimate(data: object, denoiser: ap.Denoiser = smooth_teacher, **options: Any) -> ap.TeacherStatistics:
    options = {"levels": LEVELS, "num_samples": 48, "batch_size": 7, "progress": False, **options}
    return ap.estimate_statistics(denoiser, data, **options)


class Labelled(Dataset[Any]):
    """A map-style data set of (sample, label), the label in whatever form."""

    def __init__(self, label: Callable[[int], Any] = int) -> None:
        self.label = label

    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> Any:
        return DATA[index], self.label(index)


class Stream(IterableDataset[Any]):
    """Samples or (sample, label) one by one."""

    def __init__(self, labels: bool = False) -> None:
        self.labels = labels

    def __iter__(self) -> Iterator[Any]:
        return ((x, y) if self.labels else x for x, y in zip(DATA, LABELS, strict=True))


class Recorder:
    """A teacher that remembers what it was shown."""

    def __init__(self) -> None:
        self.inputs: list[tuple[float, Tensor]] = []  # the rows of each level in a call
        self.sizes: list[int] = []
        self.conditions: list[dict[str, Any]] = []

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        assert t.shape == x.shape[:1]
        assert t.dtype == x.dtype
        self.inputs += [(level, x[t == level]) for level in t.unique().flip(0).tolist()]
        self.sizes.append(len(x))
        self.conditions.append(condition)
        return x / 2

    def at(self, level: float) -> tuple[Tensor, Tensor]:
        """Return clean samples and noise at one level, in the order of the run: a pair's halves come in turn."""
        rows = torch.cat([x for t, x in self.inputs if t == pytest.approx(level, rel=1e-6)])  # t may be float32
        plus, minus = rows[::2], rows[1::2]
        return (plus + minus) / 2, (plus - minus) / (2 * level)

    def visited(self, level: float = 0.01) -> list[int]:
        return self.at(level)[0][:, 0].round().long().tolist()


def record(data: object, **options: Any) -> Recorder:
    recorder = Recorder()
    estimate(data, recorder, **{"levels": SMALL, **options})
    return recorder


def assert_same(a: ap.TeacherStatistics, b: ap.TeacherStatistics, relative: float = 0.0) -> None:
    assert a.num_samples == b.num_samples
    for name in RESULTS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=relative, atol=0.0, msg=name)


def batches(size: int = 5) -> list[Tensor]:
    return list(DATA.split(size))


def labelled_batches(labels: Any, size: int = 5) -> list[Any]:
    return [(DATA[i : i + size], labels[i : i + size]) for i in range(0, len(DATA), size)]


# the order is drawn from the seed where the source can be indexed, and is the source's own where it cannot
INDEXED: dict[str, Callable[[], object]] = {
    "tensor": lambda: DATA,
    "TensorDataset": lambda: TensorDataset(DATA),
    "TensorDataset with labels": lambda: TensorDataset(DATA, LABELS),
    "Subset": lambda: Subset(TensorDataset(DATA), range(len(DATA))),
    "map-style Dataset": Labelled,
}
ORDERED: dict[str, Callable[[], object]] = {
    "list": batches,
    "tuple": lambda: tuple(batches()),
    "one batch": lambda: [DATA],
    "single samples": lambda: batches(1),
    "list with labels": lambda: labelled_batches(LABELS),
    "generator": lambda: (b for b in batches()),
    "generator of tuples": lambda: ((b,) for b in batches()),
    "DataLoader": lambda: DataLoader(TensorDataset(DATA), batch_size=9),
    "DataLoader with labels": lambda: DataLoader(Labelled(), batch_size=9),
    "IterableDataset": Stream,
    "IterableDataset with labels": lambda: Stream(labels=True),
    "DataLoader of a stream": lambda: DataLoader(Stream(), batch_size=9),
}


@pytest.mark.parametrize("make", INDEXED.values(), ids=INDEXED.keys())
def test_sources_with_an_index_give_the_same_numbers(make: Callable[[], object]) -> None:
    assert_same(estimate(make()), estimate(DATA))
    visited = record(make()).visited()
    assert sorted(visited) == LABELS.tolist()
    assert visited != LABELS.tolist()  # an order drawn from the seed: the head of a sorted data set is no sample of it
    assert visited != record(make(), seed=1).visited()


@pytest.mark.parametrize("make", ORDERED.values(), ids=ORDERED.keys())
def test_sources_without_an_index_give_the_same_numbers(make: Callable[[], object]) -> None:
    # sums over other batches: 48 float64 roundings, and s differentiates a logarithm of them
    assert_same(estimate(make()), estimate(batches()), relative=1e-10)
    assert record(make()).visited() == LABELS.tolist()


def test_a_subset_stays_within_itself() -> None:
    assert set(record(Subset(TensorDataset(DATA), [3, 5, 8]), num_samples=20).visited()) == {3, 5, 8}


def test_a_shuffling_loader_is_followed() -> None:
    visited = record(DataLoader(TensorDataset(DATA), batch_size=5, shuffle=True)).visited()
    assert sorted(visited) == LABELS.tolist()
    assert visited != LABELS.tolist()


@pytest.mark.parametrize("make", [*INDEXED.values(), batches, Stream, lambda: DataLoader(Stream(), 9)])
def test_short_data_are_reused_with_new_noise(make: Callable[[], object]) -> None:
    recorder = record(make(), num_samples=2 * 60)
    visited, noise = recorder.visited(), recorder.at(0.01)[1]
    assert set(Counter(visited[:24]).values()) == set(Counter(visited[24:48]).values()) == {1}
    assert set(Counter(visited).values()) == {2, 3}
    assert len(noise[:, 0].unique()) == 60
    # standard normal: the mean square of 180 of them has standard deviation sqrt(2 / 180) = 0.105; five of those
    assert noise.square().mean().item() == pytest.approx(1, abs=0.53)


def test_reused_data_come_in_a_new_order() -> None:
    visited = record(DATA, num_samples=2 * 48).visited()
    assert visited[:24] != visited[24:]


def test_samples_and_noise_are_the_same_at_every_level() -> None:
    recorder = record(DATA, levels=LEVELS)
    x_0, noise = recorder.at(2.0)
    for level in LEVELS.tolist()[1:]:
        for value, expected in zip(recorder.at(level), (x_0, noise), strict=True):
            # (plus - minus) / 2t of numbers up to 30: 30 * 1.1e-16 / 0.05 is 7e-14
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-12)


def test_a_generator_that_runs_dry_warns_and_is_recorded() -> None:
    with pytest.warns(UserWarning, match=r"ran out after 12 of 24 clean samples.*num_samples=24") as record:
        statistics = estimate(b for b in DATA[:12].split(5))
    assert statistics.num_samples == 24
    assert [w.filename for w in record] == [__file__]  # it points at the caller
    # the first twelve samples with their noise, as if no more had been asked for; only the groups differ
    asked = estimate(DATA[:12].split(5), num_samples=24)
    torch.testing.assert_close(statistics.l, asked.l, rtol=1e-12, atol=0)  # the same sums in another order
    torch.testing.assert_close(statistics.s, asked.s, rtol=1e-10, atol=0)  # their derivative


def test_a_generator_that_runs_dry_keeps_its_intercept() -> None:
    with pytest.warns(UserWarning, match="ran out after 23 of 500"):
        statistics = estimate((b for b in DATA[:23].split(5)), intercept=True, num_samples=1000)
    assert 0 < statistics.num_samples <= 46
    assert statistics.intercept is not None
    assert statistics.intercept.isfinite().all()


def test_an_exhausted_generator_is_no_data() -> None:
    generator = (b for b in batches())
    estimate(generator)
    with pytest.raises(ValueError, match="at least one sample, got none"):
        estimate(generator)


def test_a_generator_is_not_read_further_than_needed() -> None:
    generator = (b for b in batches(6))
    estimate(generator, num_samples=2 * 12)
    assert torch.equal(next(generator), DATA[12:18])


class LabelTeacher:
    """Denoises with the help of its label, and checks it against the sample."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, x: Tensor, t: Tensor, *, label: Tensor) -> Tensor:
        assert label.tolist() == x[:, 0].round().long().tolist()
        self.rows += len(x)
        return label[:, None].to(x) + smooth_teacher(x - label[:, None], t)


def number(name: str) -> int:
    return int(name.removeprefix("class "))


NAMES = [f"class {i}" for i in LABELS.tolist()]
LABELLED: dict[str, tuple[Callable[[], object], Callable[..., dict[str, Any]]]] = {
    "TensorDataset": (lambda: TensorDataset(DATA, LABELS), lambda y: {"label": y}),
    "Dataset": (Labelled, lambda y: {"label": y}),
    "Dataset of dict labels": (lambda: Labelled(lambda i: {"id": i}), lambda y: {"label": y["id"]}),
    "Dataset of nested dict labels": (
        lambda: Labelled(lambda i: {"meta": {"id": i}}),
        lambda y: {"label": y["meta"]["id"]},
    ),
    "Dataset of tuple labels": (lambda: Labelled(lambda i: (i, -i)), lambda y: {"label": y[0]}),
    "Dataset of tuple labels, three of them": (lambda: Labelled(lambda i: (0, i, -i)), lambda y: {"label": y[1]}),
    "Dataset of named labels": (
        lambda: Labelled(lambda i: NAMES[i]),
        lambda y: {"label": torch.tensor([number(name) for name in y])},
    ),
    "Dataset of vector labels": (
        lambda: Labelled(lambda i: nn.functional.one_hot(LABELS[i], 24)),
        lambda y: {"label": y.argmax(1)},
    ),
    "two labels": (lambda: TensorDataset(DATA, -LABELS, LABELS), lambda wrong, right: {"label": right}),
    "IterableDataset": (lambda: Stream(labels=True), lambda y: {"label": y}),
    "DataLoader": (lambda: DataLoader(Labelled(), batch_size=10), lambda y: {"label": y}),
    "shuffling DataLoader": (lambda: DataLoader(Labelled(), batch_size=10, shuffle=True), lambda y: {"label": y}),
    "DataLoader of dict labels": (
        lambda: DataLoader(Labelled(lambda i: {"id": i}), batch_size=10),
        lambda y: {"label": y["id"]},
    ),
    "DataLoader of tuple labels": (
        lambda: DataLoader(Labelled(lambda i: (i, -i)), batch_size=10),
        lambda y: {"label": y[0]},
    ),
    "list": (lambda: labelled_batches(LABELS), lambda y: {"label": y}),
    "list of list labels": (lambda: labelled_batches(LABELS.tolist()), lambda y: {"label": torch.tensor(y)}),
    "list of array labels": (lambda: labelled_batches(LABELS.numpy()), lambda y: {"label": torch.from_numpy(y)}),
    "generator": (lambda: (b for b in labelled_batches(LABELS)), lambda y: {"label": y}),
}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("make", "condition"), LABELLED.values(), ids=LABELLED.keys())
def test_labels_stay_with_their_samples(
    make: Callable[[], object], condition: Callable[..., dict[str, Any]], batch_size: int
) -> None:
    teacher = LabelTeacher()
    # 23 pairs of 24: the last batch is cut, whatever its size
    estimate(make(), teacher, levels=SMALL, num_samples=46, batch_size=batch_size, condition=condition)
    assert teacher.rows == 46 * len(SMALL)


def test_what_is_common_to_a_batch_comes_whole() -> None:
    """Only what has one row per sample is cut: a prompt, a number or a vector of another length is not."""
    common = ["a prompt", 3.5, torch.tensor(7), torch.arange(5), None]
    recorder = Recorder()
    condition = lambda *extra: dict(zip("abcde", extra, strict=True))  # noqa: E731
    estimate([(DATA, *common)], recorder, batch_size=4, condition=condition)
    for seen in recorder.conditions:
        assert [seen[key] for key in "abc"] == common[:3]
        assert torch.equal(seen["d"], torch.arange(5))
        assert seen["e"] is None


def test_labels_are_ignored_without_a_condition() -> None:
    recorder = record(TensorDataset(DATA, LABELS))
    assert recorder.conditions
    assert all(condition == {} for condition in recorder.conditions)


METHODS = [
    {},
    {"intercept": True},
    {"l_method": "hutchinson"},
    {"l_method": "exact"},
    {"s_method": "jvp"},
    {"s_method": "finite-difference", "intercept": True},
]
method_ids = [" ".join(map(str, options.values())) or "default" for options in METHODS]
# sums of 70 float64 terms in another order round to 1e-14; s and the standard errors, differences of nearly equal
# numbers, lose up to three digits more
BATCHING = 1e-10


@pytest.mark.parametrize("make", [lambda: DATA / 10, lambda: DataLoader(TensorDataset(DATA / 10), 9, shuffle=True)])
def test_the_batch_size_does_not_change_the_numbers(make: Callable[[], object]) -> None:
    reference = estimate(make(), batch_size=1, num_samples=140)
    for batch_size in (7, 64, 1000):
        assert_same(estimate(make(), batch_size=batch_size, num_samples=140), reference, BATCHING)


@pytest.mark.parametrize("options", METHODS[1:], ids=method_ids[1:])
def test_the_batch_size_does_not_change_the_other_methods(options: dict[str, Any]) -> None:
    reference, other = (estimate(DATA / 10, batch_size=size, num_samples=32, **options) for size in (3, 1000))
    assert_same(other, reference, BATCHING)


def test_the_seed_decides_the_numbers() -> None:
    assert_same(estimate(DATA, seed=5), estimate(DATA, seed=5))
    for name in RESULTS:
        assert not torch.equal(getattr(estimate(DATA, seed=5), name), getattr(estimate(DATA, seed=6), name))


def test_neighbouring_seeds_share_no_noise() -> None:
    drawn = [record(DATA, seed=seed).at(0.01)[1].flatten() for seed in (0, 1, 2**32, 2**63)]
    for noise in drawn:
        noise.mul_(1e9).round_()  # (plus - minus) / 2t rounds to 30 * 1.1e-16 / 0.01
    assert len(torch.cat(drawn).unique()) == 4 * 24 * 3


def test_labels_or_not_the_numbers_are_the_same() -> None:
    with_labels = estimate(TensorDataset(DATA, LABELS), condition=lambda y: {"label": y})
    assert_same(with_labels, estimate(TensorDataset(DATA)))


def dropout_teacher(x: Tensor, t: Tensor) -> Tensor:
    return nn.functional.dropout(x, 0.5, training=True)


class AugmentedStream(IterableDataset[Tensor]):
    """Draws from torch's global generator."""

    def __iter__(self) -> Iterator[Tensor]:
        return (x + torch.randn(()) for x in DATA)


RANDOM: dict[str, Callable[[], Any]] = {
    "tensor": lambda: DATA,
    "dataset": Labelled,
    "short data": lambda: DATA[:5],
    "shuffling loader": lambda: DataLoader(TensorDataset(DATA), 9, shuffle=True),
    "augmented stream": AugmentedStream,
}


@pytest.mark.parametrize("denoiser", [smooth_teacher, dropout_teacher])
@pytest.mark.parametrize("make", RANDOM.values(), ids=RANDOM.keys())
@pytest.mark.parametrize("l_method", ["stein", "hutchinson"])
def test_the_global_rng_is_left_alone_and_does_not_matter(
    make: Callable[[], Any], denoiser: ap.Denoiser, l_method: str
) -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        with global_rng_untouched():
            results.append(estimate(make(), denoiser, l_method=l_method))
    assert_same(*results)


def test_the_gradient_mode_is_left_alone() -> None:
    modes = []

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        modes.append(torch.is_grad_enabled())
        return x / 2

    estimate(DATA, teacher)
    assert torch.is_grad_enabled()
    assert set(modes) == {False}  # activations are not kept


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("make", [lambda: DATA, lambda: [DATA], lambda: DataLoader(TensorDataset(DATA), 9), Stream])
@pytest.mark.parametrize("num_samples", [2, 31, 120])
def test_one_evaluation_per_sample_and_level(make: Callable[[], object], batch_size: int, num_samples: int) -> None:
    recorder = Recorder()
    statistics = estimate(make(), recorder, batch_size=batch_size, num_samples=num_samples)
    rows = Counter[float]()
    for t, x in recorder.inputs:
        rows[t] += len(x)
    pairs = num_samples // 2
    assert statistics.num_samples == 2 * pairs
    assert rows == dict.fromkeys(LEVELS.tolist(), 2 * pairs)
    assert max(recorder.sizes) <= batch_size


@pytest.mark.parametrize(
    ("options", "cost"),
    [({"intercept": True}, 1), ({"s_method": "finite-difference"}, 3), ({"l_method": "hutchinson"}, 1)],
)
def test_the_cost_of_the_other_methods(options: dict[str, Any], cost: int) -> None:
    sizes = []

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return x / 2

    estimate(DATA, teacher, num_samples=20, **options)
    assert sum(sizes) == cost * 20 * len(LEVELS)
    assert max(sizes) <= 7


class NoForwardMode(torch.autograd.Function):
    """A square root of one plus a square, with a backward formula only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (1 + x**2).sqrt()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x / (1 + x**2).sqrt()


class Network(nn.Module):
    """A small teacher with parameters that ask for gradients."""

    def __init__(self, forward_mode: bool = True) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3, dtype=torch.float64)
        nn.init.eye_(self.linear.weight)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.forward_mode = forward_mode

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.norm(self.linear(x))
        return (1 + h**2).sqrt() if self.forward_mode else NoForwardMode.apply(h)


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("l_method", ["stein", "hutchinson", "exact"])
def test_the_teacher_is_left_as_it_was(l_method: str, forward_mode: bool) -> None:
    teacher = Network(forward_mode).eval()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    statistics = estimate(DATA, teacher, l_method=l_method)
    for parameter in teacher.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad
    assert not teacher.training
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])
    for name in RESULTS:
        assert not getattr(statistics, name).requires_grad


@pytest.mark.parametrize("l_method", ["hutchinson", "exact"])
def test_reverse_mode_gives_the_numbers_of_forward_mode(l_method: str) -> None:
    torch.manual_seed(0)
    forward, reverse = Network(True).eval(), Network(False).eval()
    reverse.load_state_dict(forward.state_dict())
    # the same derivative by two formulas in float64
    assert_same(
        estimate(DATA, forward, l_method=l_method), estimate(DATA, reverse, l_method=l_method), relative=BATCHING
    )


def test_the_data_are_left_as_they_were() -> None:
    data = DATA.clone()
    estimate(data, lambda x, t: x.mul_(0.5))
    assert torch.equal(data, DATA)


@pytest.mark.parametrize("options", METHODS[:3] + METHODS[5:], ids=method_ids[:3] + method_ids[5:])
def test_a_teacher_may_write_into_its_input(options: dict[str, Any]) -> None:
    """As an in-place activation in front does: the sums still see the noisy samples and levels that were meant."""

    def in_place(x: Tensor, t: Tensor) -> Tensor:
        x.div_(1 + t.square_()[:, None])
        return x.tanh_()

    def polite(x: Tensor, t: Tensor) -> Tensor:
        return (x / (1 + t**2)[:, None]).tanh()

    assert_same(estimate(DATA, in_place, **options), estimate(DATA, polite, **options))


@pytest.mark.parametrize("options", METHODS[:2] + METHODS[5:], ids=method_ids[:2] + method_ids[5:])
def test_a_teacher_may_reuse_its_output(options: dict[str, Any]) -> None:
    """As a compiled network with static buffers does: its next answer overwrites the last."""
    buffers: dict[int, Tensor] = {}

    def buffered(x: Tensor, t: Tensor) -> Tensor:
        return buffers.setdefault(len(x), torch.empty_like(x)).copy_(smooth_teacher(x, t))

    assert_same(estimate(DATA, buffered, **options), estimate(DATA, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (3, 4, 4)])
def test_dtypes_and_sample_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    data = torch.randn(512, *shape, dtype=dtype, generator=torch.Generator().manual_seed(0))
    recorder, teacher = Recorder(), ap.GaussianDenoiser(1.0)
    estimate(data, recorder)
    assert all(x.dtype == dtype and x.shape[1:] == shape for _, x in recorder.inputs)

    statistics = estimate(data, teacher, num_samples=256)
    assert statistics.header.sample_shape == shape
    for name in RESULTS:
        assert getattr(statistics, name).dtype == torch.float64
        assert getattr(statistics, name).shape == LEVELS.shape
    # D is linear, so Stein's estimate is exact but for the rounding of x_0 +- t n: eps |x| / t at t = 0.05, with
    # |x| up to 4 and the worst case of one element per sample averaged over 128 pairs: 80 eps / sqrt(128)
    torch.testing.assert_close(statistics.l, 1 / (1 + LEVELS**2), rtol=0, atol=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.t().contiguous().t(), lambda x: x.requires_grad_()])
def test_layout_and_gradients_of_the_data_do_not_matter(make: Callable[[Tensor], Tensor]) -> None:
    assert_same(estimate(make(DATA.clone())), estimate(DATA))


def test_progress_shows_levels_samples_and_time_left(capsys: pytest.CaptureFixture[str]) -> None:
    estimate(DATA, progress=True)
    output, shown = capsys.readouterr()
    assert output == ""
    assert "level=4/4" in shown
    assert "samples=48" in shown
    assert "100%" in shown
    assert re.search(r"\[\d\d:\d\d<(\d\d:\d\d|\?)", shown)  # [elapsed<left


def test_progress_moves_on_at_every_level(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = partial(tqdm, mininterval=0, miniters=1)  # not every 0.1 s
    monkeypatch.setattr("analytic_precond.estimation.estimate.tqdm", at_once)
    estimate(DATA, progress=True, batch_size=12)
    shown = capsys.readouterr().err
    for samples in (24, 48):
        for level in range(1, 5):
            assert f"level={level}/4, samples={samples}" in shown


def test_progress_can_be_silent(capfd: pytest.CaptureFixture[str]) -> None:
    estimate(DATA, progress=False)
    assert capfd.readouterr() == ("", "")


def test_the_progress_bar_is_closed_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="finite"):
        estimate(DATA, lambda x, t: x / 0, progress=True)
    assert capsys.readouterr().err.endswith("\n")


@pytest.mark.parametrize("intercept", [False, True])
def test_merging_pools_the_sums(intercept: bool) -> None:
    parts = [
        estimate(DATA, seed=seed, num_samples=num, intercept=intercept) for seed, num in ((0, 40), (1, 200), (2, 80))
    ]
    merged = ap.merge_statistics(parts)
    assert merged.num_samples == 320
    assert merged.header.seeds == (0, 1, 2)
    # the same float64 sums in another order
    pooled = sum(part.sums.sum(0) for part in parts)
    torch.testing.assert_close(merged.sums.sum(0), pooled, rtol=1e-12, atol=1e-12 * pooled.abs().max().item())
    torch.testing.assert_close(merged.l, pooled[:, 0] / pooled[:, 1], rtol=1e-12, atol=0)
    weights = torch.tensor([40, 200, 80], dtype=torch.float64) / 320
    if intercept:
        means = torch.stack([part.mean_denoised for part in parts])
        expected = (weights[:, None, None] * means).sum(0)
        torch.testing.assert_close(merged.mean_denoised, expected, rtol=1e-12, atol=1e-12)
    assert bool((merged.l_stderr < parts[0].l_stderr).all())  # eight times the samples


def test_merging_does_not_depend_on_the_order_or_the_steps() -> None:
    a, b, c = (estimate(DATA, seed=seed, num_samples=400) for seed in range(3))
    at_once = ap.merge_statistics([a, b, c])
    for other in (ap.merge_statistics([c, a, b]), ap.merge_statistics([ap.merge_statistics([a, b]), c])):
        for name in ("l", "g_rms", "s"):
            # the same groups in another order: float64 sums, and a derivative of them
            torch.testing.assert_close(getattr(other, name), getattr(at_once, name), rtol=BATCHING, atol=0)
    assert_same(ap.merge_statistics([a]), a)


def test_merging_leaves_its_parts_alone() -> None:
    a, b = estimate(DATA, seed=0), estimate(DATA, seed=1)
    before = a.sums.clone()
    ap.merge_statistics([a, b])
    assert torch.equal(a.sums, before)


def with_another(**options: Any) -> Callable[[], Any]:
    """Return statistics and statistics of another seed that do not go with them."""
    return lambda: [estimate(DATA), estimate(**{"data": DATA, "seed": 1, **options})]


UNFIT: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "nothing": (list, ValueError, r"at least one TeacherStatistics, got none"),
    "same seed": (with_another(seed=0), ValueError, r"different seeds, got \(0, 0\): equal noise counts once"),
    "levels": (with_another(levels=LEVELS * 2), ValueError, r"share their noise levels: .*one grid"),
    "fewer levels": (with_another(levels=LEVELS[1:]), ValueError, r"share their noise levels"),
    "l_method": (with_another(l_method="exact"), ValueError, r"made alike.*'stein'.*'exact'"),
    "s_method": (with_another(s_method="jvp"), ValueError, r"made alike.*'transport'.*'jvp'"),
    "sample shape": (
        with_another(data=DATA[:, :2], intercept=True),
        ValueError,
        r"intercept .* must share .* shape, got \(2,\)",
    ),
    "teacher": (with_another(denoiser=Recorder()), ValueError, r"made alike.*smooth_teacher.*Recorder"),
    "intercept": (with_another(intercept=True), ValueError, r"agree on the intercept"),
    "not a list": (lambda: estimate(DATA), TypeError, r"statistics must .*got TeacherStatistics"),
    "paths": (lambda: ["a.safetensors", "b.safetensors"], TypeError, r"statistics must .*got .*str"),
    "one path": (lambda: [estimate(DATA), "b.safetensors"], TypeError, r"statistics must .*got .*str"),
}


@pytest.mark.parametrize(("make", "error", "match"), UNFIT.values(), ids=UNFIT.keys())
def test_statistics_that_do_not_fit_are_not_merged(make: Callable[[], Any], error: type[Exception], match: str) -> None:
    parts = make()
    with pytest.raises(error, match=match) as info:
        ap.merge_statistics(parts)
    assert info.type is error


positive = st.floats(1e-4, 10.0)


@given(num=st.integers(2, 300), low=positive, ratio=st.floats(1.01, 1e7), rho=st.floats(0.25, 50.0))
@settings(deadline=None, max_examples=150)
def test_grids_decrease_between_exact_ends(num: int, low: float, ratio: float, rho: float) -> None:
    high = low * ratio
    for levels in (ap.karras_noise_levels(num, low, high, rho), ap.log_noise_levels(num, low, high)):
        assert levels.dtype == torch.float64
        assert levels.shape == (num,)
        assert levels[0].item() == high
        assert levels[-1].item() == low
        assert bool((levels.diff() < 0).all())


shapes = st.lists(st.integers(1, 3), min_size=1, max_size=5).map(tuple)


@given(shape=shapes, form=st.sampled_from(["per sample", "scalar", "single", "all dimensions"]), data=st.data())
@settings(deadline=None, max_examples=100)
def test_expand_to_gives_each_sample_its_level(shape: tuple[int, ...], form: str, data: st.DataObject) -> None:
    x = torch.zeros(shape)
    t = torch.tensor(data.draw(st.lists(positive, min_size=shape[0], max_size=shape[0])))
    expected = t if form in ("per sample", "all dimensions") else t[:1].expand_as(t)
    given_as = {
        "per sample": t,
        "scalar": t[0],
        "single": t[:1],
        "all dimensions": t.reshape(-1, *[1] * (len(shape) - 1)),
    }[form]
    expanded = ap.expand_to(given_as, x)
    assert expanded.ndim == x.ndim
    assert torch.equal(expanded + x, expected.reshape(-1, *[1] * (len(shape) - 1)).expand(shape))
    assert expanded.data_ptr() == given_as.data_ptr()  # a view


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    batch_size=st.integers(1, 8),
    pairs=st.integers(1, 40),
    columns=st.sampled_from(["tensor", "list", "array", "dict"]),
)
@settings(deadline=None, max_examples=60)
def test_any_batches_are_cut_and_repeated_in_order(sizes: list[int], batch_size: int, pairs: int, columns: str) -> None:
    """Batches of any sizes, empty ones too, are one sequence of samples with their labels."""
    labels = torch.arange(sum(sizes))
    convert: Callable[[Tensor], Any] = {
        "tensor": lambda y: y,
        "list": Tensor.tolist,
        "array": Tensor.numpy,
        "dict": lambda y: {"y": y},
    }[columns]
    source = [(y[:, None].double(), convert(y)) for y in labels.split(sizes)]
    seen: list[int] = []

    def teacher(x: Tensor, t: Tensor, label: Any) -> Tensor:
        assert len(x) <= batch_size
        label = torch.as_tensor(label["y"] if isinstance(label, dict) else label)
        assert label.tolist() == x[:, 0].round().long().tolist()
        seen.extend(label.tolist())
        return x / 2

    statistics = estimate(
        source,
        teacher,
        levels=SMALL,
        num_samples=2 * pairs,
        batch_size=batch_size,
        condition=lambda label: {"label": label},
    )
    assert statistics.num_samples == 2 * pairs
    expected = list(islice(cycle(labels.tolist()), pairs))
    assert Counter(seen) == {y: 2 * len(SMALL) * n for y, n in Counter(expected).items()}
    assert record(source, num_samples=2 * pairs, batch_size=batch_size).visited() == expected
