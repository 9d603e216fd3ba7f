"""A teacher of a table of noise levels is asked inside it by default, and outside with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import analytic_precond as ap
from analytic_precond.data.arguments import default_levels, name_of

# Stable Diffusion's: betas between 0.00085 and 0.012, linear in their root
TABLE = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0)
LOW, HIGH = (((1 - a) / a).sqrt().item() for a in (TABLE[0], TABLE[-1]))
SCHEDULE = ap.VPDiscreteSchedule(TABLE)
VARIANCE = 0.25
DATA = VARIANCE**0.5 * torch.randn(256, 8, generator=torch.Generator().manual_seed(0))


class Epsilon(nn.Module):
    """The exact noise of white Gaussian data, at the level of the index that it is told."""

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        t = SCHEDULE.noise_level(index)[:, None]
        alpha = (1 + t**2).rsqrt()
        return (x * t / (VARIANCE + t**2) / alpha).to(x.dtype)


def teacher(schedule: ap.VPDiscreteSchedule = SCHEDULE) -> ap.NetworkDenoiser:
    return ap.denoiser_from_network(Epsilon(), "epsilon", schedule)


def test_the_range_is_the_tables() -> None:
    expected = (pytest.approx(LOW, rel=1e-12), pytest.approx(HIGH, rel=1e-12))
    assert round(LOW, 3) == 0.029
    assert round(HIGH, 1) == 14.6
    assert SCHEDULE.noise_range == teacher().noise_range == expected
    for schedule in (ap.EDMSchedule(), ap.RectifiedFlowSchedule(), ap.VPCosineSchedule()):
        assert ap.denoiser_from_network(Epsilon(), "epsilon", schedule).noise_range is None
    assert ap.NetworkDenoiser(Epsilon(), ap.EDMPreconditioning()).noise_range is None
    assert ap.denoiser_from_edm(Epsilon()).noise_range is None


class VE(nn.Module):
    """The exact denoiser of white Gaussian data; it says its ends as EDM's VEPrecond and k-diffusion's table do."""

    def __init__(self, sigma_min: float | Tensor = 0.02, sigma_max: float | Tensor = 100.0) -> None:
        super().__init__()
        self.sigma_min, self.sigma_max = sigma_min, sigma_max

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None, force_fp32: bool = False) -> Tensor:
        return VARIANCE / (VARIANCE + sigma[:, None].clamp(0.02, 100.0) ** 2) * x


def test_networks_that_say_their_ends_themselves() -> None:
    denoiser = ap.denoiser_from_edm(VE())
    assert denoiser.noise_range == (0.02, 100.0)
    assert ap.denoiser_from_edm(VE(*torch.tensor([0.02, 14.5], dtype=torch.float64))).noise_range == (0.02, 14.5)
    assert ap.denoiser_from_edm(VE(0, torch.inf)).noise_range is None  # EDMPrecond's
    assert default_levels(ap.guide(denoiser, denoiser, 1.5), 9)[[0, -1]].tolist() == pytest.approx([80.0, 0.02])
    with pytest.warns(UserWarning, match=r"from 0\.02 to 100,.*asked at 0\.002 to 80"):
        ap.estimate_statistics(denoiser, DATA, ap.log_noise_levels(9), num_samples=32, progress=False)
    model = ap.ConsistencyModel.from_denoiser(denoiser, ap.CTMPreconditioning())
    assert model.default_range == (0.02, 80.0)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "parallel": nn.parallel.DistributedDataParallel,
    "averaged": AveragedModel,
    "compiled": lambda network: torch.compile(network, backend="eager"),
    "both": lambda network: torch.compile(AveragedModel(network), backend="eager"),
    "partial": lambda network: partial(network, force_fp32=True),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_wrapped_networks_say_what_those_inside_do(wrap: Callable[[nn.Module], Any]) -> None:
    network = VE()
    network.label_dim, network.weight = 0, nn.Parameter(torch.ones(1))  # DDP wants a parameter
    denoiser = ap.denoiser_from_edm(wrap(network))
    assert denoiser.noise_range == (0.02, 100.0)
    assert name_of(denoiser, None) == name_of(wrap(denoiser), None) == "VE"
    with pytest.raises(ValueError, match=r"unconditional \(label_dim = 0\)"):
        denoiser(DATA, torch.ones(len(DATA)), class_labels=torch.eye(2))
    # and wrapped denoisers
    model = ap.ConsistencyModel.from_denoiser(wrap(denoiser), ap.CTMPreconditioning())
    assert model.default_range == (0.02, 80.0)
    t = torch.tensor([0.5, 2.0])
    for ours, inner in zip(model.scalings(t), denoiser.scalings(t), strict=True):
        assert torch.equal(ours, inner)
    with pytest.raises(TypeError, match="which is a denoiser already"):
        ap.ConsistencyModel(wrap(denoiser), ap.CTMPreconditioning())
    with pytest.raises(TypeError, match="must not be a student"):
        ap.ConsistencyModel.from_denoiser(wrap(model), ap.CTMPreconditioning())
    with pytest.raises(TypeError, match="the second noise level, got class_labels"):  # would be told s as a label
        ap.ConsistencyTrajectoryModel.from_denoiser(wrap(network), ap.CTMPreconditioning())


class InParts(nn.Module):
    """A network with a part that is called as what a wrapper wraps."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.module = part

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.module(x, t)


