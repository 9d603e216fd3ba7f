"""Each hand-crafted preconditioning by itself: reference outputs, exact flows, values by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from torch import Tensor

import analytic_precond as ap
from analytic_precond.noise_levels.network_scalings import cm_c_noise
from analytic_precond.preconditionings.hand_crafted import (
    BCMPreconditioning,
    CMPreconditioning,
    FlowMapPreconditioning,
    LCMPreconditioning,
    TrigFlowPreconditioning,
)

with np.load(GOLDEN_FILE) as golden:
    GOLDEN = {key: torch.from_numpy(golden[key]) for key in golden}
X, T, S = GOLDEN["x"], GOLDEN["t"], GOLDEN["s"]
EPS = 0.002


def column(level: Tensor) -> Tensor:
    return ap.expand_to(level, X)


def network(x_in: Tensor, tau: Tensor) -> Tensor:
    """The closed form behind the golden outputs, without a target time."""
    return torch.sin(1.3 * x_in + 0.002 * column(tau)) + 0.25 * x_in


class TestCM:
    """The jump to sigma_min."""

    def test_agrees_with_reference_code(self) -> None:
        c_skip, c_out = CMPreconditioning().on_network(T)
        # float64 on both sides; ours takes g apart and puts it together again
        torch.testing.assert_close(c_skip, GOLDEN["openai_cm_c_skip"], rtol=1e-12, atol=0)
        torch.testing.assert_close(c_out, GOLDEN["openai_cm_c_out"], rtol=1e-12, atol=0)
        c_in = ap.EDMPreconditioning()(T).c_in
        torch.testing.assert_close(c_in, GOLDEN["openai_cm_c_in"], rtol=1e-12, atol=0)

    def test_denoised_agrees_with_reference_code(self) -> None:
        F = network(column(GOLDEN["openai_cm_c_in"]) * X, cm_c_noise(T))
        c_skip, c_out = (column(c) for c in CMPreconditioning().on_network(T))
        # float64 on both sides, x up to 210
        torch.testing.assert_close(c_skip * X + c_out * F, GOLDEN["openai_cm_denoised"], rtol=1e-12, atol=1e-12)
        edm = ap.EDMPreconditioning()(T)
        denoised = column(edm.c_skip) * X + column(edm.c_out) * F
        torch.testing.assert_close(denoised, GOLDEN["openai_edm_denoised"], rtol=1e-12, atol=1e-12)
        jump = CMPreconditioning().jump(X, denoised, T)
        torch.testing.assert_close(jump, GOLDEN["openai_cm_denoised"], rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_boundary_is_exact_where_the_dtype_has_sigma_min(self, dtype: torch.dtype) -> None:
        t = torch.tensor([EPS], dtype=dtype)
        for scalings in (
            CMPreconditioning()(t),
            CMPreconditioning()(t, EPS),
            CMPreconditioning()(t, t),
            CMPreconditioning().on_network(t),
        ):
            assert scalings.c_skip == 1
            assert scalings.c_out == 0

    def test_end_of_the_float32_grid_is_not_clamped(self) -> None:
        # 1.9999996e-3 < sigma_min: the reference code's c_out is -4.66e-10 there, one unit in the last place of t
        t = GOLDEN["sony_times_18"][-1]
        assert CMPreconditioning().on_network(t).c_out.item() == pytest.approx(-4.66e-10, rel=1e-2)

    def test_ect_trains_edm_and_samples_with_a_shift(self) -> None:
        training, sampling = CMPreconditioning(sigma_min=0.0), CMPreconditioning(sigma_min=0.003)
        assert torch.equal(training.jump(X, 2 * X, T), 2 * X)  # the denoiser itself
        edm = ap.EDMPreconditioning()(T)
        # the same formulas, a few roundings
        torch.testing.assert_close(training.on_network(T).c_skip, edm.c_skip, rtol=1e-15, atol=0)
        torch.testing.assert_close(training.on_network(T).c_out, edm.c_out, rtol=1e-15, atol=0)
        # by hand: 0.25 / (0.5^2 + 0.25), 0.5 * 0.5 / sqrt(0.503^2 + 0.25)
        c_skip, c_out = sampling.on_network(0.503)
        assert c_skip.item() == pytest.approx(0.5, rel=1e-14)
        assert c_out.item() == pytest.approx(0.25 / math.sqrt(0.503**2 + 0.25), rel=1e-14)

    def test_refuses_another_target(self) -> None:
        precond = CMPreconditioning()
        message = r"s must be sigma_min = 0\.002.*got s = 0\.5 at position 1: leave s out"
        for function in (precond, precond.on_network):
            with pytest.raises(ValueError, match=message):
                function(T[:2], torch.tensor([EPS, 0.5], dtype=torch.float64))
        with pytest.raises(ValueError, match=r"got s = 0\.5 at position 0"):
            precond.jump(X, X, T.clamp(min=0.5), 0.5)
        with pytest.raises(ValueError, match=r"0\.002 <= s <= t.*got t = 0\.001"):
            precond(torch.tensor(0.001))
        with pytest.raises(TypeError, match=r"t must be a noise level.*got 3"):
            precond(3)

    def test_other_target_is_nan_where_it_cannot_be_read(self) -> None:
        mapped = torch.vmap(lambda t, s: tuple(CMPreconditioning()(t, s)))
        assert torch.isnan(mapped(T[:1], S[:1])[0]).all()
        assert torch.equal(torch.vmap(lambda t: CMPreconditioning()(t).c_out)(T), CMPreconditioning()(T).c_out)


class TestFlowMap:
    """Exact flows in the flow's own time, tau in (0, 1)."""

    tau = torch.tensor([0.988, 0.9, 0.5, 0.3, 0.05], dtype=torch.float64)
    r = torch.tensor([0.2, 0.0, 0.49, 0.001, 0.05 / 3], dtype=torch.float64)

    @property
    def levels(self) -> tuple[Tensor, Tensor]:
        return self.tau / (1 - self.tau), self.r / (1 - self.r)

    def test_average_velocity_of_a_gaussian_jumps_exactly(self) -> None:
        variance = 0.3
        t, s = self.levels
        z = torch.linspace(-2, 3, 5, dtype=torch.float64)
        # z = (1 - tau) x_0 + tau n has this variance, and the flow keeps z / std
        std_tau, std_r = (((1 - a) ** 2 * variance + a**2).sqrt() for a in (self.tau, self.r))
        u = (z - z * std_r / std_tau) / (self.tau - self.r)
        x_t, x_s = z * (1 + t), z * std_r / std_tau * (1 + s)
        c_skip, c_out = FlowMapPreconditioning().on_network(t, s)
        # a division by tau - r >= 0.01 amplifies roundings of numbers up to 200
        torch.testing.assert_close(c_skip * x_t + c_out * u, x_s, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(x_s, ((variance + s**2) / (variance + t**2)).sqrt() * x_t, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(
            FlowMapPreconditioning().jump(x_t, z - self.tau * u, t, s), x_s, rtol=1e-12, atol=1e-13
        )

    def test_straight_flow_to_one_point(self) -> None:
        """One data point p and noise n: u = n - p everywhere on the line, and D = p."""
        point, noise = 0.7, torch.linspace(-2, 3, 5, dtype=torch.float64)
        t, s = self.levels
        c_skip, c_out = FlowMapPreconditioning().on_network(t, s)
        x_s = c_skip * (point + t * noise) + c_out * (noise - point)
        # roundings of point + t noise, up to 200
        torch.testing.assert_close(x_s, point + s * noise, rtol=1e-13, atol=1e-13)

    def test_is_the_plain_step_in_flow_time(self) -> None:
        t, s = self.levels
        c_skip, c_out = FlowMapPreconditioning().on_network(t, s)
        # a few roundings; tau = 0.988 to level 82 and back
        torch.testing.assert_close(c_skip * (1 + t) / (1 + s), torch.ones_like(t), rtol=1e-14, atol=0)
        torch.testing.assert_close(c_out / (1 + s), self.r - self.tau, rtol=1e-13, atol=0)


class TestBCM:
    """The scalings of the authors' code, worked out for a few jumps."""

    @pytest.mark.parametrize(
        ("sigma_data", "t", "s", "c_skip", "c_out"),
        [
            # (t s + d^2) / (t^2 + d^2) and d (t - s) / sqrt(t^2 + d^2)
            (0.5, 1.2, 0.5, 0.85 / 1.69, 0.35 / 1.3),
            (0.5, 1.2, 0.0, 0.25 / 1.69, 0.6 / 1.3),
            (0.5, 80.0, 0.002, 0.41 / 6400.25, 0.5 * 79.998 / math.sqrt(6400.25)),
            (3.0, 4.0, 1.0, 13 / 25, 9 / 5),
        ],
    )
    def test_values(self, sigma_data: float, t: float, s: float, c_skip: float, c_out: float) -> None:
        got = BCMPreconditioning(sigma_data).on_network(t, s)
        # the denoiser's share and EDM's are put together: a few roundings
        assert got.c_skip.item() == pytest.approx(c_skip, rel=1e-14)
        assert got.c_out.item() == pytest.approx(c_out, rel=1e-14)


class TestLCM:
    """Scalings of the clean-data prediction."""

    def test_values(self) -> None:
        c_skip, c_out = LCMPreconditioning()(torch.tensor([0.0, 0.05, 1.0], dtype=torch.float64))
        # 10 tau = 0, sigma_data, 10
        exact = torch.tensor([[1, 0.5, 0.25 / 100.25], [0, 0.5**0.5, 10 / 100.25**0.5]], dtype=torch.float64)
        torch.testing.assert_close(torch.stack((c_skip, c_out)), exact, rtol=1e-15, atol=0)  # a few roundings

    def test_has_no_factor_sigma_data(self) -> None:
        steps = torch.arange(1000, dtype=torch.float64)
        c_skip, c_out = LCMPreconditioning(sigma_data=3.0, timestep_scaling=0.1)(steps)
        # a few roundings, here and below
        torch.testing.assert_close(c_skip + c_out**2, torch.ones_like(steps), rtol=1e-15, atol=0)
        # CM's without shift is sigma_data times it, once kappa tau is the noise level
        cm = CMPreconditioning(sigma_data=3.0, sigma_min=0.0).on_network(steps[1:] * 0.1)
        torch.testing.assert_close(cm.c_out, 3 * c_out[1:], rtol=1e-14, atol=0)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        steps = torch.tensor([0, 1, 19, 128], dtype=dtype)  # 1280^2 is beyond float16
        exact, scalings = LCMPreconditioning()(steps.double()), LCMPreconditioning()(steps)
        for got, wanted in zip(scalings, exact, strict=True):
            assert got.dtype == torch.float32
            torch.testing.assert_close(got.double(), wanted, rtol=6e-8, atol=0)  # one rounding


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CMPreconditioning(sigma_min=-0.1), ValueError, r"sigma_min must be positive.*got -0\.1"),
        (lambda: CMPreconditioning(sigma_data=0.0), ValueError, r"sigma_data must be positive.*got 0\.0"),
        (lambda: CMPreconditioning(sigma_min=math.inf), ValueError, r"sigma_min must be positive.*got inf"),
        (lambda: CMPreconditioning(sigma_min="0.002"), TypeError, r"sigma_min must be a number, got '0\.002'"),  # type: ignore[arg-type]
        (lambda: BCMPreconditioning(sigma_data=-1.0), ValueError, r"sigma_data must be positive.*got -1\.0"),
        (lambda: CMPreconditioning(sigma_min=False), TypeError, "sigma_min must be a number, got False"),
        (lambda: TrigFlowPreconditioning(-1.0), ValueError, r"sigma_data must be positive.*got -1\.0"),
        (lambda: LCMPreconditioning(timestep_scaling=0.0), ValueError, "timestep_scaling must be positive"),
        (lambda: LCMPreconditioning()(999), TypeError, r"timestep must be a tensor of numbers, got 999 \(int\)"),  # type: ignore[arg-type]
        (lambda: LCMPreconditioning()(torch.tensor([True])), TypeError, r"got torch\.bool"),
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
