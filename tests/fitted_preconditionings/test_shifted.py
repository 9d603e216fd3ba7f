"""Jumps that ask at a lower noise level: against closed forms, ordinary least squares, and what students do."""

from __future__ import annotations

import copy
import math
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from hypothesis import given
from hypothesis import strategies as st
from problems import Array, gaussian_problem, mixture_problem
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar
from torch import Tensor

import analytic_precond as ap
from analytic_precond.fitted_preconditionings.follow import FitHeader, Trajectories
from analytic_precond.fitted_preconditionings.jump_regression import JumpTable
from analytic_precond.fitted_preconditionings.shift_regression import regress_shifted
from analytic_precond.fitted_preconditionings.shifted import ShiftedPreconditioning
from analytic_precond.fitted_preconditionings.trajectory_moments import shift_moments
from analytic_precond.interpolation.spline_table import SplineTable
from analytic_precond.noise_levels.network_scalings import input_scale
from analytic_precond.ode.trajectories import Start
from analytic_precond.preconditionings.base import Preconditioning
from analytic_precond.teachers.denoiser import Denoiser

PROBLEM = gaussian_problem()
IMAGES = np.arange(1.0, 65) ** -1.5  # variances of an image-like spectrum
HEADER = FitHeader(1, 0, (1,), "float64", "a test")


def from_one_start(denoiser: Denoiser, x_T: Tensor, levels: Tensor, sigma_data: float = 0.5) -> ShiftedPreconditioning:
    """The fit to given starting points at the noisiest level, all in one batch."""
    start = Start(0, x_T.double(), torch.float64, {})
    moments = shift_moments(Trajectories(denoiser, [start], levels.double(), len(x_T)), sigma_data)
    a, b, rate = regress_shifted(moments, "float64", sigma_data)
    return built(levels, a, b, rate, sigma_data)


def built(levels: Tensor, a: Array, b: Array, rate: Array, sigma_data: float = 0.5) -> ShiftedPreconditioning:
    grid = levels.double()
    control = torch.from_numpy(SplineTable.control_points(grid.numpy(), rate[None]))
    table = JumpTable.of(grid.numpy(), a[None], b[None])
    return ShiftedPreconditioning(table, HEADER, sigma_data, SplineTable(grid, control))


def exact_gaussian(c: Array, num_levels: int = 20) -> ShiftedPreconditioning:
    """The fit to one trajectory whose squares are the second moments: nothing is sampled."""
    variances = torch.from_numpy(c)
    start = (variances + 80.0**2).sqrt()[None]
    return from_one_start(ap.GaussianDenoiser(variances), start, ap.log_noise_levels(num_levels))


def best_jump(c: Array, t: float, s: float, q: float, sigma_data: float = 0.5) -> tuple[float, float, float]:
    """(c_skip, c_out, RMS miss) by the normal equations, D asked at q; E x_t^2 = c + t^2 per element."""
    weight, flow = c + t**2, np.sqrt((c + s**2) / (c + t**2))
    kappa = math.sqrt((q**2 + sigma_data**2) / (t**2 + sigma_data**2))
    answer = kappa * c / (c + q**2)
    design = np.sqrt(weight)[:, None] * np.column_stack([np.ones_like(c), answer])
    solution = np.linalg.lstsq(design, np.sqrt(weight) * flow, rcond=None)[0]
    miss = np.sqrt((weight * (flow - solution[0] - solution[1] * answer) ** 2).mean())
    return float(solution[0]), float(solution[1]), float(miss)


def miss_of(precond: Preconditioning, c: Array, t: float, s: float) -> float:
    """RMS miss of the untrained jump in a Gaussian, from one point per element."""
    x_t = torch.from_numpy(np.sqrt(c + t**2))[None]
    denoised = ap.GaussianDenoiser(torch.from_numpy(c))(*precond.query(x_t, t, s))
    x_s = torch.from_numpy(np.sqrt(c + s**2))
    return (precond.jump(x_t, denoised, t, s) - x_s).square().mean().sqrt().item()


JUMPS = [(80.0, 0.002), (80.0, 2.0), (13.0, 0.002), (6.1, 0.9), (2.0, 0.01), (0.7, 0.05), (0.3, 0.002)]


