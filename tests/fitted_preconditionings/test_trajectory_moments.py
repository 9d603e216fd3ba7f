"""What fits hold in memory: the trajectories of a batch, as documented, and little else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from full_size import FullSize
from memory_peak import MemoryPeak

import analytic_precond as ap

DATA = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LEVELS = ap.log_noise_levels(20, 0.01, 10.0)
FITS: dict[str, Callable[..., object]] = {
    "least squares": ap.LeastSquaresPreconditioning.fit,
    "shifted": ap.ShiftedPreconditioning.fit,
}


@pytest.mark.parametrize("num_trajectories", [64, 20], ids=lambda num: f"{num} trajectories")
@pytest.mark.parametrize("fit", FITS)
def test_a_fit_takes_the_documented_memory(fit: str, num_trajectories: int) -> None:
    size = min(32, num_trajectories) * DATA[0].numel()
    sizes = {"levels": LEVELS, "num_trajectories": num_trajectories, "batch_size": 32, "progress": False}
    with MemoryPeak() as memory:
        FITS[fit](ap.GaussianDenoiser(0.25), DATA, **sizes)
    # float32 points as documented; beside them the ODE's solver holds 16 numbers of each element of a sample, and a
    # piece of all points is multiplied in float64
    per_level = {"least squares": 2, "shifted": 3}[fit]
    assert 1 <= memory.bytes / (4 * (per_level * len(LEVELS) + 16) * size) <= 1.5


# products of points alone are float64. Those at all lower levels are as many as the teacher's passes
@pytest.mark.parametrize(("fit", "most"), [("least squares", 0.1), ("shifted", 0.3)])  # it was 0.88 and 0.90
def test_a_float32_teacher_is_followed_in_float32(fit: str, most: float) -> None:
    with FullSize(DATA[0].numel()) as watched:  # points are multiplied in pieces
        FITS[fit](lambda x, t: 0.5 * x, DATA, LEVELS, 32, 32, progress=False)
    assert 0 < watched.share < most
