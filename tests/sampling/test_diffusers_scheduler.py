"""The scheduler in a real pipeline, against the library's own sampler and against diffusers' scheduler."""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

import analytic_precond as ap
from analytic_precond.sampling.noise import draw_noise
from analytic_precond.sampling.samplers import sample_multistep

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # NumPy 2 in diffusers

from analytic_precond.sampling.diffusers_scheduler import ConsistencyJumpScheduler  # noqa: E402

GRID = ap.karras_noise_levels(40)


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Threads that wait for each other on a busy machine make networks this small 50 times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def unet(**config: Any) -> Any:
    """A random network of 20,000 parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = {
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        }
        size = {"sample_size": 8, "block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
        return diffusers.UNet2DModel(**size, **blocks, **config).eval()


class RawNetwork(nn.Module):
    """A diffusers model as a student's network."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, c_noise: Tensor, **condition: Any) -> Tensor:
        return self.model(x, c_noise, return_dict=False, **condition)[0]


def analytic() -> ap.AnalyticPreconditioning:
    levels = ap.log_noise_levels(40)
    return ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + 4 * levels**2), torch.tanh(levels.log()))


def student_of(model: Any, precond: ap.Preconditioning, told: str = "edm", **kwargs: Any) -> ap.ConsistencyModel:
    return ap.ConsistencyModel(RawNetwork(model), precond, noise_conditioning=ap.NOISE_CONDITIONINGS[told], **kwargs)


def pipeline(model: Any, scheduler: Any) -> Any:
    pipe = diffusers.ConsistencyModelPipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(*seeds: int) -> list[Generator]:
    return [Generator().manual_seed(seed) for seed in seeds]


def images(pipe: Any, seeds: tuple[int, ...] = (0, 1, 2), **kwargs: Any) -> Tensor:
    """Return a pipeline's images in [0, 1]; steps are all that pipelines need to be told."""
    kwargs = {"num_inference_steps": None, **kwargs} if "timesteps" in kwargs else kwargs
    result: Tensor = pipe(batch_size=len(seeds), generator=seeded(*seeds), output_type="pt", **kwargs).images
    return result


PRECONDITIONINGS = {
    "analytic": analytic,
    "forward": lambda: ap.AnalyticPreconditioning.from_coefficients(GRID, 0 * GRID + 0.3, 0 * GRID, "forward"),
    "cm": ap.CMPreconditioning,
    "ctm": ap.CTMPreconditioning,
    "bcm": ap.BCMPreconditioning,
}


@pytest.mark.parametrize("conditioning", ["edm", "cm"])
@pytest.mark.parametrize("name", PRECONDITIONINGS)
@pytest.mark.parametrize(
    ("steps", "indices"),
    [
        ({"num_inference_steps": 1}, [0]),
        ({"num_inference_steps": 2}, [0, 20]),
        ({"num_inference_steps": 3}, [0, 13, 26]),  # 40 // 3
        ({"timesteps": [33, 22, 0]}, [0, 22, 33]),  # as in diffusers
        ({"timesteps": [0, 22, 39]}, [0, 22]),  # as in openai's code
    ],
)
def test_pipeline_is_sample_multistep(name: str, conditioning: str, steps: dict[str, Any], indices: list[int]) -> None:
    model = unet()
    student = student_of(model, PRECONDITIONINGS[name](), conditioning)
    pipe = pipeline(model, ConsistencyJumpScheduler.from_student(student, GRID))

    generators = seeded(0, 1, 2)
    x = 80.0 * draw_noise((3, 3, 8, 8), generators)
    expected = sample_multistep(student, x, indices, grid=GRID, generator=generators)
    final: list[Tensor] = []
    shown = images(pipe, callback=lambda i, t, latents: final.append(latents), **steps)
    # float32, with coefficients on F instead of D and states up to 80
    torch.testing.assert_close(final[-1], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shown, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)
    assert len(final) == len(indices)