class PassesOn(InParts):
    def forward(self, *inputs: Any, **condition: Any) -> Tensor:
        return self.module(*inputs, **condition)


def test_a_part_called_module_is_not_taken_for_the_network() -> None:
    assert ap.denoiser_from_edm(PassesOn(VE())).noise_range == (0.02, 100.0)
    network = InParts(VE())
    assert ap.denoiser_from_edm(network).noise_range is None
    assert name_of(network, None) == "InParts"
    student = ap.ConsistencyModel(VE(), ap.CTMPreconditioning())
    ap.ConsistencyModel.from_denoiser(InParts(student), ap.CTMPreconditioning())
    circle = PassesOn(nn.Identity())
    circle.module = PassesOn(circle)
    assert name_of(circle, None) == "PassesOn"


def test_of_guided_denoisers_it_is_the_common_one() -> None:
    shorter = teacher(ap.VPDiscreteSchedule(TABLE[100:900]))
    low, high = (((1 - a) / a).sqrt().item() for a in (TABLE[100], TABLE[899]))
    zero = lambda x, t: 0 * x  # noqa: E731
    for guided in (ap.guide(teacher(), shorter, 2.0), ap.guide(ap.guide(zero, teacher(), 2.0), shorter, 2.0)):
        assert guided.noise_range == (pytest.approx(low, rel=1e-12), pytest.approx(high, rel=1e-12))
    assert ap.guide(zero, teacher(), 2.0).noise_range == teacher().noise_range
    assert ap.guide(zero, zero, 2.0).noise_range is None


BEHIND: dict[str, Callable[[ap.NetworkDenoiser], Any]] = {
    "alone": lambda denoiser: denoiser,
    "guided": lambda denoiser: ap.guide(denoiser, denoiser, 1.5),
    "method": lambda denoiser: denoiser.forward,
    "partial": lambda denoiser: partial(denoiser),
    "compiled": lambda denoiser: torch.compile(denoiser, backend="eager"),
}


@pytest.mark.parametrize("behind", BEHIND.values(), ids=BEHIND.keys())
def test_default_levels_stay_inside(behind: Callable[[ap.NetworkDenoiser], Any]) -> None:
    levels = default_levels(behind(teacher()), 120)
    assert levels[[-1, 0]].tolist() == pytest.approx([LOW, HIGH], rel=1e-12)
    assert torch.equal(default_levels(lambda x, t: x, 120), ap.log_noise_levels())


