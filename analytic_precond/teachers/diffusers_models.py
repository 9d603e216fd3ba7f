r"""Denoisers from models and schedulers of the diffusers library, which is not imported.

What a scheduler's model was trained for is told by what the scheduler has, not by its name: schedulers of tomorrow that
keep diffusers' conventions are understood, those that say too little are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice
from .._modules import Wrapper, attribute
from ..noise_levels.network_scalings import EDMPreconditioning, cm_c_noise
from ..noise_levels.schedules import EDMSchedule, RectifiedFlowSchedule, TrigFlowSchedule
from ..noise_levels.vp_schedules import VPDiscreteSchedule
from ..preconditionings.hand_crafted import CMPreconditioning
from .networks import NetworkDenoiser, NetworkScalings
from .predictions import PredictionScalings


def denoiser_from_diffusers(
    model: nn.Module, scheduler: Any, dtype: torch.dtype | None = None, quantize: bool = False, **condition: Any
) -> NetworkDenoiser:
    r"""Return the denoiser of a diffusers model and the scheduler that it was trained for.

    The result is what the scheduler's ``step`` takes for the clean sample (``pred_original_sample``), at any noise
    level and per sample, without the clipping and thresholding that some schedulers add, and without the boundary
    condition that ``LCMScheduler`` adds (`LCMPreconditioning`). What the scheduler has decides:

    - a table ``alphas_cumprod`` and a ``prediction_type`` (DDPM, DDIM, Euler, DPM-Solver, LCM, TCD, CogVideoX, ...):
      epsilon, v and sample predictions; between timesteps $\ln t$ is linear, beyond them the model is told the nearest
      one. With ``use_flow_sigmas`` (Wan, Sana): a flow instead, its ``flow_prediction`` a velocity,
    - EDM's preconditioning and a ``sigma_data``: EDM's scalings,
    - flow-matching sigmas, ``timesteps`` = ``num_train_timesteps`` times them: velocities; a shift changes the
      sampling grid, not the denoiser,
    - the prediction type ``"trigflow"`` (``SCMScheduler``): the model is given the scheduler's own sample,
    - a geometric table of ``discrete_sigmas`` (``ScoreSdeVeScheduler``): a score, the model told sigma,
    - a consistency model's boundary scalings (``CMStochasticIterativeScheduler``): its output is the end of the ODE,
      close to but not the posterior mean.

    A learned variance (twice the channels) is dropped. A pipeline may do more around a model, such as packing latents
    or rescaling the timestep (Flux, SanaSprint): do that in a module around the model.

    Args:
        model: The model, in eval mode, called as ``model(x, timestep=..., return_dict=False, **condition)``.
        scheduler: The scheduler; only its config and tables are read.
        dtype: What the model is called in. Default: its own, as for `NetworkDenoiser`.
        quantize: Tell the model the nearest timestep of the table, an integer, instead of a fraction: needed where it
            looks times up (``time_embedding_type="learned"``).
        **condition: Conditions of one sample, for all, e.g. ``encoder_hidden_states`` (see `common`); those of a call
            come on top.

    Raises:
        TypeError: If the scheduler does not tell what its model was trained for.
        ValueError: If its prediction type is not known, or there is no table to ``quantize`` to.

    Examples:
        >>> from types import SimpleNamespace
        >>> class DDPMScheduler:  # diffusers has the real one
        ...     config = SimpleNamespace(prediction_type="sample")
        ...     alphas_cumprod = torch.tensor([0.9, 0.5, 0.1])
        >>> model = lambda x, timestep, return_dict: (x * timestep[:, None],)
        >>> denoiser = denoiser_from_diffusers(model, DDPMScheduler())
        >>> denoiser(torch.tensor([[2.0]]), torch.tensor([3.0]))  # index 2, times 2 times the root of 0.1
        tensor([[1.2649]])
    """
    network = _TimestepByKeyword(model)
    return NetworkDenoiser(network, _scalings_of(scheduler, quantize), condition, dtype=dtype, learned_variance=True)


def _scalings_of(scheduler: Any, quantize: bool) -> NetworkScalings:
    """Return the scalings of the model that a scheduler is for, told by what it has."""
    name = type(scheduler).__name__
    config: Any = getattr(scheduler, "config", None)
    prediction_type = getattr(config, "prediction_type", None)
    if hasattr(scheduler, "alphas_cumprod") and prediction_type is not None:
        if not getattr(config, "use_flow_sigmas", False):
            return _discrete(scheduler, quantize)
        known: dict[str, str] = {"flow_prediction": "velocity", "epsilon": "epsilon", "sample": "sample"}
        check_choice(prediction_type, known, f"the prediction_type of {name} with use_flow_sigmas")
        scalings = _flow(scheduler, known[prediction_type])
    elif hasattr(scheduler, "precondition_noise") and hasattr(config, "sigma_data"):
        check_choice(prediction_type, ("epsilon", "v_prediction"), f"{name}'s prediction_type")
        sign = 1.0 if prediction_type == "epsilon" else -1.0  # diffusers' v differs from its epsilon in that
        edm = EDMPreconditioning(config.sigma_data)
        scalings = _Rescaled(edm, output=sign, told=scheduler.precondition_noise)
    elif hasattr(scheduler, "get_scalings_for_boundary_condition") and hasattr(config, "sigma_data"):
        scalings = _ConsistencyScalings(scheduler)
    elif prediction_type == "trigflow":
        sigma_data = config.sigma_data
        on_unit_scale = PredictionScalings("velocity", TrigFlowSchedule(sigma_data))
        scalings = _Rescaled(on_unit_scale, input=sigma_data, output=1 / sigma_data)
    elif hasattr(scheduler, "discrete_sigmas"):
        scalings = PredictionScalings("score", EDMSchedule())
    elif _has_flow_sigmas(scheduler):
        scalings = _flow(scheduler, "velocity")
    else:
        raise TypeError(
            f"expected a diffusers scheduler that tells its noise schedule and what its model predicts (alphas_cumprod "
            f"and a prediction_type, EDM's preconditioning, flow-matching sigmas or TrigFlow), got {name}: pass the "
            f"one that the model was trained with, often DDPMScheduler or FlowMatchEulerDiscreteScheduler, or say both "
            f"with denoiser_from_network."
        )
    if quantize:
        raise ValueError(f"quantize needs a table of timesteps, which {name} does not have: leave it out.")
    return scalings


class _TimestepByKeyword(Wrapper):
    """A diffusers model as ``network(x, time)``: not all take the timestep second, and all can return a tuple."""

    named_after = "model"

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model

    @property
    def dtype(self) -> torch.dtype | None:
        """What the model says that it computes in."""
        said: torch.dtype | None = attribute(self.model, "dtype")
        return said

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Any:
        return self.model(x, timestep=time, return_dict=False, **condition)[0]


@dataclass(frozen=True)
class _Rescaled:
    """Scalings of a network that takes and returns multiples of another's input and output, or is told another time."""

    scalings: NetworkScalings
    input: float = 1.0
    output: float = 1.0
    told: Callable[[Tensor], Tensor] | None = None

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c_skip, c_out, c_in, c_noise = self.scalings(t)
        return c_skip, self.output * c_out, self.input * c_in, c_noise if self.told is None else self.told(t)