@pytest.fixture(scope="module")
def images() -> ShiftedPreconditioning:
    return exact_gaussian(IMAGES)


class TestGaussian:
    @pytest.mark.parametrize(("t", "s"), JUMPS)
    def test_close_to_the_best_level_and_coefficients(self, images: ShiftedPreconditioning, t: float, s: float) -> None:
        found = minimize_scalar(
            lambda u: best_jump(IMAGES, t, s, t * math.exp(-u))[2], bounds=(0, math.log(t / s)), method="bounded"
        )
        got, unshifted = miss_of(images, IMAGES, t, s), best_jump(IMAGES, t, s, t)[2]
        # a fifth of what the shift brings may be lost to smoothness; 1e-3 is what 20 levels leave of interpolation
        assert got - found.fun < 0.2 * (unshifted - found.fun) + 1e-3
        # what is left between a level's own regression and the interpolated one
        q = images.network_level(torch.tensor(t, dtype=torch.float64), s).item()
        assert got == pytest.approx(best_jump(IMAGES, t, s, q)[2], rel=0.03, abs=1e-3)

    def test_long_jumps_gain_most(self, images: ShiftedPreconditioning) -> None:
        """Against plain least squares: known from the normal equations, not from the library."""
        assert miss_of(images, IMAGES, 80.0, 0.002) < 0.4 * best_jump(IMAGES, 80.0, 0.002, 80.0)[2]

    @pytest.mark.long
    def test_finer_tables_agree(self, images: ShiftedPreconditioning) -> None:
        finer = exact_gaussian(IMAGES, 32)
        for t, s in JUMPS:
            assert miss_of(finer, IMAGES, t, s) == pytest.approx(miss_of(images, IMAGES, t, s), rel=0.1, abs=1e-3)

    def test_white_data_follow_the_flow_with_the_euler_share(self) -> None:
        data = 0.5 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        precond = ShiftedPreconditioning.fit(ap.GaussianDenoiser(0.25), data, num_trajectories=64, progress=False)
        for t, s in JUMPS:
            c = np.array([0.25])
            # 20 levels: 1e-3 of the flow, as in plain least squares
            assert miss_of(precond, c, t, s) < 2e-3 * math.sqrt(0.25 + s**2)


def test_ordinary_least_squares_on_the_answers_themselves() -> None:
    """A mixture of Gaussians: at each pair of levels, numpy regresses on D asked at the table's level."""
    problem, levels = mixture_problem(), ap.log_noise_levels(16, 0.02, 20.0)
    x_T = problem.sample(400, 0) + 20 * torch.randn(400, 1, generator=torch.Generator().manual_seed(1)).double()
    precond = from_one_start(problem.denoiser, x_T, levels)
    states = [x_T]
    for t, s in pairwise(levels):
        grid = torch.linspace(t.item() ** (1 / 7), s.item() ** (1 / 7), 33, dtype=torch.float64) ** 7
        states.append(ap.solve_ode(problem.denoiser, states[-1], grid))
    for i, j in [(0, 15), (0, 6), (3, 12), (5, 15), (8, 13)]:
        t, s = levels[i].expand(400), levels[j].expand(400)
        x, q = precond.query(states[i], t, s)
        design = torch.cat([states[i], problem.denoiser(x, q)], 1).numpy()
        best, (square,), *_ = np.linalg.lstsq(design, states[j][:, 0].numpy(), rcond=None)
        got = np.array([c[0].item() for c in precond(t, s)])
        miss = np.square(design @ got - states[j][:, 0].numpy()).sum()
        assert miss < 1.05 * square  # moments are interpolated between the levels that were asked
        assert got[1] == pytest.approx(best[1], rel=0.1)


def random_table(data: st.DataObject) -> ShiftedPreconditioning:
    num = data.draw(st.integers(4, 9))
    values = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))).normal(size=(3, num, num))
    eye = np.eye(num) > 0
    a, b = np.where(eye, 1, 1 + 0.2 * values[0]), np.where(eye, 0, 0.2 * values[1])
    return built(ap.log_noise_levels(num, 0.01, 50.0), a, b, 0.5 + values[2])


