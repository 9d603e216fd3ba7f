r"""The commands: each takes its parsed options, writes results to stdout and returns the exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from .._checks import check_count
from .._files import replace_file
from ..data.arguments import default_levels
from ..diagnostics.comparison import compare_statistics
from ..diagnostics.plots import plot_preconditioning, plot_statistics
from ..estimation.estimate import estimate_statistics
from ..noise_levels.grids import log_noise_levels
from ..preconditionings.analytic import AnalyticPreconditioning
from ..preconditionings.base import Preconditioning
from ..statistics.teacher_statistics import TeacherStatistics
from ..students.base import takes
from .inputs import check_kind, check_output, load_file, load_statistics, load_teacher
from .outputs import as_json, comparison_as_json, comparison_as_text, described, nearest_rows, summary, table, tables

DIFFER = 1

# options that `estimate_statistics` takes as they are
_SETTINGS = ("num_samples", "batch_size", "l_method", "s_method", "seed", "intercept", "per_element", "resume")


def estimate(options: argparse.Namespace) -> int:
    """Estimate a teacher's statistics, and write them to a file."""
    output = Path(options.output)
    check_output(output)
    if options.resume is not None:
        if os.path.realpath(options.resume) == os.path.realpath(output):
            raise ValueError(f"--resume must be another file than --output, got {output} for both.")
        check_kind(options.resume, "--resume", "EstimationState")
    check_kind(options.output, "--output", "TeacherStatistics")
    levels, device = _levels(options), _device(options.device)
    with contextlib.redirect_stdout(sys.stderr):  # whatever the teacher has to say
        denoiser, data = load_teacher(options.teacher, options.data)
        if isinstance(denoiser, nn.Module) and device is not None:
            denoiser.to(device)
        if levels is None:
            levels = default_levels(denoiser, options.num_levels or 120)  # type: ignore[arg-type]
        try:
            settings = {name: getattr(options, name) for name in _SETTINGS}
            statistics = estimate_statistics(
                denoiser,  # type: ignore[arg-type]  # it is checked there
                data,
                levels,
                device=device,
                description=options.teacher,
                **settings,
            )
        except TypeError as error:
            if takes(denoiser, 2, alone=True):
                raise
            raise TypeError(
                f"TEACHER must return a denoiser that is callable as D(x, t), got {type(denoiser).__name__} ({error}): "
                f"wrap it in a function of x and t, or an adapter."
            ) from error
    statistics.save(output)
    sys.stderr.write(f"written to {output}\n")
    if options.json:
        sys.stdout.write(as_json(described(statistics) | tables(statistics, range(len(levels)))))
    else:
        sys.stdout.write(summary(statistics))
    return 0


def _levels(options: argparse.Namespace) -> Tensor | None:
    """Return what was asked for, None where the teacher is to say."""
    grid = {name: getattr(options, name) for name in ("num_levels", "sigma_min", "sigma_max")}
    grid = {name.replace("num_levels", "num"): value for name, value in grid.items() if value is not None}
    if options.levels is None:
        check_count(grid.get("num", 2), 2, "--num-levels")
        return log_noise_levels(**grid) if grid.keys() - {"num"} else None
    if grid:
        raise ValueError("give --levels, or --num-levels, --sigma-min and --sigma-max, got both.")
    return torch.tensor(options.levels, dtype=torch.float64, device="cpu")


def _device(name: str | None) -> torch.device | None:
    try:
        return None if name is None else torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # no such name, no such hardware
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device must be one that torch has here, got {name}: {reason}") from error


def show(options: argparse.Namespace) -> int:
    """Show what a file holds."""
    loaded = load_file(options.file)
    rows = nearest_rows(loaded.levels, options.levels)
    if options.json:
        sys.stdout.write(as_json(described(loaded) | tables(loaded, rows)))
    else:
        sys.stdout.write(summary(loaded) + table(loaded, rows))
    return 0


def plot(options: argparse.Namespace) -> int:
    """Draw files."""
    output = Path(options.output)
    check_output(output)
    if options.what == "statistics" and options.start is not None:
        raise ValueError("--from belongs to jumps: give --what coefficients with it.")
    names = [Path(file).stem for file in options.files]
    if len(set(names)) < len(names):
        names = options.files
    if options.what == "statistics":
        figure = plot_statistics({name: load_statistics(file) for name, file in zip(names, options.files, strict=True)})
    else:
        named = {name: _preconditioning(file) for name, file in zip(names, options.files, strict=True)}
        figure = plot_preconditioning(named, **({} if options.start is None else {"t": options.start}))
    kind = output.suffix.removeprefix(".").lower()
    if kind not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"--output must end in .png, .pdf or .svg, got {output.name}: rename it.")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=120)
    replace_file(output, picture.getvalue())
    sys.stderr.write(f"written to {output}\n")
    return 0


def _preconditioning(file: str) -> Preconditioning:
    loaded = load_file(file)
    return AnalyticPreconditioning(loaded) if isinstance(loaded, TeacherStatistics) else loaded


def compare(options: argparse.Namespace) -> int:
    """Tell whether two files of statistics agree."""
    first, second = (load_statistics(file) for file in (options.first, options.second))
    found = compare_statistics(first, second)
    sys.stdout.write((comparison_as_json if options.json else comparison_as_text)(first, second, found))
    return 0 if found.agree else DIFFER
