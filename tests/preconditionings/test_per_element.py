"""Coefficients per element and per channel: exact on diagonal Gaussians, and like the scalar ones one by one."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from constructions import raw
from problems import coefficient_tables, gaussian_problem
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from without_float64 import DEMAND, moved, pretence, without_float64

import analytic_precond as ap
from analytic_precond.preconditionings.per_element import PerElementPreconditioning

PROBLEM = gaussian_problem()
SHAPE = (2, 3, 4)
LEVELS = ap.log_noise_levels(60)


def variances(per: str = "element") -> Tensor:
    shape = SHAPE if per == "element" else (2, 1, 1)
    return torch.logspace(-3, 0.6, math.prod(shape), dtype=torch.float64).reshape(shape)


def noisy(c: Tensor, mean: float, t: float, num: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return mean + (c + t**2).sqrt() * torch.randn(num, *SHAPE, dtype=torch.float64, generator=generator)


def flow(x: Tensor, c: Tensor, mean: float, t: float, s: float) -> Tensor:
    return mean + ((c + s**2) / (c + t**2)).sqrt() * (x - mean)


def statistics(
    c: Tensor, mean: float = 0.0, dtype: torch.dtype = torch.float64, **options: object
) -> ap.TeacherStatistics:
    denoiser = ap.GaussianDenoiser(c.expand(SHAPE).to(dtype), torch.tensor(mean, dtype=dtype))
    return ap.estimate_statistics(
        denoiser, noisy(c, mean, 0.0, 64).to(dtype), LEVELS, 128, progress=False, per_element=True, **options
    )


JUMPS = [*pairwise((80.0, 20.0, 3.0, 0.5, 0.05, 0.002)), (80.0, 0.002), (5.0, 4.999)]


@pytest.mark.parametrize("per", ["element", "channel"])
@pytest.mark.parametrize("mean", [0.0, 0.25])
def test_a_diagonal_gaussian_is_carried_exactly(per: str, mean: float) -> None:
    c = variances(per)
    forward = PerElementPreconditioning(statistics(c, mean), "forward", per=per)
    backward = PerElementPreconditioning(statistics(c, mean), per=per)
    denoiser = ap.GaussianDenoiser(c.expand(SHAPE), torch.tensor(mean, dtype=torch.float64))
    for t, s in JUMPS:
        x_t = noisy(c, mean, t)
        x_s = flow(x_t, c, mean, t, s)
        at_t, at_s = (denoiser(x, torch.full((8,), level).double()) for x, level in ((x_t, t), (x_s, s)))
        # interpolation on 60 levels, of a sixth of a unit of lambda each
        close = {"rtol": 0, "atol": 2e-6 * x_s.square().mean().sqrt().item()}
        torch.testing.assert_close(forward.jump(x_t, at_t, t, s), x_s, **close)
        torch.testing.assert_close(backward.jump(x_t, at_s, t, s), x_s, **close)
        torch.testing.assert_close(backward.required_output(x_t, x_s, t, s), at_s, rtol=1e-3, atol=1e-4)


def test_float32_statistics_are_good_enough() -> None:
    c = variances()
    forward = PerElementPreconditioning(statistics(c, 0.25, torch.float32), "forward")
    denoiser = ap.GaussianDenoiser(c, torch.tensor(0.25, dtype=torch.float64))
    for t, s in JUMPS:
        x_t = noisy(c, 0.25, t)
        x_s = flow(x_t, c, 0.25, t, s)
        got = forward.jump(x_t, denoiser(x_t, torch.full((8,), t).double()), t, s)
        # l to 1e-6 or so of float32's rounding, D of some 80 in it, and mean (1 - w) unresolved at the cleanest levels
        assert (got - x_s).square().mean().sqrt() < 1e-4 * x_s.square().mean().sqrt()


@pytest.mark.parametrize("theta", [0.0, 0.5, 1.0])
def test_every_element_is_as_by_itself(theta: float) -> None:
    levels, l, s = coefficient_tables(PROBLEM, 120)
    tables = torch.stack([l, 0.5 * l, 1 - l], 1), torch.stack([s, 0 * s, -0.5 * s], 1)
    precond = PerElementPreconditioning.from_coefficients(levels, *tables, theta=theta)
    ends = (
        torch.exp(torch.rand(2, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 10.59) * 0.002
    )
    t, target = ends.max(0).values, ends.min(0).values
    t = torch.where(torch.arange(4000) < 2000, t, target * (1 + 1e-6 * t)).clamp(max=80)
    got = precond(t, target)
    assert got.c_out.shape == (4000, 3)
    for i in range(3):
        one = ap.AnalyticPreconditioning.from_coefficients(levels, tables[0][:, i], tables[1][:, i], theta=theta)
        expected = one(t, target)
        # two resamplings of the same splines; beside the diagonal, rounding of places in lambda
        torch.testing.assert_close(got.c_out[:, i], expected.c_out, rtol=1e-7, atol=2e-15)
        # the forward form's c_skip is a difference of terms of this size
        size = expected.c_skip.abs() + expected.c_out
        assert ((got.c_skip[:, i] - expected.c_skip).abs() <= 1e-7 * size).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_jumps_to_the_same_level_change_no_bit(dtype: torch.dtype) -> None:
    precond = PerElementPreconditioning(statistics(variances()), theta=0.3)
    t = torch.exp(torch.rand(64, generator=torch.Generator().manual_seed(0)) * 10.59) * 0.002
    t = torch.cat([t.clamp(0.002, 80), LEVELS[:8].float()])
    x = torch.randn(len(t), *SHAPE, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(precond.jump(x, 1e3 * x, t, t), x)
    s = torch.where(torch.arange(len(t)) == 3, t, 0.9 * t).clamp(min=0.002)
    with pytest.raises(ValueError, match="t > s needed, got s = t at position 3:"):
        precond.required_output(x.double(), x.double(), t, s)


@pytest.mark.parametrize("theta", [0.0, 1.0])
def test_read_out(theta: float) -> None:
    precond = PerElementPreconditioning(statistics(variances()), theta=theta)
    t = torch.tensor([60.0, 1.0, 0.01], dtype=torch.float64)
    s = t.clone().requires_grad_()
    for c, sign in zip(precond(t, s), (1, -1), strict=True):
        (slope,) = torch.autograd.grad(c.sum(), s, retain_graph=True)  # 1/t and -1/t, of each of 24 elements
        # as good as splines of l and ln L agree: ln L's slope is 1 - l but for interpolation
        torch.testing.assert_close(slope, sign * 24 / t, rtol=1e-6, atol=0)


def test_shapes_and_on_network() -> None:
    precond = PerElementPreconditioning(statistics(variances("channel")), per="channel", sigma_data=0.7)
    assert precond(5.0, 1.0).c_out.shape == (2, 1, 1)
    t = torch.tensor([[5.0, 3.0, 2.0], [1.0, 0.5, 0.1]])
    on_denoiser, on_network = precond(t, 0.05), precond.on_network(t, 0.05)
    assert on_network.c_out.shape == (2, 3, 2, 1, 1)
    assert on_network.c_out.dtype == torch.float32
    x, F = torch.randn(2, 6, *SHAPE, generator=torch.Generator().manual_seed(0)).double()
    t = t.flatten()
    edm = [ap.expand_to(c, x) for c in ap.EDMPreconditioning(0.7)(t.double())]
    expected = precond.jump(x, edm[0] * x + edm[1] * F, t, 0.05)
    c_skip, c_out = (c.flatten(0, 1) for c in on_network)
    torch.testing.assert_close(c_skip * x + c_out * F, expected, rtol=1e-5, atol=1e-6)  # float32 coefficients
    assert precond.on_network(5.0, 1.0).c_skip.shape == (2, 1, 1)
    assert on_denoiser.c_skip.shape == on_network.c_skip.shape


def test_state_dict_half_and_copies() -> None:
    first, second = (PerElementPreconditioning(statistics(c)) for c in (variances(), 2 * variances()))
    expected = first(5.0, 0.01).c_out
    assert not torch.equal(second(5.0, 0.01).c_out, expected)
    second.load_state_dict(first.state_dict())
    for same in (second, copy.deepcopy(first), copy.deepcopy(first).half(), copy.deepcopy(first).to(torch.bfloat16)):
        assert torch.equal(same(5.0, 0.01).c_out, expected)
    halved = {name: value.half() for name, value in first.state_dict().items()}
    with pytest.raises(RuntimeError, match="save the student uncast"):
        second.load_state_dict(halved)


def test_without_float64() -> None:
    precond = PerElementPreconditioning(statistics(variances(), 0.25))
    narrow = moved(precond)
    ends = torch.exp(torch.rand(2, 500, generator=torch.Generator().manual_seed(0)) * 10.59) * 0.002
    t, s = ends.max(0).values.clamp(0.002, 80), ends.min(0).values.clamp(0.002, 80)
    t = torch.where(torch.arange(500) < 250, t, s * (1 + 1e-5)).clamp(max=80)
    expected = precond(t.double(), s.double())
    with without_float64():
        got = narrow(t, s)
        zero = narrow(t, t)
    # ln L and ln S are counted from the noisiest level, up to 12: their rounding, 5e-7, enters ratios directly
    torch.testing.assert_close(got.c_out.double(), expected.c_out, rtol=2 * DEMAND, atol=0)
    torch.testing.assert_close(got.c_skip.double(), expected.c_skip, rtol=2 * DEMAND, atol=1e-9)
    assert zero.c_skip.eq(1).all()
    assert zero.c_out.eq(0).all()


@pytest.mark.long
@pytest.mark.parametrize("dynamic", [False, True])  # torch makes sizes dynamic by itself where others were compiled
def test_compiled_without_graph_breaks(dynamic: bool) -> None:
    precond = PerElementPreconditioning(statistics(variances()))
    t, x = torch.tensor([5.0, 1.0, 0.3]), torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0))
    jump = torch.compile(precond.jump, fullgraph=True, backend="eager", dynamic=dynamic)
    torch.testing.assert_close(jump(x, 0.5 * x, t, t / 2), precond.jump(x, 0.5 * x, t, t / 2))
    assert jump(x, x, t, 2 * t).isnan().all()


@pytest.mark.usefixtures("around")
def test_students_train_and_sample() -> None:
    c = variances()
    precond = PerElementPreconditioning(statistics(c), "forward")
    denoiser = ap.GaussianDenoiser(c.float())

    class Network(torch.nn.Module):
        """The teacher's raw network, times a weight."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, c_noise_t: Tensor, c_noise_s: Tensor) -> Tensor:
            t = (4 * c_noise_t).exp()
            edm = [ap.expand_to(v, x) for v in ap.EDMPreconditioning()(t)]
            noisy = x / edm[2]
            return self.weight * (denoiser(noisy, t) - edm[0] * noisy) / edm[1]

    student = ap.ConsistencyTrajectoryModel(Network(), precond)
    x = noisy(c, 0.0, 80.0).float()
    got = student(x, torch.full((8,), 80.0), torch.full((8,), 0.1))
    # an untrained student; the network's and the denoiser's scalings in float32, at t = 80
    torch.testing.assert_close(got, flow(x, c, 0.0, 80.0, 0.1).float(), rtol=0, atol=2e-3)
    got.square().mean().backward()
    assert bool(raw(student).weight.grad.isfinite())


