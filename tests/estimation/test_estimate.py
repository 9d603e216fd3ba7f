"""Estimators against closed forms; standard errors against the spread that they claim."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from problems import gaussian_problem, mixture_problem
from torch import Tensor, nn

import analytic_precond as ap

L_METHODS = ("stein", "hutchinson", "exact")
S_METHODS = ("transport", "jvp", "finite-difference")
# the exact trace differentiates once per element: slow, and each of its pairs is half of one before
METHOD_PAIRS = [
    pytest.param(*pair, marks=[pytest.mark.long] * (pair in {("exact", "jvp"), ("exact", "finite-difference")}))
    for pair in itertools.product(L_METHODS, S_METHODS)
]
RESULTS = ("l", "g_rms", "s")


def z_scores(stats: ap.TeacherStatistics, truth: dict[str, Tensor]) -> dict[str, Tensor]:
    """Errors in units of the standard error, plus an allowance for the spline at the ends of the grid."""
    allowance = {"l": 1e-12, "g_rms": 1e-9, "s": 2e-4}
    return {
        name: (getattr(stats, name) - truth[name]) / (getattr(stats, f"{name}_stderr") + allowance[name])
        for name in RESULTS
    }


@pytest.mark.parametrize(("l_method", "s_method"), METHOD_PAIRS)
def test_every_estimator_finds_the_gaussian(l_method: str, s_method: str) -> None:
    problem, levels = gaussian_problem(), ap.log_noise_levels()
    stats = ap.estimate_statistics(
        problem.denoiser, problem.sample(512, seed=0), levels, 1024, 512, l_method, s_method, progress=False
    )
    truth = {name: getattr(problem, name)(levels) for name in RESULTS}
    for name, z in z_scores(stats, truth).items():
        # 120 correlated levels, a fixed seed: 4.5 standard errors is one chance in 1e5 per level
        assert z.abs().max() < 4.5, (name, z)
    assert (stats.l_stderr < 0.02).all()
    assert (stats.s_stderr < 0.1).all()


@pytest.mark.parametrize("intercept", [False, True])
def test_mixture_with_and_without_intercept(intercept: bool) -> None:
    problem, levels = mixture_problem(), ap.log_noise_levels(60)
    stats = ap.estimate_statistics(
        problem.denoiser, problem.sample(4096, seed=0), levels, 8192, 4096, intercept=intercept, progress=False
    )
    truth = {"l": problem.l(levels), "g_rms": problem.g_rms(levels, intercept), "s": problem.s(levels, intercept)}
    for name, z in z_scores(stats, truth).items():
        assert z.abs().max() < 4.5, (name, z)


@pytest.mark.long
@pytest.mark.parametrize(
    ("l_method", "s_method", "intercept"),
    [("stein", "transport", False), ("stein", "transport", True), ("hutchinson", "finite-difference", False)],
)
def test_standard_errors_are_calibrated(l_method: str, s_method: str, intercept: bool) -> None:
    """Over 200 repeats, 90 to 99 % of the 95 % intervals cover the truth, at every level."""
    problem, levels = mixture_problem(), ap.log_noise_levels(24, sigma_min=0.05, sigma_max=10.0)
    truth = problem.l(levels), problem.g_rms(levels, intercept), problem.s(levels, intercept)
    covered = np.zeros((3, len(levels)))
    repeats = 200
    for seed in range(repeats):
        stats = ap.estimate_statistics(
            problem.denoiser, problem.sample(2048, seed), levels, 4096, 2048, l_method, s_method,
            seed=seed, intercept=intercept, progress=False,
        )  # fmt: skip
        for row, name in enumerate(RESULTS):
            error = (getattr(stats, name) - truth[row]).abs().numpy()
            covered[row] += error < 1.96 * getattr(stats, f"{name}_stderr").numpy()
    coverage = covered / repeats
    assert (coverage >= 0.90).all(), coverage.min(1)
    assert (coverage <= 0.99).all(), coverage.max(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize(("l_method", "s_method"), METHOD_PAIRS)
def test_isotropic_gaussian_has_no_remainder(l_method: str, s_method: str, intercept: bool, dtype: torch.dtype) -> None:
    data = 0.5 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    levels = ap.log_noise_levels(20)
    stats = ap.estimate_statistics(
        ap.GaussianDenoiser(0.25), data, levels, 64, 64, l_method, s_method, intercept=intercept, progress=False
    )
    # float32: rounding of D over the probe 2 t n, at t = 0.002
    torch.testing.assert_close(
        stats.l, 0.25 / (0.25 + levels**2), rtol=1e-9 if dtype == torch.float64 else 1e-5, atol=0
    )
    zero = torch.zeros(20, dtype=torch.float64)
    for name in ("g_rms", "s", "g_rms_stderr", "s_stderr"):
        assert torch.equal(getattr(stats, name), zero), name


def test_intercept_takes_a_large_mean_out_of_the_remainder() -> None:
    mean = torch.tensor([30.0, -20.0, 10.0, 5.0, -40.0, 25.0], dtype=torch.float64)
    levels = ap.log_noise_levels(40)

    def run(mean: Tensor | float, intercept: bool) -> ap.TeacherStatistics:
        problem = gaussian_problem(mean=mean)
        data = problem.sample(512, seed=0)
        return ap.estimate_statistics(problem.denoiser, data, levels, 1024, intercept=intercept, progress=False)

    plain, centred, shifted = run(mean, False), run(mean, True), run(0.0, True)
    # the same noise and order: centring makes the shift disappear, to rounding of 40^2 beside g^2 = 1e-8 or so
    for name in ("g_rms", "g_rms_stderr"):
        torch.testing.assert_close(getattr(centred, name), getattr(shifted, name), rtol=1e-4, atol=0)
    torch.testing.assert_close(centred.s, shifted.s, rtol=0, atol=1e-3)
    assert (plain.g_rms[levels > 1] > 10 * centred.g_rms[levels > 1]).all()
    # b_t = (1 - l_t w-weighted) mean: here E[D] - l E[x] = mean - l mean for the optimal denoiser
    intercept = centred.intercept
    assert intercept is not None
    assert plain.intercept is None
    expected = (1 - centred.l)[:, None] * mean
    # E[D] = E[x_0] for the optimal denoiser; 512 samples of variance up to 4
    torch.testing.assert_close(intercept, expected, rtol=0.02, atol=0.4)


def test_odd_num_samples_and_too_few_for_an_error() -> None:
    problem = gaussian_problem()
    stats = ap.estimate_statistics(problem.denoiser, problem.sample(5, 0), num_samples=7, progress=False)
    assert stats.num_samples == 6
    single = ap.estimate_statistics(problem.denoiser, problem.sample(5, 0), num_samples=2, progress=False)
    assert bool(torch.isinf(single.l_stderr).all())
    assert bool(torch.isfinite(single.l).all())


def test_float32_teacher_agrees_with_float64() -> None:
    problem = gaussian_problem((1.0, 0.25, 0.05))
    data = problem.sample(256, 0)
    levels = ap.log_noise_levels(30)
    wide, narrow = (
        ap.estimate_statistics(problem.denoiser, x, levels, 512, progress=False) for x in (data, data.float())
    )
    # a float32 teacher's rounding, 6e-8 of x, divided by the probe 2 t n
    torch.testing.assert_close(narrow.l, wide.l, rtol=1e-5, atol=1e-6)
    kept = levels > 0.05  # below, the remainder itself nears float32's rounding of D
    torch.testing.assert_close(narrow.g_rms[kept], wide.g_rms[kept], rtol=1e-3, atol=0)


class Attention(nn.Module):
    """A layer without forward mode: a custom Function without a jvp, or torch's fused attention."""

    class Softplus(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
            ctx.save_for_backward(x)
            return torch.nn.functional.softplus(x)

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
            return grad * x.sigmoid()

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if self.fused:
            h = x[:, None, :, None].expand(-1, 1, -1, 8).contiguous()
            h = nn.functional.scaled_dot_product_attention(h, h, h)[:, 0, :, 0]
        else:
            h = self.Softplus.apply(x)
        return self.scale * h / (1 + ap.expand_to(t, x) ** 2)


@pytest.mark.parametrize("fused", [False, True], ids=["custom Function", "fused attention"])
def test_teachers_without_forward_mode(fused: bool) -> None:
    teacher = Attention(fused)
    data = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    levels = ap.log_noise_levels(6, 0.05, 5.0)
    with pytest.raises(RuntimeError, match=r"finite-difference.*transport"):
        ap.estimate_statistics(teacher, data, levels, 64, s_method="jvp", progress=False)
    by_vjp = ap.estimate_statistics(teacher, data, levels, 512, 256, "hutchinson", progress=False)
    by_stein = ap.estimate_statistics(teacher, data, levels, 512, 256, "stein", progress=False)
    bound = 4.5 * (by_vjp.l_stderr + by_stein.l_stderr)
    assert ((by_vjp.l - by_stein.l).abs() < bound).all()
    assert teacher.scale.grad is None


def test_teacher_without_any_derivative_names_the_way_out() -> None:
    @torch.no_grad()
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() / 2)

    data = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError, match=r"l_method='stein'"):
        ap.estimate_statistics(teacher, data, num_samples=8, l_method="hutchinson", progress=False)
    stats = ap.estimate_statistics(teacher, data, num_samples=8, progress=False)
    torch.testing.assert_close(stats.l, torch.full_like(stats.l, 0.5), rtol=1e-4, atol=0)  # float32 at t = 0.002


