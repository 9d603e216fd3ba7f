r"""Denoisers from models and schedulers of the diffusers library, which is not imported: their names and configs do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_choice
from .._modules import Wrapper
from ..noise_levels.network_scalings import EDMPreconditioning, cm_c_noise
from ..noise_levels.schedules import RectifiedFlowSchedule
from ..noise_levels.vp_schedules import VPDiscreteSchedule
from ..preconditionings.hand_crafted import CMPreconditioning
from .networks import NetworkDenoiser, NetworkScalings
from .predictions import PredictionScalings


def denoiser_from_diffusers(
    model: nn.Module, scheduler: Any, dtype: torch.dtype | None = None, **condition: Any
) -> NetworkDenoiser:
    r"""Make a denoiser of a diffusers model and the scheduler that it was trained for.

    The result is what the scheduler's ``step`` takes for the clean sample (``pred_original_sample``), at any noise
    level and per sample, without the clipping and thresholding that some schedulers add:

    - schedulers with ``alphas_cumprod`` (DDPM, DDIM, Euler, DPM-Solver, ...): epsilon, v and sample predictions;
      between timesteps $\ln t$ is linear, beyond them the model is told the nearest one,
    - EDM schedulers: EDM's scalings with their ``sigma_data``,
    - flow-matching schedulers: velocities; a shift changes their sampling grid, not the denoiser,
    - ``CMStochasticIterativeScheduler``: consistency models. Their output is the end of the ODE, close to but not
      the posterior mean.

    A learned variance (twice the channels) is dropped. A pipeline may do more around a model, such as packing latents
    or rescaling the timestep (Flux): do that in a module around the model.

    Args:
        model: The model, in eval mode, called as ``model(x, timestep=..., return_dict=False, **condition)``.
        scheduler: The scheduler; only its config and tables are read.
        dtype: What the model is called in. Default: its own, as for `NetworkDenoiser`.
        **condition: Conditions of one sample, for all, e.g. ``encoder_hidden_states`` (see `common`); those of a call
            come on top.

    Returns:
        The denoiser.

    Raises:
        TypeError: If the scheduler is not one of the supported ones.
        ValueError: If its prediction type is not.

    Examples:
        >>> from types import SimpleNamespace
        >>> class EDMEulerScheduler:  # diffusers has the real one
        ...     config = SimpleNamespace(sigma_data=0.5, prediction_type="epsilon")
        >>> model = lambda x, timestep, return_dict: (0 * x,)
        >>> denoiser_from_diffusers(model, EDMEulerScheduler())(torch.tensor([[2.0]]), torch.tensor([0.5]))
        tensor([[1.]])
    """
    names = [cls.__name__ for cls in type(scheduler).__mro__]
    scalings_of = next((_SCALINGS[name] for name in names if name in _SCALINGS), None)
    if scalings_of is None:
        raise TypeError(
            f"expected one of the diffusers schedulers {', '.join(_SCALINGS)}, got {names[0]}: pass the one that the "
            f"model was trained for, or say what it predicts with denoiser_from_network."
        )
    network = _TimestepByKeyword(model)
    return NetworkDenoiser(network, scalings_of(scheduler), condition, dtype=dtype, learned_variance=True)


class _TimestepByKeyword(Wrapper):
    """A diffusers model as ``network(x, time)``: not all take the timestep second, and all can return a tuple."""

    named_after = "model"

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model

    @property
    def dtype(self) -> torch.dtype | None:
        """What the model says that it computes in."""
        return getattr(self.model, "dtype", None)

    def forward(self, x: Tensor, time: Tensor, **condition: Any) -> Any:
        return self.model(x, timestep=time, return_dict=False, **condition)[0]


@dataclass(frozen=True)
class _Negated:
    """Scalings of a network that predicts the opposite."""

    scalings: NetworkScalings

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c_skip, c_out, c_in, c_noise = self.scalings(t)
        return c_skip, -c_out, c_in, c_noise


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


def _discrete(scheduler: Any) -> NetworkScalings:
    """Return the scalings of a table of alphas_cumprod."""
    config = scheduler.config
    check_choice(config.prediction_type, _PREDICTION_TYPES, f"{type(scheduler).__name__}'s prediction_type")
    if getattr(config, "timestep_type", "discrete") == "continuous" and config.prediction_type == "v_prediction":
        return _Negated(EDMPreconditioning(sigma_data=1.0))
    alphas_cumprod = scheduler.alphas_cumprod
    if getattr(config, "rescale_betas_zero_snr", False):
        alphas_cumprod = alphas_cumprod[:-1]  # the last is pure noise: 0, or a stand-in for it
    return PredictionScalings(_PREDICTION_TYPES[config.prediction_type], VPDiscreteSchedule(alphas_cumprod))


def _edm(scheduler: Any) -> NetworkScalings:
    """Return EDM's scalings; diffusers' v differs from its epsilon in the sign of the output."""
    config = scheduler.config
    check_choice(config.prediction_type, ("epsilon", "v_prediction"), f"{type(scheduler).__name__}'s prediction_type")
    scalings = EDMPreconditioning(config.sigma_data)
    return scalings if config.prediction_type == "epsilon" else _Negated(scalings)


def _flow(scheduler: Any) -> NetworkScalings:
    """Return the scalings of a flow, told its time in training steps."""
    config = scheduler.config
    data_at = 1 if getattr(config, "invert_sigmas", False) else 0
    schedule = RectifiedFlowSchedule(data_at, time_scale=float(config.num_train_timesteps))
    return PredictionScalings("velocity", schedule)


_SCALINGS: dict[str, Callable[[Any], NetworkScalings]] = {
    "DDPMScheduler": _discrete,
    "DDIMScheduler": _discrete,
    "PNDMScheduler": _discrete,
    "EulerDiscreteScheduler": _discrete,
    "EulerAncestralDiscreteScheduler": _discrete,
    "HeunDiscreteScheduler": _discrete,
    "LMSDiscreteScheduler": _discrete,
    "DPMSolverMultistepScheduler": _discrete,
    "DPMSolverSinglestepScheduler": _discrete,
    "DEISMultistepScheduler": _discrete,
    "UniPCMultistepScheduler": _discrete,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "CMStochasticIterativeScheduler": _ConsistencyScalings,
}
