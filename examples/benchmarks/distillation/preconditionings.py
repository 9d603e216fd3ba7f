"""What is compared, by name: CTM's three, the paper's family, and fits along the teacher's trajectories."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from configurations import Configuration
from networks import NetworkTeacher
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


def _least_squares(path: Path, sigma_data: float) -> ap.Preconditioning:
    return ap.LeastSquaresPreconditioning.load(path)


def _per_mode(path: Path, sigma_data: float) -> ap.Preconditioning:
    return ap.PerModePreconditioning.load(path)


def _cm(path: Path, sigma_data: float) -> ap.Preconditioning:
    return ap.CMPreconditioning(sigma_data=sigma_data)


METHODS = {
    "ctm-euler": Method("CTM, Euler", _ctm("euler")),
    "ctm-variance": Method("CTM, variance", _ctm("variance")),
    "ctm-mixed": Method("CTM, mixed", _ctm("euler_variance_mixed")),
    "analytic-backward": Method("Analytic-Precond, backward", _analytic(1.0), "statistics"),
    "analytic-forward": Method("Analytic-Precond, forward", _analytic(0.0), "statistics"),
    "analytic-half": Method("Analytic-Precond, θ = 0.5", _analytic(0.5), "statistics"),
    "least-squares": Method("least squares", _least_squares, "least_squares"),
    "per-mode-dct": Method("least squares per DCT mode", _per_mode, "per_mode_dct"),
    "per-mode-pca": Method("least squares per PCA mode", _per_mode, "per_mode_pca"),
    "cm": Method("CM, EDM's", _cm, times=1),
    "cm-per-mode-dct": Method("CM, least squares per DCT mode", _per_mode, "per_mode_dct", times=1),
}


def fit(config: Configuration, methods: Iterable[str], teacher: NetworkTeacher, data: Tensor, folder: Path) -> None:
    """Write the files that the methods need of one teacher; those that exist stay as they are."""
    sizes = {"num_trajectories": config.num_trajectories, "sigma_data": data.std().item(), "progress": False}
    for file in sorted({METHODS[name].file for name in methods} - {None}):
        path = folder / f"{file}.safetensors"
        if path.exists():
            continue
        if file == "statistics":
            ap.estimate_statistics(teacher, data, num_samples=config.num_statistics, progress=False).save(path)
        elif file == "least_squares":
            ap.LeastSquaresPreconditioning.fit(teacher, data, **sizes).save(path)
        else:
            ap.PerModePreconditioning.fit(teacher, data, basis=file.removeprefix("per_mode_"), **sizes).save(path)