def test_bad_input() -> None:
    stats = statistics(variances())
    precond = PerElementPreconditioning(stats)
    x = torch.ones(4, *SHAPE)
    with pytest.raises(
        ValueError, match=r"x_t must be of shape \(B, 2, 3, 4\), got \(4, 2, 3, 5\): coefficients belong"
    ):
        precond.jump(torch.ones(4, 2, 3, 5), torch.ones(4, 2, 3, 5), 1.0, 0.5)
    with pytest.raises(ValueError, match=r"\(B, 2, 3, 4\), got \(2, 3, 4\): add a batch dimension"):
        precond.jump(x[0], x[0], 1.0, 0.5)
    with pytest.raises(ValueError, match="denoised must have x_t's shape"):
        precond.jump(x, x[:2], 1.0, 0.5)
    with pytest.raises(ValueError, match="jumps must go from t to s"):
        precond.jump(x, x, 1.0, 2.0)
    with pytest.raises(ValueError, match="per must be one of"):
        PerElementPreconditioning(stats, per="sample")
    with pytest.raises(ValueError, match="give a discretization or a theta"):
        PerElementPreconditioning(stats, "forward", theta=0.5)
    with pytest.raises(TypeError, match="must be TeacherStatistics, got Tensor"):
        PerElementPreconditioning(stats.l)  # type: ignore[arg-type]
    scalars = ap.estimate_statistics(ap.GaussianDenoiser(1.0), torch.ones(8, 2), LEVELS, 16, progress=False)
    with pytest.raises(ValueError, match="call estimate_statistics with per_element=True"):
        PerElementPreconditioning(scalars)

    make, l = PerElementPreconditioning.from_coefficients, torch.full((60, 2), 0.5)
    with pytest.raises(ValueError, match="AnalyticPreconditioning takes tables of one value per level"):
        make(LEVELS, l[:, 0], l[:, 0])
    with pytest.raises(ValueError, match=r"l and s must broadcast, got shapes \(60, 2\) and \(60, 3\)"):
        make(LEVELS, l, torch.zeros(60, 3))
    with pytest.raises(ValueError, match="s must be finite"):
        make(LEVELS, l, l / 0)
    for empty in (torch.ones(60, 0), torch.ones(60, 2, 0, 1)):
        with pytest.raises(ValueError, match=r"coefficients of some elements, got shape \(60, .*0"):
            make(LEVELS, empty, empty)