@pytest.mark.parametrize("steps", [{"num_inference_steps": 1}, {"num_inference_steps": 4}, {"timesteps": [22, 0]}])
def test_cms_preconditioning_is_diffusers_own_scheduler(steps: dict[str, Any]) -> None:
    model = unet()
    theirs = pipeline(model, diffusers.CMStochasticIterativeScheduler(clip_denoised=False))
    student = student_of(model, ap.CMPreconditioning(), "cm")
    ours = pipeline(model, ConsistencyJumpScheduler.from_student(student, GRID))
    torch.testing.assert_close(images(ours, **steps), images(theirs, **steps), rtol=1e-5, atol=1e-5)  # float32


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = unet()
    scheduler = ConsistencyJumpScheduler.from_student(student_of(model, PRECONDITIONINGS[name]()), GRID)
    pipe = pipeline(model, scheduler)
    pipe.save_pretrained(tmp_path)
    assert ap.ConsistencyJumpScheduler is ConsistencyJumpScheduler
    loaded = diffusers.ConsistencyModelPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.scheduler) is ConsistencyJumpScheduler
    assert dict(loaded.scheduler.config) == dict(scheduler.config)
    for steps in ({"num_inference_steps": 1}, {"timesteps": [31, 12, 0]}):
        assert torch.equal(images(loaded, **steps), images(pipe, **steps))
    alone = ConsistencyJumpScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    for other in (alone, ConsistencyJumpScheduler.from_config(scheduler.config), copy.deepcopy(scheduler)):
        other.set_timesteps(timesteps=[0, 5])
        scheduler.set_timesteps(timesteps=[0, 5])
        assert torch.equal(other.timesteps, scheduler.timesteps)
        args = torch.ones(1, 2), scheduler.timesteps[1], torch.ones(1, 2)
        assert torch.equal(*(each.scale_model_input(args[2], args[1]) for each in (other, scheduler)))
        assert torch.equal(other.step(*args).prev_sample, scheduler.step(*args, return_dict=False)[0])