class TestStructure:
    """What holds for any table."""

    @given(st.data())
    def test_boundary_read_out_and_range_of_the_level(self, data: st.DataObject) -> None:
        precond = random_table(data)
        low, high = math.log(0.01), math.log(50.0)
        t = torch.tensor(data.draw(st.floats(low, high)), dtype=torch.float64).exp().clamp(0.01, 50)
        s = torch.tensor(data.draw(st.floats(low, high)), dtype=torch.float64).exp().clamp(0.01, 50).minimum(t)
        q = precond.network_level(t, s)
        assert s * (1 - 1e-12) <= q <= t  # exp and log round
        x_t = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
        x, level = precond.query(x_t, t, t)
        torch.testing.assert_close(x, x_t, rtol=0, atol=0)
        assert level == t

        denoiser = ap.GaussianDenoiser(0.25)
        assert torch.equal(precond.jump(x_t, denoiser(*precond.query(x_t, t, t)), t, t), x_t)
        target = t.clone().requires_grad_()
        x_s = precond.jump(x_t, denoiser(*precond.query(x_t, t, target)), t, target)
        (slope,) = torch.autograd.grad(x_s[0, 0], target)
        # D = x - t d x_s / ds; rounding of the graph
        torch.testing.assert_close(x_t[0, 0] - t * slope, denoiser(x_t, t)[0, 0], rtol=1e-9, atol=1e-10)

    @pytest.mark.parametrize("power", [1.5, 2.0])
    def test_levels_grow_with_t(self, power: float) -> None:
        """So that a network told (q, s) knows t. Far above the data's scale q is constant, but for ripples."""
        precond = exact_gaussian(np.arange(1.0, 65) ** -power)
        for s in np.geomspace(0.0021, 40, 12).tolist():
            t = torch.linspace(math.log(s * 1.02), math.log(80), 300, dtype=torch.float64).exp().clamp(max=80)
            q = precond.network_level(t, s)
            assert bool((q > 0.96 * q.cummax(0).values).all())

    def test_others_ask_for_what_they_are_given(self) -> None:
        x_t, t = torch.randn(2, 3), torch.tensor([2.0, 1.0])
        for precond in (ap.CTMPreconditioning(), ap.CMPreconditioning(), ap.TrigFlowPreconditioning()):
            x, level = precond.query(x_t, t, 0.002)
            assert x is x_t
            assert level is t

    def test_dtypes_and_batches(self, images: ShiftedPreconditioning) -> None:
        t, s = torch.tensor([4.0, 2.0]), torch.tensor([0.5, 0.002])
        x_t = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            x, q = images.query(x_t.to(dtype), t, s)
            assert x.dtype == dtype
            assert q.dtype == torch.float32
        wide = images.network_level(t.double(), s.double())
        assert wide.dtype == torch.float64
        torch.testing.assert_close(q.double(), wide, rtol=1e-6, atol=0)  # float32 levels
        torch.testing.assert_close(torch.vmap(images.network_level)(t.double(), s.double()), wide, rtol=1e-12, atol=0)

    def test_levels_out_of_range_are_refused(self, images: ShiftedPreconditioning) -> None:
        with pytest.raises(ValueError, match="jumps must go from t to s"):
            images.query(torch.zeros(1, 2), torch.tensor([90.0]), torch.tensor([1.0]))
        with pytest.raises(ValueError, match="jumps must go from t to s"):
            images.network_level(torch.tensor([1.0]), torch.tensor([2.0]))


def recording_network(calls: list[tuple[Tensor, ...]]) -> Any:
    def network(x: Tensor, *c_noise: Tensor) -> Tensor:
        calls.append((x, *c_noise))
        return torch.tanh(x + c_noise[0].reshape(-1, 1))

    return network


def test_a_student_around_a_network_scales_as_the_fit_did(images: ShiftedPreconditioning) -> None:
    with pytest.raises(ValueError, match=r"sigma_data must be 0\.5, the preconditioning's"):
        ap.ConsistencyModel(recording_network([]), images, sigma_data=1.0)


