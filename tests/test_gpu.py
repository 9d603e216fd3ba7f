"""What runs on a GPU gives the CPU's numbers, waits for nothing, can be captured, and takes a batch's memory.

Everything runs on the CPU too, where there is nothing to wait for: so that a machine without a GPU tries the tests.
More of them, marked ``gpu`` likewise, are beside the tests of what they are about.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from problems import Gaussian
from torch import Tensor, nn

import analytic_precond as ap

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")],
    ),
]
pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),  # torch's, at its first use
]

SHAPE = (2, 4, 3)
SAMPLER_LEVELS = [80.0, 5.0, 0.5, 0.002]
PROBLEM = Gaussian((4.0, 1.0, 0.25, 0.05, 0.01, 0.001) * 4)  # as many as a sample has elements


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


@contextmanager
def no_waiting(device: str) -> Iterator[None]:
    """Let every operation that waits for a GPU raise."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def times_waited(device: str, function: Callable[[], object]) -> int:
    """Return how often a function waits for the device."""
    if device == "cpu":
        function()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


def captured(step: Callable[[], object], device: str) -> Callable[[], object]:
    """Return a replay of a step as a CUDA graph; on the CPU, the step."""
    if device == "cpu":
        return step
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # cuBLAS, cuDNN and the allocator set themselves up
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


# statistics


def bent_teacher(x: Tensor, t: Tensor) -> Tensor:
    """A teacher that is neither linear nor diagonal."""
    return torch.tanh(x) / (1 + ap.expand_to(t, x)) + 0.1 * x.roll(1, -1)


class ConvTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))
        for number, parameter in enumerate(self.parameters()):
            parameter.data = 0.2 * normal(*parameter.shape, seed=number, dtype=torch.float32)
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x / (1 + ap.expand_to(t, x) ** 2) + 0.1 * self.layers(x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"intercept": True},
        {"l_method": "hutchinson", "s_method": "jvp"},
        {"l_method": "exact", "s_method": "finite-difference"},
        {"intercept": True, "l_method": "hutchinson", "s_method": "finite-difference"},
    ],
    ids=str,
)
def test_statistics_are_the_same(device: str, options: dict[str, Any]) -> None:
    data, levels = normal(6, *SHAPE), torch.tensor([20.0, 1.0, 0.1], dtype=torch.float64)
    common: dict[str, Any] = {"num_samples": 16, "batch_size": 6, "progress": False, **options}
    expected = ap.estimate_statistics(bent_teacher, data, levels, **common)
    for where in ({"data": data.to(device), "batch_size": 64}, {"data": data, "device": device}):
        got = ap.estimate_statistics(bent_teacher, levels=levels, **{**common, **where})
        assert got.sums.device.type == got.l.device.type == "cpu"
        assert torch.equal(got.counts, expected.counts)
        torch.testing.assert_close(got.sums, expected.sums, rtol=1e-9, atol=1e-9)  # float64, another order of sums
        for name in ("l", "g_rms", "s", "l_stderr", "g_rms_stderr", "s_stderr"):  # differences lose digits
            torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=1e-6, atol=1e-9)
        if options.get("intercept"):
            torch.testing.assert_close(got.intercept, expected.intercept, rtol=1e-9, atol=1e-9)


def test_statistics_of_a_network_are_the_same(device: str) -> None:
    data = normal(16, 3, 8, 8, dtype=torch.float32)
    teacher, levels = ConvTeacher(), torch.tensor([20.0, 2.0, 0.5, 0.1])
    expected = ap.estimate_statistics(teacher, data, levels, 32, progress=False)
    got = ap.estimate_statistics(teacher.to(device), data, levels, 32, 8, progress=False)
    assert got.header.precision == "float32"
    # TensorFloat-32 in cuDNN's convolutions: 10 bits of a tenth of D
    for name in ("l", "g_rms"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=2e-3, atol=2e-4)


def test_the_estimator_waits_once_per_batch_not_per_level(device: str) -> None:
    data, teacher = normal(16, 3, 8, 8, dtype=torch.float32).to(device), ConvTeacher().to(device)

    def waited(num_levels: int) -> int:
        levels = ap.log_noise_levels(num_levels)
        # 8 pairs fill a call: each level has one of its own
        return times_waited(
            device, lambda: ap.estimate_statistics(teacher, data, levels, 32, batch_size=16, progress=False)
        )

    waited(3)  # cuDNN sets itself up
    assert waited(24) == waited(3)


def test_memory_is_of_a_batch(device: str) -> None:
    teacher, data = ConvTeacher().to(device), normal(512, 3, 16, 16, dtype=torch.float32)

    def peak(num_samples: int) -> int:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if device == "cuda" else 0
        ap.estimate_statistics(teacher, data, ap.log_noise_levels(4), num_samples, 32, progress=False)
        return torch.cuda.max_memory_allocated() - before if device == "cuda" else 0

    peak(128)
    few, many = peak(128), peak(1024)  # 2 and 16 batches of clean samples
    assert many <= 1.05 * few


# preconditionings