def test_labels() -> None:
    model = unet(num_class_embeds=4)
    student = student_of(model, analytic())
    pipe = pipeline(model, ConsistencyJumpScheduler.from_student(student, GRID))
    labels, generators = torch.tensor([3, 0]), seeded(5, 6)
    x = 80.0 * draw_noise((2, 3, 8, 8), generators)
    expected = sample_multistep(student, x, [0, 10], grid=GRID, generator=generators, class_labels=labels)
    shown = images(pipe, (5, 6), timesteps=[10, 0], class_labels=[3, 0])
    torch.testing.assert_close(shown, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = unet()
    scheduler = ConsistencyJumpScheduler.from_student(student_of(model, analytic()), GRID)
    latents = draw_noise((2, 3, 8, 8), Generator().manual_seed(0))
    expected = images(pipeline(model, scheduler), (0, 1), latents=latents)
    result = images(pipeline(model.to(dtype), scheduler), (0, 1), latents=latents)
    assert result.dtype == dtype
    # one call of a network whose weights and activations are rounded to eps, in images of order 1
    tolerance = 8 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(result.float(), expected, rtol=0, atol=tolerance)


def test_wrapped_students() -> None:
    student = student_of(unet(), analytic())
    expected = ConsistencyJumpScheduler.from_student(student, GRID).config
    for wrapped in (ap.exponential_moving_average(student, 0.9), torch.nn.DataParallel(student)):
        assert ConsistencyJumpScheduler.from_student(wrapped, GRID).config == expected


def test_other_sigma_data_and_grid() -> None:
    """The student's own sigma_data, sigma_min and a grid that ends with 0 or above sigma_min."""
    model = unet()
    student = student_of(model, ap.CTMPreconditioning(), sigma_data=1.5, sigma_min=0.01)
    for grid, most in (([40.0, 3.0, 0.5, 0.01], 3), ([0.0, 0.5, 3.0, 40.0], 3), ([40.0, 3.0, 0.5], 3)):
        scheduler = ConsistencyJumpScheduler.from_student(student, grid)
        assert scheduler.init_noise_sigma == 40.0
        generators = seeded(0)
        x = 40.0 * draw_noise((1, 3, 8, 8), generators)
        expected = sample_multistep(student, x, grid, sigma_min=0.01, generator=generators)
        shown = images(pipeline(model, scheduler), (0,), num_inference_steps=most)
        torch.testing.assert_close(shown, (expected / 2 + 0.5).clamp(0, 1), rtol=1e-5, atol=1e-5)
        with pytest.raises(ValueError, match=rf"from 1 to {most}, the number of levels to jump from, got 4"):
            scheduler.set_timesteps(4)


def scheduler() -> ConsistencyJumpScheduler:
    return ConsistencyJumpScheduler.from_student(student_of(unet(), analytic()), GRID)


def rebuilt(scheduler: ConsistencyJumpScheduler, **changes: Any) -> Any:
    return ConsistencyJumpScheduler.from_config(scheduler.config, **changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s: s.set_timesteps(), ValueError, r"num_inference_steps or timesteps, got None and None"),
        (lambda s: s.set_timesteps(2, timesteps=[0]), ValueError, r"got 2 and \[0\]: pass one"),
        (lambda s: s.set_timesteps(0), ValueError, r"from 1 to 39, .* got 0: make the scheduler with more levels"),
        (lambda s: s.set_timesteps(40), ValueError, r"from 1 to 39, .* got 40"),
        (lambda s: s.set_timesteps(2.0), TypeError, r"num_inference_steps must be an int, got 2\.0"),
        (lambda s: s.set_timesteps(timesteps=[22, 10]), ValueError, r"must hold 0, the noisiest level.* \[22, 10\]"),
        (lambda s: s.set_timesteps(timesteps=[40, 0]), ValueError, r"grid of 40 levels: .* got 40"),
        (lambda s: s.set_timesteps(timesteps=[80.0, 1.0]), ValueError, r"grid of 40 levels: .* as ints"),
        (lambda s: s.set_timesteps(timesteps=[]), ValueError, r"at least one"),
        (lambda s: s.scale_model_input(torch.ones(1), 3), ValueError, r"one of scheduler\.timesteps, \[1\.09.*, got 3"),
        (lambda s: s.step(torch.ones(1), 0.5, torch.ones(1)), ValueError, r"got 0\.5: call set_timesteps first"),
        (lambda s: type(s).from_student(ap.ConsistencyTrajectoryModel(unet(), analytic()), GRID), TypeError,
         r"must be a ConsistencyModel, got ConsistencyTrajectoryModel: pipelines tell a network one noise level"),
        (lambda s: type(s).from_student(student_of(unet(), analytic()), [90.0, 1.0]), ValueError, r"t = 90"),
        (lambda s: type(s).from_student(student_of(unet(), analytic()), GRID[[0, 0]]), ValueError, r"strictly"),
        (lambda s: rebuilt(s, c_noise=[0.1]), ValueError, r"c_noise must hold .* each of 40 levels, got \[0\.1\]"),
        (lambda s: rebuilt(s, c_skip=[math.nan] * 40), ValueError, r"c_skip must .* got \[nan"),
        (lambda s: rebuilt(s, levels=s.config["levels"][::-1]), ValueError, r"from the noisiest, got \[0\.002"),
        (lambda s: rebuilt(s, c_noise=[0.1] * 40), ValueError, r"c_noise must tell all levels apart in float32"),
        (lambda s: rebuilt(s, sigma_min=1.0), ValueError, r"must not lie below sigma_min = 1"),
    ],
)  # fmt: skip
def test_bad_input(call: Callable[..., object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(scheduler())


def test_without_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "analytic_precond.sampling.diffusers_scheduler")
    monkeypatch.setitem(sys.modules, "diffusers.configuration_utils", None)  # as if not installed
    with pytest.raises(ImportError, match=r"expected the diffusers package .*: pip install diffusers"):
        importlib.import_module("analytic_precond.sampling.diffusers_scheduler")
