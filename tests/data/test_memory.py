"""Batches cut or shared in any way: the same numbers, the same passes, nothing lost where memory runs out."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, fx
from torch.utils.data import TensorDataset

import analytic_precond as ap
from analytic_precond._conditions import rows_of
from analytic_precond.data.memory import Pieces, is_out_of_memory
from analytic_precond.fitted_preconditionings import trajectory_moments

LEVELS = torch.tensor([2.0, 1.0, 0.5, 0.2, 0.1, 0.05, 0.02], dtype=torch.float64)
LABELS = torch.arange(24)
NUMBERED = LABELS[:, None] + torch.tensor([0.0, 0.1, -0.1], dtype=torch.float64)  # sample i is around the number i
DATA = (NUMBERED - 11.5) / 10
# float64 sums in another order; s and the standard errors, differences of nearly equal numbers, lose most
ROUNDING = 1e-9


def smooth(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear denoiser whose remainder is large at all levels."""
    return (2 * x).sin() / (1 + ap.expand_to(t, x))


def estimate(denoiser: Any = smooth, data: object = DATA, **options: Any) -> ap.TeacherStatistics:
    return ap.estimate_statistics(denoiser, data, **{"levels": LEVELS, "num_samples": 96, "progress": False, **options})


def assert_same(a: ap.TeacherStatistics, b: ap.TeacherStatistics) -> None:
    assert a.num_samples == b.num_samples
    for name in ("l", "l_stderr", "g_rms", "g_rms_stderr", "s", "s_stderr"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=ROUNDING, atol=0, msg=name)


def cpu_error() -> RuntimeError:
    with pytest.raises(RuntimeError) as info:
        torch.empty(2**52)  # 16 PB
    return info.value


ERRORS: dict[str, Callable[[], BaseException]] = {
    "cuda": lambda: torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": cpu_error,
    "mps": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)."),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
}


class Small:
    """A teacher whose memory holds a few rows only. It counts what it has answered, and what it has refused."""

    def __init__(self, most: int, error: Callable[[], BaseException] = ERRORS["cuda"]) -> None:
        self.most, self.error = most, error
        self.sizes: list[int] = []
        self.refused: list[int] = []
        self.rows = Counter[float]()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if len(x) > self.most:
            self.refused.append(len(x))
            raise self.error()
        self.sizes.append(len(x))
        self.rows.update(t.tolist())
        return smooth(x, t)


class TestOutOfMemory:
    @pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
    def test_is_known_on_every_device(self, error: Callable[[], BaseException]) -> None:
        assert is_out_of_memory(error())
        teacher = Small(50, error)
        assert_same(estimate(teacher, batch_size="auto"), estimate())
        assert teacher.refused

    @pytest.mark.parametrize(
        "error", [RuntimeError("expected scalar type Half"), ValueError("out of memory"), KeyError()]
    )
    def test_is_told_from_other_errors(self, error: Exception) -> None:
        assert not is_out_of_memory(error)
        calls = []

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            calls.append(len(x))
            raise error

        with pytest.raises(type(error)) as info:
            estimate(teacher, batch_size="auto")
        assert info.value is error
        assert len(calls) == 1

    @pytest.mark.parametrize(("most", "intercept"), [(255, False), (100, True), (32, False), (5, True)])
    def test_halves_the_batch_for_good_and_loses_nothing(self, most: int, intercept: bool) -> None:
        data = torch.cat([DATA + 0.01 * i for i in range(12)])
        teacher = Small(most)
        options = {"num_samples": 560, "intercept": intercept}
        assert_same(estimate(teacher, data, batch_size="auto", **options), estimate(data=data, **options))

        assert teacher.refused == [256 >> i for i in range(math.ceil(math.log2(256 / most)))]
        assert max(teacher.sizes) == 256 >> len(teacher.refused)
        assert teacher.rows == dict.fromkeys(LEVELS.tolist(), 560)  # each sample once at each level

    @pytest.mark.parametrize(
        "options",
        [{"l_method": "hutchinson"}, {"l_method": "exact"}, {"s_method": "jvp"}, {"s_method": "finite-difference"}],
        ids=lambda options: next(iter(options.values())),
    )
    def test_halves_the_batch_of_every_estimator(self, options: dict[str, str]) -> None:
        teacher = Small(10)
        assert_same(estimate(teacher, batch_size="auto", **options), estimate(**options))
        assert len(teacher.refused) == 5  # 48 rows at 256, 128 and 64, then 32 and 16

    def test_may_come_at_any_time(self) -> None:
        """Memory that other programs share."""
        calls = itertools.count()

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            if next(calls) in (5, 6, 20, 33):
                raise torch.cuda.OutOfMemoryError
            return smooth(x, t)

        assert_same(estimate(teacher, batch_size="auto", num_samples=960), estimate(num_samples=960))

    @pytest.mark.parametrize(
        "error",
        [pytest.param(error, id=name, marks=[pytest.mark.long] * (name != "cuda")) for name, error in ERRORS.items()],
    )
    def test_on_one_sample_is_said_with_the_level(self, error: Callable[[], BaseException]) -> None:
        teacher = Small(0, error)
        match = r"one sample, got too little at noise levels 2 to .*batch 0: free some.*It said: .*(?i:alloc)"
        with pytest.raises(torch.cuda.OutOfMemoryError, match=match) as info:
            estimate(teacher, batch_size="auto")
        assert teacher.refused[-1] == 1
        assert is_out_of_memory(info.value.__cause__)

    @pytest.mark.parametrize("options", [{}, {"l_method": "hutchinson"}, {"l_method": "exact"}, {"s_method": "jvp"}])
    @pytest.mark.parametrize("name", ["cuda", "cpu"])
    def test_comes_as_it_is_where_the_batch_size_is_a_number(self, name: str, options: dict[str, str]) -> None:
        """And is not taken for a layer without a forward mode."""
        error = ERRORS[name]()
        teacher = Small(10, lambda: error)
        with pytest.raises(RuntimeError) as info:
            estimate(teacher, batch_size=32, **options)
        assert info.value is error
        assert len(teacher.refused) == 1

    def test_does_not_skip_the_check_of_reverse_mode(self) -> None:
        """A teacher without forward mode, part of it hidden from autograd; memory runs out during the comparison."""
        calls = itertools.count()

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            if next(calls) == 1 and len(x) > 20:
                raise torch.cuda.OutOfMemoryError
            return Backward.apply(x) - 0.9 * x.detach()

        with pytest.raises(RuntimeError, match="expected gradients through the whole teacher"):
            estimate(teacher, batch_size="auto", l_method="hutchinson")
        assert next(calls) > 4

    def test_memory_of_the_failed_call_is_free_before_the_next(self) -> None:
        left: list[weakref.ref[Tensor]] = []

        def work(piece: slice) -> int:
            assert all(ref() is None for ref in left)
            activations = torch.zeros(8)
            left.append(weakref.ref(activations))
            if piece.stop - piece.start > 16:
                try:
                    raise torch.cuda.OutOfMemoryError
                except RuntimeError as error:
                    raise RuntimeError("a layer: out of memory") from error
            return piece.stop - piece.start

        assert [size for _, size in Pieces("auto")(70, work, "")] == [16, 16, 16, 16, 6]


