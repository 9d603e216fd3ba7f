"""What all hand-crafted preconditionings promise: boundary, read-out, network form, identities, dtypes."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from torch import Tensor

import analytic_precond as ap
from analytic_precond.noise_levels.network_scalings import trigflow_c_noise
from analytic_precond.preconditionings.hand_crafted import (
    BCMPreconditioning,
    CMPreconditioning,
    FlowMapPreconditioning,
    TrigFlowPreconditioning,
)

with np.load(GOLDEN_FILE) as golden:
    X, T, S = (torch.from_numpy(golden[key]) for key in ("x", "t", "s"))
EPS = 0.002

ALL = {
    "bcm": BCMPreconditioning(),
    "bcm 0.7": BCMPreconditioning(sigma_data=0.7),
    "trigflow": TrigFlowPreconditioning(),
    "flow map": FlowMapPreconditioning(),
}
every = pytest.mark.parametrize("precond", ALL.values(), ids=ALL.keys())
every_with_cm = pytest.mark.parametrize(
    "precond", [*ALL.values(), CMPreconditioning(sigma_min=0.01)], ids=[*ALL.keys(), "cm"]
)


def column(level: Tensor) -> Tensor:
    return ap.expand_to(level, X)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_boundary_is_exact_in_every_dtype(precond: ap.Preconditioning, dtype: torch.dtype) -> None:
    t = ap.log_noise_levels(1001).to(dtype)
    c_skip, c_out = precond(t, t)
    assert torch.equal(c_skip, torch.ones_like(c_skip))
    assert torch.equal(c_out, torch.zeros_like(c_out))
    c_skip, c_out = precond.on_network(t, t)
    assert torch.equal(c_skip, torch.ones_like(c_skip))
    assert torch.equal(c_out, torch.zeros_like(c_out))


@every
def test_read_out_recovers_the_denoiser(precond: ap.Preconditioning) -> None:
    x, denoised = X[:, 0, 0, 0], X[:, 1, 0, 0]
    t = torch.tensor([0.01, 0.1, 0.5, 2.0, 10.0, 60.0], dtype=torch.float64)
    slope = torch.func.jvp(lambda s: precond.jump(x, denoised, t, s), (t,), (torch.ones_like(t),))[1]
    # t times a derivative in s: a few roundings of numbers of order 1 to 60
    torch.testing.assert_close(x - t * slope, denoised, rtol=1e-12, atol=1e-12)


@every_with_cm
def test_gradients_in_the_levels(precond: ap.Preconditioning) -> None:
    t = torch.tensor([0.31, 7.0, 43.0], dtype=torch.float64, requires_grad=True)
    s = torch.tensor([0.17, 1.3, 0.5], dtype=torch.float64, requires_grad=True)
    # Consistency Models have one s
    levels = (t, torch.tensor(0.01).double()) if isinstance(precond, CMPreconditioning) else (t, s)
    for function in (precond, precond.on_network):
        assert torch.autograd.gradcheck(lambda t, s: tuple(function(t, s)), levels, check_forward_ad=True)  # noqa: B023


@every_with_cm
def test_dtypes(precond: ap.Preconditioning) -> None:
    s = 0.01
    exact = (precond(80.0, s), precond.on_network(80.0, s))
    assert exact[0].c_out.dtype == exact[1].c_out.dtype == torch.float64
    single = torch.tensor([80.0])
    for t, expected in ((single, torch.float32), (single.double(), torch.float64)):
        for scalings, reference in zip((precond(t, s), precond.on_network(t, s)), exact, strict=True):
            for got, wanted in zip(scalings, reference, strict=True):
                assert got.dtype == expected
                # two roundings to float32 on the denoiser, two more and a sum of positive terms on the network
                torch.testing.assert_close(got[0].double(), wanted, rtol=2.5e-7, atol=0)


@every_with_cm
def test_infinite_levels_are_refused_with_what_to_do(precond: ap.Preconditioning) -> None:
    t, x = torch.tensor([2.0, torch.inf], dtype=torch.float64), torch.ones(2, 3)
    jumps: list[Callable[[], object]] = [
        lambda: precond(torch.inf, 0.01),
        lambda: precond(t, 0.01),
        lambda: precond(t.float(), 0.01),
        lambda: precond.on_network(t, 0.01),
        lambda: precond.jump(x, x, t, 0.01),
        lambda: ap.ConsistencyModel(lambda x, c: x, precond, sigma_min=0.01)(x, t),
    ]
    for jump in jumps:
        with pytest.raises(ValueError, match=r"got t = inf, s = 0\.0\d+ at .*start at the sigma_max of the schedule"):
            jump()
    c_skip, c_out = torch.vmap(lambda t: tuple(precond(t, 0.01)))(t)
    assert torch.isnan(c_skip).tolist() == torch.isnan(c_out).tolist() == [False, True]
    assert torch.isfinite(torch.stack(precond(1e30, 0.01))).all()


@every_with_cm
def test_invalid_levels_are_nan_where_they_cannot_be_read(precond: ap.Preconditioning) -> None:
    t, s = torch.tensor([2.0, 1.0, float("nan"), -1.0]), torch.tensor([0.01, 2.0, 0.01, -2.0])
    mapped = torch.vmap(lambda t, s: tuple(precond(t, s)))
    torch.compiler.reset()  # many classes share one `forward`, and a process may compile it 8 times
    compiled = torch.compile(precond, fullgraph=True, backend="eager")
    for function in (mapped, compiled):
        c_skip, c_out = function(t, s)
        assert torch.isnan(c_skip).tolist() == torch.isnan(c_out).tolist() == [False, True, True, True]
        assert c_out[0] == precond(t[0], s[0]).c_out
    torch.compiler.reset()


@every
def test_jumps_to_clean_data_and_not_to_more_noise(precond: ap.Preconditioning) -> None:
    c_skip, c_out = precond(3.0, 0.0)
    assert c_out == 1
    assert math.isfinite(c_skip)
    with pytest.raises(ValueError, match=r"s <= t.*got t = 1, s = 2"):
        precond.on_network(1.0, 2.0)


def edm_wrap(x: Tensor, F: Tensor, sign: float = 1.0) -> Tensor:
    edm = ap.EDMPreconditioning(0.5)(T)
    return column(edm.c_skip) * x + sign * column(edm.c_out) * F


def flow_wrap(x: Tensor, u: Tensor) -> Tensor:
    tau = column(T / (1 + T))
    return (1 - tau) * x - tau * u


CONVERSIONS = {
    "cm": (CMPreconditioning(), edm_wrap),
    "bcm": (BCMPreconditioning(), edm_wrap),
    "trigflow": (TrigFlowPreconditioning(), lambda x, F: edm_wrap(x, F, -1.0)),
    "flow map": (FlowMapPreconditioning(), flow_wrap),
}


@pytest.mark.parametrize(("precond", "wrap"), CONVERSIONS.values(), ids=CONVERSIONS.keys())
def test_denoiser_and_network_make_the_same_jump(
    precond: ap.Preconditioning, wrap: Callable[[Tensor, Tensor], Tensor]
) -> None:
    s = torch.full_like(T, EPS) if isinstance(precond, CMPreconditioning) else S
    c_skip, c_out = (column(c) for c in precond.on_network(T, s))
    F = torch.sin(X)
    # read-outs by autograd multiply roundings by t = 80 and x of order 100
    torch.testing.assert_close(precond.jump(X, wrap(X, F), T, s), c_skip * X + c_out * F, rtol=1e-12, atol=1e-11)
    # back: D is linear in x and F, so the network that a denoiser stands for is one division away
    denoised = torch.cos(X)
    skip = wrap(X, torch.zeros_like(X))
    F = (denoised - skip) / wrap(torch.zeros_like(X), torch.ones_like(X))
    # ... by c_out of the wrapping, as small as t = 0.002
    torch.testing.assert_close(c_skip * X + c_out * F, precond.jump(X, denoised, T, s), rtol=1e-12, atol=1e-11)


def test_ctm_euler_trigflow_and_bcm_are_one_jump() -> None:
    d = 0.7
    ctm, bcm = ap.CTMPreconditioning(sigma_data=d), BCMPreconditioning(d)
    trigflow, flow_map = TrigFlowPreconditioning(d), FlowMapPreconditioning()
    for precond in (bcm, trigflow, flow_map):
        for got, expected in zip(precond(T, S), ctm(T, S), strict=True):
            # c_skip as a difference of terms below 1: a few roundings
            torch.testing.assert_close(got, expected, rtol=1e-14, atol=1e-16)
    c_skip, c_out = ctm.on_network(T, S)
    for precond, sign in ((bcm, 1), (trigflow, -1)):
        torch.testing.assert_close(precond.on_network(T, S).c_skip, c_skip, rtol=1e-14, atol=0)
        torch.testing.assert_close(precond.on_network(T, S).c_out, sign * c_out, rtol=1e-14, atol=0)


def test_trigflow_is_a_rotation_by_the_difference_of_angles() -> None:
    d = 0.7
    c_skip, c_out = TrigFlowPreconditioning(d).on_network(T, S)
    angle_t, angle_s = trigflow_c_noise(T, d), trigflow_c_noise(S, d)
    to_trig, back = angle_t.cos(), 1 / angle_s.cos()
    # cosines of angles next to pi / 2 keep 1e-16 absolute, of 1e-2: 1e-14 relative, twice
    torch.testing.assert_close(c_skip, back * (angle_t - angle_s).cos() * to_trig, rtol=1e-13, atol=0)
    torch.testing.assert_close(c_out, -back * (angle_t - angle_s).sin() * d, rtol=1e-13, atol=0)