@cache
def preconditionings() -> dict[str, ap.Preconditioning]:
    levels, l, s = PROBLEM.tables(60)
    analytic = ap.AnalyticPreconditioning.from_coefficients
    data = PROBLEM.sample(32, 0).reshape(-1, *SHAPE)
    teacher = ap.GaussianDenoiser(torch.tensor(PROBLEM.variances, dtype=torch.float64).reshape(SHAPE))
    fit: dict[str, Any] = {"levels": ap.log_noise_levels(8), "num_trajectories": 32, "progress": False}
    return {
        **{outer: ap.CTMPreconditioning(outer) for outer in ("euler", "variance", "euler_variance_mixed")},
        "CM": ap.CMPreconditioning(),
        "BCM": ap.BCMPreconditioning(),
        "TrigFlow": ap.TrigFlowPreconditioning(),
        "flow map": ap.FlowMapPreconditioning(),
        "backward": analytic(levels, l, s),
        "forward": analytic(levels, l, s, "forward"),
        "theta": analytic(levels, l, s, theta=0.4),
        "least squares": ap.LeastSquaresPreconditioning.fit(teacher, data, **fit),
        "cosines": ap.PerModePreconditioning.fit(teacher, data, **fit),
        "shifted": ap.ShiftedPreconditioning.fit(teacher, data, **{**fit, "levels": ap.log_noise_levels(20)}),
        "axes": ap.PerModePreconditioning.fit(teacher, data, basis="pca", **fit),
    }


NAMES = [
    "euler", "variance", "euler_variance_mixed", "CM", "BCM", "TrigFlow", "flow map", "backward", "forward", "theta",
    "least squares", "shifted", "cosines", "axes",
]  # fmt: skip