def test_statistics_by_default_are_right_at_every_level() -> None:
    stats = ap.estimate_statistics(teacher(), DATA, num_samples=128, progress=False)
    assert len(stats.levels) == 120
    expected = VARIANCE / (VARIANCE + stats.levels**2)
    # D is linear, so that only rounding is left: of float32, in n (D_+ - D_-) / 2t
    torch.testing.assert_close(stats.l, expected, rtol=0, atol=2e-6)
    fit = ap.LeastSquaresPreconditioning.fit(teacher(), DATA, num_trajectories=64, progress=False)
    assert len(fit.levels) == 40
    assert (fit.sigma_min, fit.sigma_max) == (stats.levels[-1].item(), stats.levels[0].item())
    report = ap.check_teacher(teacher(), DATA, num_samples=64, progress=False)
    assert torch.equal(report.statistics.levels, ap.log_noise_levels(40, *SCHEDULE.noise_range))


def test_other_fits_stay_inside_too() -> None:
    fit = ap.ShiftedPreconditioning.fit(teacher(), DATA, num_trajectories=64, progress=False)
    assert torch.equal(fit.levels, ap.log_noise_levels(20, *SCHEDULE.noise_range))


OUTSIDE = r"knows noise levels from 0\.02917 to 14\.61.*is asked at {}.*log_noise_levels\({}, \*denoiser\.noise_range\)"


@pytest.mark.parametrize(
    ("levels", "asked"),
    [([80.0, 1.0, 0.5], "0.5 to 80"), ([10.0, 1.0, 0.02], "0.02 to 10"), ([80.0, 0.002], "0.002 to 80")],
)
def test_levels_outside_give_a_warning_with_the_ends(levels: list[float], asked: str) -> None:
    kwargs: dict[str, Any] = {"levels": torch.tensor(levels), "progress": False}
    outside = OUTSIDE.format(asked, len(levels))
    for denoiser in (teacher(), ap.guide(teacher(), teacher(), 1.5)):
        with pytest.warns(UserWarning, match=outside) as caught:
            ap.estimate_statistics(denoiser, DATA, num_samples=32, s_method="finite-difference", **kwargs)
        assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(UserWarning, match=outside):
        ap.LeastSquaresPreconditioning.fit(teacher(), DATA, num_trajectories=32, **kwargs)
    with pytest.warns(UserWarning, match=outside):
        ap.check_teacher(teacher(), DATA, num_samples=32, **kwargs)


def test_ends_of_a_schedule_of_functions() -> None:
    vp = ap.VPLinearSchedule()
    schedule = ap.FunctionSchedule(vp.alpha, vp.sigma, times=(0, 1))  # 0 to 152
    denoiser = ap.denoiser_from_network(lambda x, time: 0 * x, "epsilon", schedule)
    with (
        pytest.warns(UserWarning, match=r"from 0 to 152.*log_noise_levels\(2, 0.002, 80\)"),
        pytest.raises(ValueError, match=r"0 to 152.167, got 200"),
    ):
        ap.estimate_statistics(denoiser, DATA, torch.tensor([200.0, 1.0]), num_samples=32, progress=False)
    stats = ap.estimate_statistics(denoiser, DATA, ap.log_noise_levels(120, 0.002, 80), num_samples=32, progress=False)
    assert torch.equal(stats.levels, ap.estimate_statistics(denoiser, DATA, num_samples=32, progress=False).levels)


def test_levels_inside_and_teachers_that_know_no_ends_give_none() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for levels in ([14.0, 1.0, 0.03], [HIGH, 1.0, LOW]):  # float32 ends
            ap.estimate_statistics(
                teacher(), DATA, torch.tensor(levels), num_samples=32, progress=False
            )  # float32 ends
        ap.estimate_statistics(lambda x, t: x / 2, DATA, torch.tensor([800.0, 1e-4]), num_samples=32, progress=False)
