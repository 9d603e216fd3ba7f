"""Students around denoisers of other schedules: they start as their teachers, and are told times as those are.

What students around raw networks are tested for is tested of these too: see the fixture ``around``.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from foreign_networks import LEVELS, PATHS, Mixture
from torch import Tensor, nn

import analytic_precond as ap

PREDICTIONS = ("epsilon", "v", "sample", "score", "velocity")


class Network(nn.Module):
    """A network of a time, and of a second one and a label if it is told them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.time, self.target = nn.Linear(3, 3), nn.Linear(1, 3), nn.Linear(1, 3)
        self.label = nn.Embedding(4, 3)

    def forward(self, x: Tensor, time: Tensor, target: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        dtype = self.layer.weight.dtype
        h = self.layer(x) + self.time(time[:, None].sin().to(dtype))  # some times go to 1000
        if target is not None:
            h = h + self.target(target[:, None].sin().to(dtype))
        return torch.tanh(h if label is None else h + self.label(label))


def network() -> Network:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


def analytic() -> ap.AnalyticPreconditioning:
    levels = ap.log_noise_levels(40)
    return ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + 4 * levels**2), torch.tanh(levels.log()))


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
T, S = torch.tensor([80.0, 9.0, 0.5, 0.02]), torch.tensor([0.002, 5.0, 0.1, 0.02])
X_T = (1 + T[:, None]) * X


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_starts_as_its_teacher_under_any_schedule(name: str, prediction: str) -> None:
    """Exact networks in every schedule's own terms; what is expected comes from the mixture's closed form."""
    schedule, path = PATHS[name]
    mixture = Mixture(3, prediction, path, schedule.time_scale)
    seen = []

    def two_times(z: Tensor, time: Tensor, target: Tensor | None = None) -> Tensor:
        seen.append(target)
        return mixture(z, time)

    denoiser, exact = ap.denoiser_from_network(two_times, prediction, schedule), mixture.denoiser()
    t, s = LEVELS[:-1], LEVELS[1:]
    x, D = mixture.sample(t), exact(mixture.sample(t), t)
    # as accurate as the denoisers themselves: at t = 0.002 a tenth of the digits of x' are left to D
    close: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8}
    student = ap.ConsistencyTrajectoryModel.from_denoiser(denoiser, analytic(), target_time="target")
    torch.testing.assert_close(student.denoise(x, t), D, **close)
    torch.testing.assert_close(student(x, t, s), analytic().jump(x, D, t, s), **close)
    alpha, sigma = path(seen[1])  # type: ignore[arg-type]
    torch.testing.assert_close(sigma / alpha, s, rtol=1e-8, atol=0)  # cosine: cancellation in the path itself

    model = ap.ConsistencyModel.from_denoiser(denoiser, ap.CTMPreconditioning(), sigma_min=0.001)
    ratio = (0.001 / t)[:, None, None]
    torch.testing.assert_close(model(x, t), ratio * x + (1 - ratio) * D, **close)
    assert type(student) is ap.ConsistencyTrajectoryModel
    assert type(model) is ap.ConsistencyModel


def test_edms_scalings_around_another_network_are_not_its_denoiser() -> None:
    """What happens without from_denoiser: no error, and another denoiser."""
    schedule, path = PATHS["flow-0"]
    mixture = Mixture(3, "velocity", path)
    denoiser, x = ap.denoiser_from_network(mixture, "velocity", schedule), mixture.sample(LEVELS)
    right = ap.ConsistencyModel.from_denoiser(denoiser, ap.CTMPreconditioning()).denoise(x, LEVELS)
    wrong = ap.ConsistencyModel(mixture, ap.CTMPreconditioning(), noise_conditioning=schedule.network_time)
    torch.testing.assert_close(right, mixture.denoiser()(x, LEVELS), rtol=1e-8, atol=1e-8)
    assert (wrong.denoise(x, LEVELS) - right).abs().max() > 1