def test_errors_of_the_teacher_itself_come_through_unchanged() -> None:
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    for l_method in L_METHODS:
        with pytest.raises(RuntimeError, match=r"^mat1 and mat2"):
            ap.estimate_statistics(teacher, torch.zeros(8, 4), l_method=l_method, progress=False)


def test_digits_stein_agrees_with_hutchinson() -> None:
    """Real images, the ideal denoiser of a data set: two estimators that share nothing but the definition."""
    from sklearn.datasets import load_digits

    data = torch.from_numpy(load_digits().data[:300] / 8 - 1)
    teacher, levels = ap.EmpiricalDenoiser(data), ap.log_noise_levels(8, 0.05, 20.0)
    stein, hutchinson = (
        ap.estimate_statistics(teacher, data, levels, 600, 300, method, progress=False)
        for method in ("stein", "hutchinson")
    )
    bound = 4.5 * (stein.l_stderr + hutchinson.l_stderr) + 1e-9
    assert ((stein.l - hutchinson.l).abs() < bound).all()


def test_teacher_that_hides_its_network_from_autograd_is_refused() -> None:
    network = Attention(fused=True)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        edm = ap.EDMPreconditioning()(t)
        with torch.no_grad():
            output = network(x, t)
        return ap.expand_to(edm.c_skip, x) * x + ap.expand_to(edm.c_out, x) * output

    data = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    for l_method in ("hutchinson", "exact"):
        with pytest.raises(RuntimeError, match=r"through the whole teacher.*l_method='stein'"):
            ap.estimate_statistics(teacher, data, ap.log_noise_levels(4, 0.05, 5.0), 64, 32, l_method, progress=False)