def test_refused_coefficients_are_named_with_advice_that_fits() -> None:
    def make(l: list[float], s: list[float], shape: tuple[int, ...] = (2,)) -> PerElementPreconditioning:
        tables = (torch.tensor(v).reshape(shape).expand(60, *shape) for v in (l, s))
        return PerElementPreconditioning.from_coefficients(LEVELS, *tables)

    half = [0.5, 0.5]
    with pytest.raises(
        ValueError, match=r"fall by more than 50 .* down to t = 0.002 in element \(1,\): check sign and"
    ):
        make(half, [0.0, -20.0])
    # 40 times a twelfth of lambda
    with pytest.raises(ValueError, match=r"change by more than 2 .* got 3\.3.* in element \(0, 1, 0\): check sign"):
        make(half, [0.0, 40.0], (1, 2, 1))
    # (0.5 + 100) ln(80 / 0.002)
    with pytest.raises(
        ValueError, match=r"span more than 600 over the levels, got 1065 in element \(1, 0\): check sign"
    ):
        make(half, [0.0, 100.0], (2, 1))
    with pytest.raises(
        ValueError, match=r"keep the denominator .* in element \(1,\) for the jump from 80 .*: check sign"
    ):
        make([0.5, -2.0], [0.0, -2.0])

    def teacher(x: Tensor, t: Tensor) -> Tensor:  # l = -7 and s = -2 in the second channel
        return torch.cat([0 * x[:, :1], ap.expand_to(t, x) ** 2 - 7 * x[:, 1:]], 1)

    stats = ap.estimate_statistics(teacher, torch.ones(4, *SHAPE).double(), LEVELS, 8, progress=False, per_element=True)
    advice = "take more samples, a teacher in float32, or"
    with pytest.raises(ValueError, match=rf"in element \(1, \d, \d\).* half precision: {advice} per='channel'\."):
        PerElementPreconditioning(stats)
    with pytest.raises(
        ValueError, match=rf"in element \(1, 0, 0\).* half precision: {advice} AnalyticPreconditioning\."
    ):
        PerElementPreconditioning(stats, per="channel")


