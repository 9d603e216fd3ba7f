"""Levels in half precision are refused wherever they come in, on every device; data in half precision are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import analytic_precond as ap

HALVES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
MESSAGE = r"must be float32 or float64, got torch\.(bfloat16|float16|float8_\w+).*grids in float64.*t\.float\(\)"


def network(x: Tensor, *c_noise: Tensor) -> Tensor:
    return 0 * x


def shrink(x: Tensor, t: Tensor) -> Tensor:
    return 0 * x


def jump(x: Tensor, t: Tensor, s: Tensor) -> Tensor:
    return x


CTM = ap.CTMPreconditioning()
STUDENT = ap.ConsistencyTrajectoryModel(network, CTM)
MODEL = ap.ConsistencyModel(network, CTM)
STEPS = torch.tensor([1, 1])


def losses(x: Tensor, *times: Tensor) -> Any:
    x = torch.zeros(x.shape)  # what is not on the CPU has no values to compare
    return ap.consistency_distillation_loss(shrink, jump, jump, x, x, ap.JumpTimes(*times))


# called with x, and levels t and s of its two samples
DOORS: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "student": STUDENT,
    "consistency model": lambda x, t, s: (MODEL(x, t), MODEL(x, s)),
    "denoise": lambda x, t, s: (STUDENT.denoise(x, t), STUDENT.denoise(x, s)),
    "preconditioning": lambda x, t, s: CTM(t, s),
    "on network": lambda x, t, s: CTM.on_network(t, s),
    "jump": lambda x, t, s: CTM.jump(x, x, t, s),
    "required output": lambda x, t, s: CTM.required_output(x, x, t, s),
    "query": lambda x, t, s: (CTM.query(x, t, s), CTM.query(x, s, s)),
    "network denoiser": lambda x, t, s: [
        ap.denoiser_from_network(network, "epsilon", ap.EDMSchedule())(x, level) for level in (t, s)
    ],
    "EDM's scalings": lambda x, t, s: (ap.EDMPreconditioning()(t), ap.EDMPreconditioning()(s)),
    "schedule": lambda x, t, s: (ap.VPLinearSchedule().time(t), ap.VPLinearSchedule().noise_level(s)),
    "velocity": lambda x, t, s: [ap.probability_flow_velocity(shrink, x, level) for level in (t, s)],
    "euler_step": lambda x, t, s: ap.euler_step(shrink, x, t, s),
    "heun_step": lambda x, t, s: ap.heun_step(shrink, x, t, s),
    "heun_solve_between": lambda x, t, s: ap.heun_solve_between(shrink, x, t, s, STEPS),
    "losses": lambda x, t, s: losses(x, t, s, s),
    "denoising_loss": lambda x, t, s: [ap.denoising_loss(shrink, x, x, level) for level in (t, s)],
    "ect_target_times": lambda x, t, s: (ap.ect_target_times(t), ap.ect_target_times(s)),
}

ZERO = torch.zeros(3)
X, T, S = torch.ones(2, 3), torch.tensor([4.0, 2.0]), torch.tensor([1.0, 0.5])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS.keys())
def test_one_level_per_sample(door: Callable[..., Any], dtype: torch.dtype) -> None:
    door(X, T, S)
    for t, s in ((T.to(dtype), S), (T, S.to(dtype))):
        with pytest.raises(TypeError, match=MESSAGE):
            door(X, t, s)
        with pytest.raises(TypeError, match=MESSAGE):
            door(X.to("meta"), t.to("meta"), s.to("meta"))  # stands for a GPU: no value is looked at


GRIDS: dict[str, Callable[[Tensor], Any]] = {
    "solve_ode": lambda levels: ap.solve_ode(shrink, X, levels),
    "heun_solve": lambda levels: ap.heun_solve(shrink, X, levels, 0, 1),
    "sample_jump_times": lambda levels: ap.sample_jump_times(2, levels),
    "estimate_statistics": lambda levels: ap.estimate_statistics(shrink, X, levels, progress=False),
    "fit": lambda levels: ap.LeastSquaresPreconditioning.fit(shrink, X, levels, progress=False),
    "from_coefficients": lambda levels: ap.AnalyticPreconditioning.from_coefficients(levels, ZERO, ZERO),
    "sample_multistep": lambda levels: ap.sample_multistep(jump, X, levels),
    "sample_deterministic": lambda levels: ap.sample_deterministic(jump, X, levels),
    "a sampler's grid": lambda levels: ap.sample_multistep(jump, X, [0, 1], grid=levels),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("door", GRIDS.values(), ids=GRIDS.keys())
def test_grids(door: Callable[[Tensor], Any], dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=MESSAGE):
        door(torch.tensor([4.0, 2.0, 1.0]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_data_may_be_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    for door in (STUDENT, DOORS["jump"], DOORS["heun_step"]):
        # one rounding of x and one of the result
        torch.testing.assert_close(
            door(x.to(dtype), T, S).float(), door(x, T, S), rtol=2 * torch.finfo(dtype).eps, atol=0
        )


def test_the_error_names_the_cure_under_fsdp() -> None:
    with pytest.raises(TypeError, match=r"MixedPrecisionPolicy\(\.\.\., cast_forward_inputs=False\)"):
        STUDENT(X, T.bfloat16(), S)


def test_a_consistency_models_target() -> None:
    with pytest.raises(TypeError, match="^s " + MESSAGE):
        MODEL(X, T, torch.full((2,), 0.002, dtype=torch.bfloat16))
