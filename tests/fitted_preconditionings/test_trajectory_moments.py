"""What fits hold in memory: the trajectories of a batch, as documented, and little else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
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
    # 16 K B d as documented; beside them seven slopes of the ODE's solver, and the part of one block at a time
    assert 1 <= memory.bytes / (16 * len(LEVELS) * size) <= 1.5
