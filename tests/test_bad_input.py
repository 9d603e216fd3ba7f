"""Bad input is refused: with the right exception, a message that helps, and nothing changed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from global_rng import global_rng_untouched
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import analytic_precond as ap

NAN, INF = float("nan"), float("inf")
LEVELS = torch.tensor([2.0, 1.0, 0.5], dtype=torch.float64)
DATA = torch.linspace(-1, 1, 60).reshape(20, 3)
ZERO = torch.zeros(3, dtype=torch.float64)


class Teacher:
    """A denoiser that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        self.calls += 1
        return x / 2


class MapDataset(Dataset[Any]):
    """Items of a function of the index."""

    def __init__(self, item: Callable[[int], Any], size: int = 20) -> None:
        self.item, self.size = item, size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return self.item(index)


class Stream(IterableDataset[Any]):
    """The same items as a stream."""

    def __init__(self, item: Callable[[int], Any], size: int = 20) -> None:
        self.item, self.size = item, size

    def __iter__(self) -> Iterator[Any]:
        return (self.item(i) for i in range(self.size))


def estimate(denoiser: Any = None, data: Any = DATA, levels: Any = LEVELS, **options: Any) -> ap.TeacherStatistics:
    """Estimate with small defaults, so that a case names only what is wrong with it."""
    options = {"num_samples": 16, "batch_size": 4, "progress": False, **options}
    return ap.estimate_statistics(Teacher() if denoiser is None else denoiser, data, levels, **options)


def tables(levels: Any = LEVELS, l: Any = ZERO, s: Any = ZERO, *args: Any, **options: Any) -> Any:
    return ap.AnalyticPreconditioning.from_coefficients(levels, l, s, *args, **options)


def jump_between(t: Any, s: Any) -> Any:
    """Ask for the jump from t to s of a preconditioning that reaches from 2 to 0.5."""
    return tables()(t, s)


def move(x_t: Any = DATA, denoised: Any = DATA, t: Any = 2.0, s: Any = 1.0) -> Tensor:
    return tables().jump(x_t, denoised, t, s)


def check_refused(call: Callable[[], object], error: type[Exception], match: str) -> None:
    with global_rng_untouched(), pytest.raises(error, match=match) as info:
        call()
    assert info.type is error


def full(shape: int | tuple[int, ...], value: float = 1.0) -> Tensor:
    return torch.full((shape,) if isinstance(shape, int) else shape, value, dtype=torch.float64)


def levels_with(value: float, index: int = 1) -> Tensor:
    levels = LEVELS.clone()
    levels[index] = value
    return levels


UINT8 = torch.full((20, 3), 200, dtype=torch.uint8)
IN_RANGE = r"jumps must go from t to s with 0\.5 <= s <= t <= 2 .*got t = {}, s = {} at position {}: .*sigma, not ind"
INTEGER = r"{} must be a floating-point tensor, got torch\.{}: convert it"
NOT_A_TENSOR = r"{} must be a torch\.Tensor, got {}: convert it with torch\.as_tensor"
ONE_PER_SAMPLE = (
    r"t must hold one noise level per sample, shape \(20,\) for x of shape \(20, 3\), got shape \({}\): pass"
)

# what is wrong with a grid is said alike by every function that takes one
BAD_LEVELS = [
    (
        "unsorted",
        torch.tensor([2.0, 0.5, 1.0]),
        ValueError,
        r"strictly decreasing.*got 0\.5 then 1\.0 at index 1: sort",
    ),
    ("increasing", LEVELS.flip(0), ValueError, r"strictly decreasing.*got 0\.5 then 1\.0 at index 0: sort them"),
    ("duplicate", torch.tensor([2.0, 1.0, 1.0]), ValueError, r"got 1\.0 then 1\.0 at index 1: .*drop duplicates"),
    ("single", LEVELS[:1], ValueError, r"at least 2 noise levels, got shape \(1,\): make a grid with log_noise_levels"),
    ("empty", LEVELS[:0], ValueError, r"at least 2 noise levels, got shape \(0,\): make a grid"),
    ("2-d", LEVELS[:, None], ValueError, r"must be 1-D .*got shape \(3, 1\)"),
    ("nan", levels_with(NAN), ValueError, r"levels must be finite, got 1 NaN or infinite of 3 values"),
    ("inf", levels_with(INF, 0), ValueError, r"levels must be finite, got 1 NaN or infinite of 3 values"),
    ("zero", levels_with(0.0, 2), ValueError, r"positive noise levels.*got 0\.0 at index 2: drop a final 0"),
    ("negative", levels_with(-0.5, 2), ValueError, r"positive noise levels.*got -0\.5 at index 2"),
    ("integer", torch.tensor([3, 2, 1]), TypeError, INTEGER.format("levels", "int64")),
    ("list", [2.0, 1.0, 0.5], TypeError, NOT_A_TENSOR.format("levels", "list")),
    ("array", LEVELS.numpy(), TypeError, NOT_A_TENSOR.format("levels", "ndarray")),
]

