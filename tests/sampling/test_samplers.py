"""Samplers against golden outputs of reference code, exact flows of Gaussians, and the levels that people write."""

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
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel

import analytic_precond as ap
from analytic_precond.sampling.levels import resolve_levels
from analytic_precond.sampling.noise import draw_noise, per_sample_generators
from analytic_precond.sampling.samplers import (
    SamplingStep,
    sample_deterministic,
    sample_gamma,
    sample_multistep,
    sample_one_step,
)

GOLDEN = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN_FILE).items()}
X_T, GRID = GOLDEN["openai_multistep_xT"], ap.preset("openai_cm").multistep_levels(40)
SIGMAS = GOLDEN["sony_exact_sigmas"]  # ..., 0.0019999996, 0

Sampler = Callable[..., Tensor]


def tau(t: Tensor) -> Tensor:
    return 250 * (t + 1e-44).log()


def golden_network(x: Tensor, tau: Tensor, tau_s: Tensor | None = None) -> Tensor:
    """The closed form that the reference codes were run with."""
    out = torch.sin(1.3 * x + 0.002 * ap.expand_to(tau, x)) + 0.25 * x
    return out if tau_s is None else out + 0.1 * torch.cos(0.003 * ap.expand_to(tau_s, x) + x)


def consistency_model(sigma_min: float = 0.002) -> ap.ConsistencyModel:
    precond = ap.CMPreconditioning(sigma_min=sigma_min)
    return ap.ConsistencyModel(golden_network, precond, sigma_min=sigma_min, noise_conditioning=tau)


def trajectory_model() -> ap.ConsistencyTrajectoryModel:
    return ap.ConsistencyTrajectoryModel(golden_network, ap.CTMPreconditioning(), noise_conditioning=tau)


def assert_golden(result: Tensor, key: str) -> None:
    torch.testing.assert_close(result, GOLDEN[key], rtol=1e-11, atol=1e-11)  # float64, a few hundred operations


@pytest.mark.usefixtures("around")
class TestReferenceCodes:
    @pytest.mark.parametrize("order", [[0, 17, 31, 39], [39, 31, 17, 0], [0, 17, 31], [31, 17, 0]])
    def test_openai_multistep(self, order: list[int]) -> None:
        """Ascending indices to the grid's last in openai's code, descending ones without it in diffusers'."""
        noise, last = GOLDEN["openai_multistep_noise"].split([2, 1])
        result = sample_multistep(consistency_model(), X_T, order, grid=GRID, noise=noise)
        # openai's code adds noise after the last jump, too; by rounding its level is 1e-10 instead of 0
        rounding = math.sqrt(GRID[-1].item() ** 2 - 0.002**2)
        assert rounding < 2e-10
        assert_golden(result + rounding * last[0], "openai_multistep_result")
        levels = GRID[torch.tensor(order)]
        assert torch.equal(sample_multistep(consistency_model(), X_T, levels, noise=noise), result)

    @pytest.mark.parametrize("levels", [SIGMAS, SIGMAS[:-1], SIGMAS.flip(0), SIGMAS.tolist()])
    def test_sony_exact(self, levels: Any) -> None:
        assert_golden(sample_deterministic(trajectory_model(), X_T, levels), "sony_exact_result")

    def test_sony_gamma(self) -> None:
        noise = GOLDEN["sony_gamma_noise"][:3]
        result = sample_gamma(trajectory_model(), X_T, [0, 1, 2, 3, 4], 0.5, grid=SIGMAS, noise=noise)
        assert_golden(result, "sony_gamma_0.5_result")

    def test_ect_adds_the_whole_level(self) -> None:
        """ECT's two steps by hand: from 80 and from 0.821, without removing sigma_min^2."""
        student, noise = consistency_model(0.003), GOLDEN["openai_multistep_noise"][:1]
        levels = ap.preset("ect").sampling_levels(2)
        result = sample_multistep(student, X_T, levels, sigma_min=0.003, subtract_sigma_min=False, noise=noise)
        torch.testing.assert_close(
            result, student(student(X_T, 80.0) + 0.821 * noise[0], 0.821), rtol=1e-12, atol=1e-12
        )