def test_shifted_jumps_ask_a_flow_network_at_the_lower_level() -> None:
    schedule, path = PATHS["flow-0"]
    mixture = Mixture(3, "velocity", path)
    exact, data = mixture.denoiser(), torch.zeros(8, 2, 3, dtype=torch.float64)
    levels = ap.log_noise_levels(10, 0.05, 10.0)
    shifted = ap.ShiftedPreconditioning.fit(exact, data, levels, num_trajectories=8, sigma_data=0.7, progress=False)
    seen = []

    def two_times(z: Tensor, time: Tensor, target: Tensor | None = None) -> Tensor:
        seen.append((z, time, target))
        return mixture(z, time)

    denoiser = ap.denoiser_from_network(two_times, "velocity", schedule)
    t, s = torch.tensor([9.0, 3.0], dtype=torch.float64), torch.tensor([0.05, 1.0], dtype=torch.float64)
    x, q = mixture.sample(t), shifted.network_level(t, s)
    assert (q < 0.95 * t).all()
    kappa = ((q**2 + 0.49) / (t**2 + 0.49)).sqrt()[:, None, None]
    c_skip, c_out = (c[:, None, None] for c in shifted(t, s))
    expected = c_skip * x + c_out * exact(kappa * x, q)
    student = ap.ConsistencyTrajectoryModel.from_denoiser(denoiser, shifted, "target")
    torch.testing.assert_close(student(x, t, s), expected, rtol=1e-8, atol=1e-8)
    z, time, target = seen[0]
    torch.testing.assert_close(time, q / (1 + q))
    torch.testing.assert_close(target, s / (1 + s))
    torch.testing.assert_close(z, kappa * x / (1 + q[:, None, None]))  # alpha of the level it is told
    model = ap.ConsistencyModel.from_denoiser(denoiser, shifted)
    torch.testing.assert_close(model(x[:1], t[:1]), expected[:1], rtol=1e-8, atol=1e-8)


SCHEDULES: dict[str, tuple[str, ap.Schedule]] = {
    "flow": ("velocity", ap.RectifiedFlowSchedule(time_scale=1000)),
    "table": ("v", PATHS["vp-discrete"][0]),
    "cosine": ("epsilon", ap.VPCosineSchedule()),
}
each = pytest.mark.parametrize(("prediction", "schedule"), SCHEDULES.values(), ids=SCHEDULES.keys())


def students(prediction: str, schedule: ap.Schedule) -> list[tuple[Any, tuple[Tensor, ...]]]:
    """Both kinds, with what they are called with."""
    return [
        (
            ap.ConsistencyTrajectoryModel.from_denoiser(
                ap.denoiser_from_network(network(), prediction, schedule), analytic(), "target"
            ),
            (X_T, T, S),
        ),
        (
            ap.ConsistencyModel.from_denoiser(ap.denoiser_from_network(network(), prediction, schedule), analytic()),
            (X_T, T),
        ),
    ]


@each
def test_copies_and_averages_are_the_same_student(prediction: str, schedule: ap.Schedule) -> None:
    label = torch.tensor([0, 1, 2, 3])
    for student, args in students(prediction, schedule):
        expected = student(*args, label=label)
        assert not torch.equal(expected, student(*args))
        other = copy.deepcopy(student)
        nn.init.zeros_(other.network.network.layer.weight)
        other.load_state_dict(student.state_dict())
        for same in (other, pickle.loads(pickle.dumps(student)), ap.exponential_moving_average(student, 0.9).module):
            assert type(same) is type(student)
            assert torch.equal(same(*args, label=label), expected)
        expected.square().mean().backward()
        unused = {"target.weight", "target.bias"} if len(args) == 2 else set()
        for name, p in student.network.network.named_parameters():
            assert name in unused or p.grad.abs().max() > 0


def test_compiles_whole() -> None:
    torch.compiler.reset()
    (student, args), _ = students(*SCHEDULES["flow"])
    torch.testing.assert_close(torch.compile(student, fullgraph=True, backend="eager")(*args), student(*args))
    torch.compiler.reset()


