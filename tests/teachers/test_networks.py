"""Exact denoisers re-expressed as raw networks come back as the same D(x, t), and follow the same ODE."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from foreign_networks import LEVELS, PATHS, Mixture, rand
from scipy.integrate import solve_ivp
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.teachers.networks import denoiser_from_network

PREDICTIONS = ["epsilon", "sample", "v", "score", "velocity"]


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("num", [1, 3], ids=["gaussian", "mixture"])
def test_every_prediction_and_schedule_gives_the_same_denoiser(num: int, name: str, prediction: str) -> None:
    schedule, path = PATHS[name]
    network = Mixture(num, prediction, path, schedule.time_scale)
    x = network.sample(LEVELS)
    denoised = denoiser_from_network(network, prediction, schedule)(x, LEVELS)
    torch.testing.assert_close(denoised, network.denoiser()(x, LEVELS), rtol=1e-10, atol=1e-10)


def test_what_is_no_noise_level_is_refused() -> None:
    """Many formulas go on there: ln t, given for t, would get an answer."""
    for schedule, _ in PATHS.values():
        denoiser = denoiser_from_network(lambda x, time: 0 * x, "epsilon", schedule)
        for level in (-2.0, -0.5, math.inf, math.nan):
            with pytest.raises(ValueError, match=rf"noise levels must be within .* got {level:g}: choose levels"):
                denoiser(torch.ones(2, 3), torch.tensor([1.0, level]))


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_in_x_and_t(name: str) -> None:
    schedule, path = PATHS[name]
    network = Mixture(3, "epsilon", path)
    x = network.sample(LEVELS)
    dx, dt = rand(*x.shape, seed=5), LEVELS / 3
    results = [
        torch.func.jvp(denoiser, (x, LEVELS), (dx, dt))[1]
        for denoiser in (denoiser_from_network(network, "epsilon", schedule), network.denoiser())
    ]
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-8)


@pytest.mark.long
@pytest.mark.parametrize(
    "schedule",
    [
        ap.VPLinearSchedule(data_at=1),
        ap.FunctionSchedule(lambda u: u, lambda u: (1 - u**2).sqrt(), times=(1, 0)),
        ap.VPDiscreteSchedule(torch.linspace(0.99, 0.01, 50), timesteps=torch.arange(0, 100, 2)),
    ],
    ids=["vp", "function", "table"],
)
def test_derivatives_of_a_schedule_compile_and_export(schedule: ap.Schedule) -> None:
    torch.compiler.reset()  # others' graphs of the same code count, and torch keeps eight

    class Network(nn.Linear):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return super().forward(x) * time.cos()[:, None]

    student = ap.ConsistencyModel.from_denoiser(
        denoiser_from_network(Network(3, 3), "velocity", schedule), ap.CTMPreconditioning(sigma_min=0.02)
    )
    inputs = (rand(4, 3).float(), torch.tensor([0.3, 1.0, 2.0, 4.0]))
    weights, expected = [*student.parameters()], student(*inputs)
    compiled = torch.compile(student, backend="aot_eager", fullgraph=True)(*inputs)
    torch.testing.assert_close(compiled, expected)
    for got, wanted in zip(*(torch.autograd.grad(y.sum(), weights) for y in (compiled, expected)), strict=True):
        torch.testing.assert_close(got, wanted)
    with torch.no_grad():
        exported = torch.export.export(student.eval(), inputs).module()(*inputs)
    torch.testing.assert_close(exported, expected)


def test_statistics_of_an_adapted_teacher() -> None:
    schedule, path = PATHS["flow-0"]
    network = Mixture(3, "velocity", path)
    data = network.means[torch.arange(40) % 3] + 0.1 * rand(40, 2, 3, seed=7)
    kwargs: dict[str, Any] = {"levels": LEVELS, "num_samples": 80, "progress": False, "s_method": "jvp"}
    ours = ap.estimate_statistics(denoiser_from_network(network, "velocity", schedule), data, **kwargs)
    exact = ap.estimate_statistics(network.denoiser(), data, **kwargs)
    torch.testing.assert_close(ours.l, exact.l, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(ours.s, exact.s, rtol=1e-6, atol=1e-6)


class TestTrajectory:
    """One trajectory from level 20 to 0.05, each time by the foreign codebase's own ODE in its own time."""

    start, end = 20.0, 0.05

    def solve(self, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, begin: float, end: float) -> Tensor:
        def flat(time: float, y: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(y).reshape(x.shape)
            return velocity(z, torch.full((len(x),), time, dtype=torch.float64)).numpy().ravel()

        y = solve_ivp(flat, (begin, end), x.numpy().ravel(), method="DOP853", rtol=1e-10, atol=1e-11).y[:, -1]
        return torch.from_numpy(y).reshape(x.shape)

    def foreign(self, name: str, velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> Tensor:
        schedule, path = PATHS[name]
        ends = schedule.time(torch.tensor([self.start, self.end], dtype=torch.float64))
        alphas = path(ends)[0]
        return self.solve(velocity, alphas[0] * x, *ends.tolist()) / alphas[1]

    @pytest.mark.long
    @pytest.mark.parametrize("name", ["vp-linear", "flow-0", "flow-1", "trigflow"])
    def test_same_end(self, name: str) -> None:
        schedule, path = PATHS[name]
        prediction = "epsilon" if name == "vp-linear" else "velocity"
        network = Mixture(3, prediction, path)

        def vp(z: Tensor, time: Tensor) -> Tensor:  # dz = -beta/2 (z + score) = -beta/2 (z - epsilon / sigma)
            beta = 0.1 + 19.9 * time[:, None, None]
            return -0.5 * beta * (z - network(z, time) / path(time)[1][:, None, None])

        denoiser = denoiser_from_network(network, prediction, schedule)

        def edm(x: Tensor, log_t: Tensor) -> Tensor:  # dx / d ln t = x - D
            return x - denoiser(x, log_t.exp())

        x = self.start * rand(2, 2, 3, seed=3)
        ours = self.solve(edm, x, math.log(self.start), math.log(self.end))
        theirs = self.foreign(name, vp if name == "vp-linear" else network, x)
        # 1e-7: two adaptive solutions with rtol 1e-10 per step
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)

    def test_gaussian_flow_is_exact(self) -> None:
        network = Mixture(1, "velocity", PATHS["flow-0"][1])
        mean, c = network.means[0], network.variances[0]
        x = self.start * rand(2, 2, 3, seed=3)
        exact = mean + ((c + self.end**2) / (c + self.start**2)).sqrt() * (x - mean)
        torch.testing.assert_close(self.foreign("flow-0", network, x), exact, rtol=1e-8, atol=1e-8)
