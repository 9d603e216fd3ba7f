"""Per-sample Heun solutions against CTM's own solver, one sample at a time, and exact flows; evaluations counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from global_rng import global_rng_untouched
from hypothesis import given
from hypothesis import strategies as st
from problems import gaussian_problem
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.ode.solve import heun_solve, heun_solve_between, solve_ode

with np.load(GOLDEN_FILE) as golden:
    GOLDEN = {key: torch.from_numpy(golden[key]) for key in golden}

LEVELS = ap.karras_noise_levels(7)
TO_ZERO = torch.cat([LEVELS[:-1], torch.zeros(1, dtype=torch.float64)])


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Teacher(nn.Module):
    """A denoiser without symmetries that counts the samples of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[int] = []

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None, scale: Tensor | float = 1.0) -> Tensor:
        self.samples.append(len(x))
        shift = 0.0 if label is None else ap.expand_to(label.to(x.dtype), x)
        return scale * x / (1 + ap.expand_to(t, x) ** 2) + 0.1 * x.sin() + shift


def ctm_teacher(x: Tensor, t: Tensor) -> Tensor:
    """EDM's denoiser around the golden outputs' network, its coefficients in float32 as in the reference code."""
    t = ap.expand_to(t.float(), x)
    root = (t**2 + 0.25) ** 0.5
    x_in = 1 / root * x
    F = torch.sin(1.3 * x_in + 0.002 * (250 * (t + 1e-44).log())) + 0.25 * x_in
    return 0.25 / (t**2 + 0.25) * x + t * 0.5 / root * F


@pytest.mark.parametrize("steps", [1, 3])
def test_agrees_with_ctm(steps: int) -> None:
    x, start = GOLDEN["sony_heun_x"], GOLDEN["sony_heun_index"]
    result = heun_solve(ctm_teacher, x, GOLDEN["sony_times_18"], start, start + steps)
    # the reference code takes s - t in float32, to 6e-8
    torch.testing.assert_close(result, GOLDEN[f"sony_heun_{steps}_steps"], rtol=1e-8, atol=1e-8)


jumps = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted), max_size=9)


class TestOnAGrid:
    @given(jumps=jumps, to_zero=st.booleans())
    def test_same_as_one_sample_at_a_time(self, jumps: list[list[int]], to_zero: bool) -> None:
        levels = TO_ZERO if to_zero else LEVELS
        start, stop = torch.tensor(jumps, dtype=torch.int64).reshape(-1, 2).unbind(1)
        x = 80 * rand(len(jumps), 2, 3)
        teacher, alone = Teacher(), Teacher()

        result = heun_solve(teacher, x, levels, start, stop)
        for i, (first, last) in enumerate(jumps):
            expected = solve_ode(alone, x[i : i + 1], levels[first : last + 1]) if first < last else x[i : i + 1]
            # the same operations on a row; sines may be vectorised differently
            torch.testing.assert_close(result[i : i + 1], expected, rtol=1e-13, atol=1e-13)

        euler = sum(first < last == 6 for first, last in jumps) if to_zero else 0
        assert sum(teacher.samples) == 2 * int((stop - start).sum()) - euler == sum(alone.samples)
        longest = max((last - first for first, last in jumps), default=0)
        assert len(teacher.samples) <= 2 * longest + euler
        if not to_zero:
            assert len(teacher.samples) == 2 * longest

    def test_one_index_for_all(self) -> None:
        x, expected = rand(3, 2), solve_ode(Teacher(), rand(3, 2), LEVELS[1:5])
        for start, stop in ((1, 4), (torch.tensor(1), torch.tensor([4])), (torch.tensor([1, 1, 1]), 4)):
            assert torch.equal(heun_solve(Teacher(), x, LEVELS, start, stop), expected)
        assert torch.equal(heun_solve(Teacher(), x, LEVELS, torch.tensor([1, 1, 1], dtype=torch.int32), 4), expected)

    def test_no_way_no_call(self) -> None:
        x, teacher, index = rand(3, 2), Teacher(), torch.tensor([0, 3, 6])
        for levels in (LEVELS, TO_ZERO):
            assert torch.equal(heun_solve(teacher, x, levels, index, index), x)
        assert heun_solve(teacher, x[:0], LEVELS, 0, 3).shape == (0, 2)
        assert teacher.samples == []

    def test_converges_to_the_exact_flow(self) -> None:
        problem, levels = gaussian_problem(), ap.karras_noise_levels(401)
        x, start, stop = rand(3, 6), torch.tensor([0, 100, 390]), torch.tensor([400, 110, 400])
        result = heun_solve(problem.denoiser, x, levels, start, stop)
        t, s = levels[start], levels[stop]
        exact = torch.stack([problem.flow(x[i], t[i].item(), s[i].item()) for i in range(3)])
        torch.testing.assert_close(result, exact, rtol=1e-3, atol=0)  # a hundredth per step, squared, over 400 steps

    def test_differentiable(self) -> None:
        x, start, stop = rand(4, 2).requires_grad_(), torch.tensor([0, 2, 1, 3]), torch.tensor([1, 3, 1, 3])
        levels = f64(2.0, 1.0, 0.5, 0.2).requires_grad_()
        solve = lambda x, levels: heun_solve(Teacher(), x, levels, start, stop)  # noqa: E731
        assert torch.autograd.gradcheck(solve, (x, levels), check_forward_ad=True)

    def test_draws_no_random_numbers_and_keeps_its_input(self) -> None:
        x, start, stop = rand(3, 2), torch.tensor([2, 0, 1]), torch.tensor([3, 4, 1])
        with global_rng_untouched():
            heun_solve(Teacher(), x, LEVELS, start, stop)
        assert torch.equal(x, rand(3, 2))
        assert (start.tolist(), stop.tolist()) == ([2, 0, 1], [3, 4, 1])


