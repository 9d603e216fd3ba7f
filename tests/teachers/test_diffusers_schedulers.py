"""Every scheduler class of diffusers: its own estimate of the clean sample, or a refusal that says the way out."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import analytic_precond as ap

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # NumPy 2 in diffusers

CLASSES = sorted(
    name for name in dir(diffusers) if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name))
)

# what a class needs to be built; those of packages that are not here raise ImportError
ARGUMENTS: dict[str, dict[str, Any]] = {
    "AmusedScheduler": {"mask_token_id": 0},
    "VQDiffusionScheduler": {"num_vec_classes": 4},
    "RFD4ProteinaScheduler": {"schedule_mode": "log", "noise_mode": "tan", "tsr_k": 2.0, "tsr_sigma": 1.0},
}

# none of their methods returns the clean sample, or theirs is at another time: the class of the same conventions
SAME_AS = {
    "PNDMScheduler": "DDPMScheduler",
    "DEISMultistepScheduler": "DDPMScheduler",
    "DDIMInverseScheduler": "DDIMScheduler",
    "DPMSolverMultistepInverseScheduler": "DPMSolverMultistepScheduler",
    "TCDScheduler": "DDIMScheduler",
    "FlowMatchHeunDiscreteScheduler": "FlowMatchEulerDiscreteScheduler",
}

PREDICTION_TYPES = ["epsilon", "v_prediction", "sample", "flow_prediction"]


def model(x: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
    return (torch.tanh(x) + 0.3 * x,)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def build(name: str, **config: Any) -> Any:
    """Return a scheduler without the clipping that the denoiser leaves out."""
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    config = {**ARGUMENTS.get(name, {}), **config}
    free = {
        "clip_sample": False,
        "clip_denoised": False,
        "use_flow_sigmas": config.get("prediction_type") == PREDICTION_TYPES[3],
    }
    return cls(**config, **{key: value for key, value in free.items() if key in known})


def own_estimate(theirs: Any, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return EDM's x and t at step k of ten, the scheduler's clean sample there, and what it tells the model."""
    theirs = copy.deepcopy(theirs)
    config = theirs.config
    if hasattr(theirs, "discrete_sigmas"):  # a step of its predictor from its cleanest level ends at the data
        theirs.set_timesteps(config.num_train_timesteps)
        sigma = theirs.discrete_sigmas[0].double()
        x = noise(2, 3)
        clean = theirs.step_pred(model(x, sigma)[0], 0.0, x).prev_sample_mean
        return x, sigma, clean, sigma
    two_steps = config.get("prediction_type") == "trigflow"
    theirs.set_timesteps(2 if two_steps else 10)
    k = 1 if two_steps else k
    time = theirs.timesteps[k]

    if two_steps:
        alpha, sigma = time.double().cos(), config.sigma_data * time.double().sin()
    elif hasattr(theirs, "alphas_cumprod") and not config.get("use_flow_sigmas"):
        bar = theirs.alphas_cumprod[int(time)].double()
        alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    elif hasattr(theirs, "scale_model_input") and not config.get("use_flow_sigmas"):
        alpha, sigma = torch.ones(()), theirs.sigmas[k].double()
    else:
        alpha, sigma = 1 - theirs.sigmas[k].double(), theirs.sigmas[k].double()
    sample = alpha * noise(2, 3) + sigma * noise(2, 3).flip(0)
    given = theirs.scale_model_input(sample, time) if hasattr(theirs, "scale_model_input") else sample
    if not torch.equal(given, sample):  # the sample is x_0 + t n, also where there is a table
        if hasattr(theirs, "alphas_cumprod"):  # some have a level twice: theirs is the one that scaled
            sigma = ((sample / given).mean().double() ** 2 - 1).sqrt()
        alpha, sample = torch.ones(()), noise(2, 3) + sigma * noise(2, 3).flip(0)
        given = theirs.scale_model_input(sample, time)
    output = model(given, time)[0]
    return sample / alpha, sigma / alpha, clean_of(theirs, output, time, sample, k), time


