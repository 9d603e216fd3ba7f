"""Count the files that a reader enters on five walks through the package, and how often the walk changes the file.

python .ci/walks.py            # files / switches of each
python .ci/walks.py --list     # and every function on the way

A walk is one run, traced: every function of the package that it enters, in the order in which each is entered first.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

import analytic_precond as ap

ROOT = Path(ap.__file__).parent
VARIANCES = torch.tensor([0.25, 0.5])
DATA = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
LEVELS = ap.log_noise_levels(20, 0.1, 10.0)
SIZES = {"levels": LEVELS, "num_trajectories": 64, "progress": False}


def teacher(x: Tensor, t: Tensor) -> Tensor:
    """Return the ideal denoiser of Gaussian data: the reader's own teacher is no part of a walk."""
    return x * VARIANCES / (VARIANCES + t[:, None] ** 2)


class Network(nn.Module):
    """A raw network of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, c_noise_t: Tensor, c_noise_s: Tensor) -> Tensor:
        """Return F."""
        return self.weight * x


STATISTICS = ap.estimate_statistics(teacher, DATA, levels=LEVELS, num_samples=64, progress=False)
STUDENT = ap.ConsistencyTrajectoryModel(Network(), ap.AnalyticPreconditioning(STATISTICS))
TIMES = ap.sample_jump_times(64, LEVELS, 3, torch.Generator().manual_seed(0))
WALKS: dict[str, Callable[[], object]] = {
    "c_out, built and called": lambda: ap.AnalyticPreconditioning(STATISTICS)(5.0, 1.0),
    "one batch becomes l_t": lambda: (
        ap.estimate_statistics(teacher, DATA, levels=LEVELS, num_samples=64, progress=False).l_stderr
    ),
    "a loss calls the student": lambda: ap.trajectory_distillation_loss(teacher, STUDENT, STUDENT, DATA, DATA, TIMES),
    "a least-squares fit": lambda: ap.LeastSquaresPreconditioning.fit(teacher, DATA, **SIZES),
    "a shifted fit": lambda: ap.ShiftedPreconditioning.fit(teacher, DATA, **SIZES),
}


def walk(run: Callable[[], object]) -> list[tuple[str, str]]:
    """Return (file, function) of every function that a run enters, each once; what stands inside one is part of it."""
    entered: dict[tuple[str, str], None] = {}

    def enter(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(ROOT)):
            name = code.co_qualname.split(".<locals>")[0]
            entered.setdefault((str(Path(code.co_filename).relative_to(ROOT)), name))

    sys.setprofile(enter)
    try:
        run()
    finally:
        sys.setprofile(None)
    return list(entered)


for title, run in WALKS.items():
    steps = walk(run)
    files = [file for file, _ in steps]
    story = [file for file in files if not file.startswith("_")]  # without argument checks and places of numbers
    counts = (
        f"{len(set(way))} files, {sum(a != b for a, b in itertools.pairwise(way))} switches" for way in (files, story)
    )
    print(f"{title}: {' (without _checks and _precision: '.join(counts)})")
    if "--list" in sys.argv:
        print(*(f"    {file}: {name}" for file, name in steps), sep="\n")
