"""Students of VP and flow schedules in real pipelines, from noise or an image to the end, saved and loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from alone import alone
from torch import Generator, Tensor

import analytic_precond as ap

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # NumPy 2 in diffusers

from analytic_precond.sampling.diffusers_scheduler import ConsistencyJumpScheduler  # noqa: E402

VP = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
TABLE, FLOW = ap.VPDiscreteSchedule(VP.alphas_cumprod), ap.RectifiedFlowSchedule(time_scale=1000)
VP_LEVELS = TABLE.noise_level(torch.tensor([999.0, 759.0, 499.0, 259.0]))  # LCM's four steps
FLOW_LEVELS = torch.tensor([200.0, 3.0, 1.0, 0.3], dtype=torch.float64)
FEW = {"num_inference_steps": 2}  # levels 0 and 2


@pytest.fixture(autouse=True)
def _alone() -> Any:
    with alone():
        yield


def analytic(low: float = 0.03, high: float = 200.0) -> ap.AnalyticPreconditioning:
    levels = ap.log_noise_levels(40, low, high)
    return ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + levels**2), torch.tanh(levels.log()))


def student_of(model: Any, trained_for: Any, **condition: Any) -> ap.ConsistencyModel:
    denoiser = ap.denoiser_from_diffusers(model, trained_for, **condition)
    return ap.ConsistencyModel.from_denoiser(denoiser, analytic())


def unet(**config: Any) -> Any:
    size = {"sample_size": 8, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return diffusers.UNet2DModel(**size, **blocks, **config).eval()


def vae(channels: int) -> Any:
    size = {"block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2, "sample_size": 8}
    return diffusers.AutoencoderKL(**size, latent_channels=channels, shift_factor=0.1).eval()


def unit_noise(shape: tuple[int, ...], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


def by_hand(
    student: ap.ConsistencyModel, z: Tensor, alpha: float, levels: list[float], generator: Generator, **condition: Any
) -> Tensor:
    """Multistep sampling from x' = alpha x, with noise as pipelines draw it."""
    noise = torch.stack([z.new_zeros(z.shape), *(unit_noise(z.shape, generator) for _ in levels[1:])])[1:]
    return ap.sample_multistep(student, z / alpha, levels, noise=noise, **condition)