@pytest.mark.long
@each
def test_compiles_and_exports_for_other_batches(prediction: str, schedule: ap.Schedule) -> None:
    torch.compiler.reset()
    for student, args in students(prediction, schedule):
        compiled = torch.compile(student, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*args), student(*args))
        torch.testing.assert_close(compiled(*(v[:3] for v in args)), student(*args)[:3])
        size = torch.export.Dim("size", min=2, max=1024)
        shapes = ({0: size}, {0: size}, {0: size} if len(args) == 3 else None)
        args = (*args, None)[:3]
        program = torch.export.export(student, args, dynamic_shapes=dict(zip(("x_t", "t", "s"), shapes, strict=True)))
        fewer = tuple(None if v is None else v[:3] for v in args)
        torch.testing.assert_close(program.module()(*fewer), student(*fewer))
    torch.compiler.reset()


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(prediction: str, schedule: ap.Schedule, dtype: torch.dtype) -> None:
    for student, args in students(prediction, schedule):
        expected = student(*args)
        with torch.autocast("cpu", dtype):
            jumped = student(*args)
        narrow = student.to(dtype)
        # inputs and activations are rounded; c_out is a few at t = 80 (v), t itself for epsilon
        scale = (1 + T[:, None]) * 8 * torch.finfo(dtype).eps
        for got in (jumped, narrow(*args)):
            assert got.dtype == torch.float32
            assert ((got - expected).abs() < scale).all()
        assert narrow(args[0].to(dtype), *args[1:]).dtype == dtype