JUMPS = [
    ("s-above-t", partial(jump_between, 1.0, 1.5), ValueError, IN_RANGE.format("1", r"1\.5", 0)),
    (
        "s-above-t-in-a-batch",
        partial(jump_between, torch.tensor([2.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.25])),
        ValueError,
        IN_RANGE.format("1", r"1\.25", 2),
    ),
    ("nan-t", partial(jump_between, NAN, 1.0), ValueError, IN_RANGE.format("nan", "1", 0)),
    ("nan-s", partial(jump_between, full(2), torch.tensor([1.0, NAN])), ValueError, IN_RANGE.format("1", "nan", 1)),
    ("zero-t", partial(jump_between, 0.0, 0.0), ValueError, IN_RANGE.format("0", "0", 0)),
    ("zero-s", partial(jump_between, 2.0, 0.0), ValueError, IN_RANGE.format("2", "0", 0)),
    ("negative-s", partial(jump_between, 1.0, -0.5), ValueError, IN_RANGE.format("1", r"-0\.5", 0)),
    ("infinite-t", partial(jump_between, INF, 1.0), ValueError, IN_RANGE.format("inf", "1", 0)),
    ("t-above-range", partial(jump_between, 2.1, 1.0), ValueError, IN_RANGE.format(r"2\.1", "1", 0)),
    ("s-below-range", partial(jump_between, 1.0, 0.4), ValueError, IN_RANGE.format("1", r"0\.4", 0)),
    (
        "int-t",
        partial(jump_between, 2, 1.0),
        TypeError,
        r"t must be a noise level \(float .*got 2 \(int\): write 80\.0",
    ),
    ("index-s", partial(jump_between, full(2, 2.0), torch.tensor([1, 2])), TypeError, INTEGER.format("s", "int64")),
    ("text-t", partial(jump_between, "2.0", 1.0), TypeError, r"t must be a noise level .*got str: pass a Python float"),
    ("shapes-do-not-broadcast", partial(jump_between, full(3, 2.0), full(4)), ValueError, r"\(3,\).*\(4,\)"),
    ("on-network", lambda: tables().on_network(1.0, 2.0), ValueError, IN_RANGE.format("1", "2", 0)),
    ("ctm-s-above-t", lambda: ap.CTMPreconditioning()(1.0, 2.0), ValueError, r"s <= t .*got t = 1, s = 2"),
    ("jump-s-above-t", partial(move, t=1.0, s=2.0), ValueError, IN_RANGE.format("1", "2", 0)),
    ("jump-shapes", partial(move, denoised=DATA[:3]), ValueError, r"x_t's shape \(20, 3\), got \(3, 3\)"),
    ("jump-t-shape", partial(move, t=full(3, 2.0)), ValueError, ONE_PER_SAMPLE.format("3,")),
    ("jump-uint8-x", partial(move, x_t=UINT8), TypeError, INTEGER.format("x_t", "uint8")),
    ("jump-uint8-denoised", partial(move, denoised=UINT8), TypeError, INTEGER.format("denoised", "uint8")),
    ("jump-uint8-both", partial(move, UINT8, UINT8), TypeError, INTEGER.format("x_t", "uint8")),
    ("jump-array", partial(move, DATA.numpy(), DATA.numpy()), TypeError, NOT_A_TENSOR.format("x_t", "ndarray")),
]