class TestBetweenLevels:
    t, u = f64(80.0, 0.5, 2.0, 3.0), f64(0.002, 0.3, 2.0, 0.1)
    steps = torch.tensor([5, 1, 2, 9])

    def test_same_as_karras_grids_one_sample_at_a_time(self) -> None:
        x, teacher = rand(4, 2, 3), Teacher()
        result = heun_solve_between(teacher, x, self.t, self.u, self.steps)
        for i in (0, 1, 3):
            levels = ap.karras_noise_levels(int(self.steps[i]) + 1, self.u[i].item(), self.t[i].item())
            # levels by another formula
            torch.testing.assert_close(
                result[i : i + 1], solve_ode(Teacher(), x[i : i + 1], levels), rtol=1e-12, atol=0
            )
        assert torch.equal(result[2], x[2])
        assert sum(teacher.samples) == 2 * int(self.steps.sum())
        assert len(teacher.samples) == 2 * 9

    @pytest.mark.parametrize("rho", [0.5, 1.0, 7.0, 1e4])
    def test_order_two(self, rho: float) -> None:
        problem, x = gaussian_problem((1.0, 0.3)), rand(3, 2)
        t, u = f64(2.0, 1.5, 1.0), f64(1.0, 1.2, 0.5)
        exact = torch.stack([problem.flow(x[i], t[i].item(), u[i].item()) for i in range(3)])
        nums, errors = np.array([64, 128, 256]), []
        for num in nums:
            steps = torch.tensor([num, 2 * num, num])
            result = heun_solve_between(problem.denoiser, x, t, u, steps, rho=rho)
            errors.append((result - exact).square().mean().sqrt().item())
        # steps of up to 1 / 64: the next order has a few hundredths of the error
        assert -np.polyfit(np.log(nums), np.log(errors), 1)[0] == pytest.approx(2, abs=0.05)

    @pytest.mark.parametrize("rho", [1e-3, 1e6])
    def test_extreme_spacings(self, rho: float) -> None:
        x = rand(4, 2)
        result = heun_solve_between(lambda x, t: 0 * x, x, self.t, self.u, self.steps, rho=rho)
        # data 0: x / t stays what it is; a step from 80 to 0.002 multiplies rounding by (80 / 0.002)^2 = 2e9
        torch.testing.assert_close(result, (self.u / self.t)[:, None] * x, rtol=1e-6, atol=0)

    def test_ends_at_the_levels_asked_for(self) -> None:
        told: list[float] = []

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            told.extend(t.tolist())
            return 0 * x

        heun_solve_between(teacher, rand(1, 2), 0.7, 0.1, 3)
        assert (told[0], told[-1]) == (0.7, 0.1)
        assert told[1::2][:-1] == told[2::2]

    def test_forms_of_arguments(self) -> None:
        x = rand(3, 2)
        expected = heun_solve_between(Teacher(), x, f64(2.0, 2.0, 2.0), f64(0.5, 0.5, 0.5), torch.tensor([4, 4, 4]))
        assert torch.equal(heun_solve_between(Teacher(), x, 2.0, 0.5, 4), expected)
        assert torch.equal(heun_solve_between(Teacher(), x, f64(2.0), f64(0.5)[0], torch.tensor(4)), expected)
        assert heun_solve_between(Teacher(), x[:0], 2.0, 0.5, 4).shape == (0, 2)

    def test_differentiable(self) -> None:
        x, t, u = (v.requires_grad_() for v in (rand(3, 2), f64(2.0, 1.0, 0.5), f64(1.0, 0.2, 0.4)))
        solve = lambda *a: heun_solve_between(Teacher(), *a, torch.tensor([1, 3, 2]))  # noqa: E731
        assert torch.autograd.gradcheck(solve, (x, t, u), check_forward_ad=True)


