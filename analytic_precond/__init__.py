"""Preconditioning primitives for distilling diffusion models.

Data flow one way: teacher denoiser -> statistics (l_t, S per noise level) -> preconditioning (c_skip, c_out)(t, s) ->
student -> loss, sampler.
"""

from importlib.metadata import version

from .adapters import NetworkDenoiser, denoiser_from_edm, denoiser_from_network
from .analytic import AnalyticPreconditioning
from .diffusers_adapter import denoiser_from_diffusers
from .estimation import estimate_statistics
from .exact import EmpiricalDenoiser, GaussianDenoiser, GaussianMixtureDenoiser
from .guidance import guide
from .hand_crafted import (
    BCMPreconditioning,
    CMPreconditioning,
    FlowMapPreconditioning,
    LCMPreconditioning,
    TrigFlowPreconditioning,
)
from .initialization import initialize_from_teacher
from .merging import merge_statistics
from .noise_conditioning import NOISE_CONDITIONINGS
from .noise_levels import expand_to, karras_noise_levels, log_noise_levels
from .plotting import plot_preconditioning, plot_statistics
from .preconditioning import CTMPreconditioning, DenoiserScalings, EDMPreconditioning, Preconditioning, Scalings
from .presets import PAPER_EXPERIMENTS, PRESETS, PaperExperiment, Preset, paper_experiment, preset
from .schedules import EDMSchedule, RectifiedFlowSchedule, Schedule, TrigFlowSchedule
from .student import ConsistencyModel, ConsistencyTrajectoryModel
from .teacher import Denoiser
from .teacher_statistics import StatisticsHeader, TeacherStatistics
from .vp_schedules import VPCosineSchedule, VPDiscreteSchedule, VPLinearSchedule

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
    # statistics
    "estimate_statistics",
    "TeacherStatistics",
    "StatisticsHeader",
    "merge_statistics",
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
    # students
    "NOISE_CONDITIONINGS",
    "ConsistencyModel",
    "ConsistencyTrajectoryModel",
    "initialize_from_teacher",
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
]
