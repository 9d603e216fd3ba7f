"""What is compared, by name: CTM's three, the paper's family, and fits along the teacher's trajectories."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from annealed import AnnealedPreconditioning
from configurations import Configuration
from networks import NetworkTeacher
from safetensors.torch import load_file
from storage import write_tensors
from torch import Tensor

import analytic_precond as ap

Build = Callable[[Path, float], ap.Preconditioning]


@dataclass(frozen=True)
class Method:
    """A preconditioning, and the kind of student that it goes into.

    Attributes:
        label: For tables and figures.
        build: Makes it from its file and the data's standard deviation.
        file: Name of the file with what was measured on the teacher; none for hand-crafted ones.
        times: 2 for students that jump anywhere (CTM), 1 for those that only jump to the end (CM).
    """

    label: str
    build: Build
    file: str | None = None
    times: int = 2

    def load(self, folder: Path, sigma_data: float) -> ap.Preconditioning:
        """Return the preconditioning for the teacher whose files are in a folder."""
        return self.build(folder / f"{self.file}.safetensors", sigma_data)


def _ctm(outer: str) -> Build:
    return lambda path, sigma_data: ap.CTMPreconditioning(outer, sigma_data)


def _analytic(theta: float) -> Build:
    return lambda path, sigma_data: ap.AnalyticPreconditioning(
        ap.TeacherStatistics.load(path), theta=theta, sigma_data=sigma_data
    )


def _analytic_by_gap(path: Path, sigma_data: float) -> ap.Preconditioning:
    statistics = ap.TeacherStatistics.load(path.with_stem("statistics"))
    return ap.AnalyticPreconditioning(statistics, theta=load_file(path)["theta"].item(), sigma_data=sigma_data)


def _least_squares(path: Path, sigma_data: float) -> ap.Preconditioning:
    return ap.LeastSquaresPreconditioning.load(path)


def _per_mode(path: Path, sigma_data: float) -> ap.Preconditioning:
    return ap.PerModePreconditioning.load(path)


def _shifted(path: Path, sigma_data: float) -> ap.Preconditioning:
    return ap.ShiftedPreconditioning.load(path)


def _annealed(path: Path, sigma_data: float) -> ap.Preconditioning:
    end = _analytic(1.0)(path.with_stem("statistics"), sigma_data)
    return AnnealedPreconditioning(_shifted(path, sigma_data), end)


def _cm(path: Path, sigma_data: float) -> ap.Preconditioning:
    return ap.CMPreconditioning(sigma_data=sigma_data)


METHODS = {
    "ctm-euler": Method("CTM, Euler", _ctm("euler")),
    "ctm-variance": Method("CTM, variance", _ctm("variance")),
    "ctm-mixed": Method("CTM, mixed", _ctm("euler_variance_mixed")),
    "analytic-backward": Method("Analytic-Precond, backward", _analytic(1.0), "statistics"),
    "analytic-forward": Method("Analytic-Precond, forward", _analytic(0.0), "statistics"),
    "analytic-half": Method("Analytic-Precond, θ = 0.5", _analytic(0.5), "statistics"),
    "analytic-gap": Method("Analytic-Precond, θ by the gap", _analytic_by_gap, "theta"),
    "least-squares": Method("least squares", _least_squares, "least_squares"),
    "per-mode-dct": Method("least squares per DCT mode", _per_mode, "per_mode_dct"),
    "per-mode-pca": Method("least squares per PCA mode", _per_mode, "per_mode_pca"),
    "shifted": Method("shifted least squares", _shifted, "shifted"),
    "annealed": Method("shifted, annealed", _annealed, "shifted"),
    "cm": Method("CM, EDM's", _cm, times=1),
    "cm-shifted": Method("CM, shifted least squares", _shifted, "shifted", times=1),
}


def theta_by_gap(config: Configuration, teacher: NetworkTeacher, data: Tensor, statistics: Path) -> float:
    """Return the theta whose jumps, drawn as in training, ask for outputs closest to the teacher's at their start."""
    generator = torch.Generator().manual_seed(5)
    x_0 = data[torch.randperm(len(data), generator=generator)[: config.num_gap_samples].to(data.device)]
    noise = torch.randn(x_0.shape, generator=generator).to(data)
    levels = ap.karras_noise_levels(config.num_levels).to(data.device)
    times = ap.sample_jump_times(len(x_0), levels, config.max_steps, generator)
    jumps = times.s < times.t
    t, s, x_t = (
        times.t[jumps],
        times.s[jumps],
        (x_0 + times.t.to(x_0).reshape(-1, *[1] * (x_0.ndim - 1)) * noise)[jumps],
    )
    loaded, gaps = ap.TeacherStatistics.load(statistics), {}
    for theta in (0.0, 0.25, 0.5, 0.75, 1.0):
        precond = ap.AnalyticPreconditioning(loaded, theta=theta, sigma_data=data.std().item()).to(data.device)
        gaps[theta] = ap.consistency_gap(teacher, precond, x_t, t, s).start.square().mean().item()
    return min(gaps, key=lambda theta: gaps[theta])


def fit(config: Configuration, methods: Iterable[str], teacher: NetworkTeacher, data: Tensor, folder: Path) -> None:
    """Write the files that the methods need of one teacher; those that exist stay as they are."""
    sizes = {"num_trajectories": config.num_trajectories, "sigma_data": data.std().item(), "progress": False}
    for file in sorted({METHODS[name].file for name in methods} - {None}):  # statistics come before theta
        path = folder / f"{file}.safetensors"
        if path.exists():
            continue
        if file == "statistics":
            ap.estimate_statistics(teacher, data, num_samples=config.num_statistics, progress=False).save(path)
        elif file == "theta":
            theta = theta_by_gap(config, teacher, data, folder / "statistics.safetensors")
            write_tensors({"theta": torch.tensor(theta)}, path)
        elif file == "least_squares":
            ap.LeastSquaresPreconditioning.fit(teacher, data, **sizes).save(path)
        elif file == "shifted":
            ap.ShiftedPreconditioning.fit(teacher, data, **sizes).save(path)
        else:
            ap.PerModePreconditioning.fit(teacher, data, basis=file.removeprefix("per_mode_"), **sizes).save(path)