@pytest.mark.usefixtures("around")
class TestStudents:
    t, s = torch.tensor([80.0, 3.0], dtype=torch.float64), torch.tensor([0.002, 0.5], dtype=torch.float64)
    x_t = t[:, None] * torch.tensor([[0.3, -1.2, 0.7], [1.1, 0.2, -0.4]], dtype=torch.float64)

    def test_the_network_gets_the_same_input_and_a_lower_level(self, images: ShiftedPreconditioning) -> None:
        calls: list[tuple[Tensor, ...]] = []
        student = ap.ConsistencyTrajectoryModel(recording_network(calls), images, sigma_data=0.5)
        x_s = student(self.x_t, self.t, self.s)
        x, c_t, c_s = calls[0]
        torch.testing.assert_close(x, self.x_t / (self.t[:, None] ** 2 + 0.25).sqrt(), rtol=1e-6, atol=0)
        q = images.network_level(self.t, self.s)
        torch.testing.assert_close(c_t, q.log() / 4, rtol=1e-6, atol=0)
        torch.testing.assert_close(c_s, self.s.log() / 4, rtol=1e-6, atol=0)
        assert bool((q < 0.9 * self.t).all())

        # the same on the raw network
        c_skip, c_out = images.on_network(self.t, self.s)
        F = torch.tanh(x + c_t[:, None])
        torch.testing.assert_close(x_s, c_skip[:, None] * self.x_t + c_out[:, None] * F, rtol=1e-6, atol=1e-9)

    def test_denoising_asks_at_t(self, images: ShiftedPreconditioning) -> None:
        calls: list[tuple[Tensor, ...]] = []
        ap.ConsistencyTrajectoryModel(recording_network(calls), images).denoise(self.x_t, self.t)
        torch.testing.assert_close(calls[0][1], self.t.log() / 4, rtol=1e-6, atol=0)

    def test_consistency_model_and_its_diffusers_scheduler(self, images: ShiftedPreconditioning) -> None:
        pytest.importorskip("diffusers")
        calls: list[tuple[Tensor, ...]] = []
        network = recording_network(calls)
        student = ap.ConsistencyModel(network, images, sigma_data=0.5)
        expected = student(self.x_t[:1], self.t[:1])
        scheduler = ap.ConsistencyJumpScheduler.from_student(student, [80.0])
        scheduler.set_timesteps(1)
        (timestep,) = scheduler.timesteps
        output = network(scheduler.scale_model_input(self.x_t[:1], timestep), timestep[None])
        for mine, theirs in zip(calls[0], calls[1], strict=True):
            torch.testing.assert_close(mine, theirs.to(mine), rtol=1e-6, atol=0)  # timesteps are float32
        got = scheduler.step(output, timestep, self.x_t[:1]).prev_sample
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-9)

    def test_gap_at_the_start_is_to_the_answer_that_was_asked_for(self) -> None:
        c = torch.from_numpy(IMAGES)
        precond, teacher = exact_gaussian(IMAGES), ap.GaussianDenoiser(c)
        t, s = torch.tensor([5.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
        x_t = (c + 25).sqrt()[None]
        gap = ap.consistency_gap(teacher, precond, x_t, t, s)
        c_skip, c_out = precond(t, s)
        required = ((c + 1).sqrt() - c_skip * x_t) / c_out
        by_hand = (required - teacher(*precond.query(x_t, t, s))).square().mean().sqrt()
        torch.testing.assert_close(gap.start[0], by_hand, rtol=1e-3, atol=0)  # of 48 Heun steps
        maps = ap.gap_map(
            teacher, {"shifted": precond}, torch.zeros(1, 64).double(), (1 + c / 25).sqrt()[None],
            torch.tensor([5.0, 1.0]), num_steps=48, progress=False,
        )  # fmt: skip
        torch.testing.assert_close(maps.start[0, 0, 1], by_hand, rtol=1e-3, atol=0)


class TestFit:
    def test_passes_seeds_and_the_global_rng(self) -> None:
        data, levels = PROBLEM.sample(64, 0), ap.log_noise_levels(12, 0.01, 20.0)
        seen = 0

        def counting(x: Tensor, t: Tensor) -> Tensor:
            nonlocal seen
            seen += len(x)
            return PROBLEM.denoiser(x, t)

        with global_rng_untouched():
            fit = ShiftedPreconditioning.fit(counting, data, levels, 50, batch_size=16, progress=False)
        assert seen == 50 * (6 * 12 - 5 + 12 * 11 // 2)
        again = ShiftedPreconditioning.fit(PROBLEM.denoiser, data, levels, 50, batch_size=50, progress=False)
        other = ShiftedPreconditioning.fit(PROBLEM.denoiser, data, levels, 50, seed=1, progress=False)
        t, s = torch.meshgrid(levels, levels, indexing="ij")
        t, s = t[t > s], s[t > s]
        for ours, same, different in zip(fit(t, s), again(t, s), other(t, s), strict=True):
            # sums in another order, which a minimisation that stops at 1e-14 of its value hardly sees
            torch.testing.assert_close(ours, same, rtol=1e-4, atol=1e-6)
            assert not torch.allclose(ours, different, rtol=1e-3)

    def test_memory_that_runs_out_is_met_with_smaller_batches(self) -> None:
        data, levels = PROBLEM.sample(64, 0), ap.log_noise_levels(12, 0.01, 20.0)

        def small(x: Tensor, t: Tensor) -> Tensor:
            if len(x) > 20 and t[0] < 1:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            return PROBLEM.denoiser(x, t)

        fits = [
            ShiftedPreconditioning.fit(teacher, data, levels, 50, batch_size, progress=False)
            for teacher, batch_size in ((small, "auto"), (PROBLEM.denoiser, 16))
        ]
        t, s = torch.tensor([10.0, 1.0]), torch.tensor([0.5, 0.1])
        for ours, theirs in zip(*(fit(t, s) for fit in fits), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # sums in another order

    def test_file(self, tmp_path: Path, images: ShiftedPreconditioning) -> None:
        path = tmp_path / "shifted.safetensors"
        images.save(path)
        loaded = ShiftedPreconditioning.load(path)
        t, s = torch.tensor([80.0, 7.0, 0.3]), torch.tensor([0.002, 1.0, 0.1])
        for other in (loaded, copy.deepcopy(images), pickle.loads(pickle.dumps(images)), images.half()):
            for mine, theirs in zip(images(t, s), other(t, s), strict=True):
                assert torch.equal(mine, theirs)
            assert torch.equal(images.network_level(t, s), other.network_level(t, s))

        fresh = exact_gaussian(PROBLEM.variances.numpy())
        fresh.load_state_dict(images.state_dict())
        assert torch.equal(images.network_level(t, s), fresh.network_level(t, s))

        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            header = file.metadata()
        for broken in ({**tensors, "shift": tensors["shift"][1:]}, {k: v for k, v in tensors.items() if k != "shift"}):
            save_file(broken, tmp_path / "broken.safetensors", metadata=header)
            with pytest.raises(ValueError, match="shift must be"):
                ShiftedPreconditioning.load(tmp_path / "broken.safetensors")
        with pytest.raises(ValueError, match="ShiftedPreconditioning"):
            ap.LeastSquaresPreconditioning.load(path)

    def test_bad_input(self) -> None:
        data = PROBLEM.sample(8, 0)
        with pytest.raises(ValueError, match="sigma_data must be positive"):
            ShiftedPreconditioning.fit(PROBLEM.denoiser, data, sigma_data=0.0, progress=False)
        for levels in (ap.log_noise_levels(12), torch.tensor([2.0, 1.01, 1.0])):
            with pytest.raises(ValueError, match=r"at least a factor of 1.05 and at most one of 2.0 apart, got"):
                ShiftedPreconditioning.fit(PROBLEM.denoiser, data, levels, progress=False)
        with pytest.raises(TypeError, match="denoiser must be callable"):
            ShiftedPreconditioning.fit(None, data, progress=False)  # type: ignore[arg-type]

        def explodes(x: Tensor, t: Tensor) -> Tensor:
            return torch.where(t.reshape(-1, 1) < 0.5, torch.nan, x / 2)

        with pytest.raises(ValueError, match=r"finite values, got NaN .* noise level"):
            ShiftedPreconditioning.fit(explodes, data, ap.log_noise_levels(8, 0.1, 10.0), 8, progress=False)


def test_input_scale_keeps_the_networks_input() -> None:
    t, q = torch.tensor([80.0, 1.0]).double(), torch.tensor([8.0, 0.7]).double()
    edm = ap.EDMPreconditioning(0.5)
    torch.testing.assert_close(edm(q).c_in * input_scale(t, q, 0.5), edm(t).c_in, rtol=1e-12, atol=0)
