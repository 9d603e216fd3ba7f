"""Per-mode jumps against closed forms, scipy's cosine transform, and ordinary least squares."""

from __future__ import annotations

import copy
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.fft import dctn
from torch import Tensor

import analytic_precond as ap
from analytic_precond.fitted_preconditionings.bases import (
    CosineBasis,
    MatrixBasis,
    OrthonormalBasis,
    choose_basis,
    tie_modes,
)
from analytic_precond.fitted_preconditionings.follow import Trajectories
from analytic_precond.fitted_preconditionings.jump_regression import regress_groups, regress_samples
from analytic_precond.fitted_preconditionings.least_squares import LeastSquaresPreconditioning
from analytic_precond.fitted_preconditionings.per_mode import PerModePreconditioning
from analytic_precond.fitted_preconditionings.trajectory_moments import trajectory_moments
from analytic_precond.ode.trajectories import Start, trajectory

SMALL = 0.002**2


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class GaussianModes:
    """Independent Gaussians in the modes of a basis: the teacher, its data and its flow in closed form."""

    def __init__(self, basis: OrthonormalBasis, variances: Tensor) -> None:
        self.basis, self.c = basis, variances.double()

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """Multiply modes by functions of c and of one level per sample."""
        return self.basis.from_modes(factor * self.basis.to_modes(x.double())).to(x.dtype)

    def levels(self, t: Tensor) -> Tensor:
        return t.double().reshape(-1, *[1] * len(self.basis.mode_shape))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scaled(x, self.c / (self.c + self.levels(t) ** 2))

    def sample(self, num: int, seed: int) -> Tensor:
        noise = torch.randn(num, *self.basis.mode_shape, generator=seeded(seed), dtype=torch.float64)
        return self.basis.from_modes(self.c.sqrt() * noise)

    def worst_miss(self, precond: PerModePreconditioning) -> float:
        """The largest error of any mode after random jumps, in its own standard deviations."""
        generator = seeded(9)
        low, high = math.log(0.002), math.log(80)
        t = low + (high - low) * torch.rand(400, generator=generator, dtype=torch.float64)
        s = (low + (t - low) * torch.rand(400, generator=generator, dtype=torch.float64)).exp().clamp(min=0.002)
        t = t.exp().clamp(max=80.0)
        z = torch.randn(400, *self.basis.mode_shape, generator=generator, dtype=torch.float64)
        sd_t, sd_s = ((self.c + self.levels(level) ** 2).sqrt() for level in (t, s))
        x_t = self.basis.from_modes(sd_t * z)
        x_s = precond.jump(x_t, self(x_t, t), t, s)
        return float((self.basis.to_modes(x_s) / sd_s - z).abs().max())


def spectrum(*shape: int, channel: float = 0.1) -> Tensor:
    """Image-like variances of modes (C, H, W) or (H, W)."""
    index = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    channels = channel ** index[0] if len(shape) == 3 else 1.0
    return channels * 4 * (1 + index[-1] ** 2 + index[-2] ** 2) ** -1.5


