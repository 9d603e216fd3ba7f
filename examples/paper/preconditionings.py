"""The student's preconditioning: the comparison is the point."""

from __future__ import annotations

from pathlib import Path

from data import ImageArchive
from processes import Processes
from settings import Settings

import analytic_precond as ap

FITS = {
    "shifted": ap.ShiftedPreconditioning,
    "least-squares": ap.LeastSquaresPreconditioning,
    "per-mode": ap.PerModePreconditioning,
}
NAMES = ("analytic", "ctm", *FITS)


def prepare(
    settings: Settings,
    teacher: ap.Denoiser,
    sigma_data: float,
    images: ImageArchive,
    folder: Path,
    processes: Processes,
) -> ap.Preconditioning:
    """Estimate or fit what the run's preconditioning needs of the teacher, unless its file is there.

    Statistics are estimated by all processes, and an interrupted estimate goes on. The first one fits, while the others
    wait: a fit follows trajectories in one process.
    """
    name, path = settings.preconditioning, file_of(settings.preconditioning, folder)
    condition = (lambda label: {"class_labels": label}) if images.label_dim else None
    told = {
        "device": processes.device,
        "description": settings.teacher.name,
        "seed": settings.seed,
        "condition": condition,
    }
    if name == "analytic" and not processes.gather(path.exists())[0]:
        experiment, kept = settings.experiment, folder / "statistics.resume"
        levels = ap.log_noise_levels(experiment.statistics_levels)
        with processes.together():
            stats = ap.estimate_statistics(
                teacher, images, levels, experiment.statistics_samples, "auto", resume=kept, **told
            )
            if processes.rank == 0:
                stats.save(path)
                kept.unlink()
    elif name in FITS and not processes.gather(path.exists())[0]:
        with processes.together():
            if processes.rank == 0:
                # the fits' own numbers of trajectories at the paper's 4096 samples: 512, 2048, 2048
                num = settings.experiment.statistics_samples // (8 if name == "shifted" else 2)
                fit = FITS[name].fit
                fit(teacher, images, num_trajectories=num, batch_size="auto", sigma_data=sigma_data, **told).save(path)
    with processes.together():
        precond = load(name, path, sigma_data)
    return precond


def file_of(name: str, folder: Path) -> Path:
    """Return the file of what a preconditioning is made of."""
    return folder / ("statistics.safetensors" if name == "analytic" else f"{name}.safetensors")


def load(name: str, path: Path, sigma_data: float) -> ap.Preconditioning:
    """Return a preconditioning from its file; CTM's needs none."""
    if name == "ctm":
        return ap.CTMPreconditioning(sigma_data=sigma_data)
    if name == "analytic":
        return ap.AnalyticPreconditioning(ap.TeacherStatistics.load(path), sigma_data=sigma_data)
    return FITS[name].load(path)