class _ConsistencyScalings:
    """The scalings of a consistency model: its jump to ``sigma_min`` on EDM's denoiser around the network."""

    def __init__(self, scheduler: Any) -> None:
        config = scheduler.config
        self.edm = EDMPreconditioning(config.sigma_data)
        self.jump = CMPreconditioning(config.sigma_data, config.sigma_min)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        edm = self.edm(t)
        c_skip, c_out = self.jump.coefficients(t, torch.full_like(t, self.jump.sigma_min))
        return c_skip + c_out * edm.c_skip, c_out * edm.c_out, edm.c_in, cm_c_noise(t)


_PREDICTION_TYPES = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}


def _discrete(scheduler: Any, quantize: bool) -> NetworkScalings:
    """Return the scalings of a table of alphas_cumprod."""
    config = scheduler.config
    check_choice(config.prediction_type, _PREDICTION_TYPES, f"{type(scheduler).__name__}'s prediction_type")
    if getattr(config, "timestep_type", "discrete") == "continuous" and config.prediction_type == "v_prediction":
        return _Rescaled(EDMPreconditioning(sigma_data=1.0), output=-1.0)
    table = scheduler.alphas_cumprod
    if getattr(config, "rescale_betas_zero_snr", False):
        table = table[:-1]  # the last is pure noise: 0, or a stand-in for it
    table = table[table > 0]  # a beta of 1 is pure noise, too
    return PredictionScalings(_PREDICTION_TYPES[config.prediction_type], VPDiscreteSchedule(table, quantize))


def _has_flow_sigmas(scheduler: Any) -> bool:
    """Whether a scheduler counts and noises as flow matching does, for a model that predicts a velocity at one time."""
    sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
    total = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    if not (
        isinstance(sigmas, Tensor) and isinstance(timesteps, Tensor) and total and hasattr(scheduler, "scale_noise")
    ):
        return False
    of_two_times = "r_timestep" in inspect.signature(scheduler.step).parameters  # a student, which jumps
    counted = (total * sigmas).to(timesteps)[: len(timesteps)]
    return not of_two_times and counted.shape == timesteps.shape and torch.allclose(counted, timesteps, atol=1e-3)


def _flow(scheduler: Any, prediction: str) -> NetworkScalings:
    """Return the scalings of a flow, told its time in training steps."""
    config = scheduler.config
    data_at = 1 if getattr(config, "invert_sigmas", False) else 0
    schedule = RectifiedFlowSchedule(data_at, time_scale=float(config.num_train_timesteps))
    return PredictionScalings(prediction, schedule)