class TestBases:
    @pytest.mark.parametrize("shape", [(4, 4), (3, 5, 7), (1, 1, 6), (4, 8, 3)])
    def test_cosines_are_scipys(self, shape: tuple[int, ...]) -> None:
        x = torch.randn(2, *shape, generator=seeded(0), dtype=torch.float64)
        for mix in (False, True) if len(shape) == 3 else (False,):
            basis = CosineBasis(shape, mix)
            modes = basis.to_modes(x)
            axes = tuple(range(1 if mix else x.ndim - 2, x.ndim))
            np.testing.assert_allclose(modes.numpy(), dctn(x.numpy(), norm="ortho", axes=axes), atol=1e-13)
            torch.testing.assert_close(basis.from_modes(modes), x)
            assert modes.square().sum().item() == pytest.approx(x.square().sum().item())

    def test_colours(self) -> None:
        """Red, green and blue become grey, red against blue, and green against both."""
        basis = CosineBasis((3, 1, 1), mix_channels=True)
        grey = basis.to_modes(torch.tensor([1.0, 1.0, 1.0]).reshape(1, 3, 1, 1)).flatten()
        torch.testing.assert_close(grey, torch.tensor([math.sqrt(3), 0.0, 0.0]), rtol=0, atol=1e-6)
        green = basis.to_modes(torch.tensor([-1.0, 2.0, -1.0]).reshape(1, 3, 1, 1)).flatten()
        torch.testing.assert_close(green.abs(), torch.tensor([0.0, 0.0, math.sqrt(6)]), rtol=0, atol=1e-6)

    def test_channels_are_mixed_where_that_separates_modes(self) -> None:
        grey = torch.randn(500, 1, 4, 4, generator=seeded(0))
        colours = grey + 0.1 * torch.randn(500, 3, 4, 4, generator=seeded(1))
        separate = torch.tensor([1.0, 0.1, 0.01])[:, None, None] * torch.randn(500, 3, 4, 4, generator=seeded(2))
        for data, mixed in ((colours, True), (separate, False)):
            basis, variances = choose_basis("dct", data.split(100), SMALL)
            assert isinstance(basis, CosineBasis)
            assert basis.mix_channels == mixed
            expected = dctn(data.numpy(), norm="ortho", axes=(1, 2, 3) if mixed else (2, 3)).var(0)
            np.testing.assert_allclose(variances.numpy(), expected, rtol=1e-4)

    def test_principal_axes(self) -> None:
        data = torch.randn(300, 2, 3, generator=seeded(0)) * torch.tensor([3.0, 1.0, 0.1]) + 5
        basis, variances = choose_basis("pca", data.split(70), SMALL)
        assert isinstance(basis, MatrixBasis)
        _, sd, axes = np.linalg.svd(data.flatten(1).double().numpy() - data.flatten(1).double().numpy().mean(0))
        np.testing.assert_allclose(variances.numpy(), sd**2 / 300, rtol=1e-6)
        np.testing.assert_allclose(np.abs(axes @ basis.matrix.numpy()), np.eye(6), atol=1e-6)

    @given(st.integers(1, 4), st.integers(1, 30), st.integers(1, 30), st.integers(0, 99), st.booleans())
    def test_ties(self, channels: int, height: int, width: int, seed: int, vector: bool) -> None:
        c = torch.randn(channels, height, width, generator=seeded(seed), dtype=torch.float64).mul(4).exp()
        c[:, ::5] = 0
        c = c.flatten() if vector else c
        groups = tie_modes(c, SMALL).reshape(c.shape)
        num = int(groups.max()) + 1
        assert len(groups.unique()) == num <= 256
        per_channel = (
            [(c, groups, 256)] if vector else [(*pair, 256 // channels) for pair in zip(c, groups, strict=True)]
        )
        seen: set[int] = set()
        for own_c, own, most in per_channel:
            assert not seen & set(own.flatten().tolist())  # no group spans two channels
            seen |= set(own.flatten().tolist())
            if own_c.numel() <= most:
                assert len(own.unique()) == own_c.numel()
                continue
            log = (own_c.flatten() + SMALL).log()
            width_of_bin = (log.max() - log.min()) / most
            for g in own.unique():
                assert float(log[own.flatten() == g].max() - log[own.flatten() == g].min()) <= width_of_bin * 1.0001


class TestGaussian:
    # 1e-4 of each mode's own standard deviation: the demand; 5e-5 come from interpolation, in the longest jumps
    @pytest.mark.parametrize("mix", [False, True])
    def test_cosine_modes(self, mix: bool) -> None:
        problem = GaussianModes(CosineBasis((3, 6, 5), mix), spectrum(3, 6, 5))
        precond = PerModePreconditioning.fit(problem, problem.sample(500, 0), num_trajectories=64, progress=False)
        assert isinstance(precond.basis, CosineBasis)
        assert precond.basis.mix_channels == mix
        assert problem.worst_miss(precond) < 1e-4

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_rank_deficient(self, dtype: torch.dtype) -> None:
        c = spectrum(6, 5)
        c[3:], c[0, 0] = 0, 0
        problem = GaussianModes(CosineBasis((6, 5)), c)
        data = problem.sample(64, 0).to(dtype)
        precond = PerModePreconditioning.fit(problem, data, num_trajectories=64, progress=False)
        assert problem.worst_miss(precond) < 1e-4
        # c_out of modes without variance is that of whole samples, c_skip that of the flow: s / t
        whole = LeastSquaresPreconditioning.fit(problem, data, num_trajectories=64, progress=False)
        c_skip, c_out = precond(20.0, 0.1)
        torch.testing.assert_close(c_skip[3:], torch.full_like(c_skip[3:], 0.005), rtol=1e-4, atol=0)
        torch.testing.assert_close(c_out[3:], whole(20.0, 0.1).c_out.expand(3, 5), rtol=2e-3, atol=0)

    def test_tiny_variances(self) -> None:
        problem = GaussianModes(CosineBasis((5, 4)), 1e-9 * spectrum(5, 4))
        precond = PerModePreconditioning.fit(problem, problem.sample(64, 0), num_trajectories=64, progress=False)
        assert problem.worst_miss(precond) < 1e-4

    def test_given_basis(self) -> None:
        Q = torch.linalg.qr(torch.randn(12, 12, generator=seeded(0), dtype=torch.float64)).Q
        problem = GaussianModes(MatrixBasis((2, 3, 2), Q), torch.linspace(0, 3, 12) ** 4)
        precond = PerModePreconditioning.fit(
            problem, problem.sample(64, 0), num_trajectories=64, basis=Q, progress=False
        )
        assert problem.worst_miss(precond) < 1e-4

    def test_principal_axes(self) -> None:
        """Data whose sample covariance is the teacher's: all signs of the modes."""
        Q = torch.linalg.qr(torch.randn(5, 5, generator=seeded(0), dtype=torch.float64)).Q
        c = torch.tensor([4.0, 1.0, 0.3, 0.01, 0.0])
        problem = GaussianModes(MatrixBasis((5,), Q), c)
        signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 5)
        precond = PerModePreconditioning.fit(
            problem, problem.basis.from_modes(c.sqrt() * signs), num_trajectories=32, basis="pca", progress=False
        )
        assert problem.worst_miss(precond) < 1e-4

    def test_tied_modes_are_nearly_exact(self) -> None:
        """1024 modes share at most 256 pairs of coefficients."""
        problem = GaussianModes(CosineBasis((32, 32)), spectrum(32, 32))
        precond = PerModePreconditioning.fit(
            problem, problem.sample(256, 0), ap.log_noise_levels(20), 256, progress=False
        )
        assert precond.table.num_jumps <= 256
        x_T = 80 * torch.randn(64, 32, 32, generator=seeded(1), dtype=torch.float64)
        D, expected = (
            problem(x_T, torch.full((64,), 80.0)),
            problem.scaled(x_T, (problem.c / (problem.c + 6400)).sqrt()),
        )

        def miss(x_s: Tensor) -> float:
            return float((x_s - expected).norm() / expected.norm())

        assert miss(precond.jump(x_T, D, 80.0, 0.002)) < 0.02  # 256 samples know a variance to 9 %, 2048 to 3 %
        assert miss(ap.CTMPreconditioning().jump(x_T, D, 80.0, 0.002)) > 0.9


class Bent:
    """Six independent coordinates of two-point data, bent differently, in a mixing basis."""

    def __init__(self) -> None:
        self.basis = CosineBasis((2, 3))
        self.points = torch.tensor([[1.0, 0.5, 0.3], [0.2, 0.1, 0.05]], dtype=torch.float64)

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        modes = self.basis.to_modes(x.double())
        t = t.double()[:, None, None]
        return self.basis.from_modes(self.points * (self.points * modes / t**2).tanh()).to(x.dtype)

    def starts(self, num: int) -> Tensor:
        return 10 * torch.randn(num, 2, 3, generator=seeded(0), dtype=torch.float64)


class TestRegression:
    levels = ap.log_noise_levels(10, 0.02, 10.0)

    def moments(self, num: int) -> tuple[Any, Tensor]:
        bent, x_T = Bent(), Bent().starts(num)
        trajectories = Trajectories(bent, [Start(0, x_T, torch.float64, {})], self.levels, num)
        modes = [torch.tensor([k]) for k in range(6)]
        return trajectory_moments(trajectories, 8, modes, lambda x: bent.basis.to_modes(x).flatten(1)), x_T

    def test_each_mode_is_regressed_by_itself(self) -> None:
        moments, x_T = self.moments(2000)
        regression = regress_groups(moments, "float64")
        (whole, _), bent = regress_samples(moments.of_whole_samples(), "float64"), Bent()
        states = list(trajectory(bent, Start(0, x_T, torch.float64, {}), self.levels.tolist()))
        near, pairs = 0, 0
        for i in range(10):
            x, denoised = (bent.basis.to_modes(v).flatten(1).numpy() for v in (states[i].x, states[i].denoised))
            for j in range(i + 1, 10):
                target = bent.basis.to_modes(states[j].x).flatten(1).numpy()
                ratio = (self.levels[j] / self.levels[i]).item()
                for k in range(6):
                    D = denoised[:, k]
                    own = np.linalg.lstsq(np.stack([x[:, k], D], 1), target[:, k], rcond=None)[0][1] / (1 - ratio)
                    a, b = regression.a[k, i, j], regression.b[k, i, j]
                    low, high = sorted((max(own, 0.5), float(whole.a[0, i, j])))
                    assert low - 1e-4 < a < high + 1e-4  # between its own and that of whole samples
                    signal = np.mean((D - x[:, k] * (D @ x[:, k]) / (x[:, k] @ x[:, k])) ** 2)
                    if signal > 1e-3:  # more than a network's errors, 0.03^2 of at most the data's mean square 0.24
                        near, pairs = near + (abs(a - max(own, 0.5)) < 0.1 * (high - low) + 0.01), pairs + 1
                    residual = target[:, k] - (ratio + (1 - ratio) * b) * x[:, k] - (1 - ratio) * a * D
                    assert abs((residual * x[:, k]).mean()) < 1e-9 * (x[:, k] ** 2).mean()  # b is a regression's
        assert near > 0.8 * pairs > 40  # 2000 trajectories tell most modes from the whole

    def test_noise_is_drawn_to_whole_samples(self) -> None:
        """With 16 trajectories a mode's own a is mostly noise, with 4000 hardly."""
        (few, _), (many, _) = self.moments(16), self.moments(4000)
        truth = regress_groups(many, "float64").a
        drawn = regress_groups(few, "float64").a
        alone = np.concatenate([regress_samples(part, "float64")[0].a for part in self.per_mode(few)])
        upper = np.triu(np.ones((10, 10)), 1) > 0
        error, own_error = (np.median(np.abs(a - truth)[:, upper]) for a in (drawn, alone))
        assert error < 0.1 * own_error

    @staticmethod
    def per_mode(moments: Any) -> list[Any]:
        parts = (moments.xx, moments.Ex, moments.EE)
        return [
            type(moments)(moments.levels, moments.counts, moments.sizes[k : k + 1], *(p[:, k : k + 1] for p in parts))
            for k in range(6)
        ]

    def test_modes_add_up_to_whole_samples(self) -> None:
        moments, x_T = self.moments(50)
        plain = trajectory_moments(Trajectories(Bent(), [Start(0, x_T, torch.float64, {})], self.levels, 50), 8)
        whole = moments.of_whole_samples()
        for name in ("xx", "Ex", "EE", "sizes", "counts"):
            np.testing.assert_allclose(getattr(whole, name), getattr(plain, name), rtol=1e-10, atol=1e-12)


@pytest.fixture(scope="module")
def problem() -> GaussianModes:
    return GaussianModes(CosineBasis((3, 4, 5), True), spectrum(3, 4, 5))


@pytest.fixture(scope="module")
def precond(problem: GaussianModes) -> PerModePreconditioning:
    return PerModePreconditioning.fit(
        problem, problem.sample(200, 0), ap.log_noise_levels(12, 0.01, 20.0), 64, sigma_data=0.7, progress=False
    )


T, S = torch.tensor([20.0, 5.0, 1.0, 0.5, 0.0101]), torch.tensor([0.01, 1.0, 0.9, 0.1, 0.01])


def batch(seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 5, 3, 4, 5, generator=seeded(seed)).to(dtype).unbind()  # type: ignore[return-value]


class TestJump:
    def test_boundary_and_read_out(self, precond: PerModePreconditioning) -> None:
        x, D = batch(0)
        assert torch.equal(precond.jump(x, D, T, T), x)  # to the bit, whatever the basis rounds
        x, D, t = x.double(), D.double(), T.double()
        _, slope = torch.func.jvp(lambda s: precond.jump(x, D, t, s), (t,), (torch.ones_like(t),))
        torch.testing.assert_close(x - t.reshape(-1, 1, 1, 1) * slope, D, rtol=1e-12, atol=1e-12)

    def test_coefficients_are_those_of_the_jump(self, precond: PerModePreconditioning) -> None:
        x, D = batch(1, torch.float64)
        c_skip, c_out = precond(T.double(), S.double())
        assert c_skip.shape == (5, 3, 4, 5)
        basis = CosineBasis((3, 4, 5), True)
        expected = basis.from_modes(c_skip * basis.to_modes(x) + c_out * basis.to_modes(D))
        torch.testing.assert_close(precond.jump(x, D, T, S), expected, rtol=1e-10, atol=1e-10)
        one = precond(5.0, 1.0)
        assert one.c_skip.shape == (3, 4, 5)
        torch.testing.assert_close(one.c_skip, precond(T[1:2].double(), S[1:2].double()).c_skip[0])

    def test_on_network(self, precond: PerModePreconditioning) -> None:
        """The same jump from a raw network's output."""
        x, F = batch(2, torch.float64)
        t, s = T.double(), S.double()
        edm = ap.EDMPreconditioning(0.7)(t)
        D = edm.c_skip.reshape(-1, 1, 1, 1) * x + edm.c_out.reshape(-1, 1, 1, 1) * F
        c_skip, c_out = precond.on_network(t, s)
        basis = precond.basis
        got = basis.from_modes(c_skip * basis.to_modes(x) + c_out * basis.to_modes(F))
        torch.testing.assert_close(got, precond.jump(x, D, t, s), rtol=1e-9, atol=1e-9)
        assert precond.on_network(5.0, s[2:]).c_out.shape == (3, 3, 4, 5)

    def test_required_output_is_the_inverse(self, precond: PerModePreconditioning) -> None:
        x, D = batch(3)
        x_s = precond.jump(x.double(), D.double(), T, S)
        torch.testing.assert_close(precond.required_output(x, x_s, T, S), D.double(), rtol=1e-9, atol=1e-9)
        with pytest.raises(ValueError, match="t > s needed"):
            precond.required_output(x, x, T, T)

    def test_required_output_in_float32(self, precond: PerModePreconditioning) -> None:
        """It adds little to the data's own rounding, which a short jump divides by c_out; nor does autocast add any."""
        x, D = batch(3)
        for t, s in ((20.0, 19.0), (20.0, 19.9), (1.0, 0.99), (0.0125, 0.01), (20.0, 0.01)):
            x_t = (x + t * D).float()
            x_s = precond.jump(x_t.double(), D.double(), t, s).float()
            exact = precond.required_output(x_t.double(), x_s.double(), t, s)
            c_out = precond(t, s).c_out.abs().min().item()
            rounding = torch.finfo(torch.float32).eps / 2 * x_t.abs().max().item() / c_out
            for half in (False, True):
                with torch.autocast("cpu", torch.bfloat16, enabled=half):
                    found = precond.required_output(x_t, x_s, t, s)
                assert found.dtype == torch.float32
                assert (found - exact).square().mean().sqrt().item() < rounding

    def test_gaps_are_the_same_under_autocast(self, precond: PerModePreconditioning) -> None:
        x = batch(3)[0].float()
        teacher = ap.GaussianDenoiser(0.25)
        expected = ap.consistency_gap(teacher, precond, x, 2.0, 1.0)
        with torch.autocast("cpu", torch.bfloat16):
            found = ap.consistency_gap(teacher, precond, x, 2.0, 1.0)
        torch.testing.assert_close(found.start, expected.start)
        torch.testing.assert_close(found.target, expected.target)

    def test_one_level_for_all(self, precond: PerModePreconditioning) -> None:
        x, D = batch(4)
        one = torch.full((5,), 5.0)
        expected = precond.jump(x, D, one, one / 5)
        for t, s in ((5.0, 1.0), (one[:1], one / 5), (one[:, None, None, None], torch.tensor(1.0))):
            torch.testing.assert_close(precond.jump(x, D, t, s), expected)

    def test_dtypes_and_autocast(self, precond: PerModePreconditioning) -> None:
        x, D = batch(5)
        expected = precond.jump(x, D, T, S)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(precond.jump(x, D, T, S), expected)
        half = precond.jump(x.half(), D.half(), T, S)
        assert half.dtype == torch.float16
        torch.testing.assert_close(half.float(), expected, rtol=2e-3, atol=1e-2)  # of x = 3, times c_out up to 3
        assert precond.jump(x.double(), D, T, S).dtype == torch.float64

    @pytest.mark.long
    def test_compiles_maps_and_differentiates(self, precond: PerModePreconditioning) -> None:
        x, D = batch(6)
        expected = precond.jump(x, D, T, S)
        compiled = torch.compile(precond.jump, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, D, T, S), expected)
        mapped = torch.vmap(lambda x, D, t, s: precond.jump(x[None], D[None], t, s)[0])(x, D, T, S)
        torch.testing.assert_close(mapped, expected)
        wide = copy.deepcopy(precond)
        wide.table.control = wide.table.control.double()  # a difference quotient would see float32's steps
        t, s = (v[1:3].double().requires_grad_() for v in (T, S))
        assert torch.autograd.gradcheck(lambda t, s: wide.jump(x[1:3].double(), D[1:3].double(), t, s), (t, s))

    def test_layouts(self, precond: PerModePreconditioning) -> None:
        x, D = batch(7)
        expected = precond.jump(x, D, T, S)
        last = (v.contiguous(memory_format=torch.channels_last) for v in (x, D))
        torch.testing.assert_close(precond.jump(*last, T, S), expected)
        assert precond.jump(x[:0], D[:0], T[:0], S[:0]).shape == (0, 3, 4, 5)

    def test_levels_outside_are_refused(self, precond: PerModePreconditioning) -> None:
        x, D = batch(8)
        for t, s in ((21.0, 1.0), (1.0, 0.009), (1.0, 1.1)):
            with pytest.raises(ValueError, match=r"0.01 <= s <= t <= 20"):
                precond.jump(x, D, t, s)

    def test_other_samples_are_refused(self, precond: PerModePreconditioning) -> None:
        x, D = batch(9)
        with pytest.raises(ValueError, match=r"samples of shape \(3, 4, 5\), got x_t of shape \(5, 3, 4, 4\)"):
            precond.jump(x[..., 1:], D[..., 1:], T, S)
        with pytest.raises(ValueError, match="denoised must have x_t's shape"):
            precond.jump(x, D[:1], T, S)
        with pytest.raises(TypeError, match="denoised must be a floating-point tensor"):
            precond.jump(x, D.long(), T, S)
        with pytest.raises(ValueError, match="one noise level per sample"):
            precond.jump(x, D, torch.ones(4), S)


