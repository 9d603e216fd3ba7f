"""Teacher checks: exact teachers pass, faulty ones are told apart from trained ones, numbers have closed forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from problems import gaussian_problem, mixture_problem
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import analytic_precond as ap
from analytic_precond.data.arguments import name_of
from analytic_precond.diagnostics.teacher_check import check_teacher
from analytic_precond.diagnostics.teacher_report import LevelCheck, TeacherReport
from analytic_precond.testing import GaussianProblem, MixtureProblem

DIGITS = torch.from_numpy(load_digits().images[:400]).float().flatten(1) / 8 - 1  # in [-1, 1]
LEVELS = ap.log_noise_levels(24)

Teacher = Callable[..., Tensor]


def check(teacher: Teacher, data: Any = DIGITS, levels: Tensor = LEVELS, **options: Any) -> TeacherReport:
    return check_teacher(teacher, data, levels, progress=False, **{"num_samples": 256, **options})


class MLP(nn.Module):
    """A denoiser in EDM's scalings, with dropout."""

    def __init__(self, width: int = 128, dropout: float = 0.0) -> None:
        super().__init__()
        self.edm = ap.EDMPreconditioning(DIGITS.std().item())
        self.enter, self.leave = nn.Linear(64 + 16, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Dropout(dropout))
            for _ in range(2)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        c_skip, c_out, c_in, c_noise = (c[:, None] for c in self.edm(t))
        phase = c_noise * 2.0 ** torch.linspace(-1, 2, 8)
        h = self.enter(torch.cat([c_in * x, phase.sin(), phase.cos()], 1))
        for block in self.blocks:
            h = h + block(h)
        return c_skip * x + c_out * self.leave(h)


