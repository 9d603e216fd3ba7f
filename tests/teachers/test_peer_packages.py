"""The clean estimates of other codebases' packages, where these are installed (they are not among the extras):

    pip install --no-deps --target /tmp/peers flow_matching torchcfm denoising-diffusion-pytorch einops ema-pytorch \
        accelerate
    PYTHONPATH=$PYTHONPATH:/tmp/peers pytest tests/teachers/test_peer_packages.py

What they import without need here (torchvision, POT) is replaced by empty modules. Their formulas are tested in words
of our own beside this, by the paths of `foreign_networks` and in tests/pages.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from foreign_networks import rand
from torch import Tensor, nn

import analytic_precond as ap

X, T = rand(4, 3, 8, 8), torch.tensor([60.0, 3.0, 0.4, 0.02], dtype=torch.float64)


def network(x: Tensor, time: Tensor, *_: Any) -> Tensor:
    return torch.tanh(x) + torch.cos(time).to(x).reshape(-1, *[1] * (x.ndim - 1)) * x


class Network(nn.Module):
    """What lucidrains' classes ask of a network."""

    channels = out_dim = 3
    self_condition = False
    random_or_learned_sinusoidal_cond = False
    forward = staticmethod(network)


@pytest.fixture
def _without_what_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for package in ("torchvision", "ot"):
        if importlib.util.find_spec(package) is None:
            module = ModuleType(package)
            module.transforms = module.utils = SimpleNamespace()  # type: ignore[attr-defined]
            for name in (package, f"{package}.transforms", f"{package}.utils"):
                monkeypatch.setitem(sys.modules, name, module)
    yield
    for name in [name for name in sys.modules if name.startswith(("denoising_diffusion_pytorch", "torchcfm"))]:
        del sys.modules[name]


FLOW_MATCHING: dict[str, Callable[[], ap.Schedule]] = {
    "CondOTScheduler": lambda: ap.RectifiedFlowSchedule(data_at=1),
    "PolynomialConvexScheduler": lambda: ap.FunctionSchedule(lambda u: u**3, lambda u: 1 - u**3, (1, 0)),
    "VPScheduler": lambda: ap.VPLinearSchedule(data_at=1),
    "LinearVPScheduler": lambda: ap.FunctionSchedule(lambda u: u, lambda u: (1 - u**2).sqrt(), (1, 0)),
    "CosineScheduler": lambda: ap.VPCosineSchedule(offset=0.0, data_at=1),
}


@pytest.mark.parametrize("name", FLOW_MATCHING)
def test_flow_matching(name: str) -> None:
    schedulers = pytest.importorskip("flow_matching.path.scheduler")
    paths = pytest.importorskip("flow_matching.path")
    theirs = getattr(schedulers, name)(**({"n": 3} if "Polynomial" in name else {}))
    ours = FLOW_MATCHING[name]()
    tau = ours.time(T)
    alpha, sigma, d_alpha, d_sigma = vars(theirs(tau)).values()
    # 1e-9: their square root of 1 - exp(-T) or 1 - t^2 near the data
    torch.testing.assert_close(ours.alpha(tau), alpha, rtol=1e-9, atol=0)
    torch.testing.assert_close(ours.sigma(tau), sigma, rtol=1e-9, atol=0)
    torch.testing.assert_close(tuple(ours.rates(tau)), (d_alpha, d_sigma), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(theirs.snr_inverse(1 / T), tau, rtol=1e-9, atol=1e-9)

    scaled = alpha.reshape(-1, 1, 1, 1) * X
    path = paths.AffineProbPath(theirs)
    for prediction, clean_of in (("velocity", path.velocity_to_target), ("epsilon", path.epsilon_to_target)):
        expected = clean_of(network(scaled, tau), scaled, tau.reshape(-1, 1, 1, 1))
        denoiser = ap.denoiser_from_network(network, prediction, ours, time_dtype=torch.float64)
        torch.testing.assert_close(denoiser(X, T), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("_without_what_is_not_needed")
@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("ConditionalFlowMatcher", ap.RectifiedFlowSchedule(data_at=1)),
        ("VariancePreservingConditionalFlowMatcher", ap.VPCosineSchedule(offset=0.0, data_at=1)),
    ],
)
def test_torchcfm(name: str, schedule: ap.Schedule) -> None:
    """The velocity that it trains on is ours: the denoiser gives back the data."""
    matcher = getattr(pytest.importorskip("torchcfm.conditional_flow_matching"), name)(sigma=0.0)
    noise, data, tau = rand(4, 3, 8, 8, seed=1), rand(4, 3, 8, 8, seed=2), schedule.time(T)
    _, x, velocity = matcher.sample_location_and_conditional_flow(noise, data, tau)
    denoiser = ap.denoiser_from_network(lambda x, time: velocity, "velocity", schedule)
    alpha = schedule.alpha(tau).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(x / alpha, T), data, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("_without_what_is_not_needed")