class Backward(torch.autograd.Function):
    """The identity, with a backward formula only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Recorder:
    """A teacher that remembers its calls."""

    def __init__(self) -> None:
        self.levels: list[list[float]] = []
        self.sizes: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        self.levels.append(t.unique().flip(0).tolist())
        self.sizes.append(len(x))
        return smooth(x, t)


class TestLevelsShareCalls:
    @pytest.mark.parametrize(
        ("pairs", "batch_size", "sizes", "levels"),
        [
            (8, 64, [64, 48], [4, 3]),
            (8, 32, [32, 32, 32, 16], [2, 2, 2, 1]),
            (8, 16, [16] * 7, [1] * 7),  # both halves of the pairs
            (8, 15, [15, 1] * 7, [1] * 14),
            (8, 8, [8] * 14, [1] * 14),
            (20, 8, [8] * 28 + [8] * 7, [1] * 35),  # batches of 8, 8 and 4
            (1, 256, [14], [7]),
            (12, "auto", [168], [7]),
        ],
    )
    def test_as_many_as_fit(self, pairs: int, batch_size: Any, sizes: list[int], levels: list[int]) -> None:
        teacher = Recorder()
        options = {"num_samples": 2 * pairs, "levels": LEVELS}
        assert_same(estimate(teacher, batch_size=batch_size, **options), estimate(batch_size=1, **options))
        assert teacher.sizes == sizes
        assert [len(call) for call in teacher.levels] == levels

    @pytest.mark.parametrize("s_method", ["jvp", "finite-difference"])
    def test_with_derivatives_along_the_ode(self, s_method: str) -> None:
        few, many = (estimate(num_samples=16, s_method=s_method, batch_size=size) for size in (1, 64))
        assert_same(few, many)

    def test_not_where_the_jacobian_is_probed(self) -> None:
        """Its check against a difference says most at one level, the noisiest."""
        seen = []

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            seen.append(bool((t == t[0]).all()))
            return smooth(x, t)

        estimate(teacher, num_samples=16, l_method="hutchinson")
        assert seen == [True] * len(LEVELS)

    def test_the_intercept_is_the_same(self) -> None:
        few, many = (estimate(num_samples=40, intercept=True, batch_size=size) for size in (1, 256))
        assert_same(few, many)
        torch.testing.assert_close(few.intercept, many.intercept, rtol=0, atol=1e-12)

    def test_errors_say_which(self) -> None:
        with pytest.raises(ValueError, match=r"at noise levels 2 to 0\.2 \(indices 0 to 3\), batch 0"):
            estimate(lambda x, t: x[:1], num_samples=16, batch_size=64)

    def test_a_value_that_is_not_finite_is_found_at_its_own(self) -> None:
        def teacher(x: Tensor, t: Tensor) -> Tensor:
            return torch.where(ap.expand_to(t, x) == 0.1, torch.nan, x)

        with pytest.raises(ValueError, match=r"at noise level 0\.1 \(index 4\), batch 0, sample 0"):
            estimate(teacher, num_samples=16, batch_size=64)


class Named(NamedTuple):
    text: list[str]
    pooled: Tensor


class TestConditions:
    @pytest.mark.parametrize("batch_size", [1, 5, 24, 48, 200, "auto"])
    def test_stay_with_their_samples(self, batch_size: Any) -> None:
        """In whatever form, and whether a call holds half a pair or several levels."""

        def condition(label: Tensor) -> dict[str, Any]:
            names = [f"class {i}" for i in label.tolist()]
            added = {"time_ids": label[:, None].expand(-1, 6), "names": names}
            return {"label": label, "array": label.numpy(), "added": added, "pair": (label, names), "scale": 2.0}

        def teacher(x: Tensor, t: Tensor, **seen: Any) -> Tensor:
            expected = x[:, 0].round().long().tolist()
            names = [f"class {i}" for i in expected]
            assert seen["label"].tolist() == seen["array"].tolist() == seen["pair"][0].tolist() == expected
            assert seen["added"]["time_ids"][:, 5].tolist() == expected
            assert seen["added"]["names"] == seen["pair"][1] == names
            assert seen["scale"] == 2.0
            return smooth(x, t)

        data, levels = TensorDataset(NUMBERED, LABELS), LEVELS / 100  # 50 standard deviations to the next number
        options = {"batch_size": batch_size, "condition": condition, "levels": levels}
        assert estimate(teacher, data, **options).num_samples == 96

    def test_what_is_common_to_all_comes_whole(self) -> None:
        common = {"prompt": "a", "guidance": 3.0, "scalar": torch.tensor(2.0), "one": torch.ones(1, 4), "none": None}
        rows = rows_of(common, torch.tensor([0, 0, 1, 1, 2, 2]), 3)
        assert rows.keys() == common.keys()
        assert all(rows[name] is value for name, value in common.items())

    def test_keep_their_types(self) -> None:
        index = torch.tensor([1, 1, 0])
        rows = rows_of(Named(["a", "b"], torch.tensor([[1.0], [2.0]])), index, 2)
        assert isinstance(rows, Named)
        assert rows.text == ["b", "b", "a"]
        assert rows.pooled.flatten().tolist() == [2.0, 2.0, 1.0]
        assert np.array_equal(rows_of(np.array([5, 7]), index, 2), [7, 7, 5])
        # one tensor of its own length for each sample: token embeddings
        tokens = [torch.zeros(3), torch.zeros(7)]
        assert [len(part) for part in rows_of(tokens, index, 2)] == [7, 7, 3]


class TestTrajectories:
    """The least-squares fits, which follow the teacher's ODE."""

    @staticmethod
    def fit(denoiser: Any, batch_size: Any, **options: Any) -> ap.LeastSquaresPreconditioning:
        levels = torch.tensor([2.0, 1.0, 0.5])
        options = {"levels": levels, "num_trajectories": 60, "progress": False, "batch_size": batch_size, **options}
        return ap.LeastSquaresPreconditioning.fit(denoiser, DATA, **options)

    def assert_same(self, a: ap.LeastSquaresPreconditioning, b: ap.LeastSquaresPreconditioning) -> None:
        t, s = torch.tensor([2.0, 2.0, 1.0]).double(), torch.tensor([1.0, 0.5, 0.5]).double()
        for ours, theirs in zip((*a(t, s), *a.standard_errors), (*b(t, s), *b.standard_errors), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=ROUNDING, atol=1e-12)

    def test_auto_halves_the_batch(self) -> None:
        teacher = Small(10)
        self.assert_same(self.fit(teacher, "auto"), self.fit(smooth, 60))
        assert teacher.refused == [24, 24, 24, 24, 16]  # at 256, 128, 64, 32 and 16

    def test_nothing_is_counted_twice_where_memory_runs_out_in_the_sums(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected, products, calls = self.fit(smooth, 60), trajectory_moments._products, itertools.count()

        def crowded(x: Tensor, E: Tensor) -> Any:
            if next(calls) == 3:  # blocks before it are done
                raise torch.cuda.OutOfMemoryError
            return products(x, E)

        monkeypatch.setattr(trajectory_moments, "_products", crowded)
        self.assert_same(self.fit(smooth, "auto"), expected)

    def test_the_bar_ends_at_its_end(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.fit(Small(10), "auto", progress=True)
        assert "100%" in capsys.readouterr().err


class Counting:
    """A compiler that runs a graph as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.mark.parametrize("batch_size", [16, 64, "auto"])
def test_a_compiled_teacher_is_compiled_twice_at_most(batch_size: Any) -> None:
    """Once for the first shape, once for any number of rows: batches of 10, 10 and 4 in calls of many sizes."""
    torch.compiler.reset()
    backend = Counting()
    compiled = torch.compile(smooth, backend=backend)
    data = list(DATA.split(10))
    assert_same(estimate(compiled, data, batch_size=batch_size), estimate(data=data, batch_size=1))
    assert 1 <= backend.count <= 2
    torch.compiler.reset()
