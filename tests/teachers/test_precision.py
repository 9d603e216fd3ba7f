"""Teachers in half precision: as near to float32 as docs/scale.md says, with an error or a warning where not."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from edm_stand_in import DhariwalUNet, EDMPrecond, SongUNet
from torch import Tensor, nn

import analytic_precond as ap

LEVELS = ap.log_noise_levels(20, sigma_min=0.005)
HALF = [torch.bfloat16, torch.float16]
# what the docs state for 0.01 and above: of l, and of g_rms relative to itself; fp16 keeps 3 bits more
STATED = {torch.bfloat16: (2e-3, 5e-3), torch.float16: (3e-4, 6e-4)}


class Network(nn.Module):
    """A raw network F of two layers, told the noise level."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.enter, self.leave = nn.Linear(17, 64), nn.Linear(64, 16)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5

    def forward(self, z: Tensor, time: Tensor, class_labels: Tensor | None = None) -> Tensor:
        told = torch.cat([z, time[:, None].to(z.dtype)], 1)
        return self.leave(torch.tanh(self.enter(told)))


class EDMNetwork(nn.Module):
    """A network that holds EDM's preconditioning, applied in float32, as EDM's own do."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model, self.edm, self.dtype = Network().to(dtype), ap.EDMPreconditioning(0.5), dtype

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        *factors, c_noise = self.edm(sigma)
        c_skip, c_out, c_in = (ap.expand_to(c, x).float() for c in factors)
        F_x = self.model((c_in * x).to(self.dtype), c_noise)
        assert F_x.dtype == self.dtype  # as EDM's do
        return c_skip * x + c_out * F_x.float()


DATA = 0.5 * torch.randn(256, 16, generator=torch.Generator().manual_seed(1))


def estimate(denoiser: Any, context: AbstractContextManager[Any] | None = None, **options: Any) -> ap.TeacherStatistics:
    with context or nullcontext():
        options = {"data": DATA, "levels": LEVELS, "num_samples": 512, "progress": False, **options}
        return ap.estimate_statistics(denoiser, **options)


def from_parts(network: nn.Module) -> ap.Denoiser:
    return ap.NetworkDenoiser(network, ap.EDMPreconditioning(0.5))


def from_velocity(network: nn.Module) -> ap.Denoiser:
    return ap.denoiser_from_network(network, "velocity", ap.RectifiedFlowSchedule())


def from_edm(network: nn.Module) -> ap.Denoiser:
    return ap.denoiser_from_edm(network)


def assert_near(half: ap.TeacherStatistics, full: ap.TeacherStatistics, dtype: torch.dtype) -> None:
    of_l, of_g = STATED[dtype]
    high = LEVELS >= 0.01
    torch.testing.assert_close(half.l[high], full.l[high], rtol=0, atol=of_l)
    torch.testing.assert_close(half.g_rms[high], full.g_rms[high], rtol=of_g, atol=0)
    assert not torch.equal(half.l, full.l)  # half precision was used at all
    assert bool((half.g_rms > 0).all())  # and what it leaves of g is not taken for rounding


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("adapt", [from_parts, from_velocity])
@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_a_half_precision_network_gives_the_statistics_of_float32(how: str, adapt: Any, dtype: torch.dtype) -> None:
    full = estimate(adapt(Network()))
    if how == "autocast":
        half = estimate(adapt(Network()), torch.autocast("cpu", dtype))
    else:
        half = estimate(adapt(Network().to(dtype)))
    assert_near(half, full, dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_so_does_an_edm_network_that_casts_inside(dtype: torch.dtype) -> None:
    full = estimate(from_edm(EDMNetwork()))
    assert_near(estimate(from_edm(EDMNetwork()), torch.autocast("cpu", dtype)), full, dtype)
    assert_near(estimate(from_edm(EDMNetwork(dtype))), full, dtype)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("conditional", [False, True])
def test_edms_denoiser_under_autocast_is_its_model_with_edms_scalings(conditional: bool, dtype: torch.dtype) -> None:
    """The network itself dies of its own assertion there; and is left as it was."""
    labels = {"class_labels": torch.eye(5)[:2]} if conditional else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DhariwalUNet(label_dim=5) if conditional else SongUNet()
        net = EDMPrecond(model, label_dim=5 if conditional else 0).eval().requires_grad_(False)
        x, t = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 0.2])
    raw = ap.NetworkDenoiser(lambda z, c_noise: model(z, c_noise, labels.get("class_labels")), ap.EDMPreconditioning())
    denoiser = ap.denoiser_from_edm(net)
    with torch.autocast("cpu", dtype):
        with pytest.raises(AssertionError):
            net(x, t, **labels)
        half, expected = denoiser(x, t, **labels), raw(x, t)
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-6)  # scalings in float32 there, in float64 here
    full = denoiser(x, t, **labels)
    assert 0 < (half - full).norm() < 2.0**-5 * (full - x).norm()  # bf16 keeps 8 bits, and was used at all
    assert not model._forward_hooks


def test_edms_denoiser_on_a_device_without_autocast() -> None:
    with torch.device("meta"):
        net, x, t = EDMPrecond(SongUNet()), torch.zeros(2, 3, 8, 8), torch.ones(2)
    with torch.autocast("cpu", torch.bfloat16):  # which is not meta's
        assert ap.denoiser_from_edm(net.eval())(x, t).dtype == torch.float32


@pytest.mark.parametrize("options", [{"l_method": "hutchinson"}, {"s_method": "finite-difference"}])
def test_differences_under_autocast_stay_near(options: dict[str, str]) -> None:
    full = estimate(from_parts(Network()), **options)
    assert_near(estimate(from_parts(Network()), torch.autocast("cpu", torch.float16), **options), full, torch.float16)


@pytest.mark.parametrize("dtype", HALF)
def test_a_denoiser_that_returns_half_precision_is_warned_of(dtype: torch.dtype) -> None:
    """At large noise its rounding does not matter; at small noise g is rounding, whatever the standard errors say."""
    full = estimate(from_parts(Network()))
    with pytest.warns(
        UserWarning, match=rf"returns {dtype}, whose rounding hides.*c_skip x \+ c_out F in float32"
    ) as caught:
        rounded = estimate(lambda x, t: from_parts(Network())(x, t).to(dtype))
    assert len(caught) == 1
    relative = (rounded.g_rms / full.g_rms - 1).abs()
    assert relative[LEVELS > 0.1].max() < 1e-3  # D's rounding, 2^-9 of 0.5, against c_out F, 0.1 F: 1e-4 in the square
    assert relative[-1] > STATED[dtype][1]


class Loud(nn.Module):
    """A network whose activations pass 65504, where float16 ends, at one noise level."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.time, self.layer = math.log(level) / 4, nn.Linear(16, 16)

    def forward(self, z: Tensor, time: Tensor) -> Tensor:
        loud = (time - self.time).abs() < 1e-3
        return self.layer(z * torch.where(loud, 1e6, 1.0)[:, None])