def train(steps: int) -> MLP:
    """Train a small network by denoising score matching, from a seed of its own."""
    torch.manual_seed(0)
    network = MLP()
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    for _ in range(steps):
        x_0 = DIGITS[torch.randint(len(DIGITS), (96,))]
        t = (1.8 * torch.randn(96) - 0.8).exp()
        x_t = x_0 + t[:, None] * torch.randn_like(x_0)
        loss = ((network(x_t, t) - x_0) / network.edm(t).c_out[:, None]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@pytest.fixture(scope="module")
def trained() -> MLP:
    """A small network after a few seconds of training."""
    with torch.random.fork_rng(devices=[]):
        return train(900)


# verdicts


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("problem", [gaussian_problem(), mixture_problem()], ids=["Gaussian", "mixture"])
def test_exact_teachers_are_consistent(problem: GaussianProblem | MixtureProblem, seed: int) -> None:
    report = check_teacher(problem.denoiser, problem.sample(1024, seed), seed=seed, progress=False)
    assert report.verdict == "consistent", str(report)


def test_ideal_denoiser_of_real_images_is_consistent() -> None:
    report = check(ap.EmpiricalDenoiser(DIGITS), levels=ap.log_noise_levels(40))
    assert report.verdict == "consistent", str(report)


class White(nn.Module):
    """What an exact network predicts of white Gaussian data, in float32."""

    def __init__(self, prediction: str, variance: float) -> None:
        super().__init__()
        self.prediction, self.variance = prediction, variance

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        t = ap.VPCosineSchedule().noise_level(time).to(z)[:, None]
        alpha = (1 + t**2).rsqrt()
        share = z / (self.variance + t**2) / alpha
        clean, epsilon = self.variance * share, t * share
        v = alpha * epsilon - alpha * t * clean
        return {"v": v, "epsilon": epsilon, "sample": clean}[self.prediction]


@pytest.mark.parametrize("prediction", ["v", "epsilon", "sample"])
@pytest.mark.parametrize("variance", [1.0, 0.25, 0.04])
def test_rounding_of_an_exact_network_is_no_misfit(prediction: str, variance: float) -> None:
    """It is relative to c_skip x, which is larger than D: the remainder, 6e-9, is nothing to have a law."""
    data = variance**0.5 * torch.randn(1024, 192, generator=torch.Generator().manual_seed(0))
    denoiser = ap.denoiser_from_network(White(prediction, variance), prediction, ap.VPCosineSchedule())
    report = check(denoiser, data, levels=ap.log_noise_levels(40))
    assert report.verdict == "consistent", str(report)
    assert str(report).startswith("Teacher check of White: consistent")
    assert float((report.statistics.g_rms / (variance + report.levels**2).sqrt()).max()) < 1e-7  # of x
    assert ap.estimate_statistics(denoiser, data, LEVELS, 8, progress=False).header.description == "White"


def test_names_are_of_the_network_inside() -> None:
    network = White("v", 1.0)
    denoiser = ap.denoiser_from_network(network, "v", ap.VPCosineSchedule())
    for teacher in (denoiser, ap.denoiser_from_edm(network), ap.guide(denoiser, denoiser, 2.0), network):
        assert name_of(teacher, None) == "White"
        assert name_of(teacher, "mine") == "mine"
    assert name_of(ap.denoiser_from_edm(network.forward), None) == "White.forward"
    assert name_of(ap.GaussianDenoiser(1.0), None) == "GaussianDenoiser"


@pytest.mark.parametrize("steps", [0, 5, 20, 60, 150])
def test_short_training_is_no_fault_of_conventions(steps: int) -> None:
    with torch.random.fork_rng(devices=[]):
        network = train(steps)
    report = check(network, levels=ap.log_noise_levels(16))
    text = " ".join(str(report).split())
    assert report.verdict == "inconsistent"
    meaning = "It is inexact: trained briefly, or on other data. If it is well trained on these, t is not sigma"
    assert (meaning in text) == (steps != 60)  # whose ODE is off at the last level, and nothing else
    assert "the data are in another range than" not in text
    assert "epsilon, v or a score" not in text


@pytest.mark.long
def test_small_trained_network_is_close(trained: MLP) -> None:
    report = check(trained, levels=ap.log_noise_levels(40), num_samples=512)
    assert report.verdict == "close", str(report)
    assert "what a trained network usually has" in str(report)


def expand(t: Tensor, x: Tensor) -> Tensor:
    return ap.expand_to(t, x)


FAULTS: dict[str, Callable[[Teacher, Tensor], tuple[Teacher, Tensor]]] = {
    "data in 0..255": lambda D, x: (D, (x + 1) * 127.5),
    "data in [0, 1]": lambda D, x: (D, (x + 1) / 2),
    "t twice sigma": lambda D, x: (lambda x, t: D(x, 2 * t), x),
    "returns epsilon": lambda D, x: (lambda x, t: (x - D(x, t)) / expand(t, x), x),
    "returns the score": lambda D, x: (lambda x, t: (D(x, t) - x) / expand(t, x) ** 2, x),
}


MEANING = {"data": "the data are in another range", "returns": "epsilon, v or a score", "t": "t is not sigma"}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["ideal", "trained", "Gaussian"])
def test_faulty_teachers_are_inconsistent(fault: str, kind: str, trained: MLP) -> None:
    data = DIGITS
    teacher: Teacher = trained if kind == "trained" else ap.EmpiricalDenoiser(DIGITS)
    if kind == "Gaussian":
        data = 0.5 * torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
        teacher = ap.GaussianDenoiser(0.25)
    report = check(*FAULTS[fault](teacher, data), levels=ap.log_noise_levels(16))
    assert report.verdict == "inconsistent"
    assert MEANING[fault.split()[0]] in " ".join(str(report).split())


def test_untrained_network_is_inconsistent() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        report = check(MLP().eval(), num_samples=128)
    assert report.verdict == "inconsistent"


def test_train_mode_is_found_by_asking_twice(trained: MLP) -> None:
    with torch.random.fork_rng(devices=[]):
        network = MLP(dropout=0.1)
        network.load_state_dict(trained.state_dict())
    with pytest.warns(UserWarning, match="training mode, with Dropout"):
        reports = {True: check(network.train())}
    reports[False] = check(network.eval())
    assert reports[False].repeat_difference == 0
    assert reports[True].repeat_difference > 0.01
    assert reports[True].verdict == "inconsistent"
    assert "teacher.eval()" in str(reports[True])
    assert "teacher.eval()" not in str(reports[False])
    assert "same answer" in str(reports[False])


# numbers