VARIANCE = 0.3


def exact_flow(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """The perfect student for data from N(0, VARIANCE)."""
    return x * ap.expand_to(((VARIANCE + s**2) / (VARIANCE + t**2)).sqrt(), x)


def response(sampler: Sampler, start: float, num_draws: int, *args: Any, **kwargs: Any) -> Tensor:
    """What each of the independent sources, x and the draws, contributes to a linear sampler's result."""
    sources = torch.eye(1 + num_draws, dtype=torch.float64)
    x, noise = start * sources[0], sources[1:].reshape(num_draws, 1 + num_draws)
    return sampler(exact_flow, x, *args, noise=noise, **kwargs)


class TestExactStudent:
    """Samplers of a linear student are linear: the variance of the result is the sum of squared contributions."""

    LEVELS = (80.0, 11.0, 2.5, 0.6, 0.04)

    def test_deterministic_is_the_flow(self) -> None:
        x = draw_noise((5, 2), Generator().manual_seed(0), dtype=torch.float64) * 80
        for levels in ([80.0, 0.002], [80.0, 3.0], [*self.LEVELS, 0.002], [*self.LEVELS, 0.0]):
            end = levels[-1] or 0.002
            flow = x * math.sqrt((VARIANCE + end**2) / (VARIANCE + 80**2))
            torch.testing.assert_close(sample_deterministic(exact_flow, x, levels), flow, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            sample_one_step(exact_flow, x), x * math.sqrt((VARIANCE + 0.002**2) / (VARIANCE + 80**2))
        )

    @pytest.mark.parametrize("gamma", [0.0, 1e-4, 0.2, 0.9, 1.0])
    @pytest.mark.parametrize("end", [[], [0.002], [0.0]])
    def test_gamma_keeps_the_distribution(self, gamma: float, end: list[float]) -> None:
        parts = response(sample_gamma, math.sqrt(VARIANCE + 80**2), 4, [*self.LEVELS, *end], gamma)
        level = 0.002 if end else 0.04
        assert parts.square().sum().item() == pytest.approx(VARIANCE + level**2, rel=1e-12)
        assert parts[1:].any() == (gamma > 0)

    def test_gamma_ends_as_deterministic_and_multistep(self) -> None:
        levels, x = [*self.LEVELS, 0.002], 80 * torch.ones(1, dtype=torch.float64)
        noise = draw_noise((4, 1), Generator().manual_seed(0), dtype=torch.float64)
        pairs = (
            (sample_gamma(exact_flow, x, levels, 0.0, noise=noise), sample_deterministic(exact_flow, x, levels)),
            (
                sample_gamma(exact_flow, x, levels, 1.0, noise=noise),
                sample_multistep(exact_flow, x, levels, noise=noise),
            ),
        )
        for ours, other in pairs:
            torch.testing.assert_close(ours, other, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("sigma_min", [0.0, 0.002, 0.03])
    def test_multistep_keeps_the_distribution(self, sigma_min: float) -> None:
        parts = response(sample_multistep, math.sqrt(VARIANCE + 80**2), 4, self.LEVELS, sigma_min=sigma_min)
        assert parts.square().sum().item() == pytest.approx(VARIANCE + sigma_min**2, rel=1e-12)

    def test_multistep_with_too_much_noise(self) -> None:
        """Without removing sigma_min^2 a level u holds u^2 + sigma_min^2, which the last jump scales down."""
        kwargs = {"sigma_min": 0.03, "subtract_sigma_min": False}
        parts = response(sample_multistep, math.sqrt(VARIANCE + 80**2), 1, [80.0, 0.5], **kwargs)
        clean = VARIANCE + 0.03**2
        assert parts.square().sum().item() == pytest.approx(clean * (clean + 0.25) / (VARIANCE + 0.25), rel=1e-12)

    def test_drawn_noise_is_standard_normal_and_fresh(self) -> None:
        """20,000 samples: a variance's standard error is sqrt(2 / 20,000) = 1 % of it; five of them allowed."""
        generators = per_sample_generators(20_000, Generator().manual_seed(0))
        x = 80 * draw_noise((20_000,), generators, dtype=torch.float64)
        levels = [80.0, 3.0, 1.0, 0.002]
        assert sample_gamma(exact_flow, x, levels, 0.7, generator=generators).var().item() == pytest.approx(
            VARIANCE, rel=0.05
        )
        result = sample_multistep(exact_flow, x, levels, generator=generators)
        assert result.var().item() == pytest.approx(VARIANCE, rel=0.05)
        # each renoising leaves a share of the data in the sum; standard error 1 / sqrt(20,000)
        correlation = math.sqrt(VARIANCE / (VARIANCE + 9) * VARIANCE / (VARIANCE + 1))
        assert torch.corrcoef(torch.stack([result, x]))[0, 1].item() == pytest.approx(correlation, abs=0.035)


def record(sampler: Sampler, *args: Any, **kwargs: Any) -> list[tuple[float, float]]:
    """Return the jumps that a sampler asks for."""
    jumps = []

    def student(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        assert t.shape == s.shape == (3,)
        assert t.dtype == s.dtype == torch.float64
        jumps.append((t[0].item(), s[0].item()))
        return x

    sampler(student, torch.zeros(3, 2, dtype=torch.float64), *args, generator=Generator(), **kwargs)
    return jumps


class TestLevels:
    @pytest.mark.parametrize(
        ("levels", "starts"),
        [
            ([80.0], [80.0]),
            ([80.0, 0.821], [80.0, 0.821]),
            ((0.002, 0.821, 80.0), [80.0, 0.821]),
            (np.array([0.0, 80.0], dtype=np.float32), [80.0]),
            ([80.0, 0.002, 0.0], [80.0]),
            (torch.tensor([80.0, 1.0, 0.0019999996]), [80.0, 1.0]),  # what float32 grids end with
            (torch.tensor([80.0, 1.0], dtype=torch.float64), [80.0, 1.0]),
        ],
    )
    def test_multistep_jumps(self, levels: Any, starts: list[float]) -> None:
        assert record(sample_multistep, levels) == [(t, 0.002) for t in starts]

    def test_deterministic_jumps(self) -> None:
        levels = GRID[::5].tolist()
        steps: list[SamplingStep] = []
        sample_deterministic(exact_flow, torch.zeros(1, 1), levels[::-1], callback=steps.append)
        assert [step.t for step in steps] == levels[:-1]
        assert [step.s for step in steps] == levels[1:]

    def test_a_final_zero_stands_for_sigma_min(self) -> None:
        assert resolve_levels([80.0, 1.0, 0.0]) == [80.0, 1.0, 0.002]
        assert resolve_levels([80.0, 1.0, 0.0], sigma_min=0.003) == [80.0, 1.0, 0.003]
        assert resolve_levels([80.0, 1.0, 0.0], sigma_min=0) == [80.0, 1.0, 0.0]
        for grid in (GOLDEN["openai_sigmas_karras_18"], ap.preset("edm").sampling_levels(18)):
            assert resolve_levels(grid) == grid[:-1].tolist()  # they end with sigma_min and 0

    @given(
        levels=st.lists(st.floats(0.0021, 1e4), min_size=2, max_size=12, unique=True),
        indices=st.sets(st.integers(0, 11), min_size=1),
    )
    def test_all_spellings_agree(self, levels: list[float], indices: set[int]) -> None:
        levels = sorted(levels, reverse=True)
        picked = sorted(i % len(levels) for i in {i % len(levels) for i in indices})
        expected = [levels[i] for i in picked]
        increasing = [len(levels) - 1 - i for i in picked]
        for grid, index in ((levels, picked), (levels[::-1], increasing)):
            for spelled in (index, index[::-1], torch.tensor(index), np.array(index)):
                assert resolve_levels(spelled, grid) == expected
            assert resolve_levels(torch.tensor(index), torch.tensor(grid, dtype=torch.float64)) == expected
        assert resolve_levels(expected) == resolve_levels(expected[::-1]) == expected

    BAD = (
        ([], ValueError, r"levels must hold at least one level, got none"),
        (torch.tensor([]), ValueError, r"at least one level"),
        (80.0, TypeError, r"sequence of numbers, got 80\.0: write \[80\.0\]"),
        (["80"], TypeError, r"levels must hold floats or ints, got '80' \(str\)"),
        ([torch.tensor(80.0), torch.tensor(1.0)], TypeError, r"\(Tensor\): a tensor's number is its \.item\(\)"),
        ([True, False], TypeError, r"got True"),
        (torch.ones(2, 2), ValueError, r"must be 1-D, got a tensor of shape \(2, 2\)"),
        ([80.0, 1, 0], TypeError, r"got both in \[80, 1, 0\]: write 80\.0"),
        ([0, 17], ValueError, r"no grid is given, got the ints \[0, 17\]: write 80\.0, or pass the grid"),
        (torch.tensor([0, 17]), ValueError, r"no grid is given"),
        ([80.0, 2.5, 2.5], ValueError, r"strictly, got \[80, 2\.5, 2\.5\], with 2\.5 beside 2\.5: sort them and drop"),
        ([80.0, 0.1, 2.5], ValueError, r"with 0\.1 beside 2\.5"),
        ([80.0, -1.0], ValueError, r"not negative, got -1\.0 at position 1"),
        ([80.0, math.nan], ValueError, r"finite noise levels \(sigma\), not negative, got nan at position 1"),
        ([math.inf, 1.0], ValueError, r"got inf at position 0"),
        ([80.0, 0.001], ValueError, r"below sigma_min = 0\.002, the cleanest level that jumps reach, got 0\.001"),
        ([0.002], ValueError, r"start above sigma_min = 0\.002, got \[0\.002\]"),
        ([0.0], ValueError, r"start above sigma_min"),
        ([90.0, 1.0], ValueError, r"levels must lie in the student's range: .* <= 80 and t > 0, got t = 90"),
    )

    @pytest.mark.parametrize(("levels", "error", "message"), BAD)
    @pytest.mark.parametrize("sampler", [sample_multistep, sample_gamma, sample_deterministic])
    def test_refused_before_any_call(self, sampler: Sampler, levels: Any, error: type[Exception], message: str) -> None:
        args = (0.5,) if sampler is sample_gamma else ()
        with pytest.raises(error, match=message):
            sampler(uncalled(), torch.zeros(3, 2), levels, *args)

    @pytest.mark.parametrize(
        ("levels", "grid", "message"),
        [
            ([0, 40], GRID, r"indices from 0 to 39, the end of the grid, got 40 at position 1"),
            ([-1, 0], GRID, r"got -1 at position 0"),
            ([80.0, 1.0], GRID, r"grid is for indices, got noise levels \[80, 1\]: leave grid out"),
            ([0, 1], [80.0, 1.0, 2.0], r"grid must decrease or increase strictly, got \[80, 1, 2\]"),
            ([0, 1], [80.0, -1.0], r"grid must be finite noise levels"),
            ([0, 0], GRID, r"levels must decrease or increase strictly"),
            ([0, 1], GRID[:, None], r"grid must be 1-D"),
        ],
    )
    def test_bad_grids(self, levels: Any, grid: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            sample_multistep(uncalled(), torch.zeros(3, 2), levels, grid=grid)

    @pytest.mark.parametrize("sampler", [sample_gamma, sample_deterministic])
    def test_one_level_is_no_jump(self, sampler: Sampler) -> None:
        args = (0.5,) if sampler is sample_gamma else ()
        with pytest.raises(ValueError, match=r"at least 2, .*, got \[80\.0\]: add the level to reach, e\.g\. 0\.002"):
            sampler(uncalled(), torch.zeros(3, 2), [80.0], *args)


def uncalled() -> ap.ConsistencyTrajectoryModel:
    """A student for levels from 80 to 0.002 that must not be called."""

    def network(*args: Tensor) -> Tensor:
        raise AssertionError("the network was called")

    levels = torch.tensor([80.0, 1.0, 0.002], dtype=torch.float64)
    return ap.ConsistencyTrajectoryModel(
        network, ap.AnalyticPreconditioning.from_coefficients(levels, 0 * levels, 0 * levels)
    )


class TestReproducible:
    LEVELS = (80.0, 2.0, 0.5)

    def sample(self, num: int, generator: Any, noise_generator: Any = None) -> Tensor:
        x = torch.zeros(num, 3, 4) if noise_generator is None else 80 * draw_noise((num, 3, 4), noise_generator)
        return sample_multistep(trajectory_model(), x, self.LEVELS, generator=generator)

    def test_two_batches_are_one(self) -> None:
        generator = Generator().manual_seed(1)
        halves = [self.sample(2, generator), self.sample(3, generator)]
        whole = self.sample(5, generator.manual_seed(1))
        # elementwise operations only: equal bits
        assert torch.equal(torch.cat(halves), whole)
        assert len(whole.unique(dim=0)) == 5

    def test_noise_and_sampler_share_per_sample_generators(self) -> None:
        parent = Generator().manual_seed(1)
        halves = []
        for num in (2, 3):
            generators = per_sample_generators(num, parent)
            halves.append(self.sample(num, generators, generators))
        generators = per_sample_generators(5, parent.manual_seed(1))
        assert torch.equal(torch.cat(halves), self.sample(5, generators, generators))

    def test_a_sample_knows_nothing_of_the_others(self) -> None:
        def seeded(*seeds: int) -> list[Generator]:
            return [Generator().manual_seed(seed) for seed in seeds]

        alone = self.sample(1, seeded(7))
        assert torch.equal(self.sample(3, seeded(3, 7, 5))[1:2], alone)
        assert torch.equal(self.sample(2, tuple(seeded(8, 7)))[1:2], alone)

    def test_default_generator(self) -> None:
        def seeded(*sizes: int) -> Tensor:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                return torch.cat([self.sample(size, None) for size in sizes])

        assert torch.equal(seeded(4), seeded(1, 3))
        with global_rng_untouched():
            self.sample(2, Generator())
            sample_gamma(trajectory_model(), torch.zeros(2, 3), self.LEVELS, 0.0)
            sample_deterministic(trajectory_model(), torch.zeros(2, 3), self.LEVELS)

    def test_noise_is_diffusers_and_the_same_in_all_dtypes(self) -> None:
        generators = [Generator().manual_seed(seed) for seed in (0, 1)]
        noise = draw_noise((2, 3, 4), generators)
        by_hand = [torch.randn(1, 3, 4, generator=Generator().manual_seed(seed)) for seed in (0, 1)]
        assert torch.equal(noise, torch.cat(by_hand))
        for dtype in (torch.float64, torch.bfloat16):
            again = draw_noise((2, 3, 4), [Generator().manual_seed(seed) for seed in (0, 1)], dtype=dtype)
            assert torch.equal(again, noise.to(dtype))

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_state_in_another_dtype(self, dtype: torch.dtype) -> None:
        network = nn.Conv1d(3, 3, 1)

        def call(x: Tensor, *c_noise: Tensor) -> Tensor:
            return network(x.float()).to(x.dtype)

        student = ap.ConsistencyTrajectoryModel(call, ap.CTMPreconditioning())
        x = draw_noise((2, 3, 4), Generator().manual_seed(0))
        kwargs: dict[str, Any] = {"levels": [80.0, 2.0], "generator": Generator().manual_seed(1)}
        expected = sample_multistep(student, 80 * x, **kwargs)
        kwargs["generator"].manual_seed(1)
        result = sample_multistep(student, (80 * x).to(dtype), **kwargs)
        assert result.dtype == dtype
        # the state at level 80 is rounded to 80 eps, of which 1/80 comes down to the data
        torch.testing.assert_close(
            result.float(), expected, rtol=0, atol=8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
        )

    def test_empty_batch_and_scalar_samples(self) -> None:
        assert sample_multistep(exact_flow, torch.zeros(0, 3), self.LEVELS).shape == (0, 3)
        assert sample_multistep(exact_flow, torch.zeros(4), self.LEVELS, generator=Generator()).shape == (4,)
        assert draw_noise((0, 3)).shape == (0, 3)


class Labelled(nn.Module):
    """A network that needs a label and has dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x: Tensor, c_t: Tensor, c_s: Tensor | None = None, *, label: Tensor) -> Tensor:
        return self.drop(self.layer(x) + label[:, None])


@pytest.mark.usefixtures("around")
class TestStudents:
    @pytest.mark.parametrize("kind", [ap.ConsistencyModel, ap.ConsistencyTrajectoryModel])
    @pytest.mark.parametrize("wrap", [lambda s: s, AveragedModel, lambda s: torch.compile(s, backend="eager")])
    def test_wrapped_students_with_conditions(self, kind: Any, wrap: Callable[..., Any]) -> None:
        torch._dynamo.reset()
        student = kind(Labelled().eval(), ap.CTMPreconditioning())
        x, label = 80 * draw_noise((3, 4), Generator().manual_seed(0)), torch.arange(3.0)
        noise = draw_noise((1, 3, 4), Generator().manual_seed(0))
        result = sample_multistep(wrap(student), x, [80.0, 1.0], noise=noise, label=label)
        clean = student(x, torch.full((3,), 80.0), torch.full((3,), 0.002), label=label)
        noisy = clean + math.sqrt(1 - 0.002**2) * noise[0]
        expected = student(noisy, torch.ones(3), torch.full((3,), 0.002), label=label)
        torch.testing.assert_close(result, expected)
        assert not result.requires_grad
        torch.testing.assert_close(sample_one_step(wrap(student), x, label=label), clean)

    def test_checks_reach_through_wrappers(self) -> None:
        for student in (AveragedModel(uncalled()), torch.compile(uncalled()), AveragedModel(AveragedModel(uncalled()))):
            with pytest.raises(ValueError, match=r"levels must lie in the student's range: .*t = 90"):
                sample_multistep(student, torch.zeros(3, 2), [90.0])

    def test_a_consistency_model_reaches_sigma_min_only(self) -> None:
        network, x = uncalled().network, torch.zeros(1, 2)
        student = ap.ConsistencyModel(network, ap.CTMPreconditioning(), sigma_min=0.003)
        for call in (
            lambda: sample_gamma(student, x, [80.0, 1.0, 0.003], 0.5, sigma_min=0.003),
            lambda: sample_deterministic(student, x, [80.0, 1.0]),
            lambda: sample_multistep(student, x, [80.0, 1.0], sigma_min=0.002),
        ):
            with pytest.raises(ValueError, match=r"sigma_min = 0\.003, .* sample_multistep with sigma_min=0\.003"):
                call()
        wrong_shift = ap.ConsistencyModel(network, ap.CMPreconditioning(sigma_min=0.003), sigma_min=0.002)
        with pytest.raises(ValueError, match=r"student's range: .* with 0\.003 <= s"):
            sample_one_step(wrong_shift, x)
        full = sample_gamma(consistency_model(), X_T, GRID[[0, 17, 31, 39]], 1.0, generator=Generator())
        other = sample_multistep(consistency_model(), X_T, GRID[[0, 17, 31, 39]], generator=Generator())
        torch.testing.assert_close(full, other, rtol=1e-12, atol=1e-12)


class TestCallbackAndProgress:
    def test_callback(self) -> None:
        steps: list[SamplingStep] = []
        x = torch.ones(2, 1, dtype=torch.float64)
        result = sample_gamma(exact_flow, x, [80.0, 2.0, 0.002], 0.6, generator=Generator(), callback=steps.append)
        assert [(step.index, step.num_steps) for step in steps] == [(0, 2), (1, 2)]
        assert [step.t for step in steps] == [80.0, 2.0]
        assert steps[0].s == pytest.approx(0.002 + 0.8 * 1.998)
        ts = torch.tensor([steps[0].t, steps[0].s], dtype=torch.float64)[:, None]
        torch.testing.assert_close(steps[0].x, exact_flow(x, ts[0], ts[1]))  # before noise is added
        assert steps[1].s == 0.002
        assert torch.equal(steps[1].x, result)

    def test_a_callback_may_return_other_data(self) -> None:
        x, levels = torch.ones(2, 1, dtype=torch.float64), [80.0, 2.0, 0.5, 0.002]
        plain, shifted = (
            sample_deterministic(exact_flow, x, levels, callback=callback)
            for callback in (lambda step: "ignored", lambda step: step.x.float() if step.index != 1 else step.x + 1)
        )
        ts = torch.tensor([[0.5], [0.002]], dtype=torch.float64)
        moved = exact_flow(x * 0 + 1, *ts) - exact_flow(x * 0, *ts)  # the flow is affine: what becomes of the 1
        # float32 in between
        torch.testing.assert_close(shifted - plain, moved, rtol=1e-6, atol=1e-6)
        assert shifted.dtype == torch.float64

    def test_inpainting(self) -> None:
        """Known pixels are put back, noised, after every jump; x itself and the undisturbed sample stay."""
        x, noise = 80.0 * torch.randn(2, 4, generator=Generator()), torch.randn(2, 4, generator=Generator())
        known, mask = torch.arange(8.0).reshape(2, 4), torch.arange(8).reshape(2, 4) % 2 == 0
        before = x.clone()
        seen: list[SamplingStep] = []

        def paint(step: SamplingStep) -> Tensor:
            seen.append(step)
            return torch.where(mask, known + step.s * noise, step.x)

        levels, options = [80.0, 2.0, 0.5], {"noise": torch.zeros(2, 2, 4)}
        painted = sample_multistep(exact_flow, x, levels, callback=paint, **options)
        torch.testing.assert_close(painted[mask], (known + 0.002 * noise)[mask])
        torch.testing.assert_close(painted[~mask], sample_multistep(exact_flow, x, levels, **options)[~mask])
        assert torch.equal(x, before)
        assert len(seen) == 3
        with pytest.raises(ValueError, match=r"callback to return x's shape \(2, 4\), got \(1, 4\): return None"):
            sample_multistep(exact_flow, x, levels, callback=lambda step: step.x[:1])

    @pytest.mark.parametrize("sampler", [sample_multistep, sample_deterministic])
    def test_progress(self, sampler: Sampler, capsys: pytest.CaptureFixture[str]) -> None:
        for progress in (False, True):
            sampler(exact_flow, torch.zeros(1, 1), [80.0, 2.0, 0.002], progress=progress)
            assert ("sampling" in capsys.readouterr().err) == progress


X = torch.zeros(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: sample_multistep("net", X, [80.0]), TypeError, r"student must be callable .* got str"),
        (lambda s: sample_multistep(s, X.long(), [80.0]), TypeError, r"x must be a floating-point tensor"),
        (lambda s: sample_multistep(s, torch.zeros(()), [80.0]), ValueError, r"x must have shape \(B, \.\.\.\)"),
        (lambda s: sample_multistep(s, X, [80.0], sigma_min=-1.0), ValueError, r"sigma_min must be .* got -1\.0"),
        (lambda s: sample_multistep(s, X, [80.0], sigma_min="0"), TypeError, r"sigma_min must be a number, got '0'"),
        (lambda s: sample_one_step(s, X, 80), ValueError, r"got the ints \[80\]: write 80\.0"),
        (lambda s: sample_one_step(s, X, 80.0, 0.0005), ValueError, r"student's range: .* s = 0\.0005"),
        (lambda s: sample_gamma(s, X, [80.0, 1.0], 1.5), ValueError, r"gamma must be from 0 .* got 1\.5"),
        (lambda s: sample_gamma(s, X, [80.0, 1.0], math.nan), ValueError, r"gamma .* got nan"),
        (lambda s: sample_gamma(s, X, [80.0, 1.0], "half"), TypeError, r"gamma must be a number, got 'half'"),
        (lambda s: sample_multistep(s, X, [80.0, 1.0], generator=0), TypeError, r"got 0: torch\.Generator\(\)\.manual"),
        (lambda s: sample_multistep(s, X, [80.0, 1.0], generator=[0] * 3), TypeError, r"torch\.Generator, got 0"),
        (lambda s: sample_multistep(s, X, [80.0, 1.0], generator=[Generator()]), ValueError, r"of 3 samples, got 1"),
        (lambda s: sample_multistep(s, X, [80.0, 1.0], generator=Generator(), noise=X[None]), ValueError, r"got both"),
        (lambda s: sample_multistep(s, X, [80.0, 1.0], noise=X), ValueError,
         r"noise must hold 1 draws, .* shape \(1, 3, 2\), got \(3, 2\)"),
        (lambda s: sample_gamma(s, X, [80.0, 1.0, 0.0], 0.5, noise=torch.zeros(2, 3, 2)), ValueError, r"hold 1 draws"),
        (lambda s: sample_multistep(s, X, [80.0, 1.0], noise=X[None].long()), TypeError, r"noise must be a floating"),
        (lambda s: draw_noise(()), ValueError, r"shape must be \(B, \.\.\.\)"),
        (lambda s: draw_noise((2.0, 3)), TypeError, r"shape\[0\] must be an int"),
        (lambda s: draw_noise((2, 3), [Generator()]), ValueError, r"each of 2 samples, got 1"),
        (lambda s: draw_noise((2, 3), dtype=torch.int64), TypeError, r"dtype must be a floating-point torch.dtype"),
        (lambda s: per_sample_generators(-1), ValueError, r"num must be at least 0"),
        (lambda s: per_sample_generators(2, [Generator()]), TypeError, r"generator must be a torch\.Generator"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[..., object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(uncalled())


def test_a_student_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"student must return x's shape \(3, 2\), got \(3, 1\)"):
        sample_one_step(lambda x, t, s: x[:, :1], X)
    with pytest.raises(TypeError, match="got tuple: unwrap it"):
        sample_one_step(lambda x, t, s: (x,), X)


def test_network_errors_come_through() -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'label'"):
        sample_one_step(exact_flow, X, label=X)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_a_gpu() -> None:
    student, levels = trajectory_model(), [80.0, 2.0, 0.002]
    on_cpu, on_gpu = (
        sample_gamma(student, x, levels, 0.5, generator=Generator().manual_seed(0)) for x in (X_T, X_T.cuda())
    )
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-9, atol=1e-9)  # float64, another sine
    generator = torch.Generator("cuda")
    half = sample_multistep(student, X_T[:3].cuda(), levels, generator=generator.manual_seed(0))
    whole = sample_multistep(student, X_T.cuda(), levels, generator=generator.manual_seed(0))
    torch.testing.assert_close(whole[:3], half, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"0\.002 <= s <= t <= 80 .*got t = 90, s = 0\.002"):
        sample_multistep(uncalled().cuda(), X.cuda(), [90.0])
