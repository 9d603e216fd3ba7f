"""Jump times: their distributions against enumeration and closed forms, their order against every rounding."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from global_rng import global_rng_untouched
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import analytic_precond as ap
from analytic_precond.distillation.jump_times import (
    JumpTimes,
    ect_target_times,
    sample_adjacent_times,
    sample_continuous_times,
    sample_jump_times,
)

GOLDEN = np.load(GOLDEN_FILE)
GRID = torch.from_numpy(GOLDEN["sony_times_18"])  # float32, ends at 79.99998474 and 0.0019999996
# seeds are fixed, so a test either always passes or never; a right sampler fails at one seed in a thousand
SIGNIFICANCE = 1e-3


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact_law(num: int, max_steps: int, power: int, end: str) -> dict[tuple[int, int, int], Fraction]:
    """The probability of each (t_index, u_index, s_index), enumerated."""
    counts = range(1, min(max_steps, num - 1) + 1)
    total = sum(k**power for k in counts)
    law = {}
    for k in counts:
        for i in range(num - k):
            targets = range(i + k, num) if end == "uniform" else [num - 1]
            for j in targets:
                law[i, i + k, j] = Fraction(k**power, total) / (num - k) / len(targets)
    assert sum(law.values()) == 1
    return law


def assert_follows(times: JumpTimes, law: dict[tuple[int, int, int], Fraction]) -> None:
    assert times.t_index is not None
    assert times.u_index is not None
    assert times.s_index is not None
    drawn = Counter(zip(times.t_index.tolist(), times.u_index.tolist(), times.s_index.tolist(), strict=True))
    assert set(drawn) == set(law)  # every possible triple occurs, no other does
    expected = [float(p) * len(times.t) for p in law.values()]
    assert min(expected) > 5  # chi-square's own condition
    if len(law) > 1:
        assert stats.chisquare([drawn[key] for key in law], expected).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("end", ["uniform", "smallest"])
@pytest.mark.parametrize(("step_weighting", "power"), [("uniform", 0), ("weighted", 1)])
@pytest.mark.parametrize(("num", "max_steps"), [(6, 3), (6, 5), (6, 100), (5, 1), (3, 2), (2, 17)])
def test_joint_law_of_the_indices(num: int, max_steps: int, step_weighting: str, power: int, end: str) -> None:
    times = sample_jump_times(
        40_000, ap.log_noise_levels(num), max_steps, seeded(0), step_weighting=step_weighting, end=end
    )
    assert_follows(times, exact_law(num, max_steps, power, end))


def test_defaults_are_ctms() -> None:
    assert_follows(sample_jump_times(400_000, GRID, generator=seeded(2)), exact_law(18, 17, 1, "uniform"))


def test_law_of_neighbours() -> None:
    levels = ap.karras_noise_levels(18)
    assert_follows(
        sample_adjacent_times(20_000, levels, seeded(1)), {(i, i + 1, 17): Fraction(1, 17) for i in range(17)}
    )


@given(
    num=st.integers(2, 60),
    max_steps=st.integers(1, 80),
    batch=st.integers(1, 40),
    step_weighting=st.sampled_from(["uniform", "weighted"]),
    end=st.sampled_from(["uniform", "smallest"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_times_lie_on_the_grid_in_order(
    num: int, max_steps: int, batch: int, step_weighting: str, end: str, dtype: torch.dtype, seed: int
) -> None:
    levels = ap.karras_noise_levels(num).to(dtype)
    times = sample_jump_times(batch, levels, max_steps, seeded(seed), step_weighting=step_weighting, end=end)
    assert times.levels is levels
    for level, index in ((times.t, times.t_index), (times.u, times.u_index), (times.s, times.s_index)):
        assert index is not None
        assert index.dtype == torch.int64
        assert level.shape == index.shape == (batch,)
        assert level.dtype == dtype
        assert torch.equal(level, levels[index])
    assert bool((times.t > times.u).all())
    assert bool((times.u >= times.s).all())
    assert times.t_index is not None
    assert times.u_index is not None
    assert int((times.u_index - times.t_index).max()) <= max_steps
    if end == "smallest":
        assert bool((times.s == levels[-1]).all())


def ramp_position(level: Tensor, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray[Any, Any]:
    top, bottom = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (top - level.numpy() ** (1 / rho)) / (top - bottom)


@pytest.mark.parametrize(
    ("sigma_min", "sigma_max", "rho", "max_span"), [(0.002, 80.0, 7.0, 17 / 18), (0.1, 20.0, 3.0, 0.25)]
)
def test_continuous_times_follow_closed_forms(sigma_min: float, sigma_max: float, rho: float, max_span: float) -> None:
    times = sample_continuous_times(
        20_000, sigma_min, sigma_max, rho, seeded(3), max_span=max_span, dtype=torch.float64
    )
    tau_t, tau_u, tau_s = (ramp_position(v, sigma_min, sigma_max, rho) for v in (times.t, times.u, times.s))
    span = tau_u - tau_t

    def marginal_of_t(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """P(tau_t <= x): the integral of min(1, x / (1 - span)) over the spans."""
        x = np.clip(x, 1e-300, 1)
        below = -x * np.log1p(-max_span) / max_span
        above = (max_span - 1 + x - x * np.log(x)) / max_span
        return np.where(x <= 1 - max_span, below, above)

    for sample, law in (
        (span / max_span, "uniform"),
        (tau_t / (1 - span), "uniform"),
        ((tau_s - tau_u) / (1 - tau_u), "uniform"),
        (tau_t, marginal_of_t),
    ):
        assert stats.kstest(sample, law).pvalue > SIGNIFICANCE
    # independent draws: rank correlations of 20000 pairs are N(0, 1 / 20000)
    pairs = np.array([span, tau_t / (1 - span), (tau_s - tau_u) / (1 - tau_u)])
    correlations = stats.spearmanr(pairs.T).statistic[np.triu_indices(3, 1)]
    assert np.abs(correlations).max() < 4 / math.sqrt(20_000)


def test_continuous_times_may_all_end_at_sigma_min() -> None:
    times = sample_continuous_times(100, generator=seeded(4), end="smallest")
    assert bool((times.s == torch.tensor(0.002)).all())
    assert bool((times.u > times.s).any())
    assert times[3:] == (None, None, None, None)


@given(
    sigma_min=st.floats(1e-4, 10.0),
    log_ratio=st.floats(1e-6, 14.0),
    rho=st.floats(0.1, 40.0),
    max_span=st.floats(1e-30, 1.0),
    end=st.sampled_from(["uniform", "smallest"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_continuous_times_are_in_strict_order_whatever_rounding_does(
    sigma_min: float, log_ratio: float, rho: float, max_span: float, end: str, dtype: torch.dtype
) -> None:
    sigma_max = sigma_min * math.exp(log_ratio)
    times = sample_continuous_times(64, sigma_min, sigma_max, rho, seeded(5), max_span=max_span, end=end, dtype=dtype)
    low, high = torch.tensor([sigma_min, sigma_max], dtype=dtype)
    assert {v.dtype for v in times[:3]} == {dtype}
    for larger, smaller in ((high, times.t), (times.u, times.s), (times.s, low)):
        assert bool((larger >= smaller).all())
    assert bool((times.t > times.u).all())


LN3, LN7 = math.log(3), math.log(7)


@pytest.mark.parametrize(
    ("t", "options", "r"),
    [
        # sigmoid(-ln 7) = 1/8, so 1 + 8 / 8 = 2; sigmoid(-ln 3) = 1/4, so 1 + 8 / 4 = 3
        (LN7, {"stage": 0}, 0.0),
        (LN7, {"stage": 1}, LN7 / 2),
        (LN7, {"stage": 2}, 3 / 4 * LN7),
        (LN3, {"stage": 0}, 0.0),
        (LN3, {"stage": 1}, LN3 / 4),
        (LN3, {"stage": 1, "q": 4.0}, 13 / 16 * LN3),
        (LN3, {"stage": 0, "q": 4.0, "k": 4.0}, LN3 / 2),
        (LN3 / 2, {"stage": 2, "b": 2.0}, 5 / 16 * LN3),
        (1e-9, {"stage": 2}, 3 / 8 * 1e-9),  # sigmoid(0) = 1/2
        (1000.0, {"stage": 0}, 500.0),  # sigmoid(-inf) = 0
        (5.0, {"stage": 1, "k": 0}, 15 / 4),  # ECT's constant ratio
    ],
)
def test_ect_map_by_hand(t: float, options: dict[str, Any], r: float) -> None:
    # a few roundings of a difference of numbers up to 3; LN7 itself is rounded, and there r is 0 up to that
    got = ect_target_times(torch.tensor([t], dtype=torch.float64), **options).item()
    assert got == pytest.approx(r, rel=1e-8 if t == 1e-9 else 1e-14, abs=1e-15)
    single = ect_target_times(torch.tensor([t], dtype=torch.float32), **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(r, rel=1e-6, abs=1e-6)


@given(t=st.floats(2**-20, 2**20, width=32), stage=st.integers(0, 21), q=st.floats(1.1, 2.0))
def test_ect_pairs_are_ordered_and_approach(t: float, stage: int, q: float) -> None:
    level = torch.tensor([t], dtype=torch.float32)
    now, later = (ect_target_times(level, n, q) for n in (stage, stage + 1))
    assert 0 <= now.item() <= later.item() < level.item()


def test_ect_map_keeps_shape_and_dtype() -> None:
    t = torch.full((2, 1, 1), 4.0)
    assert ect_target_times(t).dtype == torch.float32
    assert ect_target_times(t.double()).dtype == torch.float64
    assert ect_target_times(t).shape == (2, 1, 1)


Sampler = Callable[[torch.Generator | None], JumpTimes]
SAMPLERS: dict[str, Sampler] = {
    "jump": lambda generator: sample_jump_times(50, GRID, generator=generator),
    "adjacent": lambda generator: sample_adjacent_times(50, GRID, generator),
    "continuous": lambda generator: sample_continuous_times(50, generator=generator),
}


def assert_same(a: JumpTimes, b: JumpTimes) -> None:
    torch.testing.assert_close(
        tuple(v for v in a if v is not None), tuple(v for v in b if v is not None), rtol=0, atol=0
    )


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_a_generator_decides_everything(sample: Sampler) -> None:
    with global_rng_untouched():
        first, again, other = (sample(seeded(seed)) for seed in (7, 7, 8))
    assert_same(first, again)
    assert not torch.equal(first.t, other.t)


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_without_a_generator_torchs_own_is_used(sample: Sampler) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        first, second = sample(None), sample(None)
    assert_same(first, sample(seeded(7)))
    assert not torch.equal(first.t, second.t)


def test_values_are_not_read_off_the_cpu() -> None:
    # a meta tensor has no values: reading one raises
    levels = GRID.to("meta")
    assert sample_jump_times(3, levels).s.is_meta
    assert sample_adjacent_times(3, levels).u.is_meta
    assert sample_continuous_times(3, device="meta").t.is_meta
    assert ect_target_times(levels).is_meta
    with pytest.raises(ValueError, match=r"levels must be 1-D with at least 2 noise levels, got shape \(1,\)"):
        sample_jump_times(3, levels[:1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda() -> None:
    levels = GRID.cuda()
    on_cpu = sample_jump_times(500, GRID, generator=seeded(9))
    moved = sample_jump_times(500, levels, generator=seeded(9))
    assert moved.t.is_cuda
    assert_same(on_cpu, JumpTimes(*(v if v is None else v.cpu() for v in moved)))
    back = sample_jump_times(500, GRID, generator=torch.Generator("cuda").manual_seed(9))
    assert back.t.device.type == "cpu"

    torch.cuda.set_sync_debug_mode("error")
    try:
        for generator in (None, seeded(9), torch.Generator("cuda").manual_seed(9)):
            times = sample_jump_times(500, levels, generator=generator)
            sample_adjacent_times(500, levels, generator)
            sample_continuous_times(500, generator=generator, device="cuda")
            ect_target_times(times.t)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert bool((times.t > times.u).all())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0}, ValueError, r"batch must be at least 1, got 0"),
        ({"batch": -3}, ValueError, r"batch must be at least 1, got -3"),
        ({"batch": 2.0}, TypeError, r"batch must be an int, got 2\.0 \(float\)\. Pass len\(x\)"),
        ({"batch": True}, TypeError, r"batch must be an int"),
        (
            {"generator": 0},
            TypeError,
            r"torch\.Generator or None, got 0 \(int\): pass torch\.Generator\(\)\.manual_seed",
        ),
        ({"levels": GRID[:0]}, ValueError, r"levels must be 1-D with at least 2 noise levels, got shape \(0,\)"),
        ({"levels": GRID[:1]}, ValueError, r"levels must be 1-D with at least 2"),
        ({"levels": GRID.flip(0)}, ValueError, r"levels must be strictly decreasing"),
        ({"levels": [80.0, 0.002]}, TypeError, r"levels must be a torch\.Tensor, got list"),
        ({"levels": torch.arange(9, 0, -1)}, TypeError, r"levels must be a floating-point tensor"),
        ({"levels": torch.tensor([1.0, 0.0])}, ValueError, r"levels must be positive.*drop a final 0"),
        ({"max_steps": 0}, ValueError, r"max_steps must be at least 1, got 0"),
        ({"step_weighting": "heavy"}, ValueError, r"step_weighting must be one of 'weighted', 'uniform', got 'heavy'"),
        ({"end": "last"}, ValueError, r"end must be one of 'uniform', 'smallest', got 'last'"),
    ],
)
def test_bad_input_on_a_grid(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_jump_times(**{"batch": 4, "levels": GRID, **options})
    if not {"max_steps", "step_weighting", "end"} & set(options):
        with pytest.raises(error, match=message):
            sample_adjacent_times(**{"batch": 4, "levels": GRID, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 0}, ValueError, r"batch must be at least 1"),
        ({"sigma_min": 0.0}, ValueError, r"sigma_min must be positive and finite, got 0\.0"),
        ({"sigma_min": 90.0}, ValueError, r"sigma_min must be below sigma_max, got 90\.0 and 80\.0"),
        ({"sigma_max": math.inf}, ValueError, r"sigma_max must be positive and finite"),
        ({"rho": -7.0}, ValueError, r"rho must be positive"),
        ({"max_span": 17}, ValueError, r"max_span must be at most 1.*got 17: divide steps by grid points"),
        ({"max_span": 0.0}, ValueError, r"max_span must be positive"),
        ({"end": "last"}, ValueError, r"end must be one of 'uniform', 'smallest'"),
        ({"generator": 0}, TypeError, r"generator must be a torch\.Generator or None"),
        ({"dtype": torch.bfloat16}, ValueError, r"dtype must be torch\.float32 or torch\.float64, got torch\.bfloat16"),
    ],
)
def test_bad_input_between_levels(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_continuous_times(**{"batch": 4, **options})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"t": 1.0}, TypeError, r"t must be a torch\.Tensor"),
        ({"t": torch.tensor([1.0, -2.0])}, ValueError, r"t must be positive finite noise levels, got -2\.0"),
        ({"t": torch.tensor([math.nan])}, ValueError, r"got nan"),
        ({"t": torch.tensor([math.inf])}, ValueError, r"got inf"),
        ({"stage": -1}, ValueError, r"stage must be at least 0"),
        ({"stage": 0.5}, TypeError, r"stage must be an int"),
        ({"stage": 23}, ValueError, r"stage must leave r below t in torch\.float32, got stage 23 with q = 2\.0"),
        ({"stage": 5000}, ValueError, r"stage must leave r below t"),
        ({"q": 1.0}, ValueError, r"q must be above 1, got 1\.0"),
        ({"k": -1.0}, ValueError, r"k must be positive"),
        ({"b": 0.0}, ValueError, r"b must be positive"),
    ],
)
def test_bad_input_of_the_ect_map(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ect_target_times(**{"t": torch.tensor([1.0]), **options})