def clean_of(theirs: Any, output: Tensor, time: Tensor, sample: Tensor, k: int) -> Tensor:
    if hasattr(theirs, "convert_model_output"):
        theirs._init_step_index(time)
        return theirs.convert_model_output(output, sample=sample)
    if "timestep_back" in inspect.signature(theirs.step).parameters:  # CogVideoX
        _, clean = theirs.step(output, None, time, None, sample, return_dict=False)
        return clean
    step = theirs.step(output, time, sample)
    if getattr(step, "pred_original_sample", None) is not None:
        return step.pred_original_sample
    if hasattr(step, "denoised"):
        c_skip, c_out = theirs.get_scalings_for_boundary_condition_discrete(time)
        return (step.denoised - c_skip * sample) / c_out
    if hasattr(theirs, "alphas_cumprod"):
        raise NotImplementedError(f"{type(theirs).__name__} shows no clean sample: name its like in SAME_AS")
    return step.prev_sample  # of the last step, which ends at the data


CASES = [
    (name, prediction_type)
    for name in CLASSES
    for prediction_type in [None, *PREDICTION_TYPES]
    if prediction_type is None or "prediction_type" in inspect.signature(getattr(diffusers, name).__init__).parameters
]


@pytest.mark.parametrize(("name", "prediction_type"), CASES)
def test_every_scheduler_is_understood_or_refused(name: str, prediction_type: str | None) -> None:
    config = {} if prediction_type is None else {"prediction_type": prediction_type}
    try:
        theirs = build(name, **config)
    except ImportError as error:
        pytest.skip(f"needs another package: {str(error).strip()}")
    understood = name in UNDERSTOOD and (prediction_type is None or prediction_type in UNDERSTOOD[name])
    try:
        denoiser = ap.denoiser_from_diffusers(model, theirs)
    except (TypeError, ValueError) as error:
        assert not understood
        said = f"got {name}: pass the one" if isinstance(error, TypeError) else f"got {prediction_type!r}"
        assert said in str(error)  # noqa: PT017 - refused or not, either is tested
        return

    x, t = noise(2, 3), torch.tensor([0.3, 4.0], dtype=torch.float64)
    if name in SAME_AS:
        expected = ap.denoiser_from_diffusers(model, getattr(diffusers, SAME_AS[name]).from_config(theirs.config))
        torch.testing.assert_close(denoiser(x, t), expected(x, t), rtol=1e-12, atol=1e-12)
        return
    for k in (
        (9,) if not hasattr(theirs, "alphas_cumprod") else (2, 8)
    ):  # even: others are midpoints of second-order methods
        try:
            x, t, clean, time = own_estimate(theirs, k)
        except (ValueError, NotImplementedError) as error:  # their own code knows fewer prediction types than tables
            assert not understood and "prediction_type" in str(error)  # noqa: PT017, PT018
            return
        # float32 in the schedulers' tables
        torch.testing.assert_close(denoiser(x, t), clean.double(), rtol=2e-5, atol=2e-5 * (1 + float(t)))
        assert (denoiser.scalings(t)[3] - time).abs() <= 1.0  # some round the time of a flow to whole steps


UNDERSTOOD = (
    {
        name: PREDICTION_TYPES[:3]
        for name in """DDPMScheduler DDIMScheduler PNDMScheduler DEISMultistepScheduler DDPMParallelScheduler
    DDIMParallelScheduler DDIMInverseScheduler CogVideoXDDIMScheduler CogVideoXDPMScheduler LCMScheduler TCDScheduler
    HeunDiscreteScheduler LMSDiscreteScheduler
    EulerDiscreteScheduler SASolverScheduler""".split()
    }
    | {
        name: PREDICTION_TYPES
        for name in """UniPCMultistepScheduler DPMSolverMultistepScheduler DPMSolverSinglestepScheduler
    DPMSolverMultistepInverseScheduler""".split()
    }
    | {
        "UnCLIPScheduler": ["epsilon", "sample"],
        "EDMEulerScheduler": ["epsilon", "v_prediction"],
        "EDMDPMSolverMultistepScheduler": ["epsilon", "v_prediction"],
        "EulerAncestralDiscreteScheduler": ["epsilon", "v_prediction"],
        "KDPM2DiscreteScheduler": ["epsilon", "v_prediction"],
        "KDPM2AncestralDiscreteScheduler": ["epsilon", "v_prediction"],
        "FlowMatchEulerDiscreteScheduler": [],
        "FlowMatchHeunDiscreteScheduler": [],
        "FlowMatchLCMScheduler": [],
        "CMStochasticIterativeScheduler": [],
        "SCMScheduler": [],
        "ScoreSdeVeScheduler": [],
    }
)
"""What must be understood, with all of its prediction types; the classes of later versions may be."""