TABLES = [
    (
        "l-too-short",
        partial(tables, l=ZERO[:2]),
        ValueError,
        r"l must hold one value per level, shape \(3,\), got \(2,\)",
    ),
    (
        "s-too-long",
        partial(tables, s=full(4)),
        ValueError,
        r"s must hold one value per level, shape \(3,\), got \(4,\)",
    ),
    ("l-2-d", partial(tables, l=ZERO[None]), ValueError, r"l must hold one value per level.*got \(1, 3\)"),
    ("l-nan", partial(tables, l=levels_with(NAN)), ValueError, r"l must be finite, got 1 NaN or infinite of 3 values"),
    ("s-inf", partial(tables, s=levels_with(INF)), ValueError, r"s must be finite, got 1 NaN or infinite of 3 values"),
    ("l-integer", partial(tables, l=torch.zeros(3, dtype=torch.int64)), TypeError, INTEGER.format("l", "int64")),
    ("s-list", partial(tables, s=[0.0] * 3), TypeError, NOT_A_TENSOR.format("s", "list")),
    # l_s r = -1 is passed on the way from 80 to 0.002 where l jumps below zero at the clean end
    (
        "singular-jump",
        partial(tables, torch.tensor([80.0, 0.01, 0.002]), torch.tensor([0.0, 0.0, -5.0])),
        ValueError,
        r"denominator .* positive, got -?[\d.e+-]+ for the jump from 80 to .*: a negative l is noise, take more",
    ),
    ("s-falls-too-far", partial(tables, s=full(3, -500.0)), ValueError, r"s must not let .* got 6\d\d.*check sign"),
    ("l-too-large", partial(tables, l=full(3, 100.0)), ValueError, r"\bl\b.*got 1\d\d|got 1\d\d.*\bl\b"),
    (
        "discretization",
        partial(tables, discretization="implicit"),
        ValueError,
        r"'backward', 'forward', got 'implicit'",
    ),
    ("theta-above-1", partial(tables, theta=1.5), ValueError, r"theta must be a number from 0 .* to 1 .*got 1\.5"),
    ("theta-negative", partial(tables, theta=-0.1), ValueError, r"theta must be a number from 0 .* to 1 .*got -0\.1"),
    ("theta-nan", partial(tables, theta=NAN), ValueError, r"theta must be a number from 0 .* to 1 .*got nan"),
    (
        "theta-and-forward",
        partial(tables, discretization="forward", theta=1.0),
        ValueError,
        r"or a theta.*'forward'.*1\.0",
    ),
    (
        "sigma-data-zero",
        partial(tables, sigma_data=0.0),
        ValueError,
        r"sigma_data must be positive and finite, got 0\.0",
    ),
    ("sigma-data-nan", partial(tables, sigma_data=NAN), ValueError, r"sigma_data must be positive and finite, got nan"),
    (
        "sigma-data-text",
        partial(tables, sigma_data="0.5"),
        TypeError,
        r"sigma_data must be a number, got '0\.5' \(str\)",
    ),
    (
        "path-for-statistics",
        partial(ap.AnalyticPreconditioning, "teacher.safetensors"),  # type: ignore[arg-type]
        TypeError,
        r"statistics must be TeacherStatistics, got str: load a file with TeacherStatistics\.load",
    ),
    (
        "discretization-with-statistics",
        lambda: ap.AnalyticPreconditioning(estimate(), "centred"),
        ValueError,
        r"'backward', 'forward', got 'centred'",
    ),
    ("ctm-outer", partial(ap.CTMPreconditioning, "ddim"), ValueError, r"'euler', 'variance', .*got 'ddim'"),
    (
        "ctm-sigma-min",
        partial(ap.CTMPreconditioning, sigma_min=-0.002),
        ValueError,
        r"sigma_min must be positive.*-0\.002",
    ),
    ("edm-sigma-data", partial(ap.EDMPreconditioning, -0.5), ValueError, r"sigma_data must be positive.*got -0\.5"),
    ("edm-index", lambda: ap.EDMPreconditioning()(torch.tensor([3])), TypeError, INTEGER.format("t", "int64")),
]