def jumps(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    t = torch.tensor([80.0, 80.0, 3.0, 0.5, 0.01], dtype=dtype)
    s = torch.tensor([0.002, 5.0, 2.999, 0.002, 0.005], dtype=dtype)
    return t, torch.full_like(s, 0.002) if name == "CM" else s  # which jumps to sigma_min only


def on_device(name: str, device: str) -> ap.Preconditioning:
    return copy.deepcopy(preconditionings()[name]).to(device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_preconditionings_are_the_same_without_waiting(device: str, name: str, dtype: torch.dtype) -> None:
    precond, there = preconditionings()[name], on_device(name, device)
    levels, x = jumps(name, dtype), (normal(5, *SHAPE, seed=1, dtype=dtype), normal(5, *SHAPE, seed=2, dtype=dtype))

    def everything(precond: ap.Preconditioning, t: Tensor, s: Tensor, x_t: Tensor, x_s: Tensor) -> list[Tensor]:
        x_t, t = x_t.requires_grad_(), t.requires_grad_()
        jump = precond.jump(x_t, x_s, t, s)
        slopes = torch.autograd.grad(jump.square().sum(), (x_t, t))
        numbers = precond(80.0, 0.002) if list(precond.buffers()) else ()  # without any, it is nowhere in particular
        return [
            *precond(t, s), *precond.on_network(t, s), *numbers, jump, *slopes, precond.jump(x_t, x_s, 80.0, 0.002),
            precond.required_output(x_t, x_s, t, s),
        ]  # fmt: skip

    moved = [value.clone().to(device) for value in (*levels, *x)]
    everything(there, *(value.clone() for value in moved))  # cuBLAS sets itself up
    with no_waiting(device):
        got = everything(there, *moved)
    expected = everything(precond, *levels, *x)
    # float64 inside but for per-mode tables; logarithms and matrix products of two libraries
    tolerance = 1e-9 if dtype == torch.float64 and name not in ("cosines", "axes") else 2e-4
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.device.type == device
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["backward", "least squares", "cosines"])
def test_levels_out_of_range_give_nan_instead_of_waiting(device: str, name: str) -> None:
    t, s = (torch.tensor(level, device=device) for level in ([80.0, 90.0, 1.0], [0.002, 1.0, 2.0]))
    precond = on_device(name, device)
    if device == "cpu":  # where looking costs nothing
        with pytest.raises(ValueError, match=r"got t = 90, s = 1 at position 1"):
            precond(t, s)
        return
    with no_waiting(device):
        c_skip, c_out = precond(t, s)
    assert c_skip.reshape(3, -1).isnan().all(1).tolist() == [False, True, True]
    assert c_out.reshape(3, -1).isnan().all(1).tolist() == [False, True, True]


# training steps


class Network(nn.Module):
    """A small network of two noise levels, its weights the same every time."""

    def __init__(self) -> None:
        super().__init__()
        size = 2 * 4 * 3
        self.first, self.last = nn.Linear(size + 2, 32), nn.Linear(32, size)
        for number, parameter in enumerate(self.parameters()):
            parameter.data = 0.2 * normal(*parameter.shape, seed=number, dtype=torch.float32)

    def forward(self, x: Tensor, c_t: Tensor, c_s: Tensor) -> Tensor:
        told = torch.cat([x.flatten(1), c_t[:, None], c_s[:, None]], 1)
        return self.last(torch.tanh(self.first(told))).view_as(x)


def student_of(name: str, device: str) -> ap.ConsistencyTrajectoryModel:
    return ap.ConsistencyTrajectoryModel(Network(), copy.deepcopy(preconditionings()[name])).to(device)


def gradients(student: nn.Module) -> list[Tensor]:
    return [p.grad.cpu() for p in student.parameters() if p.grad is not None]


LOSSES = {"consistency": ap.consistency_distillation_loss, "trajectory": ap.trajectory_distillation_loss}


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("distance", [ap.squared_error, ap.pseudo_huber], ids=lambda distance: distance.__name__)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["euler", "backward", "least squares", "cosines"])
def test_losses_are_the_same_without_waiting(
    device: str, name: str, loss: str, distance: Callable[[Tensor, Tensor], Tensor]
) -> None:
    variances = torch.tensor(PROBLEM.variances).reshape(SHAPE)
    x_0, noise = (normal(8, *SHAPE, seed=seed, dtype=torch.float32) for seed in (1, 2))
    x_0 = variances.sqrt() * x_0
    grid = ap.karras_noise_levels(10)
    sample = ap.sample_adjacent_times if loss == "consistency" else ap.sample_jump_times
    times = sample(8, grid, generator=seeded(3))  # indices stay on the CPU, as the teacher's steps are planned there

    def step(where: str) -> tuple[Tensor, list[Tensor]]:
        student, teacher = student_of(name, where), ap.GaussianDenoiser(variances).to(where)
        target = ap.exponential_moving_average(student, 0.9)
        arguments = (teacher, student, target, x_0.to(where), noise.to(where), times)
        LOSSES[loss](*arguments, distance=distance).loss.backward()  # sets itself up
        student.zero_grad()
        with no_waiting(where):
            value = LOSSES[loss](*arguments, distance=distance).loss
            anchor = ap.denoising_loss(student.denoise, arguments[3], arguments[4], levels[where]).loss
            (value + 0.1 * anchor).backward()
        return value.cpu(), gradients(student)

    levels = {where: times.t.float().to(where) for where in ("cpu", device)}
    (value, grads), (expected, expected_grads) = step(device), step("cpu")
    # float32, and distances at t = 80 are differences of hundreds
    torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5)
    assert len(grads) == 4
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["backward", "least squares", "cosines"])
def test_a_training_step_is_captured_as_a_graph(device: str, name: str, loss: str) -> None:
    """Preconditioning, student, loss, backward and optimiser, without a teacher: how many steps one takes varies."""
    student = student_of(name, device)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    x_0, noise = (torch.empty(8, *SHAPE, device=device) for _ in range(2))
    times = ap.JumpTimes(*(torch.empty(8, device=device) for _ in range(3)))
    result = torch.zeros((), device=device)

    def fill(seed: int) -> None:
        x_0.copy_(normal(8, *SHAPE, seed=seed, dtype=torch.float32))
        noise.copy_(normal(8, *SHAPE, seed=seed + 1, dtype=torch.float32))
        drawn = ap.sample_jump_times(8, ap.karras_noise_levels(10), generator=seeded(seed))
        for static, level in zip(times[:3], drawn[:3], strict=True):
            static.copy_(level)

    def step(student: nn.Module = student, optimizer: torch.optim.Optimizer = optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        value = LOSSES[loss](None, student, student, x_0, noise, times, share_dropout=False).loss
        value.backward()
        optimizer.step()
        result.copy_(value.detach())

    fill(0)
    replay = captured(step, device)
    twin = copy.deepcopy(student)
    twin_optimizer = torch.optim.SGD(twin.parameters(), lr=1e-3)
    for seed in (10, 20, 30):
        fill(seed)
        replay()
        value = result.item()
        step(twin, twin_optimizer)
        assert value == pytest.approx(result.item(), rel=1e-4)  # float32; atomics may add in another order
    for ours, theirs in zip(student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


# samplers and drawing


SAMPLERS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "one step": lambda student, x: ap.sample_one_step(student, x),
    "multistep": lambda student, x: ap.sample_multistep(student, x, SAMPLER_LEVELS, generator=seeded(5)),
    "gamma": lambda student, x: ap.sample_gamma(student, x, SAMPLER_LEVELS, 0.5, generator=seeded(5)),
    "deterministic": lambda student, x: ap.sample_deterministic(student, x, SAMPLER_LEVELS),
}


@pytest.mark.usefixtures("around")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", ["euler", "backward", "least squares", "cosines"])
def test_samplers_are_the_same(device: str, name: str, sampler: str) -> None:
    x = 80.0 * normal(4, *SHAPE, seed=4)
    expected = SAMPLERS[sampler](student_of(name, "cpu").double(), x)
    got = SAMPLERS[sampler](student_of(name, device).double(), x.to(device))
    assert got.device.type == device
    assert got.isfinite().all()
    # float64 but for per-mode tables, float32's, whose error is of the size of x
    tolerance = 1e-3 if name == "cosines" else 1e-9
    torch.testing.assert_close(got.cpu(), expected, rtol=tolerance, atol=tolerance)
