"""Steps and solutions of the teacher's ODE against exact flows, EDM's own sampler and closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from global_rng import global_rng_untouched
from problems import gaussian_problem, mixture_problem
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.ode.solve import solve_ode
from analytic_precond.ode.steps import euler_step, heun_step, probability_flow_velocity
from analytic_precond.testing import MixtureProblem

with np.load(GOLDEN_FILE) as golden:
    LATENTS, EDM_RESULT = (torch.from_numpy(golden[f"edm_heun_18_{key}"]) for key in ("latents", "result"))

STEPS = {"euler": euler_step, "heun": heun_step}
Step = Callable[..., Tensor]
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Teacher(nn.Module):
    """A denoiser without symmetries that counts its calls and insists on the dtype of its parameters, if it has any."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.variance = 0.25 if dtype is None else nn.Parameter(torch.tensor(0.25, dtype=dtype))
        self.seen: list[tuple[torch.dtype, torch.dtype, int]] = []

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | float = 0.0) -> Tensor:
        self.seen.append((x.dtype, t.dtype, len(x)))
        if isinstance(self.variance, Tensor):
            assert x.dtype == t.dtype == self.variance.dtype
        assert t.shape == x.shape[:1]
        return self.variance / (self.variance + ap.expand_to(t, x) ** 2) * x + 0.3 * x.sin() + shift


def mixture_flow(mixture: MixtureProblem, x_t: Tensor, t: float, s: float) -> Tensor:
    """The exact flow in one dimension: a point keeps its quantile. By bisection on scipy's normal distribution."""

    def cdf(x: float, level: float) -> float:
        sd = np.sqrt(np.asarray(mixture.variances) + level**2)
        return float((np.asarray(mixture.weights) * norm.cdf((x - np.asarray(mixture.means)) / sd)).sum())

    bound = 20 * (1 + max(s, t))
    quantiles = [cdf(x, t) for x in x_t.flatten().tolist()]
    exact = [brentq(lambda x, q=q: cdf(x, s) - q, -bound, bound, xtol=1e-13) for q in quantiles]
    return f64(*exact).reshape(x_t.shape)


class TestVelocity:
    def test_of_a_gaussian(self) -> None:
        problem, x, t = gaussian_problem(), rand(3, 6), f64(0.01, 1.0, 50.0)
        c = problem.variances
        expected = t[:, None] * x / (c + t[:, None] ** 2)
        # x - D loses c / t^2 digits at the smallest level
        torch.testing.assert_close(probability_flow_velocity(problem.denoiser, x, t), expected, rtol=1e-10, atol=0)

    def test_is_minus_t_times_the_score(self) -> None:
        mixture, t = mixture_problem(), 0.4
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_()
        m, c, p = (v[:, None] for v in (mixture.means, mixture.variances, mixture.weights))
        density = (p * torch.distributions.Normal(m, (c + t**2).sqrt()).log_prob(x).exp()).sum(0)
        (score,) = torch.autograd.grad(density.log().sum(), x)
        velocity = probability_flow_velocity(mixture.denoiser, x.detach()[:, None], t)
        torch.testing.assert_close(velocity[:, 0], -t * score)