GRIDS = [
    ("one-level", partial(ap.log_noise_levels, 1), ValueError, r"num must be at least 2, got 1"),
    ("float-num", partial(ap.log_noise_levels, 10.0), TypeError, r"num must be an int, got 10\.0 \(float\)"),
    ("bool-num", partial(ap.karras_noise_levels, True), TypeError, r"num must be an int, got True \(bool\)"),
    ("nan-end", partial(ap.log_noise_levels, 3, NAN), ValueError, r"sigma_min must be positive and finite, got nan"),
    ("infinite-end", partial(ap.karras_noise_levels, 3, 1.0, INF), ValueError, r"sigma_max must be positive.*got inf"),
    ("zero-end", partial(ap.karras_noise_levels, 3, 0.0), ValueError, r"sigma_min must be positive.*got 0\.0"),
    ("negative-end", partial(ap.log_noise_levels, 3, -1.0), ValueError, r"sigma_min must be positive.*got -1\.0"),
    (
        "swapped-ends",
        partial(ap.log_noise_levels, 3, 80.0, 0.002),
        ValueError,
        r"below sigma_max, got 80.* 0\.002: swap",
    ),
    ("equal-ends", partial(ap.karras_noise_levels, 3, 1.0, 1.0), ValueError, r"sigma_min must be below sigma_max"),
    ("text-end", partial(ap.log_noise_levels, 3, "0.1"), TypeError, r"sigma_min must be a number, got '0\.1' \(str\)"),
    ("zero-rho", partial(ap.karras_noise_levels, 3, rho=0.0), ValueError, r"rho must be positive and finite, got 0\.0"),
    # grids whose neighbours coincide in float64 are not strictly decreasing, which the functions promise
    ("ends-too-close", partial(ap.log_noise_levels, 10, 1.0, 1 + 1e-15), ValueError, r"decreasing"),
    ("rho-too-large", partial(ap.karras_noise_levels, 10, rho=1e17), ValueError, r"decreasing"),
    ("expand-index", lambda: ap.expand_to(torch.arange(20), DATA), TypeError, INTEGER.format("t", "int64")),
    ("expand-shape", lambda: ap.expand_to(full(4), DATA), ValueError, ONE_PER_SAMPLE.format("4,")),
    ("expand-shape-nd", lambda: ap.expand_to(full((5, 1)), DATA), ValueError, ONE_PER_SAMPLE.format("5, 1")),
    ("expand-number", lambda: ap.expand_to(1.0, DATA), TypeError, NOT_A_TENSOR.format("t", "float")),
]

