"""Least-squares jumps against closed forms, ordinary least squares on stored trajectories, and known figures."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from hypothesis import given
from hypothesis import strategies as st
from problems import Array, gaussian_problem, mixture_problem
from safetensors.torch import load_file, save_file
from torch import Tensor

import analytic_precond as ap
from analytic_precond.fitted_preconditionings.follow import FitHeader, Trajectories
from analytic_precond.fitted_preconditionings.jump_regression import JumpTable, regress_samples
from analytic_precond.fitted_preconditionings.least_squares import LeastSquaresPreconditioning
from analytic_precond.fitted_preconditionings.trajectory_moments import trajectory_moments
from analytic_precond.interpolation.spline_table import SplineTable
from analytic_precond.ode.trajectories import Start, trajectory
from analytic_precond.preconditionings.base import Scalings
from analytic_precond.teachers.denoiser import Denoiser

PROBLEM = gaussian_problem()


def best_jump(variances: Array, t: Array | float, s: Array | float) -> tuple[Array, Array]:
    """(c_skip, c_out) by the normal equations, with x_s = f x_t and D = x_t + e x_t per element, E x_t^2 = c + t^2."""
    t, s = (np.asarray(v, dtype=float)[..., None] for v in (t, s))
    q = variances + t**2
    e, f_minus_1 = -(t**2) / q, np.expm1(0.5 * np.log1p((s - t) * (s + t) / q))
    k = (e * q).sum(-1, keepdims=True) / q.sum(-1, keepdims=True)
    c_out = (f_minus_1 * (e - k) * q).sum(-1) / ((e - k) ** 2 * q).sum(-1)
    c_skip = 1 + ((f_minus_1 - c_out[..., None] * (1 + e)) * q).sum(-1) / q[..., :].sum(-1)
    return c_skip, c_out


def from_one_start(denoiser: Denoiser, x_T: Tensor, levels: Tensor) -> LeastSquaresPreconditioning:
    """The fit to given starting points at the noisiest level, all in one batch."""
    start = Start(0, x_T.double(), torch.float64, {})
    moments = trajectory_moments(Trajectories(denoiser, [start], levels.double(), len(x_T)), 1)
    (a, b), _ = regress_samples(moments, "float64")
    header = FitHeader(len(x_T), 0, tuple(x_T.shape[1:]), "float64", "a test")
    return LeastSquaresPreconditioning(
        JumpTable.of(levels.double().numpy(), a, b), header, 0.5, Scalings(*torch.zeros(2, len(levels), len(levels)))
    )


def exact_gaussian(variances: Array, num_levels: int) -> LeastSquaresPreconditioning:
    """The fit to one trajectory whose squares are the second moments: only the ODE and the interpolation are left."""
    c = torch.from_numpy(np.asarray(variances))
    return from_one_start(ap.GaussianDenoiser(c), (c + 80.0**2).sqrt()[None], ap.log_noise_levels(num_levels))


@pytest.fixture(scope="module")
def gaussian() -> LeastSquaresPreconditioning:
    return exact_gaussian(PROBLEM.variances.numpy(), 40)


def random_jumps(num: int, seed: int) -> tuple[Array, Array]:
    """Levels t > s anywhere, the last tenth of them a factor of 1.0002 apart."""
    rng = np.random.default_rng(seed)
    low, high = math.log(0.002), math.log(80)
    t = rng.uniform(low, high, num)
    s = rng.uniform(low, t)
    near = slice(-(num // 10), None)
    t[near] = t[near].clip(low + 2e-4)
    s[near] = t[near] - 2e-4
    return np.exp(t).clip(0.002, 80), np.exp(s).clip(0.002)


# the Gaussian of `problems.gaussian_problem()`: coefficients, and the RMS miss of the untrained jump, this and CTM's
KNOWN = [
    (80.0, 5.0, 0.062508263, 7.6717213, 0.00097, 0.142),
    (80.0, 0.002, 0.0029085515, 37.051322, 0.175, 0.919),
    (5.0, 1.0, 0.20470224, 1.5506265, 0.0320, 0.252),
    (1.0, 0.1, 0.18738172, 0.91275857, 0.0717, 0.147),
    (0.5, 0.002, 0.19974745, 0.83290805, 0.0458, 0.0995),
]


class TestGaussian:
    @pytest.mark.parametrize(("t", "s", "skip", "out", "miss", "ctm_miss"), KNOWN)
    def test_known_figures(
        self, gaussian: LeastSquaresPreconditioning, t: float, s: float, skip: float, out: float, miss: float,
        ctm_miss: float,
    ) -> None:  # fmt: skip
        c = PROBLEM.variances.numpy()
        np.testing.assert_allclose(best_jump(c, t, s), (skip, out), rtol=3e-8)  # eight digits are given
        c_skip, c_out = (v.item() for v in gaussian(t, s))
        # 40 levels: 1e-5 from the ODE and the splines, 2e-5 in the small c_skip of long jumps
        assert c_skip == pytest.approx(skip, rel=2e-5)
        assert c_out == pytest.approx(out, rel=1e-5)

        def rms(c_skip: float, c_out: float) -> float:
            off = np.sqrt((c + s**2) / (c + t**2)) - c_skip - c_out * c / (c + t**2)
            return float(np.sqrt((off**2 * (c + t**2)).mean()))

        assert rms(c_skip, c_out) == pytest.approx(miss, rel=5e-3)  # two or three digits are given
        assert rms(s / t, 1 - s / t) == pytest.approx(ctm_miss, rel=5e-3)

    @pytest.mark.parametrize(
        "variances",
        [PROBLEM.variances.tolist(), tuple(np.arange(1.0, 65) ** -1.5), (25.0, 1e-2, 1e-6), (1.0, 0.9)],
        ids=["six", "images", "spread", "alike"],
    )
    def test_closed_form_between_all_levels(self, variances: Sequence[float]) -> None:
        c = np.array(variances)
        t, s = random_jumps(2000, 0)
        skip, out = best_jump(c, t, s)
        c_skip, c_out = (v.numpy() for v in exact_gaussian(c, 40)(torch.from_numpy(t), torch.from_numpy(s)))
        np.testing.assert_allclose(c_out, out, rtol=1e-4)  # the demand; 2e-5 with the six variances
        np.testing.assert_allclose(c_skip, skip, rtol=1e-4)

    def test_error_falls_with_the_fifth_power_of_the_steps(self) -> None:
        """Dormand and Prince's order; the quintic splines' is sixth."""
        t, s = random_jumps(500, 1)
        _, out = best_jump(PROBLEM.variances.numpy(), t, s)
        errors = []
        for num in (30, 60):
            _, c_out = exact_gaussian(PROBLEM.variances.numpy(), num)(torch.from_numpy(t), torch.from_numpy(s))
            errors.append(np.abs(c_out.numpy() / out - 1).max())
        assert math.log(errors[0] / errors[1]) / math.log(59 / 29) > 4.5

    def test_sampled_fit_is_within_its_standard_errors(self) -> None:
        precond = LeastSquaresPreconditioning.fit(PROBLEM.denoiser, PROBLEM.sample(1024, 0), progress=False)
        grid = precond.levels
        t, s = (v[torch.ones(40, 40).triu(1) > 0].numpy() for v in torch.meshgrid(grid, grid, indexing="ij"))
        upper = torch.ones(40, 40).triu(1) > 0
        expected = best_jump(PROBLEM.variances.numpy(), t, s)
        got = precond(torch.from_numpy(t), torch.from_numpy(s))
        for value, truth, error in zip(got, expected, precond.standard_errors, strict=True):
            z = (value.numpy() - truth) / error[upper].numpy()
            assert 0.2 < np.sqrt((z**2).mean()) < 2.5  # neighbouring pairs share trajectories: few independent z
            relative = error[upper].numpy() / np.abs(truth)
            assert relative.max() < 0.03  # 2048 trajectories of 6 elements

    def test_standard_errors_are_the_spread_between_seeds(self) -> None:
        levels = ap.log_noise_levels(8, 0.01, 20.0)
        fits = [
            LeastSquaresPreconditioning.fit(
                PROBLEM.denoiser, PROBLEM.sample(128, seed), levels, 128, seed=seed, progress=False
            )
            for seed in range(40)
        ]
        i, j = torch.ones(8, 8).triu(1).nonzero().T
        for which in (0, 1):
            spread = torch.stack([fit(levels[i], levels[j])[which] for fit in fits]).std(0)
            told = torch.stack([fit.standard_errors[which][i, j] for fit in fits]).square().mean(0).sqrt()
            # 40 fits know their spread to 11 %; the jackknife of 32 blocks is a little high
            assert bool((told / spread > 0.7).all() & (told / spread < 1.6).all())


def test_white_gaussian_keeps_the_euler_share_and_follows_the_flow() -> None:
    t, s = (torch.from_numpy(v) for v in random_jumps(300, 2))
    for dtype in (torch.float32, torch.float64):
        data = 0.5 * torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=dtype)
        precond = LeastSquaresPreconditioning.fit(ap.GaussianDenoiser(0.25), data, num_trajectories=64, progress=False)
        c_skip, c_out = precond(t, s)
        # D is l x but for rounding, and a is 1 but for what rounding of the sums does to it
        torch.testing.assert_close(c_out, 1 - s / t, rtol=0.02, atol=0)
        # whatever a is, c_skip makes the jump right: 1e-5 of splines
        flow = ((0.25 + s**2) / (0.25 + t**2)).sqrt()
        torch.testing.assert_close(c_skip + 0.25 / (0.25 + t**2) * c_out, flow, rtol=2e-5, atol=0)


def test_ordinary_least_squares_on_stored_trajectories() -> None:
    """A mixture of Gaussians, regressed by numpy on the states and outputs themselves."""
    problem, levels = mixture_problem(), ap.log_noise_levels(12, 0.05, 10.0)
    x_T = problem.sample(300, 0) + 10 * torch.randn(300, 1, generator=torch.Generator().manual_seed(1)).double()
    precond = from_one_start(problem.denoiser, x_T, levels)
    states = list(trajectory(problem.denoiser, Start(0, x_T, torch.float64, {}), levels.tolist()))
    for i in range(11):
        design = torch.cat([states[i].x, states[i].denoised], 1).numpy()
        for j in range(i + 1, 12):
            expected = np.linalg.lstsq(design, states[j].x[:, 0].numpy())[0]
            got = [c.item() for c in precond(levels[i].item(), levels[j].item())]
            # the ridge: 1e-8 over D's own part of its square
            np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-7)


def test_trajectories_have_the_fifth_order() -> None:
    x_T = PROBLEM.sample(4, 0) + 80 * torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).double()
    errors = []
    for num in (30, 60):
        levels = ap.log_noise_levels(num)
        *_, last = trajectory(PROBLEM.denoiser, Start(0, x_T, torch.float64, {}), levels.tolist())
        errors.append((last.x - PROBLEM.flow(x_T, 80.0, 0.002)).norm().item())
    assert 4.5 < math.log(errors[0] / errors[1]) / math.log(59 / 29) < 6.5


def test_output_that_does_not_reach_the_target_keeps_half_of_the_euler_share() -> None:
    """D is noise that has nothing to do with where the trajectory goes."""

    levels = ap.log_noise_levels(6, 0.1, 10.0)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return (1e3 * x).sin() * float(bool((levels == t[0]).any()))

    x_T = 10 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0)).double()
    precond = from_one_start(denoiser, x_T, levels)
    # one step sees D once, at its start; several steps on, D is lost
    assert precond(levels[0].item(), levels[4].item()).c_out.item() == pytest.approx(0.5 * (1 - levels[4] / levels[0]))


class TestStructure:
    """What holds for any table, exact to rounding."""

    @given(st.data())
    def test_boundary_and_read_out(self, data: st.DataObject) -> None:
        num = data.draw(st.integers(2, 9))
        numbers = st.lists(st.floats(-5, 5), min_size=2 * num**2, max_size=2 * num**2)
        values = np.array(data.draw(numbers)).reshape(2, 1, num, num)
        diagonal = np.eye(num) > 0
        a, b = np.where(diagonal, 1, values[0]), np.where(diagonal, 0, values[1])
        levels = ap.log_noise_levels(num, 0.01, 10.0)
        table = JumpTable.of(levels.numpy(), a, b)
        places = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=20))
        t = (0.01 * 1000 ** torch.tensor(places, dtype=torch.float64)).clamp(0.01, 10.0)

        c_skip, c_out = table.jumps(t, t)
        assert torch.equal(c_skip, torch.ones_like(c_skip))
        assert torch.equal(c_out, torch.zeros_like(c_out))
        _, (skip_slope, out_slope) = torch.func.jvp(lambda s: tuple(table.jumps(t, s)), (t,), (torch.ones_like(t),))
        torch.testing.assert_close(-t * skip_slope[0], -torch.ones_like(t))  # x - t dx/ds = D for any D
        torch.testing.assert_close(-t * out_slope[0], torch.ones_like(t))

        i, j = torch.meshgrid(torch.arange(num), torch.arange(num), indexing="ij")
        tau = 1 - levels[j] / levels[i]
        c_skip, c_out = table.jumps(levels[i], levels[j])
        # the tables are met at the levels, those above t too; relative to the largest entries of a rough table
        scale = float(np.abs(values).max() + 1) * (levels[0] / levels[-1]).item()
        torch.testing.assert_close(c_out[0], tau * torch.from_numpy(a[0]), rtol=0, atol=1e-11 * scale)
        torch.testing.assert_close(c_skip[0], 1 - tau + tau * torch.from_numpy(b[0]), rtol=0, atol=1e-11 * scale)

    def test_tables_reproduce_polynomials(self) -> None:
        levels = ap.log_noise_levels(9, 0.01, 10.0)
        lam = -np.log(levels.numpy())

        def f(t: Any, s: Any) -> Any:
            return (1 + t - 0.1 * t**5) * (2 - s**3 + 0.2 * s**5)

        values = f(lam[:, None], lam[None])[None]
        table = SplineTable(levels, torch.from_numpy(SplineTable.control_points(levels.numpy(), values)))
        t, s = torch.rand(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6.9 - 4.6
        expected = f(-t, -s)
        torch.testing.assert_close(table(t.exp(), s.exp())[0], expected, rtol=1e-9, atol=1e-9 * expected.abs().max())

    def test_near_the_diagonal_no_digit_is_lost(self, gaussian: LeastSquaresPreconditioning) -> None:
        t = torch.tensor([80.0, 3.7, 0.5, 0.0031])
        s = t * (1 - 2e-4)  # what float32 levels are, not what they were meant to be, counts
        _, expected = best_jump(PROBLEM.variances.numpy(), t.double().numpy(), s.double().numpy())
        np.testing.assert_allclose(gaussian(t, s).c_out.numpy(), expected, rtol=1e-6)

    def test_derivatives(self, gaussian: LeastSquaresPreconditioning) -> None:
        t = torch.tensor([5.0, 0.3, 70.0], dtype=torch.float64, requires_grad=True)
        s = torch.tensor([1.0, 0.11, 0.0021], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda t, s: tuple(gaussian(t, s)), (t, s))

    def test_compiles_into_one_graph_and_maps(self, gaussian: LeastSquaresPreconditioning) -> None:
        x, D = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
        t, s = torch.tensor([80.0, 5.0, 1.0, 0.5, 0.01]), torch.tensor([0.002, 1.0, 1.0, 0.1, 0.0099])
        expected = gaussian.jump(x, D, t, s)
        compiled = torch.compile(gaussian.jump, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, D, t, s), expected)
        mapped = torch.vmap(lambda x, D, t, s: gaussian.jump(x[None], D[None], t, s)[0])
        torch.testing.assert_close(mapped(x, D, t, s), expected)

    def test_keeps_its_precision_and_travels(self, gaussian: LeastSquaresPreconditioning) -> None:
        expected = gaussian(5.0, 1.0)
        for other in (copy.deepcopy(gaussian).half(), pickle.loads(pickle.dumps(gaussian)).bfloat16()):
            assert other(5.0, 1.0) == expected
        other = exact_gaussian(np.array([1.0, 0.5]), 40)
        other.load_state_dict(gaussian.state_dict())
        assert other(5.0, 1.0) == expected
        narrow = from_one_start(ap.GaussianDenoiser(1.0), torch.ones(1, 2), ap.log_noise_levels(40, 0.1, 10.0))
        narrow.load_state_dict(gaussian.state_dict())
        assert (narrow.sigma_max, narrow.sigma_min) == (80.0, 0.002)
        rounded = {name: value.half() for name, value in gaussian.state_dict().items()}
        with pytest.raises(RuntimeError, match=r"must be torch.float64, got torch.float16: save the student uncast"):
            other.load_state_dict(rounded)

    def test_levels_outside_are_refused(self, gaussian: LeastSquaresPreconditioning) -> None:
        for t, s in ((81.0, 1.0), (1.0, 0.0019), (1.0, 1.1)):
            with pytest.raises(ValueError, match=r"0.002 <= s <= t <= 80"):
                gaussian(t, s)
        levels = ap.karras_noise_levels(18).float()  # whose ends are rounded
        assert bool(torch.isfinite(gaussian(levels[0], levels[-1]).c_out))

    @pytest.mark.usefixtures("around")
    def test_students(self, gaussian: LeastSquaresPreconditioning) -> None:
        """A student that is its teacher jumps with the closed form's coefficients."""
        c = PROBLEM.variances.float()
        v = 0.25

        def network(x: Tensor, c_noise: Tensor, *_: Tensor) -> Tensor:
            t = (4 * c_noise).exp()[:, None]
            x = x * (t**2 + v).sqrt()
            return (c / (c + t**2) - v / (t**2 + v)) * x * (t**2 + v).sqrt() / (t * math.sqrt(v))

        x, t = torch.ones(2, 6), torch.tensor([5.0, 0.5])
        skip, out = (torch.from_numpy(k)[:, None] for k in best_jump(c.numpy(), t.numpy(), np.array([1.0, 0.002])))
        expected = (skip + out * c / (c + t[:, None] ** 2)).float()
        student = ap.ConsistencyTrajectoryModel(network, gaussian)
        torch.testing.assert_close(student(x, t, torch.tensor([1.0, 0.002])), expected, rtol=2e-5, atol=1e-5)
        model = ap.ConsistencyModel(network, gaussian)
        torch.testing.assert_close(model(x, t)[1], expected[1], rtol=2e-5, atol=1e-5)