@pytest.mark.parametrize("levels", [ap.karras_noise_levels(40), ap.log_noise_levels(40)], ids=["karras", "log"])
@pytest.mark.parametrize("s_method", ["jvp", "finite-difference"])
def test_autodiff_s_on_coarse_grids(levels: Tensor, s_method: str) -> None:
    """l' is a derivative between levels: through ln(l / (1 - l)) it survives 40 of them, equal in lambda or not."""
    problem = gaussian_problem((3.0, 0.5, 0.02))
    stats = ap.estimate_statistics(
        problem.denoiser, problem.sample(512, 0), levels, 1024, 512, "exact", s_method, progress=False
    )
    error = (stats.s - problem.s(levels)).abs()
    # 0.005 for the interpolation of l (0.0004 by an independent calculation with exact l), 3 before
    assert (error < 4.5 * stats.s_stderr + 0.005).all(), error.max()


def test_half_precision_data_are_noised_in_float32() -> None:
    problem = gaussian_problem((1.0, 0.25, 0.05))
    data = problem.sample(256, 0).bfloat16()
    levels = ap.log_noise_levels(30)
    half, full = (
        ap.estimate_statistics(problem.denoiser, x, levels, 512, progress=False) for x in (data, data.float())
    )
    assert torch.equal(half.l, full.l)
    assert torch.equal(half.g_rms, full.g_rms)


@pytest.mark.parametrize("l_method", L_METHODS)
def test_memory_format_of_the_data_does_not_matter(l_method: str) -> None:
    data = torch.randn(16, 3, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    teacher = ap.GaussianDenoiser(torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(1)))
    plain, last = (
        ap.estimate_statistics(teacher, x, ap.log_noise_levels(4), 32, l_method=l_method, progress=False)
        for x in (data, data.to(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(last.l, plain.l, rtol=1e-12, atol=0)
    torch.testing.assert_close(last.g_rms, plain.g_rms, rtol=1e-9, atol=0)


@pytest.mark.parametrize("s_method", ["transport", "finite-difference"])
@pytest.mark.parametrize("variances", [(1e4, 2500.0, 100.0), (1e-4, 3e-5, 1e-6)], ids=["large", "small"])
def test_data_of_any_scale(variances: tuple[float, ...], s_method: str) -> None:
    """At t = 0.002 the large data's remainder is 1e-10 of D, which a square of D could not hold."""
    problem, levels = gaussian_problem(variances), ap.log_noise_levels()
    stats = ap.estimate_statistics(
        problem.denoiser, problem.sample(512, 0), levels, 1024, 512, "exact", s_method, progress=False
    )
    assert (stats.g_rms > 0).all()
    truth = {name: getattr(problem, name)(levels) for name in RESULTS}
    relative = (stats.g_rms / truth["g_rms"] - 1).abs()
    assert (relative < 4.5 * stats.g_rms_stderr / truth["g_rms"] + 1e-5).all(), relative.max()
    # 0.002: l' between 120 levels where 1 - l is 1e-10, and the rounding of D's differences
    assert ((stats.s - truth["s"]).abs() < 4.5 * stats.s_stderr + 0.002).all(), (stats.s - truth["s"]).abs().max()
