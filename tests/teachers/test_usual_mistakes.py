"""What a newcomer gets wrong first, and what they are told."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import analytic_precond as ap

IMAGES = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
TEACHER = ap.GaussianDenoiser(1.0)
QUICK: dict[str, Any] = {"levels": torch.tensor([4.0, 2.0, 1.0]), "progress": False}


def estimate(teacher: Any, data: Any = IMAGES, **options: Any) -> ap.TeacherStatistics:
    return ap.estimate_statistics(teacher, data, num_samples=8, **{**QUICK, **options})


def fit(teacher: Any, data: Any = IMAGES, **options: Any) -> ap.LeastSquaresPreconditioning:
    levels = ap.log_noise_levels(6, 1.0, 4.0)
    return ap.LeastSquaresPreconditioning.fit(
        teacher, data, num_trajectories=8, **{**QUICK, "levels": levels, **options}
    )


BOTH = pytest.mark.parametrize("measure", [estimate, fit])


class Network(nn.Module):
    """The ideal denoiser of unit data, with a layer beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return TEACHER(x, t)


class EDMBlock(nn.Module):
    """A block that keeps its rate as a number and calls the function, as EDM's do."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout


class TestTrainingMode:
    @BOTH
    @pytest.mark.parametrize(
        ("layer", "words"),
        [
            (nn.Dropout(0.1), "with Dropout and a dropout of 0.1: call"),
            (nn.Sequential(nn.Dropout2d(0.5)), "with Dropout2d and a dropout of 0.5: call"),
            (EDMBlock(0.13), "with EDMBlock and a dropout of 0.13: call"),
            (nn.BatchNorm2d(2), "with BatchNorm2d: call .eval()"),
        ],
    )
    def test_is_noticed(self, measure: Callable[..., object], layer: nn.Module, words: str) -> None:
        network = Network(layer).train()
        with pytest.warns(UserWarning, match=re.escape(f"the teacher is in training mode, {words}")):
            measure(network)
        measure(network.eval())  # any warning is an error

    @BOTH
    @pytest.mark.parametrize("layer", [nn.Linear(2, 2), nn.GroupNorm(1, 2), nn.Dropout(0.0), EDMBlock(0.0)])
    def test_does_not_matter_to_other_layers(self, measure: Callable[..., object], layer: nn.Module) -> None:
        measure(Network(layer))


class TestLabels:
    @BOTH
    def test_that_the_teacher_does_not_get_are_noticed(self, measure: Callable[..., object]) -> None:
        class ClassConditional(Network):
            label_dim: int

            def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
                return TEACHER(x, t)

        network, data = ClassConditional(nn.Identity()), TensorDataset(IMAGES, torch.arange(8))
        network.label_dim = 10
        for teacher in (network, ap.denoiser_from_edm(network)):
            with pytest.warns(UserWarning, match="does not get the labels that the batches hold: pass condition="):
                measure(teacher, data)
            measure(teacher, data, condition=lambda label: {"class_labels": label})
            measure(teacher, IMAGES)
        network.label_dim = 0
        measure(network, data)

    def test_without_entries_are_none(self) -> None:
        """EDM's data loaders yield labels of shape (B, 0) for unconditional networks."""

        class Unconditional(nn.Module):
            label_dim = 0

            def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
                return TEACHER(x, sigma)

        teacher = ap.denoiser_from_edm(Unconditional())
        t = torch.full((8,), 2.0)
        assert torch.equal(teacher(IMAGES, t, class_labels=torch.zeros(8, 0)), teacher(IMAGES, t))
        with pytest.raises(ValueError, match="expected no class_labels"):
            teacher(IMAGES, t, class_labels=torch.zeros(8, 3))


class TestJumps:
    precond = ap.AnalyticPreconditioning.from_coefficients(
        torch.tensor([4.0, 2.0, 1.0]), torch.zeros(3), torch.zeros(3)
    )

    def test_upwards_or_outside(self) -> None:
        with pytest.raises(ValueError, match="t = 2, s = 3 at position 0: a jump goes down; noise levels are sigma"):
            self.precond(2.0, 3.0)
        for t, s in ((5.0, 2.0), (2.0, 0.0)):
            with pytest.raises(ValueError, match="at position 0: take levels inside, or coefficients made for such"):
                self.precond(t, s)

    @pytest.mark.parametrize("name", ["t", "s"])
    def test_name_the_level_that_does_not_fit(self, name: str) -> None:
        levels = {"t": 4.0, "s": 2.0, name: torch.full((3,), 3.0)}
        for call in (self.precond.jump, self.precond.required_output):
            with pytest.raises(ValueError, match=rf"^{name} must hold one noise level per sample, shape \(8,\)"):
                call(IMAGES, IMAGES, **levels)


def test_a_name_is_no_noise_conditioning() -> None:
    with pytest.raises(TypeError, match=r"got 'cm': for example NOISE_CONDITIONINGS\['cm'\]"):
        ap.ConsistencyModel(nn.Identity(), ap.CTMPreconditioning(), noise_conditioning="cm")  # type: ignore[arg-type]


def test_a_table_of_betas_is_no_schedule() -> None:
    with pytest.raises(TypeError, match=r"^schedule must be a Schedule, got Tensor: .*\(1 - betas\)\.cumprod\(0\)"):
        ap.denoiser_from_network(nn.Identity(), "epsilon", torch.linspace(1e-4, 0.02, 1000))  # type: ignore[arg-type]
