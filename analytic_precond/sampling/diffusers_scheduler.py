r"""A scheduler for the diffusers library: consistency sampling with any preconditioning.

A pipeline calls its network with one time, so its jumps all end at ``sigma_min``, and the network's input and output
need only be scaled: a few numbers per level in the scheduler's config. A saved pipeline samples bit for bit as before,
without the statistics or the preconditioning that they came from.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .._checks import warn_caller
from ..noise_levels.network_scalings import input_scale
from ..noise_levels.schedules import EDMSchedule, Schedule
from ..students.base import student_behind
from ..students.consistency_models import ConsistencyModel
from .levels import Levels, is_cleanest, resolve_levels

try:
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(
        "expected the diffusers package for ConsistencyJumpScheduler, got none: pip install diffusers"
    ) from error


class ConsistencyJumpScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # the two disagree on config_name
    r"""Multistep sampling of a one-time student in pipelines of diffusers.

    With the raw network F of a `ConsistencyModel`, at the levels $t_i$ of its grid,

    $$x_{\sigma_{min}} = c_{skip}\, x'_t + c_{out}\, F(c_{in}\, x'_t, c_{noise}), \qquad
      x'_{t_{i+1}} = \alpha_{i+1} \left( x_{\sigma_{min}} + \sqrt{t_{i+1}^2 - \sigma_{min}^2}\; z \right)$$

    as `sample_multistep`, on the noisy data $x' = \alpha x$ that the pipeline knows: $\alpha = 1$ in
    ``ConsistencyModelPipeline``, a schedule's in others. Make it with `from_student`; the arguments are what diffusers
    keeps in ``scheduler_config.json``. Nothing is clipped.

    A saved pipeline names this module. Newer diffusers loads it only where it has been imported:
    ``from analytic_precond import ConsistencyJumpScheduler`` before ``from_pretrained``.

    Args:
        levels: Noise levels, noisiest first, where the pipeline starts.
        c_noise: What the network is told of each level; the scheduler's ``timesteps`` are of these.
        c_in: Multiplies the data on their way into the network, per level.
        c_skip: Multiplies the data in the jump from each level to ``sigma_min``.
        c_out: Multiplies the network's output in that jump.
        sigma_min: The level that all jumps reach.
        alpha: Factor of the clean data in the pipeline's noisy data, per level. Default: 1.

    Raises:
        ValueError: If the tables do not fit together.

    Examples:
        >>> from analytic_precond import CTMPreconditioning, karras_noise_levels
        >>> student = ConsistencyModel(lambda x, c_noise: 0 * x, CTMPreconditioning())
        >>> scheduler = ConsistencyJumpScheduler.from_student(student, karras_noise_levels(40))
        >>> scheduler.set_timesteps(timesteps=[22, 0])
        >>> scheduler.timesteps, scheduler.init_noise_sigma  # ln(t) / 4 at levels 0 and 22
        (tensor([1.0955, 0.0809]), 80.0)
    """

    order = 1
    init_noise_sigma: float
    timesteps: Tensor

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,  # diffusers takes positional arguments for defaults when it copies a config
        levels: list[float],
        c_noise: list[float],
        c_in: list[float],
        c_skip: list[float],
        c_out: list[float],
        sigma_min: float,
        alpha: list[float] | None = None,
    ) -> None:
        self._alpha = [1.0] * len(levels) if alpha is None else alpha
        tables = {"levels": levels, "c_noise": c_noise, "c_in": c_in, "c_skip": c_skip, "c_out": c_out}
        tables["alpha"] = self._alpha
        for name, table in tables.items():
            if len(table) != len(levels) or not all(math.isfinite(value) for value in table):
                raise ValueError(
                    f"{name} must hold a finite number for each of {len(levels)} levels, got {table!r:.200}."
                )
        if resolve_levels(levels, sigma_min=sigma_min) != levels:
            raise ValueError(f"levels must decrease from the noisiest, got {levels!r:.200}.")
        whole = all(isinstance(time, int) for time in c_noise)
        self._times = torch.tensor(c_noise, dtype=torch.int64 if whole else torch.float32, device="cpu")
        if len(self._times.unique()) < len(levels):
            raise ValueError(
                "c_noise must tell all levels apart in float32, got duplicates: take fewer levels, only such as the "
                "network knows."
            )
        self.init_noise_sigma = self._alpha[0] * levels[0]
        self.set_timesteps(1)

    @classmethod
    def from_student(
        cls, student: nn.Module, levels: Levels, schedule: Schedule | None = None
    ) -> ConsistencyJumpScheduler:
        """Return the scheduler of a student, whose raw network the pipeline then holds as ``unet`` or ``transformer``.

        Args:
            student: The student, around that network or the denoiser made of it; of its weights nothing is used. It may
                be wrapped, as an average is.
            levels: The noise levels that timesteps are indices of, usually the training grid: a final 0 stands for
                ``sigma_min``. Pipelines start from the noisiest.
            schedule: How the pipeline adds noise: a `VPDiscreteSchedule` for Stable Diffusion's, a
                `RectifiedFlowSchedule` for Stable Diffusion 3's, whose noise has unit variance instead of
                ``init_noise_sigma``'s (0.988 at level 80). Default: none, as ``ConsistencyModelPipeline``.

        Raises:
            TypeError: If ``student`` is not a `ConsistencyModel`, its denoiser is not made of a network, it jumps by
                coefficients per mode or element, or ``schedule`` is no `Schedule`.
            ValueError: If a level is out of the student's range.
        """
        found = student_behind(student)
        if not isinstance(found, ConsistencyModel):
            raise TypeError(
                f"student must be a ConsistencyModel, got {type(student).__name__}: pipelines tell a network one noise "
                f"level, so no others fit."
            )
        schedule = EDMSchedule() if schedule is None else schedule
        if not isinstance(schedule, Schedule):
            raise TypeError(
                f"schedule must be a Schedule, got {type(schedule).__name__}: e.g. RectifiedFlowSchedule()."
            )
        grid = resolve_levels(levels, sigma_min=found.sigma_min)
        rows = [_jump_on_network(found, t) for t in grid]
        q, c_in, c_skip, c_out = (list(column) for column in zip(*rows, strict=True))
        alpha = schedule.alpha(schedule.time(torch.tensor(grid, dtype=torch.float64, device="cpu"))).tolist()
        c_in, c_skip = ([c / a for c, a in zip(column, alpha, strict=True)] for column in (c_in, c_skip))
        told = torch.tensor(q, dtype=torch.float32, device="cpu")
        with torch.no_grad():  # in float32, as the student tells it with float32 data
            times = found.scalings(told).c_noise.tolist()
        scheduler: ConsistencyJumpScheduler = cls(
            levels=grid, c_noise=times, c_in=c_in, c_skip=c_skip, c_out=c_out, sigma_min=found.sigma_min, alpha=alpha
        )
        return scheduler

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Levels | None = None,
    ) -> None:
        """Choose the levels to jump from.

        Args:
            num_inference_steps: Number of jumps, from levels spaced evenly in the grid:
                ``CMStochasticIterativeScheduler``'s, which are the indices ``k * (len(levels) // number)``.
            device: Where `timesteps` go.
            timesteps: Indices into the config's ``levels`` instead, in either order. 0 must be among them, since
                pipelines start from there; the last, where it is ``sigma_min``, means no further call.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If not exactly one of the two is given, or it is out of range.
        """
        levels, sigma_min = self.config["levels"], self.config["sigma_min"]
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError(
                f"expected num_inference_steps or timesteps, got {num_inference_steps} and {timesteps}: pass one."
            )
        if timesteps is None:
            most = len(levels) - is_cleanest(levels[-1], sigma_min)
            if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, int):
                raise TypeError(f"num_inference_steps must be an int, got {num_inference_steps!r}.")
            if not 1 <= num_inference_steps <= most:
                raise ValueError(
                    f"num_inference_steps must be from 1 to {most}, the number of levels to jump from, got "
                    f"{num_inference_steps}: make the scheduler with more levels."
                )
            timesteps = [k * (len(levels) // num_inference_steps) for k in range(num_inference_steps)]
        try:
            chosen = resolve_levels(timesteps, levels, sigma_min)
        except (TypeError, ValueError) as error:
            raise type(error)(f"timesteps must be indices into the grid of {len(levels)} levels: {error}") from error
        if chosen[0] != levels[0]:
            raise ValueError(f"timesteps must hold 0, the noisiest level, where pipelines start, got {timesteps}.")
        self._rows = [levels.index(level) for level in chosen if not is_cleanest(level, sigma_min)]
        self.timesteps = self._times[self._rows].to(device)
        self.is_scale_input_called = False

    def scale_model_input(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        """Return ``c_in * sample``, what the network is called with, in the sample's dtype.

        Raises:
            ValueError: If ``timestep`` is not one of `timesteps`.
        """
        c_in: float = self.config["c_in"][self._rows[self._number(timestep)]]
        self.is_scale_input_called = True
        return (c_in * sample.to(_at_least_float32(sample))).to(sample.dtype)

    def step(
        self,
        model_output: Tensor,
        timestep: Tensor | float,
        sample: Tensor,
        generator: Generator | list[Generator] | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Jump to ``sigma_min`` and add noise up to the next level, if there is one.

        The arguments are those of any scheduler of diffusers: ``sample`` is noisy data at one of `timesteps`, not
        scaled, ``model_output`` the raw network's. With ``return_dict=False`` the result is a tuple.

        Returns:
            A ``SchedulerOutput`` with ``prev_sample``, or the tuple ``(prev_sample,)``. Dtype of ``sample``.

        Raises:
            ValueError: If ``timestep`` is not one of `timesteps`.
        """
        number, dtype = self._number(timestep), _at_least_float32(sample)
        row = self._rows[number]
        if not self.is_scale_input_called and abs(self.config["c_in"][row] - 1) > _ROUNDING:
            warn_caller(
                f"expected the network's input from scheduler.scale_model_input (here {self.config['c_in'][row]:.4g} "
                f"times the sample), which was not called: a pipeline that leaves it out gives wrong samples."
            )
        self.is_scale_input_called = False
        x = self.config["c_skip"][row] * sample.to(dtype) + self.config["c_out"][row] * model_output.to(dtype)
        if number + 1 < len(self._rows):
            following, sigma_min = self._rows[number + 1], self.config["sigma_min"]
            z = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
            x = self._alpha[following] * (x + math.sqrt(self.config["levels"][following] ** 2 - sigma_min**2) * z)
        x = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        r"""Return the pipeline's noisy data $\alpha (x_0 + t n)$ at `timesteps`, one per sample or one for all.

        Samples and noise have one shape ``(B, ...)``; the result is in the samples' dtype.
        """
        rows = [self._rows[self._number(timestep)] for timestep in timesteps.reshape(-1)]
        dtype = _at_least_float32(original_samples)
        tables = torch.tensor([self._alpha, self.config["levels"]], dtype=dtype, device=original_samples.device)
        alpha, t = tables[:, rows].reshape(2, -1, *[1] * (original_samples.ndim - 1))
        noisy: Tensor = alpha * (original_samples.to(dtype) + t * noise.to(dtype))
        return noisy.to(original_samples.dtype)

    def _number(self, timestep: Tensor | float) -> int:
        """Return the position of a timestep among `timesteps`."""
        found = (self.timesteps == timestep).nonzero().flatten().tolist()
        if len(found) != 1:
            raise ValueError(
                f"timestep must be one of scheduler.timesteps, {self.timesteps.tolist()}, got {timestep}: call "
                f"set_timesteps first and loop over scheduler.timesteps."
            )
        return int(found[0])


_ROUNDING = 1e-6  # c_in = alpha / alpha, computed in float64 twice


def _jump_on_network(student: ConsistencyModel, t: float) -> tuple[float, float, float, float]:
    """Return the level that the raw network is told; on it, c_in, c_skip and c_out of the jump from t to sigma_min."""
    scalings = student.precond(t, student.sigma_min)
    if scalings.c_out.ndim:
        raise TypeError(
            f"student.precond must have one pair of coefficients per level, which is what the scheduler holds, got "
            f"{type(student.precond).__name__} with one per mode or element: sample with sample_multistep, or train "
            f"with AnalyticPreconditioning or LeastSquaresPreconditioning."
        )
    c_skip, c_out = (float(c) for c in scalings)
    here = torch.tensor(t, dtype=torch.float64, device="cpu")
    q = student.precond.network_level(here, student.sigma_min).to(here)
    inner, scale = student.scalings(q), float(input_scale(here, q, student.precond.sigma_data))
    return float(q), float(inner.c_in) * scale, c_skip + c_out * float(inner.c_skip) * scale, c_out * float(inner.c_out)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