def test_as_many_elements_as_one_likes() -> None:
    levels, l, s = coefficient_tables(PROBLEM, 60)
    scale = torch.linspace(0.2, 1, 1500, dtype=torch.float64).reshape(30, 50)  # more than are tabulated at a time
    many = PerElementPreconditioning.from_coefficients(levels, l[:, None, None] * scale, s[:, None, None] * scale)
    for place in ((0, 0), (20, 23), (20, 24), (29, 49)):  # 1023 and 1024, where one lot ends
        one = ap.AnalyticPreconditioning.from_coefficients(levels, l * scale[place], s * scale[place])
        np.testing.assert_allclose(many(5.0, 0.1).c_out[place], one(5.0, 0.1).c_out, rtol=1e-7)


def test_samples_that_are_numbers() -> None:
    data = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    options = {"num_samples": 128, "progress": False, "per_element": True}
    numbers, vectors = (
        PerElementPreconditioning(ap.estimate_statistics(ap.GaussianDenoiser(0.7), x, LEVELS, **options), "forward")
        for x in (data, data[:, None])
    )
    assert numbers(5.0, 1.0).c_out.shape == ()
    assert numbers(torch.tensor([5.0, 4.0]), 1.0).c_out.shape == (2,)
    D = 0.5 * data
    assert torch.equal(numbers.jump(data, D, 5.0, 1.0), vectors.jump(data[:, None], D[:, None], 5.0, 1.0)[:, 0])
    with pytest.raises(ValueError, match=r"of shape \(B\), got \(64, 1\)"):
        numbers.jump(data[:, None], data[:, None], 5.0, 1.0)


