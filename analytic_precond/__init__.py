"""Preconditioning primitives for distilling diffusion models.

Data flow one way: teacher denoiser -> statistics (l_t, S per noise level) -> preconditioning (c_skip, c_out)(t, s) ->
student -> loss, sampler.
"""

from typing import TYPE_CHECKING

from ._conditions import common
from .diagnostics.consistency_gap import ConsistencyGap, GapMap, consistency_gap, gap_map
from .diagnostics.plots import plot_gap_map, plot_preconditioning, plot_statistics
from .diagnostics.teacher_check import check_teacher
from .diagnostics.teacher_report import TeacherReport
from .diagnostics.trajectory_alignment import TrajectoryAlignment, trajectory_alignment
from .distillation.denoising import adaptive_balance, denoising_loss
from .distillation.distances import pseudo_huber, pseudo_huber_elementwise, squared_error
from .distillation.ict import ict_num_levels, sample_ict_times
from .distillation.jump_times import (
    JumpTimes,
    ect_target_times,
    sample_adjacent_times,
    sample_continuous_times,
    sample_jump_times,
)
from .distillation.losses import consistency_distillation_loss, trajectory_distillation_loss
from .distillation.lpips import LPIPSDistance, ResizeRule
from .distillation.student_passes import SharedDropout
from .distillation.weightings import WEIGHTINGS, Loss
from .estimation.estimate import estimate_statistics
from .fitted_preconditionings.least_squares import LeastSquaresPreconditioning
from .fitted_preconditionings.per_mode import PerModePreconditioning
from .fitted_preconditionings.shifted import ShiftedPreconditioning
from .noise_levels.function_schedule import FunctionSchedule
from .noise_levels.grids import karras_noise_levels, log_noise_levels
from .noise_levels.network_scalings import NOISE_CONDITIONINGS, DenoiserScalings, EDMPreconditioning
from .noise_levels.per_sample import expand_to
from .noise_levels.random_levels import sample_karras_noise_levels, sample_lognormal_noise_levels
from .noise_levels.schedules import EDMSchedule, Rates, RectifiedFlowSchedule, Schedule, TrigFlowSchedule
from .noise_levels.vp_schedules import VPCosineSchedule, VPDiscreteSchedule, VPLinearSchedule
from .ode.solve import heun_solve, heun_solve_between, solve_ode
from .ode.steps import euler_step, heun_step, probability_flow_velocity
from .preconditionings.analytic import AnalyticPreconditioning
from .preconditionings.base import Preconditioning, Scalings
from .preconditionings.hand_crafted import (
    BCMPreconditioning,
    CMPreconditioning,
    CTMPreconditioning,
    FlowMapPreconditioning,
    LCMPreconditioning,
    TrigFlowPreconditioning,
)
from .preconditionings.per_element import PerElementPreconditioning
from .preconditionings.scheduled import ScheduledPreconditioning
from .sampling.noise import draw_noise, per_sample_generators
from .sampling.samplers import SamplingStep, sample_deterministic, sample_gamma, sample_multistep, sample_one_step
from .statistics.element_statistics import ElementStatistics
from .statistics.ems import EMS, load_ems, save_ems
from .statistics.merging import merge_statistics
from .statistics.teacher_statistics import StatisticsHeader, TeacherStatistics
from .students.averaging import exponential_moving_average
from .students.consistency_models import ConsistencyModel, ConsistencyTrajectoryModel
from .students.initialization import initialize_from_teacher
from .students.paper_experiments import PAPER_EXPERIMENTS, PaperExperiment, paper_experiment
from .students.presets import PRESETS, Preset, preset
from .teachers.denoiser import Denoiser
from .teachers.diffusers_models import denoiser_from_diffusers
from .teachers.exact import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from .teachers.guidance import guide
from .teachers.networks import NetworkDenoiser, denoiser_from_edm, denoiser_from_network

if TYPE_CHECKING:
    from .sampling.diffusers_scheduler import ConsistencyJumpScheduler

__version__ = "0.1.0"

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
    "common",
    # noise schedules of teachers
    "Schedule",
    "EDMSchedule",
    "VPLinearSchedule",
    "VPCosineSchedule",
    "VPDiscreteSchedule",
    "RectifiedFlowSchedule",
    "TrigFlowSchedule",
    "FunctionSchedule",
    "Rates",
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
    "ScheduledPreconditioning",
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
    "sample_ict_times",
    "ict_num_levels",
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
        from .sampling.diffusers_scheduler import ConsistencyJumpScheduler

        return ConsistencyJumpScheduler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
