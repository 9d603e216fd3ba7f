"""Models of diffusers as denoisers: the same clean estimate as the scheduler's own step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import analytic_precond as ap
from analytic_precond.teachers.diffusers_models import denoiser_from_diffusers

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # NumPy 2 in diffusers

GENERATOR = torch.Generator()


@pytest.fixture(autouse=True)
def _one_thread_same_noise() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make networks this small 50 times slower."""
    GENERATOR.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unet(**config: Any) -> Any:
    """A random network of 20,000 parameters, in float64."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    size = {"sample_size": 8, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
    return diffusers.UNet2DModel(**size, **blocks, **config).double().eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, name)(**config)


DISCRETE = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True},
]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("config", DISCRETE)
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_discrete_steps(name: str, config: dict[str, Any], prediction_type: str) -> None:
    model, theirs = unet(), scheduler(name, prediction_type=prediction_type, clip_sample=False, **config)
    theirs.set_timesteps(1000)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()  # so that the comparison is exact
    denoiser = denoiser_from_diffusers(model, theirs)
    for i in (0, 1, 400, 980):
        sample, bar = noise(2, 3, 8, 8), theirs.alphas_cumprod[i]
        output = model(sample, torch.tensor(i)).sample
        expected = theirs.step(output, i, sample).pred_original_sample
        denoised = denoiser(sample / bar.sqrt(), ((1 - bar) / bar).sqrt())
        # float32 inside the network's time embedding
        torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5 / float(bar.sqrt()))


SIGMA_SCHEDULERS = [
    ("EDMEulerScheduler", {"prediction_type": "epsilon"}),
    ("EDMEulerScheduler", {"prediction_type": "v_prediction", "sigma_data": 1.0, "sigma_max": 20.0}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential"}),
    ("EulerDiscreteScheduler", {"prediction_type": "epsilon"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction"}),
    ("EulerDiscreteScheduler", {"prediction_type": "v_prediction", "timestep_type": "continuous"}),
    ("EulerDiscreteScheduler", {"prediction_type": "sample", "timestep_spacing": "trailing"}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "epsilon"}),
    ("EulerAncestralDiscreteScheduler", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}),
]


@pytest.mark.parametrize(("name", "config"), SIGMA_SCHEDULERS)
def test_sigma_steps(name: str, config: dict[str, Any]) -> None:
    model, theirs = unet(), scheduler(name, **config)
    denoiser = denoiser_from_diffusers(model, theirs)
    theirs.set_timesteps(4)
    for time, sigma in list(zip(theirs.timesteps, theirs.sigmas, strict=False))[1:]:
        sample = noise(2, 3, 8, 8) * (1 + sigma)
        output = model(theirs.scale_model_input(sample, time), time).sample
        expected = theirs.step(output, time, sample).pred_original_sample
        # float32 in the scheduler; times between indices are linear in t there, in ln t here (0 to 999 by 333: none)
        torch.testing.assert_close(
            denoiser(sample, sigma.double()), expected.double(), rtol=1e-5, atol=2e-6 * (1 + float(sigma))
        )


@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, {"invert_sigmas": True}, {"num_train_timesteps": 500}])
def test_flow_steps(config: dict[str, Any]) -> None:
    model, theirs = unet(), scheduler("FlowMatchEulerDiscreteScheduler", **config)
    denoiser = denoiser_from_diffusers(model, theirs)
    for share in (0.02, 0.4, 0.97):
        theirs.set_timesteps(sigmas=[share])  # one step, straight to the data
        time, sigma, sample = theirs.timesteps[0], theirs.sigmas[0].double(), noise(2, 3, 8, 8)
        expected = theirs.step(model(sample, time).sample, time, sample).prev_sample
        alpha, sigma = (sigma, 1 - sigma) if config.get("invert_sigmas") else (1 - sigma, sigma)
        denoised = denoiser(sample / alpha, sigma / alpha)
        torch.testing.assert_close(denoised, expected.double(), rtol=1e-5, atol=1e-5)


def test_consistency_model_step() -> None:
    model, theirs = unet(), scheduler("CMStochasticIterativeScheduler", clip_denoised=False)
    denoiser = denoiser_from_diffusers(model, theirs)
    for i in (0, 20, 39):
        theirs.set_timesteps(timesteps=[i])
        time, sigma = theirs.timesteps[0], theirs.sigmas[0]
        sample = noise(2, 3, 8, 8) * sigma
        output = model(theirs.scale_model_input(sample, time), time).sample
        expected = theirs.step(output, time, sample).prev_sample
        torch.testing.assert_close(denoiser(sample, sigma.double()), expected, rtol=1e-5, atol=1e-5)


def test_clipping_is_left_out() -> None:
    model = unet()
    clipped, free = (denoiser_from_diffusers(model, scheduler("DDPMScheduler", clip_sample=c)) for c in (True, False))
    x, t = 50 * noise(2, 3, 8, 8), noise(2).exp()
    assert torch.equal(clipped(x, t), free(x, t))
    assert clipped(x, t).abs().max() > 1


def test_learned_variance_is_dropped() -> None:
    model = unet(out_channels=6)
    denoiser = denoiser_from_diffusers(model, scheduler("DDPMScheduler", variance_type="learned_range"))
    x, t = noise(2, 3, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    epsilon = model(x / (1 + t**2).sqrt(), denoiser.scalings(t[None])[3]).sample[:, :3]
    torch.testing.assert_close(denoiser(x, t), x - t * epsilon, rtol=1e-5, atol=1e-5)


def test_labels_half_precision_and_levels_per_sample() -> None:
    model = unet(num_class_embeds=4)
    denoiser = denoiser_from_diffusers(model, scheduler("EDMEulerScheduler"))
    x, t, labels = noise(2, 3, 8, 8), torch.tensor([3.0, 0.1], dtype=torch.float64), torch.tensor([1, 3])
    both = denoiser(x, t, class_labels=labels)
    alone = [denoiser(x[i : i + 1], t[i : i + 1], class_labels=labels[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone))
    half = denoiser_from_diffusers(model.bfloat16(), scheduler("EDMEulerScheduler"), class_labels=labels)(x, t)
    assert half.dtype == torch.float64
    torch.testing.assert_close(half, both, rtol=0.05, atol=0.05)


def test_statistics() -> None:
    model = unet().float()
    denoiser = denoiser_from_diffusers(model, scheduler("DDPMScheduler"))
    assert len(list(denoiser.parameters())) == len(list(model.parameters()))
    kwargs: dict[str, Any] = {"levels": torch.tensor([2.0, 1.0, 0.5]), "num_samples": 8, "progress": False}
    data = noise(4, 3, 8, 8).float()
    forward_only = ap.estimate_statistics(denoiser, data, **kwargs)
    derivatives = ap.estimate_statistics(
        denoiser, data, l_method="hutchinson", s_method="finite-difference", **kwargs
    )  # attention without forward mode: VJPs
    torch.testing.assert_close(forward_only.l, derivatives.l, rtol=0.2, atol=0.05)
    assert torch.isfinite(derivatives.s).all()


def test_integer_timesteps_for_a_learned_time_embedding() -> None:
    model, theirs = (
        unet(time_embedding_type="learned", num_train_timesteps=1000),
        scheduler("DDIMScheduler", clip_sample=False),
    )
    theirs.set_timesteps(1000)
    theirs.alphas_cumprod = theirs.alphas_cumprod.double()
    denoiser = denoiser_from_diffusers(model, theirs, quantize=True)
    for i in (0, 400, 980):
        sample, bar = noise(2, 3, 8, 8), theirs.alphas_cumprod[i]
        expected = theirs.step(model(sample, torch.tensor(i)).sample, i, sample).pred_original_sample
        denoised = denoiser(sample / bar.sqrt(), 1.0001 * ((1 - bar) / bar).sqrt())  # near the table's level
        torch.testing.assert_close(denoised, expected, rtol=1e-3, atol=1e-3 / float(bar.sqrt()))
    with pytest.raises(RuntimeError, match="Long, Int"):
        denoiser_from_diffusers(model, theirs)(noise(2, 3, 8, 8), noise(2).exp())


def test_a_table_of_betas_that_ends_in_pure_noise() -> None:
    betas, model = torch.linspace(1e-3, 1.0, 50).tolist(), unet()
    whole, without = (
        denoiser_from_diffusers(model, scheduler("DDPMScheduler", trained_betas=b, num_train_timesteps=len(b)))
        for b in (betas, betas[:-1])
    )
    assert whole.noise_range == without.noise_range
    x, t = noise(2, 3, 8, 8), noise(2).exp()
    assert torch.equal(whole(x, t), without(x, t))


def test_dtype_that_the_model_is_called_in() -> None:
    seen = []

    def model(x: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        seen.append((x.dtype, timestep.dtype))
        return (x,)

    theirs = scheduler("FlowMatchEulerDiscreteScheduler")
    denoiser_from_diffusers(model, theirs, dtype=torch.bfloat16)(noise(1, 3), noise(1).exp())  # type: ignore[arg-type]
    assert seen == [(torch.bfloat16, torch.float32)]


class TestErrors:
    def test_schedulers_that_say_too_little(self) -> None:
        with pytest.raises(TypeError, match=r"got RePaintScheduler: pass the one .*, often DDPMScheduler or"):
            denoiser_from_diffusers(unet(), scheduler("RePaintScheduler"))
        trained_with = diffusers.DDPMScheduler.from_config(scheduler("RePaintScheduler").config)
        assert denoiser_from_diffusers(unet(), trained_with).noise_range is not None
        with pytest.raises(TypeError, match="got Linear: pass the one"):
            denoiser_from_diffusers(unet(), torch.nn.Linear(1, 1))

    def test_unknown_prediction_types(self) -> None:
        flow = scheduler("DPMSolverMultistepScheduler", prediction_type="flow_prediction")  # on its table of betas
        with pytest.raises(ValueError, match=r"prediction_type must be one of .*'sample', got 'flow_prediction'"):
            denoiser_from_diffusers(unet(), flow)
        flow = scheduler("UniPCMultistepScheduler", prediction_type="v_prediction", use_flow_sigmas=True)
        with pytest.raises(ValueError, match=r"with use_flow_sigmas must be one of .*, got 'v_prediction'"):
            denoiser_from_diffusers(unet(), flow)

    def test_nothing_to_quantize_to(self) -> None:
        with pytest.raises(ValueError, match="quantize needs a table of timesteps, which EDMEulerScheduler does not"):
            denoiser_from_diffusers(unet(), scheduler("EDMEulerScheduler"), quantize=True)

    def test_labels_for_an_unconditional_model(self) -> None:
        denoiser = denoiser_from_diffusers(unet(), scheduler("DDPMScheduler"))
        with pytest.raises(ValueError, match="class_embedding needs to be initialized"):
            denoiser(noise(1, 3, 8, 8), noise(1).exp(), class_labels=torch.tensor([1]))
        with pytest.raises(TypeError, match="none to an unconditional teacher"):
            denoiser(noise(1, 3, 8, 8), noise(1).exp(), encoder_hidden_states=torch.ones(1))


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *((f"{name}Scheduler", "DDPMScheduler") for name in ["PNDM", "HeunDiscrete", "LMSDiscrete", "UniPCMultistep"]),
        *((f"{name}Scheduler", "DDPMScheduler") for name in ["DPMSolverMultistep", "DPMSolverSinglestep"]),
        ("DEISMultistepScheduler", "DDPMScheduler"),
        ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler"),
        ("FlowMatchHeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_samplers_of_one_training_schedule_agree(name: str, other: str) -> None:
    model, x, t = unet(), noise(2, 3, 8, 8), noise(2).exp()
    config = {"beta_start": 1e-4, "beta_end": 0.02} if other == "DDPMScheduler" else {}
    denoised, expected = (denoiser_from_diffusers(model, scheduler(n, **config))(x, t) for n in (name, other))
    torch.testing.assert_close(denoised, expected)