@pytest.mark.parametrize("batch_size", [32, 256])  # one level in a call, and four
def test_overflow_is_reported_with_its_level_and_batch(batch_size: int) -> None:
    teacher = from_parts(Loud(LEVELS[7].item()))
    data = [DATA[:32], DATA[32:40]]
    options = {"data": data, "num_samples": 80, "batch_size": batch_size}
    assert estimate(teacher, **options).num_samples == 80  # float32 holds it
    match = rf"finite values, got NaN or infinity at noise level {LEVELS[7]:.6g} \(index 7\), batch 0, .*65504"
    with pytest.raises(ValueError, match=match):
        estimate(teacher, torch.autocast("cpu", torch.float16), **options)


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_times_near_the_end_keep_their_digits(sigma_data: float) -> None:
    """A network that turns TrigFlow's angle back into a noise level, as FastGen's around EDM's do."""
    told = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        told.append(sigma_data * time.double().tan())
        assert x.dtype == torch.float32
        return x

    schedule = ap.TrigFlowSchedule(sigma_data)
    x, t = torch.zeros(2, 3), torch.tensor([80.0, 0.002])
    for dtype in (None, torch.float64):
        ap.denoiser_from_network(network, "velocity", schedule, time_dtype=dtype)(x, t)
    default, kept = told
    assert (default[0] - 80.0).abs() > 1e-4
    torch.testing.assert_close(kept, t.double(), rtol=1e-13, atol=0)