MEANS = torch.zeros(2, 3)
mixture = partial(ap.GaussianMixtureDenoiser, MEANS)
EXACT_DENOISERS = {
    "gaussian": ap.GaussianDenoiser(torch.ones(3)),
    "mixture": ap.GaussianMixtureDenoiser(MEANS, 1.0),
    "empirical": ap.EmpiricalDenoiser(DATA),
}
EXACT = [
    ("variance-negative", partial(ap.GaussianDenoiser, -1.0), ValueError, r"variances must not be negative, got -1\.0"),
    ("variance-nan", partial(ap.GaussianDenoiser, NAN), ValueError, r"variances must be finite, got 1 NaN"),
    ("variance-integer", partial(ap.GaussianDenoiser, UINT8), TypeError, INTEGER.format("variances", "uint8")),
    ("variance-none", partial(ap.GaussianDenoiser, None), TypeError, NOT_A_TENSOR.format("variances", "NoneType")),
    ("mean-inf", partial(ap.GaussianDenoiser, 1.0, INF), ValueError, r"mean must be finite, got 1 NaN or infinite"),
    ("component-variance", partial(mixture, -full(2)), ValueError, r"variances must not be negative, got -1\.0"),
    (
        "variance-count",
        partial(mixture, full(5)),
        ValueError,
        r"of shape \(2,\) or broadcast .*\(2, 3\), got shape \(5,\)",
    ),
    ("variance-shape", partial(mixture, full((2, 4))), ValueError, r"broadcast .*\(2, 3\), got shape \(2, 4\)"),
    (
        "weight-negative",
        partial(mixture, 1.0, torch.tensor([2.0, -1.0])),
        ValueError,
        r"weights must not be neg.*-1\.0",
    ),
    (
        "weights-zero",
        partial(mixture, 1.0, torch.zeros(2)),
        ValueError,
        r"weights must have .*positive sum, got \[0\.0, 0",
    ),
    ("weights-count", partial(mixture, 1.0, torch.ones(3)), ValueError, r"weights must have shape \(2,\) .*got"),
    ("weights-list", partial(mixture, 1.0, [1.0, 1.0]), TypeError, NOT_A_TENSOR.format("weights", "list")),
    ("means-1-d", partial(ap.GaussianMixtureDenoiser, full(2), 1.0), ValueError, r"means must have shape .*got \(2,\)"),
    ("means-empty", partial(ap.GaussianMixtureDenoiser, MEANS[:0], 1.0), ValueError, r"K >= 1 .*got \(0, 3\)"),
    ("points-empty", partial(ap.EmpiricalDenoiser, DATA[:0]), ValueError, r"N >= 1 points, got \(0, 3\)"),
    ("points-nan", partial(ap.EmpiricalDenoiser, DATA * NAN), ValueError, r"data must be finite, got 60 NaN"),
    ("points-uint8", partial(ap.EmpiricalDenoiser, UINT8), TypeError, INTEGER.format("data", "uint8") + r".*/ 127\.5"),
] + [
    (f"{name}-{fault}", partial(denoiser, *arguments), error, match)
    for name, denoiser in EXACT_DENOISERS.items()
    for fault, arguments, error, match in (
        ("t-shape", (DATA, full(4)), ValueError, ONE_PER_SAMPLE.format("4,")),
        ("t-index", (DATA, torch.arange(20)), TypeError, INTEGER.format("t", "int64")),
        ("t-number", (DATA, 1.0), TypeError, NOT_A_TENSOR.format("t", "float")),
        ("uint8-images", (UINT8, full(20)), TypeError, INTEGER.format("x", "uint8")),
        ("sample-shape", (full((20, 5)), full(20)), ValueError, r"\(3,\).*got .*5"),
        ("sample-shape-1", (full((20, 1)), full(20)), ValueError, r"\(3,\).*got .*1"),
    )
]