class TestOrder:
    """Halving the steps divides the error by 2 (Euler) or 4 (Heun), in both directions."""

    NUMS = (64, 128, 256)

    def fitted_order(
        self, flow: Callable[[Tensor, float, float], Tensor], solve: Any, x: Tensor, t: float, s: float
    ) -> float:
        exact = flow(x, t, s)
        errors = [(solve(x, n) - exact).square().mean().sqrt().item() for n in self.NUMS]
        assert errors[-1] < 0.03 * exact.square().mean().sqrt().item()
        return float(-np.polyfit(np.log(self.NUMS), np.log(errors), 1)[0])

    @pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2)])
    @pytest.mark.parametrize(("t", "s"), [(5.0, 0.05), (0.05, 5.0)], ids=["to data", "to noise"])
    @pytest.mark.parametrize("problem", ["gaussian", "mixture"])
    def test_of_solutions(self, problem: str, method: str, order: int, t: float, s: float) -> None:
        def solve(x: Tensor, num: int) -> Tensor:
            levels = ap.log_noise_levels(num + 1, min(s, t), max(s, t))
            return solve_ode(denoiser, x, levels if s < t else levels.flip(0), method)

        if problem == "gaussian":
            denoiser, flow = gaussian_problem().denoiser, gaussian_problem().flow
            x = gaussian_problem().flow(rand(8, 6), 1.0, t)
        else:
            mixture = mixture_problem()
            denoiser = mixture.denoiser
            flow = lambda x, t, s: mixture_flow(mixture, x, t, s)  # noqa: E731
            x = mixture.sample(16, seed=0) + t * rand(16, 1)
        # the next order has ln(100) / 64 = 0.07 of the error at 64 steps and a quarter of that at 256
        assert self.fitted_order(flow, solve, x, t, s) == pytest.approx(order, abs=0.05)

    @pytest.mark.parametrize(("method", "order"), [("euler", 2), ("heun", 3)])
    @pytest.mark.parametrize("sign", [1, -1])
    def test_of_the_local_error(self, method: str, order: int, sign: int) -> None:
        mixture, x = mixture_problem(), torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None]
        steps = np.array([0.04, 0.02, 0.01])
        errors = []
        for h in steps:
            s = 0.5 + sign * h
            x_s = STEPS[method](mixture.denoiser, x, 0.5, s)
            errors.append((x_s - mixture_flow(mixture, x, 0.5, s)).abs().max().item())
        # the next order has about h / t of the error, 0.08 to 0.02
        assert np.polyfit(np.log(steps), np.log(errors), 1)[0] == pytest.approx(order, abs=0.1)


class TestSteps:
    def test_euler_by_hand(self) -> None:
        x, t, s = rand(2, 3), f64(2.0, 0.5), f64(0.5, 3.0)
        D = Teacher()(x, t)
        expected = (s / t)[:, None] * x + (1 - s / t)[:, None] * D  # CTM's form of the same step
        torch.testing.assert_close(euler_step(Teacher(), x, t, s), expected)

    def test_heun_is_exact_for_a_quadratic_velocity(self) -> None:
        # D = x - t (1 + t): dx/dt = 1 + t, which the trapezoidal rule integrates exactly
        teacher = lambda x, t: x - ap.expand_to(t * (1 + t), x)  # noqa: E731
        x, t, s = rand(2, 3), f64(2.0, 0.5), f64(0.5, 3.0)
        expected = x + ((s - t) + (s**2 - t**2) / 2)[:, None]
        torch.testing.assert_close(heun_step(teacher, x, t, s), expected)

    @each_step
    def test_same_level_changes_nothing(self, step: Step) -> None:
        x, t = rand(3, 4), f64(0.002, 1.0, 80.0)
        assert torch.equal(step(Teacher(), x, t, t), x)

    @each_step
    def test_to_zero_is_the_denoiser(self, step: Step) -> None:
        x, t = rand(2, 4), f64(0.002, 80.0)
        # x + (0 - t) (x - D) / t
        torch.testing.assert_close(step(Teacher(), x, t, 0.0), Teacher()(x, t), rtol=0, atol=1e-14)

    def test_zero_and_positive_targets_in_one_batch(self) -> None:
        x, t, s = rand(3, 2), f64(1.0, 2.0, 3.0), f64(0.0, 1.0, 0.0)
        x_s = heun_step(Teacher(), x, t, s)
        assert torch.equal(x_s[[0, 2]], euler_step(Teacher(), x, t, s)[[0, 2]])
        assert torch.equal(x_s[1:2], heun_step(Teacher(), x[1:2], 2.0, 1.0))

    @each_step
    def test_every_form_of_levels(self, step: Step) -> None:
        x = rand(2, 3, 4)
        expected = step(Teacher(), x, f64(2.0, 2.0), f64(1.0, 1.0))
        for t, s in ((2.0, 1.0), (f64(2.0), f64(1.0)), (f64(2.0)[0], f64(1.0)[0]), (f64(2.0, 2.0)[:, None, None], 1.0)):
            assert torch.equal(step(Teacher(), x, t, s), expected)
        assert torch.equal(step(Teacher(), x[:, 0, 0], 2.0, 1.0), expected[:, 0, 0])  # x of shape (B,)
        assert step(Teacher(), x[:0], 2.0, 1.0).shape == (0, 3, 4)

    @each_step
    def test_teacher_may_overwrite_its_input_and_output(self, step: Step) -> None:
        buffer = torch.empty(3, 2, dtype=torch.float64)

        def careless(x: Tensor, t: Tensor) -> Tensor:
            buffer.copy_(x.mul_(0.5).sin_().mul_(t.mul_(2.0)[:, None]))
            return buffer

        x, t = rand(3, 2), f64(1.0, 2.0, 0.5)
        expected = step(lambda x, t: (0.5 * x).sin() * (2 * t)[:, None], x, t, 0.3)
        assert torch.equal(step(careless, x, t, 0.3), expected)
        assert torch.equal(x, rand(3, 2))
        assert torch.equal(t, f64(1.0, 2.0, 0.5))

    @each_step
    def test_differentiable(self, step: Step) -> None:
        x, t, s = (v.requires_grad_() for v in (rand(3, 2), f64(1.0, 2.0, 0.5), f64(0.5, 3.0, 0.1)))
        assert torch.autograd.gradcheck(lambda *a: step(Teacher(), *a), (x, t, s), check_forward_ad=True)
        to_zero = s.detach() * f64(1, 1, 0)
        assert torch.autograd.gradcheck(lambda x, t: step(Teacher(), x, t, to_zero), (x, t), check_forward_ad=True)

    @each_step
    def test_traceable(self, step: Step) -> None:
        teacher = gaussian_problem().denoiser
        x, t, s = rand(3, 6), f64(1.0, 2.0, 0.5), f64(0.5, 3.0, 0.0)
        compiled = torch.compile(lambda *a: step(teacher, *a), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x, t, s), step(teacher, x, t, s), rtol=0, atol=0)
        # where levels cannot be read, those out of range spoil their own sample only
        assert compiled(x, -t, s).isnan().all()
        assert compiled(x, t, f64(0.5, -1.0, 0.0)).isnan().any(1).tolist() == [False, True, False]
        batches = torch.stack([x, 2 * x])
        both = torch.vmap(lambda x: step(teacher, x, t, s))(batches)
        torch.testing.assert_close(both, torch.stack([step(teacher, x, t, s) for x in batches]))
        levels = torch.stack([t, 2 * t])
        both = torch.vmap(lambda t: step(teacher, x, t, s))(levels)
        torch.testing.assert_close(both, torch.stack([step(teacher, x, t, s) for t in levels]))


