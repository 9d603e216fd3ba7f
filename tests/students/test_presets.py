"""Presets against reference outputs: every scaling and every grid, grids bit for bit."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from checkout import GOLDEN as GOLDEN_FILE
from torch import Tensor

import analytic_precond as ap
from analytic_precond.noise_levels.network_scalings import cm_c_noise
from analytic_precond.students.paper_experiments import PAPER_EXPERIMENTS, PaperExperiment, paper_experiment
from analytic_precond.students.presets import PRESETS, Preset, preset

with np.load(GOLDEN_FILE) as golden:
    GOLDEN = {key: torch.from_numpy(golden[key]) for key in golden}
X, T, S = GOLDEN["x"], GOLDEN["t"], GOLDEN["s"]
CM, CTM, EDM, ECT = (PRESETS[name] for name in ("openai_cm", "sony_ctm_cifar10", "edm", "ect"))
every = pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())


def column(level: Tensor) -> Tensor:
    return ap.expand_to(level, X)


def golden_network(x: Tensor, tau: Tensor, tau_s: Tensor | None = None) -> Tensor:
    """The closed form that the reference codes were run with."""
    out = torch.sin(1.3 * x + 0.002 * column(tau)) + 0.25 * x
    return out if tau_s is None else out + 0.1 * torch.cos(0.003 * column(tau_s) + x)


def consistency_model(preset: Preset) -> ap.ConsistencyModel:
    return ap.ConsistencyModel(
        golden_network,
        preset.preconditioning(),
        preset.sigma_data,
        preset.sigma_min,
        noise_conditioning=preset.noise_conditioning,
    )


def trajectory_model(preset: Preset, network: Callable[..., Tensor] = golden_network) -> ap.ConsistencyTrajectoryModel:
    return ap.ConsistencyTrajectoryModel(
        network, preset.preconditioning(), preset.sigma_data, noise_conditioning=preset.noise_conditioning
    )


def training_levels(preset: Preset, num: int) -> Tensor:
    assert preset.training_levels is not None
    return preset.training_levels(num)


def multistep_levels(preset: Preset, num: int) -> Tensor:
    assert preset.multistep_levels is not None
    return preset.multistep_levels(num)


# sony/ctm offers 3 inner forms, h = c_skip x + c_out F, and 3 outer factors g on x_t. Its denoiser is what they imply,
# x - t d/ds x_s at s = t = h + (1 - t dg/ds) x; the preset has the inner form "edm" and the outer form "euler".


def outer_preset(outer: str) -> Preset:
    return dataclasses.replace(CTM, preconditioning=partial(ap.CTMPreconditioning, outer))


def outer_factor(outer: str, s: Tensor) -> Tensor:
    v_s, v_t = ((level - CTM.sigma_min) ** 2 + CTM.sigma_data**2 for level in (s, T))
    variance = (v_s / v_t).sqrt()
    return {"euler": s / T, "variance": variance, "euler_variance_mixed": (s + variance) / (T + 1)}[outer]


def sony_denoised(inner: str, outer: str) -> Tensor:
    F = golden_network(
        column(ap.EDMPreconditioning()(T).c_in) * X, CTM.noise_conditioning(T), CTM.noise_conditioning(S)
    )
    edm = ap.EDMPreconditioning(CTM.sigma_data)(T)
    c_skip, c_out = {
        "no": (torch.zeros_like(T), torch.ones_like(T)),
        "edm": edm[:2],
        "cm": CM.preconditioning().on_network(T, CM.sigma_min),
    }[inner]
    slope = torch.func.jvp(lambda s: outer_factor(outer, s), (T.clone(),), (torch.ones_like(T),))[1]
    return column(c_skip + 1 - T * slope) * X + column(c_out) * F


def sony_jump(inner: str, outer: str) -> Tensor:
    return outer_preset(outer).preconditioning().jump(X, sony_denoised(inner, outer), T, S)


SCALINGS: dict[str, Callable[[], Tensor]] = {
    "openai_edm_denoised": lambda: consistency_model(CM).denoise(X, T),
    "openai_edm_c_skip": lambda: ap.EDMPreconditioning(CM.sigma_data)(T).c_skip,
    "openai_edm_c_out": lambda: ap.EDMPreconditioning(CM.sigma_data)(T).c_out,
    "openai_edm_c_in": lambda: consistency_model(CM).edm(T).c_in,
    "openai_cm_denoised": lambda: consistency_model(CM)(X, T),
    "openai_cm_c_skip": lambda: CM.preconditioning().on_network(T, CM.sigma_min).c_skip,
    "openai_cm_c_out": lambda: CM.preconditioning().on_network(T, CM.sigma_min).c_out,
    "openai_cm_c_in": lambda: consistency_model(CM).edm(T).c_in,
    **{
        f"sony_{inner}_{outer}_{what}": partial(function, inner, outer)
        for inner in ("no", "edm", "cm")
        for outer in ("euler", "variance", "euler_variance_mixed")
        for what, function in (("denoised", sony_denoised), ("jump", sony_jump))
    },
}
GRIDS: dict[str, Callable[[], Tensor]] = {
    "openai_sigmas_karras_18": lambda: CM.sampling_levels(18),
    "sony_times_18": lambda: training_levels(CTM, CTM.num_levels),
    "sony_exact_sigmas": lambda: CTM.sampling_levels(5).double(),  # float32 values, stored for a float64 run
}
INPUTS_AND_SAMPLES = {
    *("x", "t", "s"),
    *(f"openai_multistep_{what}" for what in ("xT", "noise", "indices", "result")),
    *(f"sony_heun_{what}" for what in ("x", "index", "1_steps", "3_steps")),
    *("sony_exact_result", "sony_gamma_noise", "sony_gamma_0.5_result", "edm_heun_18_latents", "edm_heun_18_result"),
}


def test_every_reference_output_is_compared() -> None:
    assert set(GOLDEN) == SCALINGS.keys() | GRIDS.keys() | INPUTS_AND_SAMPLES


@pytest.mark.parametrize("key", SCALINGS)
def test_scalings(key: str) -> None:
    # float64 on both sides, x up to 210
    torch.testing.assert_close(SCALINGS[key](), GOLDEN[key], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", GRIDS)
def test_grids_bit_for_bit(key: str) -> None:
    got, expected = GRIDS[key](), GOLDEN[key]
    # a value of linspace, or a power, may round differently without these instructions, in the reference code too
    if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}:
        assert got.dtype == expected.dtype
        bits = {torch.float32: torch.int32, torch.float64: torch.int64}[got.dtype]
        assert torch.equal(got.view(bits), expected.view(bits))
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=0)  # 7th power: 7 * 6e-8 * 1.5 / 0.4


def test_trajectory_model_agrees_with_sony_ctm() -> None:
    for name in ("sony_ctm_cifar10", "sony_ctm_imagenet64"):
        student = trajectory_model(PRESETS[name])
        # float64 on both sides, x up to 210
        torch.testing.assert_close(student(X, T, S), GOLDEN["sony_edm_euler_jump"], rtol=1e-12, atol=1e-12)
    # the reference reads its denoiser out with the target time that it was given
    student = trajectory_model(CTM, lambda x, tau, _: golden_network(x, tau, CTM.noise_conditioning(S)))
    torch.testing.assert_close(student.denoise(X, T), GOLDEN["sony_edm_euler_denoised"], rtol=1e-12, atol=1e-12)


def test_multistep_levels_sample_like_openai_cm() -> None:
    model, levels = consistency_model(CM), multistep_levels(CM, CM.num_levels)[GOLDEN["openai_multistep_indices"]]
    x = GOLDEN["openai_multistep_xT"]
    for t, t_next, noise in zip(levels[:-1], levels[1:], GOLDEN["openai_multistep_noise"], strict=True):
        x = model(x, t) + (t_next**2 - CM.sigma_min**2).sqrt() * noise
    # three jumps in float64 from x up to 300, each with two roundings of t^2 - sigma_min^2
    torch.testing.assert_close(x, GOLDEN["openai_multistep_result"], rtol=1e-11, atol=1e-11)


def test_float32_grids_end_where_the_codes_end() -> None:
    for name in ("openai_cm", "sony_ctm_cifar10", "sony_ctm_imagenet64"):
        for levels in (training_levels(PRESETS[name], 40), PRESETS[name].sampling_levels(40)[:-1]):
            assert levels.dtype == torch.float32
            assert levels[0].item() == pytest.approx(79.99998474, abs=5e-9)  # as published, to the last digit
            assert levels[-1].item() == pytest.approx(0.0019999996, abs=5e-11)


def test_index_and_linspace_grids_are_two_formulas() -> None:
    index, linspace = training_levels(CM, 40), CM.sampling_levels(40)[:-1]
    torch.testing.assert_close(index, linspace, rtol=2e-6, atol=0)  # as above: a ramp rounded otherwise
    if torch.backends.cpu.get_cpu_capability() in {"AVX2", "AVX512"}:
        assert (index != linspace).sum() == 3


def test_edm_grid() -> None:
    levels = EDM.sampling_levels(18)
    assert levels.dtype == torch.float64
    assert levels[-1] == 0
    # powers of sums of roots, a few roundings
    torch.testing.assert_close(levels[:-1], ap.karras_noise_levels(18), rtol=3e-15, atol=0)
    torch.testing.assert_close(multistep_levels(CM, 18), levels[:-1], rtol=3e-15, atol=0)
    # the values that the published code computes
    assert levels[0].item() == pytest.approx(80.0, rel=1e-15)
    assert levels[-2].item() == pytest.approx(0.002000000000000003, rel=1e-15)


def test_edm_is_a_denoiser_whose_jump_is_an_euler_step() -> None:
    denoiser, student = consistency_model(EDM).denoise(X, T), consistency_model(EDM)(X, T)
    t = column(T)
    # float64, x up to 210
    torch.testing.assert_close(student, X + (0.002 - t) * (X - denoiser) / t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(EDM.noise_conditioning(T), T.log() / 4, rtol=1e-15, atol=0)
    torch.testing.assert_close(EDM.preconditioning().jump(X, denoiser, T, 0.0), denoiser, rtol=1e-15, atol=0)


def test_ect_trains_the_denoiser_and_samples_with_a_shift() -> None:
    t = T.clamp(min=0.003)
    model = consistency_model(ECT)
    edm = ap.EDMPreconditioning()(t)
    F = golden_network(column(edm.c_in) * X, t.log() / 4)
    denoised = column(edm.c_skip) * X + column(edm.c_out) * F
    trained = ECT.training_preconditioning().jump(X, denoised, t, 0.0)
    sampled = column(0.25 / ((t - 0.003) ** 2 + 0.25)) * X + column((t - 0.003) * 0.5 / (t**2 + 0.25).sqrt()) * F
    # float64, x up to 210
    torch.testing.assert_close(model.denoise(X, t), denoised, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trained, denoised, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(X, t), sampled, rtol=1e-12, atol=1e-12)
    assert ECT.sampling_levels(2).tolist() == [80.0, 0.821, 0.0]
    assert ECT.sampling_levels(1).tolist() == [80.0, 0.0]


@every
def test_preset_is_consistent(preset: Preset) -> None:
    assert (preset.training_levels is None) is (preset.ln_t_normal is not None)
    assert preset.sampling_levels(preset.num_levels).shape == (preset.num_levels + 1,)
    for make in (preset.preconditioning, preset.training_preconditioning):
        assert make() is not make()
        assert make().sigma_data == preset.sigma_data
    assert consistency_model(preset)(X[:1], preset.sigma_max).isfinite().all()
    assert pickle.loads(pickle.dumps(preset)).name == copy.deepcopy(preset).name == preset.name


@pytest.mark.parametrize("name", ["openai_cm", "sony_ctm_cifar10"])
def test_last_level_of_the_grid_is_a_valid_jump(name: str) -> None:
    preset = PRESETS[name]
    t = training_levels(preset, preset.num_levels)
    c_skip, c_out = preset.preconditioning()(t, torch.tensor(preset.sigma_min))
    assert c_out[-1] < 0  # not clamped: 0.0019999996 is below sigma_min
    assert c_skip[-1].item() == pytest.approx(1.0, abs=3e-7)  # 2e-7 away from the boundary


def test_grids_ignore_default_dtype() -> None:
    expected = [p.sampling_levels(p.num_levels) for p in PRESETS.values()]
    torch.set_default_dtype(torch.float64)
    try:
        for preset, levels in zip(PRESETS.values(), expected, strict=True):
            assert preset.sampling_levels(preset.num_levels).dtype == levels.dtype
        assert training_levels(CM, 40).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_paper_experiments() -> None:
    experiments = list(PAPER_EXPERIMENTS.values())
    assert list(PAPER_EXPERIMENTS) == ["cifar10_unconditional", "cifar10_conditional", "ffhq64", "imagenet64"]
    assert [e.num_levels for e in experiments] == [18, 18, 18, 40]
    assert [e.max_ode_steps for e in experiments] == [17, 17, 17, 20]
    assert [e.batch_size for e in experiments] == [256, 512, 256, 2048]
    assert [e.iterations for e in experiments] == [200_000, 150_000, 150_000, 60_000]
    for e in experiments:
        assert (e.learning_rate, e.target_ema, e.ema) == (4e-4, 0.999, 0.999)
        assert (e.ode_solver, e.distance, e.network_dtype) == ("heun", "lpips", torch.float16)
    assert [(e.gpus, e.days) for e in experiments] == [(4, 5.0), (8, 4.0), (8, 5.0), (32, 8.0)]


def test_every_setting_of_an_experiment_says_where_it_is_from() -> None:
    for e in PAPER_EXPERIMENTS.values():
        assert set(e.sources) == {f.name for f in dataclasses.fields(e)} | {
            "sampling_levels",
            "sample_denoising_levels",
        }
        assert set(e.sources.values()) <= {"paper", "sony/ctm", "teacher"}
        assert e.sources["learning_rate"] == "paper"
        assert e.sources["optimizer"] == "sony/ctm"
    assert paper_experiment("ffhq64").sources["dropout"] == "teacher"


def test_sampling_levels_are_those_of_sony_ctms_exact_sampler() -> None:
    e = paper_experiment("ffhq64")
    assert e.sampling_levels(2)[1].item() == pytest.approx(((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7)  # 2.515
    assert [len(e.sampling_levels(steps)) for steps in (1, 10)] == [2, 11]
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        e.sampling_levels(0)


def test_denoising_levels_are_half_lognormal_half_large() -> None:
    t = paper_experiment("imagenet64").sample_denoising_levels(40_000, torch.Generator().manual_seed(0))
    ln_t, large = t[:20_000].log(), t[20_000:]
    # standard errors 0.0085 and 0.006
    assert ln_t.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert ln_t.std().item() == pytest.approx(1.2, abs=0.02)
    ramp = (80 ** (1 / 7) - large ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))  # sony/ctm: uniform on (0, 0.7)
    torch.testing.assert_close(ramp.sort().values, torch.linspace(0, 0.7, 20_000), rtol=0, atol=0.01)
    assert paper_experiment("imagenet64").sample_denoising_levels(1).shape == (1,)


def test_lookup_and_freezing() -> None:
    for name in PRESETS:
        assert preset(name) is PRESETS[name]
        assert preset(name).name == name
    for name in PAPER_EXPERIMENTS:
        assert paper_experiment(name) is PAPER_EXPERIMENTS[name]
        assert paper_experiment(name).name == name
    frozen: list[tuple[Preset | PaperExperiment, str]] = [(CM, "sigma_min"), (paper_experiment("ffhq64"), "ema")]
    for value, field in frozen:
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, field, 1.0)
    for mapping in (PRESETS, PAPER_EXPERIMENTS):
        with pytest.raises(TypeError, match="does not support item assignment"):
            mapping["mine"] = None  # type: ignore[index]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: preset("cm"), ValueError, r"name must be one of 'openai_cm', 'sony_ctm_cifar10'.*'ect', got 'cm'"),
        (
            lambda: paper_experiment("lsun"),
            ValueError,
            r"name must be one of 'cifar10_uncond.*'imagenet64', got 'lsun'",
        ),
        (lambda: training_levels(CM, 1), ValueError, "num must be at least 2, got 1"),
        (lambda: CM.sampling_levels(18.0), TypeError, r"num must be an int, got 18\.0"),  # type: ignore[arg-type]
        (lambda: EDM.sampling_levels(0), ValueError, "num must be at least 2, got 0"),
        (lambda: multistep_levels(CTM, -1), ValueError, "num must be at least 2, got -1"),
        (lambda: ECT.sampling_levels(0), ValueError, "num must be at least 1, got 0"),
        (lambda: ECT.sampling_levels(3), ValueError, r"num must be 1 or 2.*got 3: write your own"),
        (lambda: PaperExperiment("mine"), TypeError, "missing 10 required"),  # type: ignore[call-arg]
    ],
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_ect_refuses_another_codes_sigma_min() -> None:
    model = ap.ConsistencyModel(golden_network, ECT.preconditioning(), sigma_min=0.002, noise_conditioning=cm_c_noise)
    with pytest.raises(ValueError, match=r"0\.003 <= s <= t.*got t = 80, s = 0\.002"):
        model(X, T)