class TestDenoisingDiffusionPytorch:
    @pytest.mark.parametrize(
        ("objective", "prediction"), [("pred_noise", "epsilon"), ("pred_x0", "sample"), ("pred_v", "v")]
    )
    @pytest.mark.parametrize("beta_schedule", ["linear", "cosine", "sigmoid"])
    def test_discrete(self, beta_schedule: str, objective: str, prediction: str) -> None:
        package = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
        theirs = package.GaussianDiffusion(
            Network(), image_size=8, objective=objective, beta_schedule=beta_schedule
        ).double()
        schedule = ap.VPDiscreteSchedule(theirs.alphas_cumprod)
        index = torch.tensor([0, 20, 500, 990])
        bar = theirs.alphas_cumprod[index]
        expected = theirs.model_predictions(X, index).pred_x_start
        x = X / bar.sqrt().reshape(-1, 1, 1, 1)
        denoised = ap.denoiser_from_network(theirs.model, prediction, schedule)(x, ((1 - bar) / bar).sqrt())
        # their buffers are rounded to float32, each by itself
        torch.testing.assert_close(denoised, expected, rtol=2e-5, atol=2e-5)

    @pytest.mark.parametrize("v", [False, True])
    def test_networks_told_the_log_snr(self, v: bool) -> None:
        module = ("v_param_" if v else "") + "continuous_time_gaussian_diffusion"
        package = pytest.importorskip(f"denoising_diffusion_pytorch.{module}")
        model = Network()
        model.random_or_learned_sinusoidal_cond = True
        cls = package.VParamContinuousTimeGaussianDiffusion if v else package.ContinuousTimeGaussianDiffusion
        theirs = cls(model, image_size=8, clip_sample_denoised=False)
        told_log_snr = ap.FunctionSchedule(
            lambda g: g.sigmoid().sqrt(), lambda g: (-g).sigmoid().sqrt(), (math.inf, -math.inf)
        )
        denoiser = ap.denoiser_from_network(model, "v" if v else "epsilon", told_log_snr)
        for time in (0.05, 0.3, 0.9):
            start, end = (torch.tensor(value, dtype=torch.float64) for value in (time, 0.0))
            mean, _ = theirs.p_mean_variance(X, start, end)  # nearly all of it the clean data
            log_snr, log_snr_end = theirs.log_snr(start), theirs.log_snr(end)
            c, alpha = -torch.expm1(log_snr - log_snr_end), log_snr.sigmoid().sqrt()
            expected = (mean / log_snr_end.sigmoid().sqrt() - X * (1 - c) / alpha) / c
            denoised = denoiser(X / alpha, (-log_snr / 2).exp().expand(4))
            torch.testing.assert_close(denoised, expected, rtol=1e-9, atol=1e-9)

    def test_elucidated(self) -> None:
        package = pytest.importorskip("denoising_diffusion_pytorch.elucidated_diffusion")
        model = Network()
        model.random_or_learned_sinusoidal_cond = True
        theirs = package.ElucidatedDiffusion(model, image_size=8)
        ours = ap.NetworkDenoiser(model, ap.EDMPreconditioning(theirs.sigma_data))
        torch.testing.assert_close(ours(X, T), theirs.preconditioned_network_forward(X, T), rtol=1e-11, atol=1e-11)