def assert_same(got: Tensor, expected: Tensor) -> None:
    # float32; coefficients on F and x' instead of D and x, states up to the first level
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_unconditional_pipeline(prediction: str, tmp_path: Path) -> None:
    """DDPMPipeline: starts from noise of unit variance, and leaves scale_model_input out, as VP students let it."""
    model, trained_for = unet(), diffusers.DDPMScheduler.from_config(VP.config, prediction_type=prediction)
    student = student_of(model, trained_for)
    scheduler = ConsistencyJumpScheduler.from_student(student, VP_LEVELS, TABLE)
    pipe = diffusers.DDPMPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    alpha = VP.alphas_cumprod.sqrt()[999].item()
    assert scheduler.init_noise_sigma == pytest.approx(math.sqrt(1 - alpha**2), rel=1e-6)
    assert scheduler.timesteps.tolist() == pytest.approx([999], rel=1e-6)

    generator = Generator().manual_seed(0)
    expected = by_hand(student, unit_noise((2, 3, 8, 8), generator), alpha, VP_LEVELS[[0, 2]].tolist(), generator)
    expected = (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    options: dict[str, Any] = {"batch_size": 2, "output_type": "np", **FEW}
    shown = pipe(generator=Generator().manual_seed(0), **options).images
    assert_same(torch.from_numpy(shown), expected)

    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is ConsistencyJumpScheduler
    assert (loaded(generator=Generator().manual_seed(0), **options).images == shown).all()


def test_a_pipeline_that_forgets_to_scale_is_told() -> None:
    model = unet()
    edm = ap.ConsistencyModel(lambda x, c: model(x, c, return_dict=False)[0], analytic())
    pipe = diffusers.DDPMPipeline(model, ConsistencyJumpScheduler.from_student(edm, [80.0, 1.0]))
    pipe.set_progress_bar_config(disable=True)
    with pytest.warns(UserWarning, match=r"from scheduler\.scale_model_input \(here 0\.0125 times the sample\), which"):
        pipe(num_inference_steps=1)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(2)
    x = torch.ones(1, 2)
    for t in scheduler.timesteps:  # with the call, nothing: warnings are errors here
        scheduler.step(scheduler.scale_model_input(x, t), t, x)
    with pytest.warns(UserWarning, match="which was not called"):  # one call scales for one step
        scheduler.step(x, scheduler.timesteps[1], x)


def test_a_network_that_counts_in_integers() -> None:
    model = unet(time_embedding_type="learned", num_train_timesteps=1000)
    schedule = ap.VPDiscreteSchedule(VP.alphas_cumprod, quantize=True)
    network = lambda z, time: model(z, time, return_dict=False)[0]  # noqa: E731
    denoiser = ap.denoiser_from_network(network, "epsilon", schedule)
    student = ap.ConsistencyModel.from_denoiser(denoiser, analytic())
    scheduler = ConsistencyJumpScheduler.from_student(student, VP_LEVELS, schedule)
    scheduler = ConsistencyJumpScheduler.from_config(scheduler.config)
    pipe = diffusers.DDPMPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    generator = Generator().manual_seed(0)
    z = unit_noise((2, 3, 8, 8), generator)
    expected = by_hand(student, z, VP.alphas_cumprod.sqrt()[999].item(), VP_LEVELS.tolist(), generator)
    shown = pipe(batch_size=2, num_inference_steps=4, output_type="np", generator=Generator().manual_seed(0)).images
    assert scheduler.timesteps.dtype == torch.int64
    assert scheduler.timesteps.tolist() == [999, 759, 499, 259]
    assert_same(torch.from_numpy(shown), (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


@pytest.mark.parametrize("schedule", [None, TABLE, FLOW], ids=["none", "table", "flow"])
def test_noise_is_added_as_the_schedule_does(schedule: ap.Schedule | None) -> None:
    student = ap.ConsistencyModel(lambda x, c: 0 * x, analytic())
    scheduler = ConsistencyJumpScheduler.from_student(student, [10.0, 3.0, 1.0, 0.1], schedule)
    scheduler.set_timesteps(4)
    x_0, noise = torch.randn(2, 3, 3, 2, 2, generator=Generator().manual_seed(0))
    t = torch.tensor([3.0, 0.1, 10.0])[:, None, None, None]
    alpha = {None: torch.ones_like(t), TABLE: (1 + t**2).rsqrt(), FLOW: 1 / (1 + t)}[schedule]
    got = scheduler.add_noise(x_0, noise, scheduler.timesteps[[1, 3, 0]])
    torch.testing.assert_close(got, alpha * (x_0 + t * noise))
    same = scheduler.add_noise(x_0, noise, scheduler.timesteps[1:2])
    torch.testing.assert_close(same, alpha[0] * (x_0 + 3 * noise))
    assert scheduler.add_noise(x_0.half(), noise.half(), scheduler.timesteps[0]).dtype == torch.float16
    with pytest.raises(ValueError, match=r"one of scheduler\.timesteps, .*, got 0\.123"):
        scheduler.add_noise(x_0, noise, torch.tensor([0.123]))


def test_shifted_jumps_of_a_flow_student() -> None:
    """The pipeline's network gets the scaled data and the lower level: the student's own call."""
    denoiser = ap.GaussianDenoiser(torch.linspace(0.1, 1, 6).double())
    levels = ap.log_noise_levels(12, 0.05, 20.0)
    data = torch.zeros(16, 6, dtype=torch.float64)
    shifted = ap.ShiftedPreconditioning.fit(denoiser, data, levels, num_trajectories=16, progress=False)
    calls = []

    def network(z: Tensor, time: Tensor) -> Tensor:
        calls.append((z, time))
        return torch.tanh(z + time[:, None] / 1000)

    student = ap.ConsistencyModel.from_denoiser(ap.denoiser_from_network(network, "velocity", FLOW), shifted)
    scheduler = ConsistencyJumpScheduler.from_student(student, [20.0], FLOW)
    x = 20 * torch.randn(1, 6, generator=Generator().manual_seed(0), dtype=torch.float64)
    expected = student(x, 20.0)
    z, (timestep,) = x / 21, scheduler.timesteps
    output = network(scheduler.scale_model_input(z, timestep), timestep.double()[None])
    torch.testing.assert_close(calls[1][0], calls[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(calls[1][1], calls[0][1], rtol=1e-6, atol=0)
    assert timestep < 1000 * 20 / 21 - 5
    torch.testing.assert_close(scheduler.step(output, timestep, z).prev_sample, expected, rtol=1e-6, atol=1e-6)
    with pytest.warns(UserWarning, match="scale_model_input"):
        scheduler.step(output, timestep, z)


@pytest.fixture
def _transformers() -> None:
    pytest.importorskip("transformers")  # which these pipelines need to be imported


@pytest.mark.long
@pytest.mark.usefixtures("_transformers")
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_stable_diffusion(guidance: float, tmp_path: Path) -> None:
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    model = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=down, up_block_types=up,
    ).eval()  # fmt: skip
    prompt, negative = torch.randn(2, 1, 5, 8)
    student = student_of(model, VP)
    if guidance > 1:
        student = ap.ConsistencyModel.from_denoiser(
            ap.guide(
                ap.denoiser_from_diffusers(model, VP),
                ap.denoiser_from_diffusers(model, VP, encoder_hidden_states=negative),
                guidance,
            ),
            analytic(),
        )
    scheduler = ConsistencyJumpScheduler.from_student(student_of(model, VP), VP_LEVELS, TABLE)
    parts: dict[str, Any] = {
        "text_encoder": None, "tokenizer": None, "safety_checker": None, "feature_extractor": None,
        "requires_safety_checker": False,
    }  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(vae(4), unet=model, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {
        "prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": guidance, "height": 8,
        "width": 8, "output_type": "latent", **FEW,
    }  # fmt: skip
    shape = (1, 4, 8 // pipe.vae_scale_factor, 8 // pipe.vae_scale_factor)
    generator = Generator().manual_seed(0)
    z = scheduler.init_noise_sigma * unit_noise(shape, generator)
    alpha = VP.alphas_cumprod.sqrt()[999].item()
    expected = by_hand(student, z, alpha, VP_LEVELS[[0, 2]].tolist(), generator, encoder_hidden_states=prompt)
    got = pipe(generator=Generator().manual_seed(0), **options).images
    assert_same(got, expected)

    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, **parts)
    loaded.set_progress_bar_config(disable=True)
    assert_same(loaded(generator=Generator().manual_seed(0), **options).images, got)
    image = loaded(generator=Generator().manual_seed(0), **{**options, "output_type": "pt"}).images
    assert image.isfinite().all()

    from_image = diffusers.StableDiffusionImg2ImgPipeline(**loaded.components, requires_safety_checker=False)
    from_image.set_progress_bar_config(disable=True)
    start = torch.rand(1, 3, 8, 8)
    del options["height"], options["width"]
    options |= {"image": start, "strength": 0.5, "num_inference_steps": 4}  # the last two of four levels
    got = from_image(generator=Generator().manual_seed(0), **options).images
    generator = Generator().manual_seed(0)
    scaling = loaded.vae.config.scaling_factor
    with torch.no_grad():
        latents = scaling * loaded.vae.encode(2 * start - 1).latent_dist.sample(generator)
    level = VP_LEVELS[2].item()
    noise = unit_noise(latents.shape, generator)
    expected = by_hand(
        student, latents + level * noise, 1.0, VP_LEVELS[2:].tolist(), generator, encoder_hidden_states=prompt
    )
    assert_same(got, expected)


@pytest.mark.long
@pytest.mark.usefixtures("_transformers")
def test_stable_diffusion_3(tmp_path: Path) -> None:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=8, out_channels=4, pos_embed_max_size=8,
    ).eval()  # fmt: skip
    prompt, pooled = torch.randn(2, 5, 8), torch.randn(2, 8)
    student = student_of(model, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    scheduler = ConsistencyJumpScheduler.from_student(student, FLOW_LEVELS, FLOW)
    parts: dict[str, Any] = {f"{kind}{i}": None for kind in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    pipe = diffusers.StableDiffusion3Pipeline(transformer=model, vae=vae(4), scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {
        "prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0, "height": 8, "width": 8,
        "output_type": "latent", **FEW,
    }  # fmt: skip

    def draw(pipe: Any, **changes: Any) -> Tensor:
        torch.manual_seed(1)  # the noise between steps: this pipeline hands no generator on
        result: Tensor = pipe(generator=Generator().manual_seed(0), **{**options, **changes}).images
        return result

    z = unit_noise((2, 4, 8 // pipe.vae_scale_factor, 8 // pipe.vae_scale_factor), Generator().manual_seed(0))
    told = {"encoder_hidden_states": prompt, "pooled_projections": pooled}
    expected = by_hand(student, z, 1 / 201, FLOW_LEVELS[[0, 2]].tolist(), Generator().manual_seed(1), **told)
    got = draw(pipe)
    assert_same(got, expected)
    assert scheduler.init_noise_sigma == pytest.approx(200 / 201)

    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, **parts)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw(loaded), got)
    assert draw(loaded, output_type="pt").isfinite().all()


def test_bad_input() -> None:
    student = student_of(unet(), VP)
    with pytest.raises(TypeError, match=r"schedule must be a Schedule, got DDPMScheduler"):
        ConsistencyJumpScheduler.from_student(student, VP_LEVELS, VP)
    with pytest.raises(ValueError, match=r"fewer levels, only such as the network knows"):  # both are told step 999
        ConsistencyJumpScheduler.from_student(student, [100.0, 50.0, 1.0], TABLE)
    own = ap.ConsistencyModel.from_denoiser(lambda x, t: x, analytic())
    with pytest.raises(TypeError, match=r"how it is made of a raw network, got function"):
        ConsistencyJumpScheduler.from_student(own, VP_LEVELS, TABLE)