def test_checkpoints_of_another_shape_are_refused() -> None:
    def make(l: float, *shape: int) -> PerElementPreconditioning:
        tables = torch.full((60, *shape), l), torch.zeros(60, *shape)
        return PerElementPreconditioning.from_coefficients(LEVELS, *tables)

    precond = make(0.5, 3, 2, 8)
    before = precond(5.0, 1.0).c_out
    with pytest.raises(RuntimeError, match=r"must be \(3, 2, 8\), got \(3, 4, 4\): .* build the preconditioning for"):
        precond.load_state_dict(make(0.3, 3, 4, 4).state_dict())
    assert torch.equal(precond(5.0, 1.0).c_out, before)
    precond.load_state_dict(make(0.3, 3, 2, 8).state_dict())
    assert not torch.equal(precond(5.0, 1.0).c_out, before)


WAYS: dict[str, Callable[[Any], Any]] = {
    "made": lambda precond: precond,
    "copied": copy.deepcopy,
    "unpickled": lambda precond: pickle.loads(pickle.dumps(precond)),
    "moved": lambda precond: precond._apply(torch.clone),  # as .to("cuda") does
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("has_float64", [True, False])
def test_made_in_inference_mode_and_differentiated_outside(way: Callable[[Any], Any], has_float64: bool) -> None:
    stats, dtype = statistics(variances()), torch.float64 if has_float64 else torch.float32
    for make in (PerElementPreconditioning, ap.AnalyticPreconditioning):
        with nullcontext() if has_float64 else pretence():
            own = make(stats) if has_float64 else moved(make(stats))
            with torch.inference_mode():
                precond = way(make(stats) if has_float64 else moved(make(stats)))
                assert torch.equal(precond(5.0, 0.5).c_out, own(5.0, 0.5).c_out)
            t = torch.tensor([5.0, 1.0], dtype=dtype, requires_grad=True)
            expected = torch.autograd.grad(own(t, 0.5).c_out.sum(), t)
            assert torch.equal(torch.autograd.grad(precond(t, 0.5).c_out.sum(), t)[0], expected[0])


@pytest.mark.parametrize("precond", [ap.CTMPreconditioning(), None], ids=["without tables", "with"])
def test_levels_on_two_devices_are_told_what_to_move(precond: ap.Preconditioning | None) -> None:
    owner = "t" if precond else "the preconditioning"
    precond = precond or PerElementPreconditioning(statistics(variances()))
    with FakeTensorMode(allow_non_fake_inputs=True):
        t, s = (torch.ones(2, device=f"cuda:{i}") for i in (0, 1))
        with pytest.raises(ValueError, match=rf"as {owner} is, .*: move {owner} by "):
            precond(t, s)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # NumPy 2 in diffusers
def test_what_holds_one_pair_per_level_says_so() -> None:
    pytest.importorskip("diffusers")
    from analytic_precond.sampling.diffusers_scheduler import ConsistencyJumpScheduler

    precond = PerElementPreconditioning(statistics(variances()))
    with pytest.raises(TypeError, match=r"one per mode or element: .* e\.g\. precond\(t, s\)\.c_out\[:, 0, 0, 0\]"):
        ap.plot_preconditioning(precond)
    student = ap.ConsistencyModel(lambda x, c_t: x, precond)
    with pytest.raises(TypeError, match=r"got PerElementPreconditioning .*: sample with sample_multistep, or train"):
        ConsistencyJumpScheduler.from_student(student, ap.karras_noise_levels(4))


def test_one_coefficient_serves_several_elements() -> None:
    l = torch.full((60, 2, 1, 1), 0.5)
    precond = PerElementPreconditioning.from_coefficients(LEVELS, l, torch.zeros(60, 1, 1, 1))
    x = torch.ones(4, *SHAPE)
    assert precond.jump(x, x, 1.0, 0.5).shape == x.shape
    with pytest.raises(ValueError, match=r"must be of shape \(B, 2, any, any\), got \(4, 3, 5, 5\)"):
        precond.jump(torch.ones(4, 3, 5, 5), torch.ones(4, 3, 5, 5), 1.0, 0.5)


def test_few_levels_are_enough_for_constants() -> None:
    # CTM's s/t, 1 - s/t, of three levels
    levels, zero = torch.tensor([80.0, 1.0, 0.002], dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    c_skip, c_out = PerElementPreconditioning.from_coefficients(levels, zero, zero)(4.0, 1.0)
    np.testing.assert_allclose(c_skip, 0.25, rtol=1e-12)
    np.testing.assert_allclose(c_out, 0.75, rtol=1e-9)  # Gauss's rule of three points on e^lambda
