"""The commands: each takes its parsed options, writes results to stdout and returns the exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from .analytic import AnalyticPreconditioning
from .command_line_inputs import check_output, load_file, load_teacher
from .command_line_outputs import (
    as_json,
    comparison_as_json,
    comparison_as_text,
    described,
    nearest_rows,
    summary,
    table,
    tables,
)
from .estimation import estimate_statistics
from .noise_levels import log_noise_levels
from .plotting import plot_preconditioning, plot_statistics
from .preconditioning import Preconditioning
from .statistics_comparison import compare_statistics
from .teacher_statistics import TeacherStatistics

DIFFER = 1


def estimate(options: argparse.Namespace) -> int:
    """Estimate a teacher's statistics, and write them to a file."""
    output = Path(options.output)
    check_output(output)
    if options.resume is not None and Path(options.resume).resolve() == output.resolve():
        raise ValueError(f"--resume must be another file than --output, got {output} for both.")
    levels = _levels(options)
    with contextlib.redirect_stdout(sys.stderr):  # whatever the teacher has to say
        denoiser, data = load_teacher(options.teacher, options.data)
        if isinstance(denoiser, nn.Module) and options.device is not None:
            denoiser.to(options.device)
        statistics = estimate_statistics(
            denoiser,  # type: ignore[arg-type]  # it is checked there
            data,
            levels,
            options.num_samples,
            options.batch_size,
            options.l_method,
            options.s_method,
            options.seed,
            intercept=options.intercept,
            per_element=options.per_element,
            device=options.device,
            description=options.teacher,
            resume=options.resume,
        )
    statistics.save(output)
    if options.json:
        sys.stdout.write(as_json(described(statistics) | tables(statistics, range(len(levels)))))
    else:
        sys.stdout.write(summary(statistics))
    return 0


def _levels(options: argparse.Namespace) -> Tensor:
    grid = {name: getattr(options, name) for name in ("num_levels", "sigma_min", "sigma_max")}
    grid = {name.replace("num_levels", "num"): value for name, value in grid.items() if value is not None}
    if options.levels is None:
        return log_noise_levels(**grid)
    if grid:
        raise ValueError("give --levels, or --num-levels, --sigma-min and --sigma-max, got both.")
    return torch.tensor(options.levels, dtype=torch.float64)


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
        figure = plot_statistics(
            {name: TeacherStatistics.load(file) for name, file in zip(names, options.files, strict=True)}
        )
    else:
        named = {name: _preconditioning(file) for name, file in zip(names, options.files, strict=True)}
        figure = plot_preconditioning(named, **({} if options.start is None else {"t": options.start}))
    kind, known = output.suffix.removeprefix(".").lower(), figure.canvas.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"--output must end in one of {', '.join(f'.{name}' for name in known)}, got {output.name}.")
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=120)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(picture.getvalue())
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    return 0


def _preconditioning(file: str) -> Preconditioning:
    loaded = load_file(file)
    return AnalyticPreconditioning(loaded) if isinstance(loaded, TeacherStatistics) else loaded


def compare(options: argparse.Namespace) -> int:
    """Tell whether two files of statistics agree."""
    first, second = (TeacherStatistics.load(file) for file in (options.first, options.second))
    found = compare_statistics(first, second)
    sys.stdout.write((comparison_as_json if options.json else comparison_as_text)(first, second, found))
    return 0 if found.agree else DIFFER