def with_ids(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.mark.parametrize(("call", "error", "match"), with_ids(JUMPS + TABLES + GRIDS + EXACT))
def test_refused(call: Callable[[], object], error: type[Exception], match: str) -> None:
    check_refused(call, error, match)


@pytest.mark.parametrize(
    "use", [partial(estimate, None, DATA), tables], ids=["estimate_statistics", "from_coefficients"]
)
@pytest.mark.parametrize(("levels", "error", "match"), with_ids(BAD_LEVELS))
def test_bad_levels_are_refused(use: Callable[[Any], object], levels: Any, error: type[Exception], match: str) -> None:
    check_refused(lambda: use(levels), error, match)


PAIRS = r"Samples come in pairs"
NEEDS_TENSORS = r"data must yield tensors .*got {}.*: adapt it, e\.g\. \(batch\['image'\] for batch in data\)"
SOURCES = r"data must be a tensor \(N, \.\.\.\), a Dataset, a DataLoader or an iterable of batches, got {}"
NO_DATA = r"data must hold at least one sample, got none"

# found before the teacher is asked
ARGUMENTS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("no-samples", {"num_samples": 0}, ValueError, r"num_samples must be at least 2, got 0\. " + PAIRS),
    ("less-than-a-pair", {"num_samples": 1}, ValueError, r"num_samples must be at least 2, got 1\. " + PAIRS),
    ("negative-samples", {"num_samples": -8}, ValueError, r"num_samples must be at least 2, got -8"),
    ("float-samples", {"num_samples": 16.0}, TypeError, r"num_samples must be an int, got 16\.0 \(float\)"),
    ("one-pair-intercept", {"num_samples": 3, "intercept": True}, ValueError, r"num_samples.*at least 4.*intercept"),
    ("batch-size-zero", {"batch_size": 0}, ValueError, r"batch_size must be at least 1, got 0"),
    ("batch-size-negative", {"batch_size": -1}, ValueError, r"batch_size must be at least 1, got -1"),
    ("batch-size-float", {"batch_size": 8.0}, TypeError, r"batch_size must be an int, got 8\.0 \(float\).*auto"),
    ("batch-size-word", {"batch_size": "any"}, TypeError, r"batch_size must be an int, got 'any' \(str\).*\"auto\""),
    ("batch-size-bool", {"batch_size": True}, TypeError, r"batch_size must be an int, got True \(bool\)"),
    ("seed-negative", {"seed": -1}, ValueError, r"seed must be at least 0, got -1"),
    ("seed-float", {"seed": 0.5}, TypeError, r"seed must be an int, got 0\.5 \(float\)"),
    ("seed-bool", {"seed": False}, TypeError, r"seed must be an int, got False \(bool\)"),
    ("seed-none", {"seed": None}, TypeError, r"seed must be an int, got None"),
    ("seed-too-large", {"seed": 2**64}, ValueError, r"seed must be .*got 18446744073709551616"),
    ("l-method", {"l_method": "hutch"}, ValueError, r"l_method must be .*'stein', 'hutchinson', 'exact', got 'hutch'"),
    ("s-method", {"s_method": "vjp"}, ValueError, r"s_method .*'transport', 'jvp', 'finite-difference', got 'vjp'"),
    ("l-method-none", {"l_method": None}, ValueError, r"l_method must be one of 'stein', .*got None"),
    ("condition-text", {"condition": "class_labels"}, TypeError, r"condition must be .*got.*str"),
    ("condition-result", {"condition": lambda: 3}, TypeError, r"condition must .*got.*int"),
    ("description", {"description": 5}, TypeError, r"description must be .*got .*(5|int)"),
    ("array", {"data": DATA.numpy()}, TypeError, SOURCES.format("ndarray: wrap arrays with torch.from_numpy")),
    ("nothing", {"data": None}, TypeError, SOURCES.format("NoneType")),
    ("path", {"data": "images/"}, TypeError, SOURCES.format("str")),
    ("dict", {"data": {"image": DATA}}, TypeError, SOURCES.format("dict")),
    ("scalar", {"data": torch.tensor(1.0)}, ValueError, r"data must .*got .*(0-d|shape \(\))"),
    ("uint8", {"data": UINT8}, TypeError, INTEGER.format("data", "uint8") + r".*x\.float\(\) / 127\.5 - 1"),
    ("bool", {"data": UINT8.bool()}, TypeError, INTEGER.format("data", "bool")),
    ("complex", {"data": DATA + 0j}, TypeError, INTEGER.format("data", "complex64")),
    ("uint8-dataset", {"data": TensorDataset(UINT8)}, TypeError, INTEGER.format("data", "uint8")),
    ("empty-tensor", {"data": DATA[:0]}, ValueError, NO_DATA),
    ("empty-samples", {"data": DATA[:, :0]}, ValueError, r"data must .*got .*\(0,\)"),
    ("empty-list", {"data": []}, ValueError, NO_DATA),
    ("empty-batches", {"data": [DATA[:0]]}, ValueError, NO_DATA),
    ("empty-generator", {"data": (x for x in ())}, ValueError, NO_DATA),
    ("empty-dataset", {"data": TensorDataset(DATA[:0])}, ValueError, NO_DATA),
    ("empty-stream", {"data": Stream(lambda i: DATA[i], 0)}, ValueError, NO_DATA),
    ("empty-loader", {"data": DataLoader(Stream(lambda i: DATA[i], 0), 4)}, ValueError, NO_DATA),
    ("empty-tuples", {"data": [()]}, TypeError, NEEDS_TENSORS.format("tuple")),
    ("dict-batches", {"data": [{"image": DATA}]}, TypeError, NEEDS_TENSORS.format("dict")),
    ("dict-dataset", {"data": MapDataset(lambda i: {"image": DATA[i]})}, TypeError, NEEDS_TENSORS.format("dict")),
    ("array-batches", {"data": [DATA.numpy()]}, TypeError, NEEDS_TENSORS.format("ndarray")),
    ("numbers", {"data": [1.0, 2.0]}, TypeError, NEEDS_TENSORS.format("float")),
    ("0-d-batches", {"data": [DATA[0, 0]]}, ValueError, r"batches of shape \(B, \.\.\.\), got a 0-d tensor"),
    (
        "nan-data",
        {"data": DATA * NAN},
        ValueError,
        r"data \(samples 0 to 3\) must be finite, got 12 NaN .*of 12 values",
    ),
    ("inf-data", {"data": [DATA / 0]}, ValueError, r"data \(samples 0 to 3\) must be finite, got 12 NaN or infinite"),
    ("ragged-dataset", {"data": MapDataset(lambda i: DATA[i, : 1 + i % 2])}, ValueError, r"one shape.*got.*resize"),
    ("ragged-stream", {"data": Stream(lambda i: DATA[i, : 1 + i % 2])}, ValueError, r"one shape.*got.*resize"),
]