def test_linear_teacher_in_closed_form() -> None:
    """D = a_i x_i whatever the noise: everything but the sampling of x_0 and n is known."""
    a, c = torch.tensor([0.9, 0.3]).repeat(32), torch.tensor([1.0, 0.25]).repeat(32)
    data = c.sqrt() * torch.randn(2048, 64, generator=torch.Generator().manual_seed(0))
    report = check(lambda x, t: a.to(x) * x, data.double(), levels=ap.log_noise_levels(40), num_samples=4096)
    t = report.levels.numpy()[:, None]
    a, c = a.double().numpy(), c.double().numpy()

    # 2048 pairs of 64 elements: means of squares to 1 %
    l = a.mean()
    np.testing.assert_allclose(report.slope.value, l, rtol=0.01)
    from_error = ((1 - a) ** 2 * c / t**2 + a**2).mean(1)
    np.testing.assert_allclose(report.slope.expected, from_error, rtol=0.02)
    affine = c.mean() / (c.mean() + t[:, 0] ** 2)
    np.testing.assert_allclose(report.error.value, from_error / affine, rtol=0.03)

    remainder = (a - l) ** 2 * (c + t**2)  # of each element, squared
    by_derivative = (remainder * (a - 1)).sum(1) / remainder.sum(1)
    np.testing.assert_allclose(report.transport.expected, by_derivative, atol=0.02)
    by_transport = -((a - l) ** 2 * t**2).sum(1) / remainder.sum(1)
    np.testing.assert_allclose(report.transport.value, by_transport, atol=0.02)


def test_posterior_variance_against_the_error_itself(trained: MLP) -> None:
    """The moments' E|x_0 - D|^2 against fresh noise, at levels on both sides of t = 1, where the moments change."""
    report = check(trained, levels=torch.tensor([3.0, 1.1, 0.9, 0.1, 0.01]), num_samples=800)
    generator = torch.Generator().manual_seed(5)
    for k, t in enumerate(report.levels.tolist()):
        x_0 = DIGITS.repeat(20, 1)
        noise = torch.randn(x_0.shape, generator=generator)
        with torch.no_grad():
            error = (trained(x_0 + t * noise, torch.full((len(x_0),), t)) - x_0).square().mean().item()
        # 400 pairs of 64 elements, 8000 samples here
        assert report.slope.expected[k].item() * t**2 == pytest.approx(error, rel=0.03)


def test_standard_errors_cover_the_truth() -> None:
    """Of l_t - E|x_0 - D|^2 / (d t^2), which is 0 for an exact teacher: |z| < 1.96 in 95 % of runs."""
    problem, levels, inside = gaussian_problem(), ap.log_noise_levels(6), []
    for seed in range(20):
        slope = check(problem.denoiser, problem.sample(256, seed), levels, seed=seed).slope
        inside.append(((slope.value - slope.expected).abs() < 1.96 * slope.stderr).double().mean().item())
    # levels of one run are correlated: 20 independent runs of probability 0.95 have standard error 0.05
    assert np.mean(inside) == pytest.approx(0.95, abs=0.1)


def test_result_does_not_depend_on_batch_size_or_source() -> None:
    teacher = ap.GaussianDenoiser(0.25)
    with global_rng_untouched():
        whole = check(teacher, DIGITS)
        pieces = check(teacher, DIGITS, batch_size=33)
    torch.testing.assert_close(pieces.slope.expected, whole.slope.expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(pieces.error.value, whole.error.value, rtol=1e-5, atol=1e-7)
    # a loader that shuffles is seeded alike in both visits
    loader = DataLoader(TensorDataset(DIGITS, torch.arange(400)), batch_size=50, shuffle=True)
    labelled = check(
        lambda x, t, label: teacher(x, t) + 0 * label[:, None],
        loader,
        condition=lambda y: {"label": y},
        num_samples=100,
    )
    assert labelled.verdict == "inconsistent"
    assert labelled.statistics.num_samples == 100


class NoForwardMode(nn.Module):
    """The denoiser of N(0, I) by an operation that has only reverse mode."""

    class Identity(torch.autograd.Function):
        @staticmethod
        def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor) -> Tensor:  # type: ignore[override]
            return x.clone()

        @staticmethod
        def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.Identity.apply(x / (1 + t[:, None] ** 2))  # type: ignore[no-any-return]