class TestSolve:
    def test_agrees_with_edm_sampler(self) -> None:
        """The teacher is EDM's denoiser around the golden outputs' network (conditioned on 250 ln t)."""
        edm = ap.EDMPreconditioning()
        scalings = lambda t: (*edm(t)[:3], 250 * t.log())  # noqa: E731
        F = lambda x, tau: torch.sin(1.3 * x + 0.002 * ap.expand_to(tau, x)) + 0.25 * x  # noqa: E731
        levels = ap.preset("edm").sampling_levels(18)
        result = solve_ode(ap.NetworkDenoiser(F, scalings), LATENTS * levels[0], levels)
        # float64 on both sides, 35 teacher calls on data of size 200 down to 2
        torch.testing.assert_close(result, EDM_RESULT, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("levels", [[4.0, 2.0, 1.0, 0.3], [0.3, 1.0, 4.0], [4.0, 1.0, 0.0], [1.0, 0.0]])
    @pytest.mark.parametrize("method", STEPS)
    def test_is_a_chain_of_steps(self, levels: list[float], method: str) -> None:
        x = rand(2, 3)
        states = [x]
        for t, s in pairwise(levels):
            states.append(STEPS[method](Teacher(), states[-1], t, s))

        teacher = Teacher()
        trajectory = solve_ode(teacher, x, f64(*levels), method, trajectory=True)
        torch.testing.assert_close(trajectory, torch.stack(states))
        assert torch.equal(trajectory[0], x)
        assert torch.equal(solve_ode(Teacher(), x, f64(*levels), method), trajectory[-1])
        corrections = sum(s > 0 for s in levels[1:]) if method == "heun" else 0
        assert len(teacher.seen) == len(levels) - 1 + corrections

    def test_there_and_back(self) -> None:
        problem, levels = gaussian_problem(), ap.karras_noise_levels(400)
        x = problem.sample(16, seed=0)
        noise = solve_ode(problem.denoiser, x, levels.flip(0))
        torch.testing.assert_close(noise, problem.flow(x, 0.002, 80.0), rtol=1e-3, atol=0)  # (7 ln(4e4) / 400)^2 / 12
        # Heun's error is odd under reversal up to the next order: it cancels
        torch.testing.assert_close(solve_ode(problem.denoiser, noise, levels), x, rtol=1e-5, atol=0)

    def test_differentiable(self) -> None:
        levels = f64(2.0, 1.0, 0.5, 0.0).requires_grad_()
        x = rand(2, 2).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, levels: solve_ode(Teacher(), x, levels), (x, levels[:3].detach()))
        grid = levels[:3].detach().requires_grad_()
        assert torch.autograd.gradcheck(lambda grid: solve_ode(Teacher(), x, grid), (grid,))

    def test_progress_only_on_request(self, capsys: pytest.CaptureFixture[str]) -> None:
        solve_ode(Teacher(), rand(1, 2), f64(2.0, 1.0))
        assert capsys.readouterr() == ("", "")
        solve_ode(Teacher(), rand(1, 2), f64(2.0, 1.0), progress=True)
        assert "1/1" in capsys.readouterr().err

    def test_draws_no_random_numbers(self) -> None:
        with global_rng_untouched():
            solve_ode(Teacher(), torch.ones(1, 2), f64(2.0, 1.0, 0.0))

    def test_empty_batch(self) -> None:
        assert solve_ode(Teacher(), rand(0, 3), f64(2.0, 1.0), trajectory=True).shape == (2, 0, 3)


