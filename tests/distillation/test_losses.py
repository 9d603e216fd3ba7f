"""Losses: perfect students, closed forms for linear ones, and what must not reach gradients or generators."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from global_rng import global_rng_untouched
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import analytic_precond as ap
from analytic_precond.distillation.denoising import denoising_loss
from analytic_precond.distillation.distances import pseudo_huber, squared_error
from analytic_precond.distillation.jump_times import (
    JumpTimes,
    ect_target_times,
    sample_adjacent_times,
    sample_jump_times,
)
from analytic_precond.distillation.losses import consistency_distillation_loss, trajectory_distillation_loss
from analytic_precond.students.averaging import exponential_moving_average

VARIANCES = torch.tensor([4.0, 1.0, 0.25, 0.05], dtype=torch.float64)
LEVELS = ap.karras_noise_levels(18)
DISTILLATION = [consistency_distillation_loss, trajectory_distillation_loss]
LossFunction = Callable[..., Any]


class GaussianFlow(nn.Module):
    """The exact jump for independent Gaussians, whose variances are parameters: perfect if they are the data's."""

    def __init__(self, variances: Tensor) -> None:
        super().__init__()
        self.variances = nn.Parameter(variances.clone())

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        t, s = ap.expand_to(t, x_t), ap.expand_to(s, x_t)
        return ((self.variances + s**2) / (self.variances + t**2)).sqrt() * x_t