def test_finite_differences_where_there_is_no_forward_mode() -> None:
    data = torch.randn(256, 8, generator=torch.Generator().manual_seed(0))
    report = check(NoForwardMode(), data)
    assert report.statistics.header.s_method == "finite-difference"
    assert "transport = finite-difference" in str(report)
    assert report.verdict == "consistent"


@pytest.mark.parametrize(("error", "calls"), [(torch.OutOfMemoryError, 1), (RuntimeError, 2), (KeyError, 1)])
def test_errors_of_the_teacher_come_through(error: type[Exception], calls: int) -> None:
    called = []

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        called.append(1)
        raise error("mine")

    with pytest.raises(error, match="mine"):
        check(teacher)
    assert len(called) == calls


# the report


def level_check(value: list[float], stderr: float = 0.0) -> LevelCheck:
    parts = value, [0.0] * 3, [stderr] * 3, [0.1] * 3, [1.0] * 3
    return LevelCheck(*(torch.tensor(part, dtype=torch.float64) for part in parts))


def test_grades() -> None:
    assert level_check([0.1, 0.2, -2.0]).grade.tolist() == [0, 1, 2]
    assert level_check([0.4, 0.6, -1.6], stderr=0.1).grade.tolist() == [0, 1, 2]  # 4 standard errors are forgiven
    assert level_check([0.0, 0.0, 5.0], stderr=0.3).unclear.tolist() == [True, True, False]


def test_text_counts_levels_and_names_where() -> None:
    teacher = ap.EmpiricalDenoiser(DIGITS)
    report = check(lambda x, t: torch.where(t[:, None] > 1, 0 * x - 3, teacher(x, t)), num_samples=128)
    above = int((LEVELS > 1).sum())
    text = str(report)
    assert text == repr(report)
    assert text.startswith(
        "Teacher check of test_text_counts_levels_and_names_where.<locals>.<lambda>: inconsistent (128 "
    )
    row = next(line for line in text.splitlines() if line.startswith("error / affine"))
    assert row.removeprefix("error / affine denoiser's <= 1").split()[:3] == [str(24 - above), "0", str(above)]
    assert f"At {above} levels from t = 80 to {LEVELS[above - 1]:.3g} an affine map denoises better" in text
    assert max(map(len, text.splitlines())) < 120


def test_too_few_samples_to_tell() -> None:
    report = check(mixture_problem().denoiser, mixture_problem().sample(64, 0), num_samples=32)
    assert bool(report.slope.unclear.any() | report.transport.unclear.any())
    assert "take more samples" in str(report)


# bad input


def generator() -> Iterator[Tensor]:
    yield DIGITS


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"teacher": 1}, TypeError, r"denoiser must be callable as denoiser\(x, t\), got int"),
        (
            {"data": generator()},
            TypeError,
            r"data must be something to visit twice, got a generator: pass list\(data\)",
        ),
        ({"data": DIGITS.to(torch.uint8)}, TypeError, r"data must be a floating-point tensor, got torch\.uint8"),
        ({"data": DIGITS[:0]}, ValueError, r"data must hold at least one sample"),
        ({"num_samples": 31}, ValueError, r"num_samples must be at least 32, got 31\."),
        ({"num_samples": 64.0}, TypeError, r"num_samples must be an int"),
        ({"batch_size": 0}, ValueError, r"batch_size must be at least 1, got 0"),
        ({"seed": -1}, ValueError, r"seed must be at least 0, got -1"),
        ({"levels": LEVELS.flip(0)}, ValueError, r"levels must be strictly decreasing"),
        ({"condition": 1}, TypeError, r"condition must be callable, got int"),
    ],
)
def test_refused_before_the_teacher_is_called(options: dict[str, Any], error: type[Exception], match: str) -> None:
    called = []

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        called.append(1)
        return x

    with global_rng_untouched(), pytest.raises(error, match=match):
        check(**{"teacher": teacher, **options})
    assert not called


def test_data_without_variance_are_refused() -> None:
    with pytest.raises(ValueError, match=r"data must differ from sample to sample, got 16 samples of variance 0\."):
        check(lambda x, t: 0 * x, torch.zeros(20, 3), num_samples=32)