@pytest.mark.parametrize(
    "solve",
    [
        lambda teacher, x, **options: heun_solve(teacher, x, LEVELS, STARTS, STOPS, **options),
        lambda teacher, x, **options: heun_solve_between(
            teacher, x, LEVELS[STARTS], LEVELS[STOPS] * 0.9, STOPS - STARTS, **options
        ),
    ],
    ids=["on a grid", "between levels"],
)
class TestBoth:
    x = rand(4, 2, 3)

    def test_conditions_follow_their_samples(self, solve: Callable[..., Tensor]) -> None:
        label, shared = torch.tensor([3, -1, 2, 5]), torch.tensor([[1.0, 0.5, 0.25]], dtype=torch.float64)
        result = solve(Teacher(), self.x, label=label, scale=shared)
        for i in range(4):
            bound = lambda x, t, i=i: Teacher()(x, t, label[i].expand(len(x)), shared)  # noqa: E731
            torch.testing.assert_close(result[i], solve(bound, self.x)[i], rtol=1e-12, atol=1e-12)

    def test_nested_conditions_follow_their_samples(self, solve: Callable[..., Tensor]) -> None:
        """In dicts, tuples, lists and arrays, beside what is common to all."""

        def teacher(x: Tensor, t: Tensor, cond: dict[str, Any], names: list[str], scale: np.ndarray) -> Tensor:
            label, (common, shift) = cond["label"], cond["pair"]
            assert len(label) == len(names) == len(scale) == len(shift) == len(x)
            assert common.shape == (3,)
            number = label + shift + torch.tensor([float(name) for name in names])
            return Teacher()(x, t, number, common * torch.from_numpy(scale)[:, None, None])

        def conditions(rows: slice) -> dict[str, Any]:
            label, shift = f64(3, -1, 2, 5), f64(0.1, 0.2, 0.3, 0.4)
            cond = {"label": label[rows], "pair": (f64(1.0, 0.5, 0.25), shift[rows])}
            return {"cond": cond, "names": ["6", "7", "8", "9"][rows], "scale": np.array([1.0, 2.0, 0.5, 0.25])[rows]}

        result = solve(teacher, self.x, **conditions(slice(0, 4)))
        for i in range(4):

            def bound(x: Tensor, t: Tensor, i: int = i) -> Tensor:
                own = conditions(slice(i, i + 1))
                return torch.cat([teacher(x[k : k + 1], t[k : k + 1], **own) for k in range(len(x))])

            torch.testing.assert_close(result[i], solve(bound, self.x)[i], rtol=1e-12, atol=1e-12)

    def test_guided(self, solve: Callable[..., Tensor]) -> None:
        label = torch.tensor([3, -1, 2, 5])
        result = solve(ap.guide(Teacher(), Teacher(), 2.0), self.x, label=label)
        guided = lambda x, t, label: Teacher()(x, t, 2 * label)  # noqa: E731 - the shift is linear in the label
        torch.testing.assert_close(result, solve(guided, self.x, label=label))

    @pytest.mark.parametrize("state", [torch.float64, torch.float32, None])
    @pytest.mark.parametrize("network", [torch.float32, torch.bfloat16])
    def test_dtypes(self, solve: Callable[..., Tensor], state: torch.dtype | None, network: torch.dtype) -> None:
        class Strict(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.ones(3, dtype=network))

            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                assert x.dtype == t.dtype == network
                return 0.5 * x * self.weight

        result = solve(Strict(), self.x.float(), dtype=state)
        assert result.dtype == (torch.float32 if state is None else state)
        assert torch.equal(result[STARTS == STOPS], self.x.float()[STARTS == STOPS].to(result.dtype))

    def test_wide_state(self, solve: Callable[..., Tensor]) -> None:
        x = self.x.float()
        zero = lambda x, t: 0 * x  # noqa: E731 - exact in any dtype
        exact, wide, narrow = solve(zero, x.double()), solve(zero, x, dtype=torch.float64), solve(zero, x)
        assert torch.equal(wide, exact)
        assert not torch.equal(narrow.double(), exact)