def test_denoisers_of_ones_own() -> None:
    """Any callable: a module gets data in its dtype and levels in float32, as from everything here."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=torch.bfloat16)

        def forward(self, x: Tensor, *levels: Tensor) -> Tensor:
            assert x.dtype == torch.bfloat16
            assert all(level.dtype == torch.float32 for level in levels)
            return self.layer(x) / (1 + sum(levels))[:, None].to(x.dtype)

    own = Own()
    D = own(X_T.bfloat16(), T, S).float()
    two = ap.ConsistencyTrajectoryModel.from_denoiser(own, ap.CTMPreconditioning())
    ratio = (S / T)[:, None]
    torch.testing.assert_close(two(X_T, T.double(), S.double()), ratio * X_T + (1 - ratio) * D)
    one = ap.ConsistencyModel.from_denoiser(lambda x, t, k: k * x, ap.CTMPreconditioning())
    assert torch.equal(one.denoise(X_T, T, k=ap.common(0.5)), 0.5 * X_T)
    guided = ap.guide(own, lambda x, t: 0 * x, 2.0)
    guided = ap.ConsistencyModel.from_denoiser(guided, ap.CTMPreconditioning())
    names = {name for name, _ in guided.named_parameters()}
    assert names == {"network.denoiser.layer.weight", "network.denoiser.layer.bias"}


def test_default_levels_stay_inside_what_the_denoiser_knows() -> None:
    table = torch.linspace(0.99, 0.01, 50, dtype=torch.float64)
    low, high = (math.sqrt((1 - a) / a) for a in (0.99, 0.01))
    denoiser = ap.denoiser_from_network(network(), "epsilon", ap.VPDiscreteSchedule(table))
    model = ap.ConsistencyModel.from_denoiser(denoiser, ap.CTMPreconditioning())
    assert (model.sigma_min, *model.default_range) == pytest.approx((low, low, high), rel=1e-12)
    two = ap.ConsistencyTrajectoryModel.from_denoiser(denoiser, analytic(), "target")
    assert two.default_range == pytest.approx((low, high), rel=1e-12)
    assert ap.ConsistencyModel.from_denoiser(denoiser, ap.CTMPreconditioning(), sigma_min=0.5).sigma_min == 0.5
    assert ap.sample_one_step(model, X).shape == X.shape


class Scaled(nn.Module):
    """What EDM's and EDM2's networks with their scalings have."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Identity())

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda d, p: ap.ConsistencyModel(d, p), TypeError,
         r"a raw network, got NetworkDenoiser, which is a denoiser already: write ConsistencyModel\.from_denoiser\("),
        (lambda d, p: ap.ConsistencyModel(ap.guide(d, d, 2.0), p), TypeError, r"GuidedDenoiser, which is a denoiser"),
        (lambda d, p: ap.ConsistencyTrajectoryModel(ap.GaussianDenoiser(1.0), p), TypeError, r"is a denoiser already"),
        (lambda d, p: ap.ConsistencyModel(Scaled("round_sigma"), p), TypeError, r"Scaled, which is a denoiser"),
        (lambda d, p: ap.ConsistencyModel(Scaled("logvar_fourier", "sigma_data"), p), TypeError, r"the network inside"),
        (lambda d, p: ap.ConsistencyTrajectoryModel.from_denoiser(Scaled("round_sigma"), p), TypeError,
         r"third argument must be the second noise level, got class_labels of Scaled: pass a function lambda x, t, s"),
        (lambda d, p: ap.ConsistencyModel(nn.DataParallel(d), p), TypeError, r"which is a denoiser already"),
        (lambda d, p: ap.ConsistencyModel.from_denoiser(3, p), TypeError,
         r"denoiser must be callable as denoiser\(x, t\), got int: pass an nn\.Module or a function"),
        (lambda d, p: ap.ConsistencyTrajectoryModel.from_denoiser(3, p), TypeError, r"as denoiser\(x, t, s\), got int"),
        (lambda d, p: ap.ConsistencyTrajectoryModel.from_denoiser(3, p, "r"), TypeError,
         r"denoiser must be callable as denoiser\(x, t, r=\.\.\.\)"),
        (lambda d, p: ap.ConsistencyTrajectoryModel(None, p), TypeError,
         r"network must be callable as network\(c_in \* x, c_noise_t, c_noise_s\), got NoneType: pass an nn\.Module"),
        (lambda d, p: ap.ConsistencyModel(None, p), TypeError, r"as network\(c_in \* x, c_noise_t\), got NoneType"),
        (lambda d, p: ap.ConsistencyModel.from_denoiser(d, "ctm"), TypeError, r"precond must be .* got str"),
        (lambda d, p: ap.ConsistencyModel.from_denoiser(d, p, sigma_min=-1.0), ValueError, r"sigma_min"),
        (lambda d, p: ap.ConsistencyTrajectoryModel.from_denoiser(d, p), TypeError,
         r"must take a second noise level.*got NetworkDenoiser.*target_time=.*ConsistencyModel"),
        (lambda d, p: ap.ConsistencyTrajectoryModel.from_denoiser(lambda x, t: x, p), TypeError, r"second noise level"),
        (lambda d, p: ap.ConsistencyTrajectoryModel.from_denoiser(nn.Identity(), p), TypeError, r"got Identity"),
        (lambda d, p: ap.ConsistencyTrajectoryModel.from_denoiser(lambda x, t, s: x, p, "target"), TypeError,
         r"which say what it is told, got function: make it with denoiser_from_network, or .* without target_time"),
        (lambda d, p: ap.ConsistencyTrajectoryModel.from_denoiser(d, p, "tau")(X_T, T, S), TypeError, r"tau"),
        (lambda d, p: ap.ConsistencyModel.from_denoiser(lambda x, t: x[:, :1], p)(X_T, T), ValueError,
         r"the denoiser must return x's shape \(4, 3\), got \(4, 1\)"),
        (lambda d, p: ap.ConsistencyModel.from_denoiser(lambda x, t: (x,), p)(X_T, T), TypeError, r"got tuple"),
        (lambda d, p: ap.ConsistencyModel.from_denoiser(lambda x, t: x, p).scalings(T), TypeError,
         r"how it is made of a raw network, got function: make it with denoiser_from_network"),
    ],
)  # fmt: skip
def test_bad_input(call: Any, error: type[Exception], message: str) -> None:
    denoiser = ap.denoiser_from_network(network(), "velocity", ap.RectifiedFlowSchedule())
    with pytest.raises(error, match=message):
        call(denoiser, ap.CTMPreconditioning())


def test_a_student_is_no_denoiser() -> None:
    student = ap.ConsistencyModel.from_denoiser(lambda x, t: 0 * x, ap.CTMPreconditioning())
    for build in (ap.ConsistencyModel, ap.ConsistencyModel.from_denoiser, ap.ConsistencyTrajectoryModel.from_denoiser):
        with pytest.raises(TypeError):
            build(student, ap.CTMPreconditioning())
    again = ap.ConsistencyModel.from_denoiser(student.denoise, ap.CTMPreconditioning())  # the advice
    assert torch.equal(again(torch.ones(2, 3), torch.ones(2)), student(torch.ones(2, 3), torch.ones(2)))


def test_the_boundary_is_exact_in_the_levels_dtype() -> None:
    student = ap.ConsistencyModel.from_denoiser(lambda x, t: 0 * x + 1e3, ap.CTMPreconditioning(), sigma_min=0.002)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(student(x, torch.full((4,), 0.002)), x)