@pytest.mark.parametrize(("options", "error", "match"), with_ids(ARGUMENTS))
def test_bad_arguments_are_refused_before_the_teacher_is_asked(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    teacher = Teacher()
    check_refused(lambda: estimate(teacher, **options), error, match)
    assert teacher.calls == 0


def test_a_denoiser_must_be_callable() -> None:
    check_refused(lambda: estimate(DATA[0]), TypeError, r"denoiser must be callable as denoiser\(x, t\), got Tensor")


def test_a_refused_call_takes_nothing_from_a_generator() -> None:
    batches = iter(DATA.split(5))
    check_refused(lambda: estimate(data=batches, levels=LEVELS.flip(0)), ValueError, "strictly decreasing")
    assert torch.equal(next(batches), DATA[:5])


@pytest.mark.parametrize(
    ("batches", "error", "match"),
    [
        pytest.param(
            [DATA[:4], DATA[:4, :2]],
            ValueError,
            r"one shape, got \(2,\) in batch 1 after \(3,\): resize them first",
            id="ragged",
        ),
        pytest.param([DATA[:4], UINT8], TypeError, INTEGER.format("data", "uint8"), id="uint8"),
        pytest.param([DATA[:4], DATA / 0], ValueError, r"data \(samples 4 to 7\) must be finite, got 12", id="inf"),
        pytest.param([DATA[:4], {"image": DATA}], TypeError, NEEDS_TENSORS.format("dict"), id="dict"),
        pytest.param([DATA[:4], None], TypeError, NEEDS_TENSORS.format("NoneType"), id="nothing"),
    ],
)
def test_a_later_batch_is_checked_too(batches: list[Any], error: type[Exception], match: str) -> None:
    check_refused(lambda: estimate(data=batches), error, match)


def spoil(output: Callable[[Tensor], Any]) -> Callable[[Tensor, Tensor], Any]:
    """Return a teacher that misbehaves at the second level on samples around 100 only."""

    def teacher(x: Tensor, t: Tensor) -> Any:
        return output(x / 2) if float(x.mean()) > 50 and float(t[0]) == 1.0 else x / 2

    return teacher


WHERE = r".* at noise level 1 \(index 1\), batch 2"
FINITE = r"the teacher must return finite values, got NaN or infinity" + WHERE + r", sample 1: check its weights"
RETURNS = r"the teacher must return a floating-point tensor, got {}" + WHERE + r": unwrap its output"
SHAPE = r"the teacher must return x's shape \(4, 3\), got \({}\)" + WHERE + r": drop extra channels"


def in_last_row(value: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.cat([x[:-1], x[-1:] * 0 + value])


OUTPUTS: list[tuple[str, Callable[[Tensor], Any], type[Exception], str]] = [
    ("nan", in_last_row(NAN), ValueError, FINITE),
    ("inf", in_last_row(INF), ValueError, FINITE),
    ("overflow", in_last_row(1e200), ValueError, FINITE),  # its square is infinite
    ("extra-channels", lambda x: torch.cat([x, x], 1), ValueError, SHAPE.format("4, 6")),
    ("broadcastable", lambda x: x[:, :1], ValueError, SHAPE.format("4, 1")),
    ("row-missing", lambda x: x[:1], ValueError, SHAPE.format("1, 3")),
    ("reduced", lambda x: x.sum(), ValueError, SHAPE.format("")),
    ("tuple", lambda x: (x, x), TypeError, RETURNS.format("tuple")),
    ("dict", lambda x: {"sample": x}, TypeError, RETURNS.format("dict")),
    ("none", lambda x: None, TypeError, RETURNS.format("NoneType")),
    ("integer", lambda x: x.long(), TypeError, RETURNS.format(r"torch\.int64")),
]


@pytest.mark.parametrize("l_method", ["stein", "hutchinson", "exact"])
@pytest.mark.parametrize(("output", "error", "match"), with_ids(OUTPUTS))
def test_bad_teacher_output_names_the_level_and_the_batch(
    l_method: str, output: Callable[[Tensor], Any], error: type[Exception], match: str
) -> None:
    # the pairs of the third batch come in one call of 4 rows; float64 so that 1e200 is a value
    data = [x.double() for x in (DATA[:4], DATA[4:8], DATA[8:10] + 100)]
    call = partial(estimate, spoil(output), data, num_samples=20, l_method=l_method)
    check_refused(call, error, match)


def off_the_levels(value: float) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.where(t == t.round(), 0.0, value)


@pytest.mark.parametrize(
    ("s_method", "offset"),
    [
        pytest.param("finite-difference", off_the_levels(NAN), id="nan-difference"),
        pytest.param("finite-difference", off_the_levels(INF), id="infinite-difference"),
        pytest.param("jvp", lambda t: (t - 1).abs().sqrt(), id="cusp"),
    ],
)
def test_a_derivative_that_is_not_finite_is_refused(s_method: str, offset: Callable[[Tensor], Tensor]) -> None:
    """D itself is finite at both levels, 2 and 1; its change along the ODE is not."""

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return x / 2 + offset(t)[:, None]

    call = partial(estimate, teacher, DATA.double(), LEVELS[:2], s_method=s_method)
    check_refused(call, ValueError, r"the teacher must return finite values, got NaN or infinity at noise level")
    assert estimate(teacher, DATA.double(), LEVELS[:2]).num_samples == 16  # the same teacher, without derivatives


def test_a_teacher_without_any_derivative_is_told_of_stein() -> None:
    @torch.no_grad()
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() / 2)  # out of torch's sight

    match = r"forward- or reverse-mode derivative in x, got neither.*use l_method='stein'"
    check_refused(lambda: estimate(teacher, l_method="hutchinson"), RuntimeError, match)


def test_a_teacher_that_detaches_its_input_is_refused_rather_than_given_l_zero() -> None:
    """Forward mode sees a constant; by Stein's identity l is 1/2."""
    call = partial(estimate, lambda x, t: x.detach() / 2, l_method="hutchinson")
    check_refused(call, RuntimeError, r"derivative in x, got neither.*use l_method='stein'")


def test_errors_inside_the_teacher_come_through_as_they_are() -> None:
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        raise KeyError("class_labels")

    check_refused(lambda: estimate(teacher), KeyError, r"class_labels")


@pytest.fixture(name="saved")
def saved_file(tmp_path: Path) -> Path:
    path = tmp_path / "teacher.safetensors"
    estimate(seed=1).save(path)
    return path


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("step", ["os.replace", "os.fsync", "analytic_precond._files.serialize"])
def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(
    saved: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = saved.read_bytes()
    statistics = estimate(seed=2)
    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="No space left"):
        statistics.save(saved)
    monkeypatch.undo()

    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]
    assert ap.TeacherStatistics.load(saved).header.seeds == (1,)


def test_saving_to_a_missing_folder_makes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "teacher.safetensors"
    match = rf"path must be in an existing folder, got {re.escape(str(path.parent))}: create it first"
    check_refused(lambda: estimate().save(path), FileNotFoundError, match)
    assert not path.parent.exists()


def test_saving_over_a_folder_keeps_it(tmp_path: Path) -> None:
    match = r"path must be a file, got the folder .*: add a file name"
    check_refused(lambda: estimate().save(tmp_path), ValueError, match)
    assert list(tmp_path.iterdir()) == []


def test_the_global_rng_is_restored_when_the_teacher_fails() -> None:
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        torch.rand(3)
        return x * NAN

    check_refused(lambda: estimate(teacher), ValueError, "finite")


def test_a_failed_loading_into_a_preconditioning_changes_nothing() -> None:
    precond = tables()
    before = precond(2.0, 0.5)
    with pytest.raises(RuntimeError, match="Missing key"):
        precond.load_state_dict({})
    assert precond(2.0, 0.5) == before