class PointFlow(nn.Module):
    """The exact jump for data that are one point."""

    def __init__(self, point: Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(point.clone())

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.point + ap.expand_to(s / t, x_t) * (x_t - self.point)


def gaussian_batch(size: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, size, len(VARIANCES), generator=generator, dtype=torch.float64)
    return VARIANCES.sqrt() * draws[0], draws[1]


def draw_times(size: int = 64, seed: int = 1, adjacent: bool = False) -> JumpTimes:
    generator = torch.Generator().manual_seed(seed)
    sample = sample_adjacent_times if adjacent else partial(sample_jump_times, max_steps=17)
    return sample(size, LEVELS, generator=generator)


@pytest.mark.parametrize("loss_function", DISTILLATION)
@pytest.mark.parametrize("adjacent", [True, False])
def test_perfect_student_of_a_point_has_no_loss_and_no_gradient(loss_function: LossFunction, adjacent: bool) -> None:
    """Trajectories towards a point are straight, so that the teacher's Heun steps are exact."""
    x_0 = torch.linspace(-1, 1, 4, dtype=torch.float64)
    student = PointFlow(x_0)
    _, noise = gaussian_batch()
    teacher = ap.GaussianDenoiser(0.0, mean=x_0)
    result = loss_function(teacher, student, student, x_0.expand_as(noise), noise, draw_times(adjacent=adjacent))
    result.loss.backward()
    # rounding of x_t up to 80, squared
    assert result.loss.item() < 1e-24
    assert student.point.grad is not None
    assert student.point.grad.abs().max() < 1e-12


@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_perfect_student_of_a_gaussian_is_as_wrong_as_the_teachers_steps(loss_function: LossFunction) -> None:
    """Heun's error is of second order: the loss falls like n^-4, its gradient like n^-2."""
    x_0, noise = gaussian_batch()
    student = GaussianFlow(VARIANCES)
    levels = torch.tensor([3.0, 0.8, 0.1], dtype=torch.float64)
    times = JumpTimes(*levels[:, None].expand(3, 64))
    values = []
    for num_steps in (8, 16, 32, 64):
        student.zero_grad()
        teacher = ap.GaussianDenoiser(VARIANCES)
        result = loss_function(teacher, student, student, x_0, noise, times, num_steps=num_steps)
        result.loss.backward()
        assert student.variances.grad is not None
        values.append([result.loss.item(), student.variances.grad.norm().item()])
    orders = np.log2(np.array(values)[:-1] / np.array(values)[1:])[-1]
    np.testing.assert_allclose(orders, [4, 2], atol=0.15)  # the next order's share with steps of 0.06 in t^(1/7)
    assert values[-1][0] < 1e-8


def heun_factor(c: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """What Heun's steps multiply a Gaussian coordinate of variance c by: v = x t / (c + t^2)."""
    factor = np.ones_like(c)
    for t, u in pairwise(levels):
        v_t = t / (c + t**2)
        v_u = u / (c + u**2) * (1 + (u - t) * v_t)
        factor = factor * (1 + (u - t) * (v_t + v_u) / 2)
    return factor


@pytest.mark.parametrize("weighting", ["uniform", "karras"])
@pytest.mark.parametrize("trajectory", [False, True])
def test_linear_students_have_the_loss_of_the_closed_form(trajectory: bool, weighting: str) -> None:
    x_0, noise = gaussian_batch()
    student, target = GaussianFlow(VARIANCES * 1.3), GaussianFlow(VARIANCES * 0.9)
    times = draw_times()
    loss_function = DISTILLATION[trajectory]
    result = loss_function(ap.GaussianDenoiser(VARIANCES), student, target, x_0, noise, times, weighting=weighting)

    def flow(c: np.ndarray, t: float, s: float) -> np.ndarray:
        return np.sqrt((c + s**2) / (c + t**2))

    expected = []
    for i, (t, u, s) in enumerate(zip(*(v.tolist() for v in times[:3]), strict=True)):
        assert times.t_index is not None
        assert times.u_index is not None
        c = VARIANCES.numpy()
        x_t = (x_0[i] + t * noise[i]).numpy()
        heun = heun_factor(c, LEVELS.numpy()[times.t_index[i] : times.u_index[i] + 1])
        error = (flow(1.3 * c, t, s) - flow(0.9 * c, u, s) * heun) * x_t
        error = error * flow(0.9 * c, s, 0.002) if trajectory else error
        expected.append((error**2).mean() * (1 if weighting == "uniform" else 1 / t**2 + 4))
    np.testing.assert_allclose(result.per_sample.detach(), expected, rtol=1e-9)  # rounding of differences
    assert result.loss.item() == pytest.approx(np.mean(expected), rel=1e-12)
    product = result.terms["weight"] * result.terms["distance"]
    torch.testing.assert_close(product, result.per_sample.detach(), rtol=1e-15, atol=0)
    torch.testing.assert_close(
        squared_error(result.terms["estimate"], result.terms["target"]), result.terms["distance"], rtol=0, atol=0
    )
    assert result.terms["estimate"].requires_grad
    assert not result.terms["target"].requires_grad


@pytest.mark.parametrize("loss_function", DISTILLATION)
@pytest.mark.parametrize("distance", [squared_error, pseudo_huber])
def test_training_finds_the_data(loss_function: LossFunction, distance: Any) -> None:
    """From variances that are wrong by up to a factor of 3 to those of the data, by the loss alone."""
    student = GaussianFlow(VARIANCES * torch.tensor([0.4, 3.0, 0.5, 2.0], dtype=torch.float64))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.05)
    teacher, levels = ap.GaussianDenoiser(VARIANCES), ap.karras_noise_levels(40)
    for step in range(200):
        with torch.no_grad():
            student.variances.clamp_(min=1e-3)
        x_0, noise = gaussian_batch(256, step)
        times = sample_jump_times(256, levels, 8, torch.Generator().manual_seed(step))
        loss = loss_function(teacher, student, student, x_0, noise, times, distance=distance).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # from 3 to 1.05: what Heun's steps and the last batches' noise leave (0.04 seen)
    assert (student.variances / VARIANCES).log().abs().max() < math.log(1.05)


@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_no_gradient_reaches_the_target(loss_function: LossFunction) -> None:
    x_0, noise = gaussian_batch()
    times = draw_times()
    teacher = ap.GaussianDenoiser(VARIANCES)
    own, frozen = GaussianFlow(VARIANCES * 2), GaussianFlow(VARIANCES * 2).requires_grad_(False)
    student = copy.deepcopy(own)
    loss_function(teacher, student, frozen, x_0, noise, times).loss.backward()
    loss_function(teacher, own, own, x_0, noise, times).loss.backward()  # the student as its own target
    assert own.variances.grad is not None
    torch.testing.assert_close(own.variances.grad, student.variances.grad, rtol=1e-12, atol=1e-15)

    average = exponential_moving_average(student, 0.9)
    average.requires_grad_(True)  # even where someone asks for them
    loss_function(teacher, student, average, x_0, noise, times).loss.backward()
    assert all(p.grad is None for p in average.parameters())


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_distributed_student_as_its_own_target(loss_function: LossFunction) -> None:
    x_0, noise = gaussian_batch()
    plain = GaussianFlow(VARIANCES * 2)
    wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    for student in (plain, wrapped):
        loss_function(ap.GaussianDenoiser(VARIANCES), student, student, x_0, noise, draw_times()).loss.backward()
    torch.testing.assert_close(wrapped.module.variances.grad, plain.variances.grad)


class Network(nn.Module):
    """Two noise levels, a label and dropout, in float32."""

    def __init__(self, width: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(width + 2, 32), nn.Linear(32, width)
        self.label = nn.Embedding(3, 32)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, c_t: Tensor, c_s: Tensor | None = None, label: Tensor | None = None) -> Tensor:
        c_s = torch.zeros_like(c_t) if c_s is None else c_s
        h = self.enter(torch.cat([x, torch.stack([c_t, c_s], 1).to(x)], 1))
        h = h if label is None else h + self.label(label)
        return self.leave(self.dropout(torch.tanh(h)))


def make_student(two_times: bool = True, dropout: float = 0.0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(dropout=dropout)
    return (ap.ConsistencyTrajectoryModel if two_times else ap.ConsistencyModel)(network, ap.CTMPreconditioning())


class Checkpointed(nn.Module):
    """A network that drops its activations and computes them again in the backward pass."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor) -> Any:
        return checkpoint(self.network, *inputs, use_reentrant=False)


@pytest.mark.parametrize("wrap", [lambda network: network, Checkpointed], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(
    "hold",
    [lambda student: student, lambda student: student.forward, partial(torch.compile, backend="eager")],
    ids=["module", "method", "compiled"],
)
def test_no_gradient_reaches_the_target_however_it_is_held(
    hold: Callable[..., Any], wrap: Callable[[nn.Module], nn.Module]
) -> None:
    x_0, noise = (v.float() for v in gaussian_batch())
    student, teacher = make_student(), ap.GaussianDenoiser(VARIANCES.float())
    frozen, own = copy.deepcopy(student).requires_grad_(False), copy.deepcopy(student)
    own.network = wrap(own.network)
    trajectory_distillation_loss(teacher, student, frozen, x_0, noise, draw_times()).loss.backward()
    trajectory_distillation_loss(teacher, own, hold(own), x_0, noise, draw_times()).loss.backward()
    for expected, parameter in zip(student.parameters(), own.parameters(), strict=True):
        if expected.grad is not None:  # not the label's
            torch.testing.assert_close(parameter.grad, expected.grad)


class ToPoint(nn.Module):
    """The exact jump for data that are one point, which it is told."""

    def forward(self, x_t: Tensor, t: Tensor, s: Tensor, point: Tensor) -> Tensor:
        return point + ap.expand_to(s / t, x_t) * (x_t - point)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_condition_is_learnt_in_the_differentiated_jump_alone(trainable: bool) -> None:
    """As what an encoder says of labels is."""
    target = ToPoint()
    target.register_parameter("unused", nn.Parameter(torch.ones(1), requires_grad=trainable))
    point, one = torch.full((1, 1), 3.0, requires_grad=True), torch.ones(1, 1)
    times = JumpTimes(*torch.tensor([[8.0], [4.0], [2.0]]))
    trajectory_distillation_loss(None, ToPoint(), target, one, one, times, sigma_min=1.0, point=point).loss.backward()
    # x_8 = 9 and x_s = 9/4 + 3/4 p; estimate x_s / 2 + 3 / 2 = 3.75, target 3.5 of x_4 = 5
    torch.testing.assert_close(point.grad, torch.tensor([[2 * 0.25 * 3 / 8]]))


@pytest.mark.long
# Dynamo's own doing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_a_training_step_compiles(loss_function: LossFunction, backend: str) -> None:
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor compiles C++ for the CPU")
    x_0, noise = (v.float() for v in gaussian_batch())
    student, teacher, times = make_student(), ap.GaussianDenoiser(VARIANCES.float()), draw_times()
    compiled = torch.compile(loss_function, backend=backend)
    gradients = []
    for function in (loss_function, compiled):
        student.zero_grad()
        function(teacher, student, student, x_0, noise, times).loss.backward()
        gradients.append(student.network.enter.weight.grad.clone())
    torch.testing.assert_close(*gradients)
    torch.compiler.reset()


@pytest.mark.parametrize("two_times", [True, False])
def test_students_of_the_library_in_float32_on_float64_grids(two_times: bool) -> None:
    x_0, noise = (v.float() for v in gaussian_batch())
    student = make_student(two_times)
    teacher = ap.GaussianDenoiser(VARIANCES.float())
    if two_times:
        result = trajectory_distillation_loss(teacher, student, student, x_0, noise, draw_times())
    else:
        result = consistency_distillation_loss(teacher, student, student, x_0, noise, draw_times(adjacent=True))
    result.loss.backward()
    assert result.loss.dtype == torch.float32
    assert all(
        p.grad is not None and p.grad.isfinite().all() for n, p in student.named_parameters() if "label" not in n
    )


class Foreign(nn.Module):
    """Someone else's student, which multiplies levels and data as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return x + self.layer(torch.cat([x, t[:, None], s[:, None]], 1))


@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_levels_come_in_the_datas_dtype(loss_function: LossFunction) -> None:
    x_0, noise = gaussian_batch()
    for dtype, expected in ((torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64,) * 2):
        student = Foreign().to(expected)
        result = loss_function(None, student, student, x_0.to(dtype), noise.to(dtype), draw_times())
        assert result.loss.dtype == expected
    denoising_loss(lambda x, t: student(x.double(), t, t), x_0.float(), noise.float(), draw_times().t)


@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_off_the_grid_the_teacher_takes_as_many_steps_as_edms_grid(loss_function: LossFunction) -> None:
    """Where times lie on EDM's grid of 18 levels, the steps are those of the grid."""
    x_0, noise = gaussian_batch()
    times = draw_times()
    student = GaussianFlow(VARIANCES * 1.2)
    free = JumpTimes(*times[:3])
    on_grid, off_grid = (
        loss_function(ap.GaussianDenoiser(VARIANCES), student, student, x_0, noise, each).per_sample
        for each in (times, free)
    )
    torch.testing.assert_close(off_grid, on_grid, rtol=1e-8, atol=0)  # rounding of t^(1/7)
    fewer = loss_function(ap.GaussianDenoiser(VARIANCES), student, student, x_0, noise, free, num_steps=1).per_sample
    assert (fewer - on_grid).abs().max() > 1e-3
    one_each = torch.ones(64, dtype=torch.int64)
    each = loss_function(ap.GaussianDenoiser(VARIANCES), student, student, x_0, noise, free, num_steps=one_each)
    assert torch.equal(each.per_sample, fewer)


def test_the_inner_jump_can_be_the_students_own() -> None:
    """As sony/ctm: the student from u to s, its average from s to the end."""
    x_0, noise = gaussian_batch()
    times = draw_times()
    student, average = GaussianFlow(VARIANCES * 1.3), GaussianFlow(VARIANCES * 0.9)
    teacher = ap.GaussianDenoiser(VARIANCES)
    result = trajectory_distillation_loss(teacher, student, average, x_0, noise, times, inner=student)
    result.loss.backward()
    assert average.variances.grad is None
    x_u = trajectory_distillation_loss(
        teacher, student, lambda x, t, s: x, x_0, noise, times, distance=squared_error
    ).terms["target"]
    with torch.no_grad():
        goal = average(student(x_u, times.u, times.s), times.s, LEVELS[-1].expand(64))
    torch.testing.assert_close(result.terms["target"], goal, rtol=1e-12, atol=1e-12)
    alone = copy.deepcopy(student)
    alone.variances.grad = None
    estimate = average(alone(x_0 + times.t[:, None] * noise, times.t, times.s), times.s, LEVELS[-1].expand(64))
    squared_error(estimate, goal).mean().backward()
    torch.testing.assert_close(student.variances.grad, alone.variances.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize(("given", "expected"), [(None, 0.02), (0.02, 0.02), (0.01, 0.01)])
def test_both_sides_are_compared_at_the_grids_last_level(given: float | None, expected: float) -> None:
    ends = []

    def student(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        ends.append(s)
        return x

    x_0, noise = gaussian_batch()
    times = sample_jump_times(64, ap.karras_noise_levels(10, sigma_min=0.02), generator=torch.Generator())
    trajectory_distillation_loss(None, student, student, x_0, noise, times, sigma_min=given)
    assert ends[1].tolist() == ends[3].tolist() == [expected] * 64
    trajectory_distillation_loss(None, student, student, x_0, noise, JumpTimes(*times[:3]))
    assert ends[-1].tolist() == [0.002] * 64


def test_dropout_is_shared_between_student_and_target() -> None:
    """Without a teacher's step (u = t) both sides are the same jump, up to their masks."""
    x_0, noise = (v.float() for v in gaussian_batch())
    t = torch.full((64,), 2.0)
    student = make_student(dropout=0.5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for loss_function in DISTILLATION:
            times = JumpTimes(t, t, t / 3)
            shared = loss_function(None, student, student, x_0, noise, times)
            unshared = loss_function(None, student, student, x_0, noise, times, share_dropout=False)
            assert shared.loss.item() == 0.0
            assert unshared.loss.item() > 1e-4
            assert (
                loss_function(None, student, student, x_0, noise, times)
                .terms["estimate"]
                .ne(shared.terms["estimate"])
                .any()
            )  # the next step has other masks


@pytest.mark.parametrize("loss_function", DISTILLATION)
@pytest.mark.parametrize("target_drops", [True, False])
def test_the_student_draws_what_it_would_alone(loss_function: LossFunction, target_drops: bool) -> None:
    """Although its target comes first, which may draw less: each step has other masks, and one pass's worth of them."""
    x_0, noise = (v.float() for v in gaussian_batch())
    times = JumpTimes(*torch.tensor([2.0, 1.0, 0.002])[:, None].expand(3, 64))
    student = make_student(dropout=0.5)
    target = copy.deepcopy(student).train(target_drops)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        for _ in range(2):
            before = torch.get_rng_state()
            result = loss_function(None, student, target, x_0, noise, times)
            after = torch.get_rng_state()
            torch.set_rng_state(before)
            estimate = student(x_0 + 2.0 * noise, times.t, times.s)
            assert torch.equal(torch.get_rng_state(), after)
            # s is the end already, from where the trajectory's second jump goes nowhere
            torch.testing.assert_close(result.terms["estimate"], estimate, rtol=1e-6, atol=1e-6)


class MagnitudePreserving(nn.Module):
    """EDM2's layer: in train mode each pass writes the normalised weight."""

    def __init__(self, size_in: int, size_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size_out, size_in, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.weight.copy_(nn.functional.normalize(self.weight))
        return x @ nn.functional.normalize(self.weight).T


class MagnitudePreservingStudent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter, self.leave = MagnitudePreserving(6, 16), MagnitudePreserving(16, 4)
        self.gain = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        h = torch.tanh(self.enter(torch.cat([x / (1 + t[:, None]), torch.stack([t.log(), s.log()], 1)], 1)))
        return ap.expand_to(s / t, x) * x + ap.expand_to(1 - s / t, x) * self.gain * self.leave(h)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("loss_function", DISTILLATION)
@pytest.mark.parametrize(
    "hold",
    {
        "student": lambda student: (student, student),
        "method": lambda student: (student, student.forward),
        "two methods": lambda student: (student.forward, student.forward),
        "function": lambda student: (student, lambda x, t, s: student(x, t, s)),
        "wrapped": lambda student: (nn.parallel.DistributedDataParallel(student),) * 2,
        "copy": lambda student: (student, copy.deepcopy(student)),
        "average": lambda student: (student, exponential_moving_average(student, 0.9)),
    }.items(),
    ids=lambda item: item[0],
)
def test_layers_that_rewrite_their_weights_in_each_pass(loss_function: LossFunction, hold: Any) -> None:
    x_0, noise = gaussian_batch()
    gradients, weights = [], []
    for rewrites in (False, True):
        student = MagnitudePreservingStudent()
        student(x_0, *(2 * torch.ones(2, 64, dtype=torch.float64)))  # normalises
        student.train(rewrites)
        pair = (student, student) if not rewrites else hold[1](student)
        loss_function(ap.GaussianDenoiser(VARIANCES), *pair, x_0, noise, draw_times()).loss.backward()
        gradients.append([p.grad for p in student.parameters()])
        weights.append([p.detach() for p in student.parameters()])
    for values, expected in (reversed(gradients), reversed(weights)):
        torch.testing.assert_close(values, expected, rtol=1e-11, atol=1e-13)  # normalising again rounds


def test_no_global_generator_moves_without_dropout() -> None:
    x_0, noise = gaussian_batch()
    student = GaussianFlow(VARIANCES)
    with global_rng_untouched():
        for loss_function in DISTILLATION:
            loss_function(ap.GaussianDenoiser(VARIANCES), student, student, x_0, noise, draw_times())
        denoising_loss(ap.GaussianDenoiser(VARIANCES), x_0, noise, draw_times().t)


@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_the_teacher_sees_each_sample_as_often_as_its_steps_ask(loss_function: LossFunction) -> None:
    seen = 0

    def teacher(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        nonlocal seen
        seen += len(x)
        assert not torch.is_grad_enabled()
        assert label.shape == t.shape
        return 0 * x

    def student(x: Tensor, t: Tensor, s: Tensor, label: Tensor) -> Tensor:
        assert label.tolist() == list(range(64))
        return x

    x_0, noise = gaussian_batch()
    times = draw_times()
    loss_function(teacher, student, student, x_0, noise, times, label=torch.arange(64))
    assert times.t_index is not None
    assert times.u_index is not None
    assert seen == 2 * (times.u_index - times.t_index).sum()


def test_consistency_training_needs_no_teacher_and_reaches_clean_data() -> None:
    """ECT's loss, written out: |D(x_t, t) - D(x_r, r)| / (t - r), with x_r = x_0 + r n and D(x, 0) = x."""
    x_0, noise = gaussian_batch()
    t = torch.logspace(-2.5, 1.9, 64, dtype=torch.float64)
    r = ect_target_times(t, stage=0)
    assert (r == 0).any()
    assert (r > 0).any()
    denoiser = GaussianFlow(VARIANCES * 0.5)
    student = lambda x, t, s: denoiser(x, t, torch.zeros_like(t))  # noqa: E731 - jumps to 0, as ECT's do
    times = JumpTimes(t, r, torch.zeros_like(t))
    norm = lambda x, y: (x - y).norm(dim=1)  # noqa: E731
    result = consistency_distillation_loss(
        None, student, student, x_0, noise, times, distance=norm, weighting="inverse-step"
    )
    factor_t, factor_r = ((VARIANCES * 0.5 / (VARIANCES * 0.5 + v[:, None] ** 2)).sqrt() for v in (t, r))
    error = factor_t * (x_0 + t[:, None] * noise) - factor_r * (x_0 + r[:, None] * noise)
    torch.testing.assert_close(result.per_sample, error.norm(dim=1) / (t - r), rtol=1e-10, atol=0)


def test_denoising_loss_of_the_best_denoiser_is_the_posterior_variance() -> None:
    t = torch.full((20000,), 0.7, dtype=torch.float64)
    x_0, noise = gaussian_batch(len(t))
    result = denoising_loss(ap.GaussianDenoiser(VARIANCES), x_0, noise, t)
    posterior = (VARIANCES * 0.49 / (VARIANCES + 0.49)).mean()
    expected = posterior * (1 / 0.49 + 4)
    spread = result.per_sample.std().item() / math.sqrt(len(t))
    assert abs(result.loss.item() - expected) < 3 * spread
    worse = denoising_loss(ap.GaussianDenoiser(VARIANCES * 1.2), x_0, noise, t)
    assert worse.loss > result.loss


def test_denoising_loss_takes_one_level_for_all_and_half_precision() -> None:
    x_0, noise = (v.half() for v in gaussian_batch())
    result = denoising_loss(lambda x, t: 0 * x, x_0, noise, torch.tensor(0.5))
    # fp16 data are squared in float32
    assert result.loss.item() == pytest.approx((x_0.double() ** 2).mean().item() * 8, rel=1e-5)


def test_denoising_levels_are_positive_and_one_per_sample() -> None:
    x_0, noise = gaussian_batch()
    for t, message in ((0.0, "must be finite and positive, got 0"), (torch.ones(64, 4), "one noise level per sample")):
        with pytest.raises(ValueError, match=message):
            denoising_loss(never, x_0, noise, t)


def nan_student(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return torch.where(ap.expand_to(t, x) > 50, torch.nan, x)


@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_a_loss_that_is_not_a_number_is_named_with_its_times(loss_function: LossFunction) -> None:
    x_0, noise = gaussian_batch(2)
    times = JumpTimes(*torch.tensor([[1.0, 60.0], [0.5, 0.25], [0.125, 0.125]], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"got nan at t = 60, u = 0\.25, s = 0\.125 \(sample 1; 1 of 2 samples\)"):
        loss_function(None, nan_student, nan_student, x_0, noise, times)
    with pytest.raises(ValueError, match=r"got nan at t = 60 \(sample 1"):
        denoising_loss(lambda x, t: nan_student(x, t, t), x_0, noise, times.t)


def never(*args: object, **kwargs: object) -> Tensor:
    raise AssertionError("a network was called before the arguments were checked")


def columns(t: float, u: float, s: float) -> JumpTimes:
    return JumpTimes(*torch.tensor([[t], [u], [s]]).expand(3, 64))


@pytest.mark.parametrize("loss_function", DISTILLATION)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"times": columns(1.0, 2.0, 0.5)}, ValueError, "t >= u >= s >= 0 with t > 0, got t = 1, u = 2"),
        ({"times": columns(1.0, 0.5, 0.75)}, ValueError, "t >= u >= s"),
        ({"times": columns(1.0, 0.5, -0.1)}, ValueError, "t >= u >= s"),
        ({"times": columns(math.nan, 0.5, 0.1)}, ValueError, "t >= u >= s"),
        ({"times": columns(0.0, 0.0, 0.0)}, ValueError, "with t > 0"),
        ({"times": draw_times(3)}, ValueError, r"times\.t must have shape \(64,\), got \(3,\)"),
        ({"times": (1.0, 0.5, 0.1)}, TypeError, "must be JumpTimes, got tuple: take sample_jump_times"),
        ({"times": JumpTimes(*torch.ones(3, 64, dtype=torch.int64))}, TypeError, r"times\.t must be a floating"),
        ({"noise": torch.zeros(64, 5)}, ValueError, r"one shape \(B, \.\.\.\), got \(64, 4\) and \(64, 5\)"),
        (
            {"x_0": torch.zeros(0, 4), "noise": torch.zeros(0, 4)},
            ValueError,
            r"x_0 must be a batch of at least one sample, .*got \(0, 4\): leave empty batches out",
        ),
        ({"x_0": torch.tensor(1.0), "noise": torch.tensor(1.0)}, ValueError, r"got \(\): .*x_0\[None\]"),
        ({"x_0": torch.zeros(64, 4, dtype=torch.uint8)}, TypeError, "x_0 must be a floating-point"),
        ({"student": 3}, TypeError, "student and target must be callable as student"),
        ({"target": None}, TypeError, "must be callable"),
    ],
)
def test_bad_arguments_are_refused_before_any_network_is_called(
    loss_function: LossFunction, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    x_0, noise = gaussian_batch()
    arguments = {"student": never, "target": never, "x_0": x_0, "noise": noise, "times": draw_times(), **changes}
    with pytest.raises(error, match=message):
        loss_function(never, *arguments.values())


def test_bad_options_are_refused() -> None:
    x_0, noise = gaussian_batch()
    student = GaussianFlow(VARIANCES)
    call = partial(trajectory_distillation_loss, None, student, student, x_0, noise, draw_times())
    with pytest.raises(ValueError, match="weighting must be one of 'uniform'"):
        call(weighting="snr2")
    with pytest.raises(ValueError, match="sigma_data must be positive"):
        call(sigma_data=0.0)
    with pytest.raises(ValueError, match="sigma_min must be positive"):
        call(sigma_min=-1.0)
    with pytest.raises(ValueError, match="num_steps must be None, as the times' grid says"):
        call(num_steps=3)
    with pytest.raises(TypeError, match="must be callable as student"):
        call(inner=3)
    with pytest.raises(ValueError, match=r"sample, shape \(64,\), got \(64, 4\): average over"):
        call(distance=lambda x, y: (x - y) ** 2)
    with pytest.raises(ValueError, match=r"one number per sample, shape \(64,\), got float"):
        call(distance=lambda x, y: 0.0)
    with pytest.raises(
        ValueError, match=r"weighting must return one number per sample, .* got \(64, 1\): compute it of t"
    ):
        call(weighting=lambda t, u, s, sigma_data: t[:, None])  # would pair every weight with every sample
    with pytest.raises(ValueError, match=r"weighting must return one number per sample, .* got float"):
        call(weighting=lambda t, u, s, sigma_data: 1.0)


@pytest.mark.parametrize("loss_function", DISTILLATION)
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (lambda x, t, s: (x,), TypeError, "student must return a floating-point tensor, got tuple"),
        (lambda x, t, s: x[:, :1], ValueError, r"student must return x's shape \(64, 4\), got \(64, 1\)"),
    ],
)
def test_answers_of_another_shape_are_refused(
    loss_function: LossFunction, answer: Any, error: type[Exception], message: str
) -> None:
    """A shape that broadcasts would train towards other numbers without a word."""
    x_0, noise = gaussian_batch()
    good = GaussianFlow(VARIANCES)
    for student, target in ((answer, good), (good, answer)):
        with pytest.raises(error, match=message):
            loss_function(None, student, target, x_0, noise, draw_times())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("loss_function", DISTILLATION)
def test_no_waiting_for_the_device(loss_function: LossFunction) -> None:
    x_0, noise = (v.float().cuda() for v in gaussian_batch())
    student = make_student().cuda()
    teacher = ap.GaussianDenoiser(VARIANCES.float()).cuda()
    times = draw_times()  # on the CPU, indices included
    expected = loss_function(teacher.cpu(), copy.deepcopy(student).cpu(), student.cpu(), x_0.cpu(), noise.cpu(), times)
    student, teacher = student.cuda(), teacher.cuda()
    loss_function(teacher, student, student, x_0, noise, times).loss.backward()  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = loss_function(teacher, student, student, x_0, noise, times)
        result.loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(result.loss.cpu(), expected.loss, rtol=1e-3, atol=1e-5)
