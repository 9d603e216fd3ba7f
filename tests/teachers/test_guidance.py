"""Classifier-free guidance against its two formulas, by hand."""

from __future__ import annotations

import pytest
import torch
from foreign_networks import rand
from torch import Tensor, nn

import analytic_precond as ap
from analytic_precond.noise_levels.vp_schedules import VPLinearSchedule
from analytic_precond.teachers.guidance import guide
from analytic_precond.teachers.networks import denoiser_from_edm, denoiser_from_network


class Shifted(nn.Module):
    """An EDM-style network whose labels shift the result."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 5))

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor) -> Tensor:
        return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2) + (class_labels @ self.weight).reshape(-1, 1, 1, 1)


class TestGuidance:
    x, t = rand(2, 3), torch.ones(2, dtype=torch.float64)

    @pytest.mark.parametrize("w", [-1.0, 0.0, 1.0, 7.5])
    def test_both_formulas(self, w: float) -> None:
        c, u = (lambda x, t: x**2), (lambda x, t: x.sin())
        torch.testing.assert_close(guide(c, u, w)(self.x, self.t), self.x.sin() + w * (self.x**2 - self.x.sin()))
        torch.testing.assert_close(
            guide(c, u, w, formula="from_conditional")(self.x, self.t), self.x**2 + w * (self.x**2 - self.x.sin())
        )

    def test_same_as_guiding_epsilon(self) -> None:
        c, u, schedule = (lambda x, time: x.cos()), (lambda x, time: x.sin()), VPLinearSchedule()
        guided = guide(*(denoiser_from_network(f, "epsilon", schedule) for f in (c, u)), 3.0)
        network = lambda x, time: u(x, time) + 3 * (c(x, time) - u(x, time))  # noqa: E731
        expected = denoiser_from_network(network, "epsilon", schedule)(self.x, self.t)
        torch.testing.assert_close(guided(self.x, self.t), expected)

    def test_conditions_go_to_the_conditional_one(self) -> None:
        network = Shifted()
        null = denoiser_from_edm(network, class_labels=torch.zeros(1, 5))
        guided = guide(denoiser_from_edm(network), null, 2.0)
        x, labels = rand(2, 3, 4, 4).float(), torch.eye(5)[[1, 4]]
        expected = 2 * network(x, torch.ones(2), labels) - network(x, torch.ones(2), torch.zeros(1, 5))
        torch.testing.assert_close(guided(x, torch.ones(2), class_labels=labels), expected)
        assert [p for p in guided.parameters()] == [network.weight]

    def test_bad_arguments(self) -> None:
        with pytest.raises(ValueError, match=r"'from_unconditional', 'from_conditional', got 'cfg'"):
            guide(ap.GaussianDenoiser(1.0), ap.GaussianDenoiser(1.0), 1.0, formula="cfg")
        with pytest.raises(TypeError, match="scale must be a number"):
            guide(ap.GaussianDenoiser(1.0), ap.GaussianDenoiser(1.0), "2")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="unconditional must be callable"):
            guide(ap.GaussianDenoiser(1.0), None, 2.0)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="both denoisers"):
            guide(lambda x, t: x, lambda x, t: x[:1], 2.0)(self.x, self.t)
