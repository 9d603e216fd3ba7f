"""Preconditioning primitives for distilling diffusion models.

Data flow one way: teacher denoiser -> statistics (l_t, S per noise level) -> preconditioning (c_skip, c_out)(t, s) ->
student -> loss, sampler.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING

from .adapters import NetworkDenoiser, denoiser_from_edm, denoiser_from_network
from .alignment import TrajectoryAlignment, trajectory_alignment
from .analytic import AnalyticPreconditioning
from .averaging import exponential_moving_average
from .denoising import denoising_loss
from .diagnostics import ConsistencyGap, GapMap, consistency_gap, gap_map
from .diffusers_adapter import denoiser_from_diffusers
from .distances import pseudo_huber, pseudo_huber_elementwise, squared_error
from .edm import DenoiserScalings, EDMPreconditioning
from .element_statistics import ElementStatistics
from .ems import EMS, load_ems, save_ems
from .estimation import estimate_statistics
from .exact import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from .gap_plotting import plot_gap_map
from .guidance import guide
from .hand_crafted import (
    BCMPreconditioning,
    CMPreconditioning,
    FlowMapPreconditioning,
    LCMPreconditioning,
    TrigFlowPreconditioning,
)
from .initialization import initialize_from_teacher
from .jump_times import (
    JumpTimes,
    ect_target_times,
    sample_adjacent_times,
    sample_continuous_times,
    sample_jump_times,
)
from .least_squares import LeastSquaresPreconditioning
from .loss import Loss
from .loss_balance import adaptive_balance
from .losses import consistency_distillation_loss, trajectory_distillation_loss
from .lpips_distance import LPIPSDistance, ResizeRule
from .merging import merge_statistics
from .noise_conditioning import NOISE_CONDITIONINGS
from .noise_level_sampling import sample_karras_noise_levels, sample_lognormal_noise_levels
from .noise_levels import expand_to, karras_noise_levels, log_noise_levels
from .ode import euler_step, heun_step, probability_flow_velocity, solve_ode
from .per_element import PerElementPreconditioning
from .per_mode import PerModePreconditioning
from .per_sample_ode import heun_solve, heun_solve_between
from .plotting import plot_preconditioning, plot_statistics
from .preconditioning import CTMPreconditioning, Preconditioning, Scalings
from .presets import PAPER_EXPERIMENTS, PRESETS, PaperExperiment, Preset, paper_experiment, preset
from .sample_noise import draw_noise, per_sample_generators
from .samplers import SamplingStep, sample_deterministic, sample_gamma, sample_multistep, sample_one_step
from .schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, TrigFlowSchedule
from .shared_dropout import SharedDropout
from .shifted import ShiftedPreconditioning
from .student import ConsistencyModel, ConsistencyTrajectoryModel
from .teacher import Denoiser
from .teacher_checks import check_teacher
from .teacher_report import TeacherReport
from .teacher_statistics import StatisticsHeader, TeacherStatistics
from .vp_schedules import VPCosineSchedule, VPDiscreteSchedule, VPLinearSchedule
from .weightings import WEIGHTINGS

if TYPE_CHECKING:
    from .diffusers_scheduler import ConsistencyJumpScheduler

__version__ = version("analytic-precond")

__all__ = [  # noqa: RUF022 - in the order of the pipeline
    # noise levels
    "karras_noise_levels",
    "log_noise_levels",
    "expand_to",
    # teachers
    "Denoiser",
    "GaussianDenoiser",
    "GaussianMixtureDenoiser",
    "EmpiricalDenoiser",
    "denoiser_from_edm",
    "denoiser_from_network",
    "denoiser_from_diffusers",
    "NetworkDenoiser",
    "guide",
    # noise schedules of teachers
    "Schedule",
    "EDMSchedule",
    "VPLinearSchedule",
    "VPCosineSchedule",
    "VPDiscreteSchedule",
    "RectifiedFlowSchedule",
    "TrigFlowSchedule",
    # the teacher's ODE
    "probability_flow_velocity",
    "euler_step",
    "heun_step",
    "solve_ode",
    "heun_solve",
    "heun_solve_between",
    # statistics
    "estimate_statistics",
    "TeacherStatistics",
    "StatisticsHeader",
    "ElementStatistics",
    "merge_statistics",
    "save_ems",
    "load_ems",
    "EMS",
    # preconditionings
    "Preconditioning",
    "Scalings",
    "DenoiserScalings",
    "EDMPreconditioning",
    "CMPreconditioning",
    "CTMPreconditioning",
    "BCMPreconditioning",
    "TrigFlowPreconditioning",
    "LCMPreconditioning",
    "FlowMapPreconditioning",
    "AnalyticPreconditioning",
    "LeastSquaresPreconditioning",
    "PerModePreconditioning",
    "PerElementPreconditioning",
    "ShiftedPreconditioning",
    # students
    "NOISE_CONDITIONINGS",
    "ConsistencyModel",
    "ConsistencyTrajectoryModel",
    "initialize_from_teacher",
    # distillation: noise levels, distances, losses
    "JumpTimes",
    "sample_jump_times",
    "sample_adjacent_times",
    "sample_continuous_times",
    "ect_target_times",
    "sample_lognormal_noise_levels",
    "sample_karras_noise_levels",
    "squared_error",
    "pseudo_huber",
    "pseudo_huber_elementwise",
    "LPIPSDistance",
    "ResizeRule",
    "WEIGHTINGS",
    "Loss",
    "consistency_distillation_loss",
    "trajectory_distillation_loss",
    "denoising_loss",
    "adaptive_balance",
    "SharedDropout",
    "exponential_moving_average",
    # sampling
    "per_sample_generators",
    "draw_noise",
    "SamplingStep",
    "sample_one_step",
    "sample_multistep",
    "sample_gamma",
    "sample_deterministic",
    # diagnostics
    "check_teacher",
    "TeacherReport",
    "consistency_gap",
    "ConsistencyGap",
    "gap_map",
    "GapMap",
    "trajectory_alignment",
    "TrajectoryAlignment",
    # settings of published codes and of the paper
    "Preset",
    "PRESETS",
    "preset",
    "PaperExperiment",
    "PAPER_EXPERIMENTS",
    "paper_experiment",
    # pictures
    "plot_statistics",
    "plot_preconditioning",
    "plot_gap_map",
    "ConsistencyJumpScheduler",
]


def __getattr__(name: str) -> object:
    """Import what needs diffusers only when it is asked for."""
    if name == "ConsistencyJumpScheduler":
        from .diffusers_scheduler import ConsistencyJumpScheduler

        return ConsistencyJumpScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