class TestConditions:
    x, t = rand(3, 2), f64(2.0, 1.0, 0.5)

    def test_reach_every_call(self) -> None:
        shift = rand(3, 1, seed=1)
        bound = lambda x, t: Teacher()(x, t, shift)  # noqa: E731
        for function, *rest in (
            (probability_flow_velocity, self.t),
            (euler_step, self.t, 0.1),
            (heun_step, self.t, 0.1),
            (solve_ode, f64(2.0, 1.0, 0.1)),
        ):
            assert torch.equal(function(Teacher(), self.x, *rest, shift=shift), function(bound, self.x, *rest))

    def test_guided(self) -> None:
        levels = f64(3.0, 1.0, 0.2)
        shift = rand(3, 1, seed=1)
        guided = lambda x, t: Teacher()(x, t) + 2.5 * (Teacher()(x, t, shift) - Teacher()(x, t))  # noqa: E731
        result = solve_ode(ap.guide(Teacher(), Teacher(), 2.5), self.x, levels, shift=shift)
        torch.testing.assert_close(result, solve_ode(guided, self.x, levels))


class TestDtypes:
    levels = ap.karras_noise_levels(12)

    @pytest.mark.parametrize("network", [torch.float64, torch.float32, torch.bfloat16, None])
    @pytest.mark.parametrize("data", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("state", [torch.float64, torch.float32, None])
    def test_teacher_gets_its_own(
        self, network: torch.dtype | None, data: torch.dtype, state: torch.dtype | None
    ) -> None:
        teacher = Teacher(network)
        x = solve_ode(teacher, rand(2, 3).to(data), self.levels, dtype=state)
        assert x.dtype == (data if state is None else state)
        assert x.isfinite().all()
        own = data if network is None else network
        assert teacher.seen == 22 * [(own, own, 2)]
        for step in STEPS.values():
            assert step(teacher, rand(2, 3).to(data), 2.0, 1.0).dtype == data
        assert probability_flow_velocity(teacher, rand(2, 3).to(data), 2.0).dtype == data

    def test_adapted_networks_get_at_least_float32(self) -> None:
        seen: list[torch.dtype] = []

        class Recorder(ap.NetworkDenoiser):
            def forward(self, x: Tensor, t: Tensor, /, **condition: Any) -> Tensor:
                seen.append(x.dtype)
                return super().forward(x, t, **condition)

        class Network(nn.Linear):
            def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
                return super().forward(x)

        denoiser = Recorder(Network(3, 3).half().requires_grad_(False), ap.EDMPreconditioning())
        for teacher in (denoiser, ap.guide(denoiser, denoiser, 2.0), torch.compile(denoiser, backend="eager")):
            for data, handed in ((torch.float16, torch.float32), (torch.float64, torch.float64)):
                seen.clear()
                assert heun_step(teacher, rand(2, 3).to(data), 2.0, 1.0).dtype == data
                assert set(seen) == {handed}

    def test_wide_state_saves_what_rounding_loses(self) -> None:
        """A thousand steps: of float32 rounding only the teacher's is left, which shrinks with the steps."""
        levels, x = ap.karras_noise_levels(1000), 80 * rand(64, 6).float()
        exact = solve_ode(gaussian_problem().denoiser, x.double(), levels)
        narrow, wide = (solve_ode(gaussian_problem().denoiser, x, levels, dtype=d) for d in (None, torch.float64))
        error = [(result - exact).abs().max().item() for result in (narrow, wide)]
        assert error[1] < error[0] / 30

    @each_step
    def test_half_precision_steps_are_computed_in_float32(self, step: Step) -> None:
        # data 0: x_s = x s / t; in float16 the sum of two velocities of 40000 would overflow
        x = torch.tensor([[40000.0]], dtype=torch.float16)
        assert step(lambda x, t: 0 * x, x, 1.0, 0.5).item() == 20000.0


class TestBadInput:
    x = rand(2, 3)

    def refused(self, call: Callable[[Teacher], Any], error: type[Exception], match: str) -> None:
        teacher = Teacher()
        with pytest.raises(error, match=match):
            call(teacher)
        assert teacher.seen == []

    @each_step
    def test_steps(self, step: Step) -> None:
        x = self.x
        self.refused(lambda D: step(D, x, 0.0, 0.0), ValueError, "t must be finite and positive, got 0 at position 0")
        self.refused(lambda D: step(D, x, f64(1, -2), 0.5), ValueError, "t must be .* got -2 at position 1")
        self.refused(lambda D: step(D, x, math.inf, 0.5), ValueError, "t must be finite and positive, got inf")
        self.refused(lambda D: step(D, x, 1.0, math.nan), ValueError, "s must be finite and at least 0, got nan")
        self.refused(lambda D: step(D, x, 1.0, -0.1), ValueError, "s must be finite and at least 0, got -0.1")
        self.refused(lambda D: step(D, x, 2, 1.0), TypeError, r"t must be a noise level .* got 2 \(int\): write 80\.0")
        self.refused(lambda D: step(D, x, np.int64(2), 1.0), TypeError, r"got 2 \(int64\): write 80\.0")
        for level in (np.ones(2, np.float32), [1.0] * 2000, np.float32(2)):
            message = rf"got {type(level).__name__}: pass a Python float, or convert it with torch\.as_tensor"
            self.refused(partial(step, x=x, t=level, s=0.5), TypeError, message)
        self.refused(lambda D: step(D, x, 2.0, torch.tensor([1, 0])), TypeError, "s must be a floating-point tensor")
        self.refused(lambda D: step(D, x, f64(3, 2, 1), 1.0), ValueError, r"t must hold one noise level per sample")
        self.refused(lambda D: step(D, x, f64(3, 2, 1)[None], 1.0), ValueError, r"one noise level per sample, got")
        self.refused(lambda D: step(D, x.int(), 2.0, 1.0), TypeError, "x must be a floating-point tensor")
        self.refused(lambda D: step(D, [1.0], 2.0, 1.0), TypeError, "x must be a torch.Tensor")
        self.refused(lambda D: step(D, x[0, 0], 2.0, 1.0), ValueError, r"x must be a batch of shape \(B, ...\)")
        with pytest.raises(TypeError, match=r"denoiser must be callable as denoiser\(x, t\), got NoneType"):
            step(None, x, 2.0, 1.0)

    @pytest.mark.parametrize(
        ("levels", "match"),
        [
            ([], r"at least 2 noise levels, got shape \(0,\)"),
            ([1.0], r"at least 2 noise levels, got shape \(1,\)"),
            ([[2.0, 1.0]], r"1-D with at least 2 noise levels, got shape \(1, 2\)"),
            ([3.0, 1.0, 2.0], "got 1 then 2 at index 1: sort them"),
            ([1.0, 2.0, 2.0], "got 2 then 2 at index 1"),
            ([2.0, 2.0, 1.0], "got 2 then 2 at index 0"),
            ([2.0, math.nan, 1.0], "levels must be finite"),
            ([math.inf, 1.0], "levels must be finite"),
            ([2.0, -1.0], "only the last may be 0, got -1 at index 1"),
            ([2.0, 0.0, -1.0], "only the last may be 0, got -1 at index 2"),
            ([0.0, 1.0], "got 0 at index 0: the ODE cannot leave 0"),
        ],
    )
    def test_grids(self, levels: list[float], match: str) -> None:
        levels = torch.tensor(levels, dtype=torch.float64)
        self.refused(lambda D: solve_ode(D, self.x, levels), ValueError, match)

    def test_solve(self) -> None:
        x, levels = self.x, f64(2.0, 1.0)
        self.refused(lambda D: solve_ode(D, x, [2.0, 1.0]), TypeError, "levels must be a torch.Tensor, got list")
        self.refused(lambda D: solve_ode(D, x, torch.tensor([2, 1])), TypeError, "levels must be a floating-point")
        self.refused(
            lambda D: solve_ode(D, x, levels, "rk4"), ValueError, "method must be one of 'euler', 'heun', got 'rk4'"
        )
        self.refused(lambda D: solve_ode(D, x, levels, dtype=torch.int64), TypeError, "dtype must be a floating-point")
        self.refused(lambda D: solve_ode(D, x, levels, dtype="float64"), TypeError, "dtype must be a floating-point")

    def test_teachers(self) -> None:
        message = (
            r"the teacher must return x's shape \(2, 3\), got \(2, 6\): .* denoiser_from_network\(\.\.\., learned_var"
        )
        with pytest.raises(ValueError, match=message):
            heun_step(lambda x, t: torch.cat([x, x], 1), self.x, 2.0, 1.0)
        with pytest.raises(ValueError, match=r"got \(2, 2\): mend it in a function around it(?!.*learned)"):
            heun_step(lambda x, t: x[:, 1:], self.x, 2.0, 1.0)
        with pytest.raises(TypeError, match="the teacher must return a floating-point tensor, got tuple"):
            heun_step(lambda x, t: (x,), self.x, 2.0, 1.0)
        for dtype in (torch.int64, torch.bool, torch.complex64):
            with pytest.raises(
                TypeError, match=rf"a floating-point tensor, got {dtype}: return floats, e\.g\. by \.float"
            ):
                heun_step(lambda x, t, dtype=dtype: x.to(dtype), self.x, 2.0, 1.0)  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestCuda:
    def test_steps_do_not_synchronize(self) -> None:
        x, t, s = (v.cuda() for v in (rand(3, 2).float(), f64(1.0, 2.0, 3.0), f64(0.5, 0.0, 4.0)))
        expected = {name: step(Teacher(), x.cpu(), t.cpu(), s.cpu()) for name, step in STEPS.items()}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = {name: (step(Teacher(), x, t, s), step(Teacher(), x, 2.0, 1.0)) for name, step in STEPS.items()}
            bad = heun_step(Teacher(), x, -t, s)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for name, (per_sample, _) in got.items():
            torch.testing.assert_close(per_sample.cpu(), expected[name])
        assert bad.isnan().all()

    def test_solve(self) -> None:
        x, levels = rand(3, 2).float(), f64(2.0, 1.0, 0.0)
        for grid in (levels, levels.cuda()):
            torch.testing.assert_close(solve_ode(Teacher(), x.cuda(), grid).cpu(), solve_ode(Teacher(), x, levels))


def test_gradients_in_levels_that_end_in_0() -> None:
    """The last step divides by no level that is 0, in its derivatives neither."""
    levels = torch.tensor([8.0, 2.0, 0.5], dtype=torch.float64, requires_grad=True)
    teacher, x = ap.GaussianDenoiser(0.25), torch.ones(2, 3, dtype=torch.float64)

    def whole(levels: Tensor) -> Tensor:
        return ap.solve_ode(teacher, x, torch.cat([levels, levels.new_zeros(1)]))

    def each(levels: Tensor) -> Tensor:
        return ap.heun_solve(teacher, x, torch.cat([levels, levels.new_zeros(1)]), 0, torch.tensor([3, 2]))

    assert torch.autograd.gradcheck(whole, (levels,))
    assert torch.autograd.gradcheck(each, (levels,))


def test_a_step_to_0_takes_nothing_of_a_second_answer() -> None:
    reached = ap.heun_step(lambda x, t: 0 * x / x.abs(), torch.ones(2, 3), 2.0, 0.0)  # NaN at its own answer
    assert torch.equal(reached, torch.zeros(2, 3))