class TestWhole:
    @pytest.mark.usefixtures("around")
    def test_students(self, problem: GaussianModes, precond: PerModePreconditioning) -> None:
        """A student that is its teacher follows the flow before any training."""
        v = 0.5**2

        def network(x: Tensor, c_noise: Tensor, *_: Tensor) -> Tensor:
            t = (4 * c_noise).exp().reshape(-1, 1, 1, 1)
            x = x * (t**2 + v).sqrt()
            return (problem(x, t) - v / (t**2 + v) * x) * (t**2 + v).sqrt() / (t * math.sqrt(v))

        t, s = T[1:4], S[1:4]
        x = problem.sample(3, 1) + problem.levels(t) * torch.randn(3, 3, 4, 5, generator=seeded(1))
        expected = problem.scaled(
            x, ((problem.c + problem.levels(s) ** 2) / (problem.c + problem.levels(t) ** 2)).sqrt()
        )
        student = ap.ConsistencyTrajectoryModel(network, precond)
        # 12 levels 0.7 apart in lambda; float32 networks
        torch.testing.assert_close(student(x.float(), t, s), expected.float(), rtol=0, atol=3e-3)
        model = ap.ConsistencyModel(network, precond, sigma_min=0.01)
        s = torch.full_like(s, 0.01)
        expected = problem.scaled(x, ((problem.c + 1e-4) / (problem.c + problem.levels(t) ** 2)).sqrt())
        torch.testing.assert_close(model(x.float(), t), expected.float(), rtol=0, atol=3e-3)

    def test_batches_and_seeds(self, problem: GaussianModes) -> None:
        def fit(**options: Any) -> Tensor:
            levels = ap.log_noise_levels(8, 0.01, 20.0)
            fitted = PerModePreconditioning.fit(
                Bent(), 0.3 * torch.randn(64, 2, 3, generator=seeded(0)).double(), levels, 64, progress=False, **options
            )
            return torch.stack(list(fitted(20.0, levels)))

        with global_rng_untouched():
            whole = fit()
            # at t = 20 some D are linear in x to 1e-5: there a keeps 1e-3 of the rounding of sums in another order
            torch.testing.assert_close(fit(batch_size=7), whole, rtol=1e-3, atol=1e-6)
        assert torch.equal(fit(), whole)
        assert not torch.equal(fit(seed=1), whole)

    def test_keeps_its_precision_and_travels(self, precond: PerModePreconditioning) -> None:
        x, D = batch(0)
        expected = precond.jump(x, D, T, S)
        for other in (copy.deepcopy(precond).half(), pickle.loads(pickle.dumps(precond)).bfloat16()):
            assert torch.equal(other.jump(x, D, T, S), expected)
        spoilt = copy.deepcopy(precond)
        spoilt.table.control.zero_()
        spoilt.load_state_dict(precond.state_dict())
        assert torch.equal(spoilt.jump(x, D, T, S), expected)

    @pytest.mark.parametrize(
        ("basis", "data", "error", "message"),
        [
            ("fft", torch.zeros(4, 2, 2), ValueError, "basis must be 'dct', 'pca' or an orthonormal matrix, got 'fft'"),
            (3, torch.zeros(4, 2, 2), TypeError, "basis must be a torch.Tensor"),
            (torch.ones(4, 2), torch.zeros(4, 2, 2), ValueError, r"square matrix .* got shape \(4, 2\)"),
            (torch.ones(4, 4), torch.zeros(4, 2, 2), ValueError, "orthonormal columns, got .* off the identity by 4"),
            (torch.full((4, 4), torch.nan), torch.zeros(4, 2, 2), ValueError, "basis must be finite"),
            (torch.eye(3), torch.zeros(4, 2, 2), ValueError, "basis must have 4 rows"),
            ("dct", torch.zeros(4, 2), ValueError, r"needs images .* got samples of shape \(2,\)"),
            ("pca", torch.zeros(4, 3, 64, 64), ValueError, "matrix of 12288 x 12288 is too large"),
        ],
    )
    def test_bad_bases(self, basis: Any, data: Tensor, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            PerModePreconditioning.fit(ap.GaussianDenoiser(1.0), data, basis=basis, num_trajectories=4, progress=False)


class TestFile:
    @pytest.fixture(params=["dct", "pca"])
    def fitted(self, request: pytest.FixtureRequest) -> PerModePreconditioning:
        data = torch.randn(16, 2, 3, generator=seeded(0))
        return PerModePreconditioning.fit(
            Bent(), data, ap.log_noise_levels(6, 0.01, 20.0), 16, basis=request.param, progress=False
        )

    def test_round_trip(self, fitted: PerModePreconditioning, tmp_path: Path) -> None:
        path = tmp_path / "modes.safetensors"
        fitted.save(path)
        other = PerModePreconditioning.load(path)
        assert other.header == fitted.header
        for (name, a), b in zip(other.state_dict().items(), fitted.state_dict().values(), strict=True):
            assert torch.equal(a, b), name
        x, D = torch.randn(2, 3, 2, 3, generator=seeded(1))
        assert torch.equal(other.jump(x, D, 5.0, 0.1), fitted.jump(x, D, 5.0, 0.1))
        with pytest.raises(ValueError, match="'PerModePreconditioning 1', not 'LeastSquaresPreconditioning 1'"):
            LeastSquaresPreconditioning.load(path)

    @pytest.mark.parametrize(
        ("name", "spoil", "message"),
        [
            ("groups", lambda g: g + 1, "groups must be from 0 to 5, got 1 to 6"),
            ("groups", lambda g: g[1:], r"groups must be torch.int64 of shape \(6,\)"),
            ("groups", lambda g: g.double(), "groups must be torch.int64"),
            ("matrix", lambda q: q[1:], r"matrix must be torch.float64 of shape \(6, 6\)"),
            ("control", lambda c: c * torch.inf, "control must be finite"),
        ],
    )
    def test_damaged(self, fitted: PerModePreconditioning, tmp_path: Path, name: str, spoil: Any, message: str) -> None:
        path = tmp_path / "modes.safetensors"
        fitted.save(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        if name not in tensors:
            return
        save_file(
            {k: v.clone() for k, v in tensors.items()} | {name: spoil(tensors[name]).contiguous()}, path, metadata
        )
        with pytest.raises(ValueError, match=f"expected a PerModePreconditioning in .*{message}"):
            PerModePreconditioning.load(path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda(precond: PerModePreconditioning) -> None:
    x, D = batch(0)
    expected = precond.jump(x, D, T, S)
    there, moved = copy.deepcopy(precond).cuda(), [value.cuda() for value in (x, D, T, S)]
    there.jump(*moved)  # cuBLAS sets itself up
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = there.jump(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)