STARTS, STOPS = torch.tensor([0, 2, 1, 4]), torch.tensor([3, 3, 6, 6])


class TestBadInput:
    x = rand(2, 3)

    def refused(self, call: Callable[[Teacher], Any], error: type[Exception], match: str) -> None:
        teacher = Teacher()
        with pytest.raises(error, match=match):
            call(teacher)
        assert teacher.samples == []

    @pytest.mark.parametrize(
        ("start", "stop", "error", "match"),
        [
            (2, 1, ValueError, "start must be at most stop, .* got start 2 and stop 1 at position 0: swap them"),
            (torch.tensor([0, 3]), torch.tensor([1, 2]), ValueError, "got start 3 and stop 2 at position 1"),
            (-1, 2, ValueError, "start must be at least 0, got -1"),
            (torch.tensor([0, -1]), 2, ValueError, "start must be an index from 0 to 6, got -1 at position 1"),
            (0, 7, ValueError, "stop must be an index from 0 to 6, got 7 at position 0"),
            (0, torch.tensor([7, 6]), ValueError, "stop must be an index from 0 to 6, got 7 at position 0"),
            (0.0, 1, TypeError, r"start must be an int, got 0\.0"),
            (True, 1, TypeError, "start must be an int, got True"),
            (0, f64(1, 1), TypeError, r"stop must hold integers, got torch\.float64"),
            (torch.tensor([True, False]), 1, TypeError, r"start must hold integers, got torch\.bool"),
            (0, [1, 1], TypeError, r"stop must be an int, got \[1, 1\]"),
            (torch.tensor([0, 0, 0]), 1, ValueError, r"start must hold one integer per sample, shape \(2,\) .* \(3,\)"),
            (0, torch.tensor([[1, 1]]), ValueError, r"stop must hold one integer per sample, .* got shape \(1, 2\)"),
        ],
    )
    def test_indices(self, start: Any, stop: Any, error: type[Exception], match: str) -> None:
        self.refused(lambda D: heun_solve(D, self.x, LEVELS, start, stop), error, match)

    def test_levels(self) -> None:
        x = self.x
        self.refused(lambda D: heun_solve(D, x, LEVELS.flip(0), 0, 1), ValueError, "levels must be decreasing .* flip")
        self.refused(lambda D: heun_solve(D, x, LEVELS[:1], 0, 0), ValueError, "at least 2 noise levels")
        self.refused(lambda D: heun_solve(D, x, f64(), 0, 0), ValueError, "at least 2 noise levels")
        self.refused(lambda D: heun_solve(D, x, f64(3, 1, 2), 0, 1), ValueError, "got 1 then 2 at index 1")
        self.refused(lambda D: heun_solve(D, x, f64(1, 0, -1), 0, 1), ValueError, "only the last may be 0")
        self.refused(lambda D: heun_solve(D, x, [2.0, 1.0], 0, 1), TypeError, "levels must be a torch.Tensor")

    def test_data(self) -> None:
        self.refused(lambda D: heun_solve(D, self.x.int(), LEVELS, 0, 1), TypeError, "x must be a floating-point")
        self.refused(lambda D: heun_solve(D, self.x[0, 0], LEVELS, 0, 1), ValueError, "x must be a batch of shape")
        self.refused(lambda D: heun_solve(D, self.x, LEVELS, 0, 1, dtype=torch.long), TypeError, "dtype must be")
        with pytest.raises(ValueError, match=r"the teacher must return x's shape \(2, 3\), got \(1, 3\)"):
            heun_solve(lambda x, t: x[:1], self.x, LEVELS, 0, 1)
        with pytest.raises(TypeError, match="denoiser must be callable"):
            heun_solve(None, self.x, LEVELS, 0, 1)

    @pytest.mark.parametrize(
        ("t", "u", "num", "error", "match"),
        [
            (1.0, 2.0, 1, ValueError, "u must be at most t, got t = 1 and u = 2 at position 0"),
            (f64(3, 1), f64(2, 1.5), 1, ValueError, r"got t = 1 and u = 1\.5 at position 1"),
            (1.0, 0.0, 1, ValueError, "u must be finite and positive, got 0"),
            (math.inf, 1.0, 1, ValueError, "t must be finite and positive, got inf"),
            (math.nan, 1.0, 1, ValueError, "t must be finite and positive, got nan"),
            (-1.0, -2.0, 1, ValueError, "t must be finite and positive, got -1"),
            (2, 1.0, 1, TypeError, r"t must be a noise level .* got 2 \(int\): write 80\.0"),
            (2.0, torch.tensor([1, 1]), 1, TypeError, "u must be a floating-point tensor"),
            (f64(3, 2, 1), 1.0, 1, ValueError, "t must hold one noise level per sample"),
            (2.0, 1.0, 0, ValueError, "num_steps must be at least 1, got 0"),
            (2.0, 1.0, torch.tensor([3, 0]), ValueError, "num_steps must be at least 1, got 0 at position 1"),
            (2.0, 1.0, 1.0, TypeError, "num_steps must be an int"),
            (2.0, 1.0, f64(1, 1), TypeError, "num_steps must hold integers"),
            (2.0, 1.0, torch.tensor([1, 2, 3]), ValueError, "num_steps must hold one integer per sample"),
        ],
    )
    def test_between(self, t: Any, u: Any, num: Any, error: type[Exception], match: str) -> None:
        self.refused(lambda D: heun_solve_between(D, self.x, t, u, num), error, match)

    def test_rho(self) -> None:
        self.refused(lambda D: heun_solve_between(D, self.x, 2.0, 1.0, 2, rho=0.0), ValueError, "rho must be positive")
        self.refused(lambda D: heun_solve_between(D, self.x, 2.0, 1.0, 2, rho="7"), TypeError, "rho must be a number")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestCuda:
    x = rand(4, 2).float()

    @pytest.mark.parametrize("where", ["cpu", "cuda"])
    def test_same_as_on_the_cpu(self, where: str) -> None:
        label = torch.tensor([3, -1, 2, 5])
        expected = heun_solve(Teacher(), self.x, LEVELS, STARTS, STOPS, label=label)
        arguments = (v.to(where) for v in (LEVELS, STARTS, STOPS))
        got = heun_solve(Teacher(), self.x.cuda(), *arguments, label=label.cuda())
        torch.testing.assert_close(got.cpu(), expected)

        t, u, steps = LEVELS[STARTS], LEVELS[STOPS], STOPS - STARTS
        expected = heun_solve_between(Teacher(), self.x, t, u, steps)
        got = heun_solve_between(Teacher(), self.x.cuda(), *(v.to(where) for v in (t, u, steps)))
        torch.testing.assert_close(got.cpu(), expected)

    def test_unreadable_levels_give_nan(self) -> None:
        t, u = f64(2.0, 1.0, 1.0, 1.0).cuda(), f64(1.0, 2.0, -1.0, 1.0).cuda()
        got = heun_solve_between(Teacher(), self.x.cuda(), t, u, 2)
        assert got.isnan().any(1).tolist() == [False, True, True, False]