class TestFit:
    levels = ap.log_noise_levels(8, 0.01, 20.0)

    def fit(self, denoiser: Denoiser | None = None, data: object = None, **options: Any) -> LeastSquaresPreconditioning:
        denoiser = PROBLEM.denoiser if denoiser is None else denoiser
        data = PROBLEM.sample(64, 0) if data is None else data
        options = {"levels": self.levels, "num_trajectories": 64, "progress": False} | options
        return LeastSquaresPreconditioning.fit(denoiser, data, **options)

    def table(self, precond: LeastSquaresPreconditioning) -> Tensor:
        return torch.stack(list(precond(self.levels[0].item(), self.levels)))

    def test_batches_and_seeds(self) -> None:
        with global_rng_untouched():
            whole = self.table(self.fit())
            split = self.table(self.fit(batch_size=7))
        torch.testing.assert_close(split, whole, rtol=1e-9, atol=1e-12)  # sums in another order, over D's own part
        assert torch.equal(self.table(self.fit()), whole)
        assert not torch.equal(self.table(self.fit(seed=1)), whole)

    def test_teacher_passes(self) -> None:
        passes = 0

        def denoiser(x: Tensor, t: Tensor) -> Tensor:
            nonlocal passes
            passes += len(x)
            return PROBLEM.denoiser(x, t)

        assert self.fit(denoiser).header.num_trajectories == 64
        assert passes == 64 * (6 * 8 - 5)

    def test_conditions_reach_the_teacher(self) -> None:
        """Each half of the data has a variance of its own, and the teacher is told which."""

        def denoiser(x: Tensor, t: Tensor, variance: Tensor) -> Tensor:
            return (variance / (variance + t**2))[:, None] * x

        variance = torch.tensor([4.0, 0.01], dtype=torch.float64).repeat(500)
        x = variance.sqrt()[:, None] * torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)).double()
        dataset = torch.utils.data.TensorDataset(x, variance)
        precond = self.fit(
            denoiser, dataset, num_trajectories=4000, batch_size=500, condition=lambda label: {"variance": label}
        )
        t, s = np.array([20.0, 5.0]), np.array([1.0, 0.1])
        expected = best_jump(np.array([4.0, 0.01]), t, s)
        for got, value in zip(precond(torch.from_numpy(t), torch.from_numpy(s)), expected, strict=True):
            np.testing.assert_allclose(got.numpy(), value, rtol=0.1)  # 4000 trajectories of 3 elements; 8 levels

    def test_float32_teacher(self) -> None:
        wide, narrow = (self.table(self.fit(data=PROBLEM.sample(64, 0).to(d))) for d in (torch.float64, torch.float32))
        torch.testing.assert_close(narrow, wide, rtol=1e-3, atol=1e-6)  # 1e-7 of D over D's own part

    def test_any_number_of_levels(self) -> None:
        for num in (2, 3, 5, 6, 7):
            levels = ap.log_noise_levels(num, 0.5, 5.0)
            c_skip, c_out = self.fit(levels=levels)(levels[0].item(), levels[1:])
            skip, out = best_jump(PROBLEM.variances.numpy(), 5.0, levels[1:].numpy())
            # one step of ln 10 is long, and 64 trajectories are few
            np.testing.assert_allclose(c_out.numpy(), out, rtol=0.2)
            np.testing.assert_allclose(c_skip.numpy(), skip, rtol=0.2)

    def test_one_trajectory_has_no_standard_error(self, tmp_path: Path) -> None:
        precond = self.fit(num_trajectories=1)
        assert bool(precond.standard_errors.c_out.triu(1).isinf().any())
        precond.save(tmp_path / "one.safetensors")
        assert LeastSquaresPreconditioning.load(tmp_path / "one.safetensors").header == precond.header

    def test_data_that_run_out(self) -> None:
        with pytest.warns(UserWarning, match="ran out after 30 of 64"):
            precond = self.fit(data=(batch for batch in PROBLEM.sample(30, 0).split(10)))
        assert precond.header.num_trajectories == 30

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"denoiser": 3}, TypeError, "denoiser must be callable"),
            ({"levels": torch.tensor([1.0, 2.0])}, ValueError, "strictly decreasing"),
            ({"num_trajectories": 0}, ValueError, "num_trajectories must be at least 1"),
            ({"batch_size": 2.0}, TypeError, "batch_size must be an int"),
            ({"seed": -1}, ValueError, "seed must be at least 0"),
            ({"seed": 2**64}, ValueError, r"seed must be below 2\*\*64"),
            ({"sigma_data": 0.0}, ValueError, "sigma_data must be positive"),
            ({"condition": 1}, TypeError, "condition must be callable"),
            ({"condition": lambda: 1}, TypeError, "condition must return a dict"),
            ({"description": 1}, TypeError, "description must be a str"),
            ({"data": torch.arange(4)}, TypeError, "floating-point"),
            (
                {"denoiser": ap.GaussianDenoiser(1.0), "data": [torch.zeros(2, 3), torch.zeros(2, 4)]},
                ValueError,
                r"one shape, got \(4,\) in batch 1",
            ),
            ({"denoiser": lambda x, t: x[:, :1]}, ValueError, "must return x's shape"),
            ({"denoiser": lambda x, t: x / (t < 1)[:, None]}, ValueError, r"finite values.*index 0"),
        ],
    )
    def test_bad_input(self, change: dict[str, Any], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            self.fit(**change)


class TestFile:
    @pytest.fixture
    def precond(self) -> LeastSquaresPreconditioning:
        return LeastSquaresPreconditioning.fit(
            PROBLEM.denoiser, PROBLEM.sample(16, 0), ap.log_noise_levels(7, 0.01, 20.0), 16, sigma_data=0.7,
            progress=False, description="six Gaussians",
        )  # fmt: skip

    def test_round_trip(self, precond: LeastSquaresPreconditioning, tmp_path: Path) -> None:
        path = tmp_path / "jumps.safetensors"
        precond.save(path)
        other = LeastSquaresPreconditioning.load(path)
        assert other.header == precond.header == FitHeader(16, 0, (6,), "float64", "six Gaussians")
        assert other.sigma_data == 0.7
        for a, b in zip(
            (*other.state_dict().values(), *other.standard_errors),
            (*precond.state_dict().values(), *precond.standard_errors),
            strict=True,
        ):
            assert torch.equal(a, b)
        assert "six Gaussians" in repr(other)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda t: t.pop("control"), "levels and control are needed"),
            (lambda t: t.pop("c_out_stderr"), "c_out_stderr must be .* got nothing"),
            (lambda t: t.update(levels=t["levels"].flip(0)), "strictly decreasing"),
            (lambda t: t.update(levels=t["levels"].float()), "levels must be torch.float64"),
            (lambda t: t.update(control=t["control"][1:]), r"control must be .* of shape \(7, 7, 2\)"),
            (lambda t: t.update(control=t["control"][..., :1]), "a and b for each group, got 1"),
            (lambda t: t["control"].fill_(torch.nan), "control must be finite"),
        ],
    )
    def test_damaged_tables(
        self, precond: LeastSquaresPreconditioning, tmp_path: Path, spoil: Any, message: str
    ) -> None:
        path = tmp_path / "jumps.safetensors"
        precond.save(path)
        self.rewrite(path, spoil)
        with pytest.raises(ValueError, match=f"expected a LeastSquaresPreconditioning in .*{message}"):
            LeastSquaresPreconditioning.load(path)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ('"seed": 0', '"seed": "a"', "'seed' must be of type int"),
            ('"sample_shape": [6]', '"sample_shape": [0]', "'sample_shape' must hold positive integers"),
            ('"sigma_data": 0.7', '"sigma_data": "?"', "'sigma_data' must be a number"),
        ],
    )
    def test_damaged_header(
        self, precond: LeastSquaresPreconditioning, tmp_path: Path, old: str, new: str, message: str
    ) -> None:
        path = tmp_path / "jumps.safetensors"
        precond.save(path)
        self.rewrite(path, lambda tensors: None, lambda header: header.replace(old, new))
        with pytest.raises(ValueError, match=message):
            LeastSquaresPreconditioning.load(path)

    def test_foreign_files(self, precond: LeastSquaresPreconditioning, tmp_path: Path) -> None:
        path = tmp_path / "jumps.safetensors"
        with pytest.raises(FileNotFoundError, match="write it with save"):
            LeastSquaresPreconditioning.load(path)
        save_file({"levels": torch.ones(3)}, path)
        with pytest.raises(ValueError, match="not 'LeastSquaresPreconditioning 1'"):
            LeastSquaresPreconditioning.load(path)
        precond.save(path)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(ValueError, match="damaged"):
            LeastSquaresPreconditioning.load(path)

    @staticmethod
    def rewrite(path: Path, spoil: Any, spoil_header: Any = lambda header: header) -> None:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        spoil(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, path, {"header": spoil_header(metadata["header"])})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda(gaussian: LeastSquaresPreconditioning) -> None:
    data = PROBLEM.sample(64, 0)
    options: dict[str, Any] = {"levels": ap.log_noise_levels(8, 0.01, 20.0), "num_trajectories": 64, "progress": False}
    here = LeastSquaresPreconditioning.fit(PROBLEM.denoiser, data, **options)
    there = LeastSquaresPreconditioning.fit(copy.deepcopy(PROBLEM.denoiser).cuda(), data, **options)
    torch.testing.assert_close(there(5.0, 1.0), here(5.0, 1.0), rtol=1e-9, atol=0)
    t, s = (torch.from_numpy(v).cuda() for v in random_jumps(100, 0))
    for a, b in zip(copy.deepcopy(gaussian).cuda()(t, s), gaussian(t.cpu(), s.cpu()), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-12, atol=1e-14)
