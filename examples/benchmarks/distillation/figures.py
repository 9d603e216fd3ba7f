"""Figures of the stored results."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from configurations import BASELINE, Configuration, Run
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from preconditionings import METHODS
from safetensors.torch import load_file
from speedups import History, find, speedup
from torch import Tensor

import analytic_precond as ap

FONT = 15  # as in the library: figures are about 12 inches wide and still readable at half that
METRICS = {
    "ode/1": "squared distance to\nthe ODE's end, 1 step",
    "ode/2": "squared distance to\nthe ODE's end, 2 steps",
    "ode/5": "squared distance to\nthe ODE's end, 5 steps",
    "features-data/1": "Fréchet distance of\nfeatures to data, 1 step",
    "features-data/2": "Fréchet distance of\nfeatures to data, 2 steps",
    "pixels-teacher/2": "Fréchet distance of pixels\nto the teacher, 2 steps",
}
# Okabe and Ito's colours; the same method has the same style everywhere
STYLES = {
    "ctm-euler": ("#000000", "-"),
    "ctm-variance": ("#000000", ":"),
    "ctm-mixed": ("#000000", "-."),
    "analytic-backward": ("#0072B2", "-"),
    "analytic-forward": ("#56B4E9", "--"),
    "analytic-half": ("#56B4E9", ":"),
    "analytic-gap": ("#56B4E9", "-."),
    "least-squares": ("#E69F00", "-"),
    "per-mode-dct": ("#CC79A7", "-"),
    "shifted": ("#D55E00", "-"),
    "annealed": ("#D55E00", "--"),
    "per-mode-pca": ("#CC79A7", "--"),
    "cm": ("#009E73", "-"),
    "cm-shifted": ("#009E73", "--"),
}


def draw_curves(results: dict[Run, History], config: Configuration, problem: str, length: int = 1) -> Figure:
    """Draw all metrics over iterations: means over the seeds, and their range."""
    figure = Figure(figsize=(13, 9.5), layout="constrained")
    panels = figure.subplots(2, 3).flat
    size = config.problem(problem)
    methods = config.methods if length == 1 else config.long_methods
    for panel, (metric, label) in zip(panels, METRICS.items(), strict=True):
        for name in methods:
            runs = [find(results, config, problem, name, seed, times=length) for seed in config.seeds]
            runs = [run for run in runs if run and metric in run[0]]
            if runs:
                _draw_curve(panel, name, np.array([[(p["iteration"], p[metric]) for p in run] for run in runs]))
        panel.set_xscale("symlog", linthresh=size.evaluations(size.iterations, config.shares)[1])
        panel.set(xlim=(0, length * size.iterations), yscale="log")
        _plain(panel.xaxis, subs=(1.0,))
        _plain(panel.yaxis)
        panel.set_title(label, fontsize=FONT)
        panel.tick_params(labelsize=FONT - 2, which="both")
        panel.grid(alpha=0.3)
    for panel in figure.axes[3:]:
        panel.set_xlabel("iteration", fontsize=FONT)
    handles = {line.get_label(): line for panel in figure.axes for line in panel.get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=FONT - 1, frameon=False)
    return figure


def _plain(axis: Axis, subs: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    """Write a logarithmic axis' numbers as they are."""
    if axis.get_scale() == "log":
        axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_curve(panel: Axes, name: str, runs: np.ndarray) -> None:
    colour, dashes = STYLES[name]
    iterations, values = runs[0, :, 0], runs[:, :, 1]
    line = {"color": colour, "linestyle": dashes, "linewidth": 2.4 if dashes == "-" else 2.0}
    panel.plot(iterations, np.exp(np.log(values).mean(0)), label=METHODS[name].label, **line)
    panel.fill_between(iterations, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)


def draw_speedups(results: dict[Run, History], config: Configuration) -> Figure:
    """Draw speed-ups with bootstrap intervals: a panel for each problem, a group of points for each method."""
    groups = [[problem for problem in config.problems if problem.relatives is also] for also in (False, True)]
    lines = [group[i : i + 2] for group in groups for i in range(0, len(group), 2)]  # with methods in common
    names = [
        [name for name in config.methods + config.relatives * line[0].relatives if name in _COMPARED] for line in lines
    ]
    heights = [len(rows) + 1 for rows in names]
    figure = Figure(figsize=(13, 1.6 + 0.42 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(lines), 2, sharex=True, squeeze=False, height_ratios=heights)
    for line, rows, pair in zip(lines, names, panels, strict=True):
        for panel in pair[len(line) :]:
            panel.set_visible(False)
        for panel, problem in zip(pair, line, strict=False):
            _draw_speedups_of(panel, results, config, problem.name, rows[::-1])
            panel.set_yticks(range(len(rows)), [METHODS[name].label for name in rows[::-1]])
            panel.tick_params(labelsize=FONT - 2, which="both", labelleft=panel is pair[0])
    for panel in panels[-1]:
        panel.set_xlabel("speed-up over CTM's Euler form", fontsize=FONT)
    dots = {label: {"color": colour, "marker": "o"} for label, colour, _ in _SPEEDUP_METRICS.values()}
    signs = {"lower bound": {"color": "gray", "marker": ">"}, "upper bound": {"color": "gray", "marker": "<"}}
    handles = [Line2D([], [], label=key, linestyle="", markersize=8, **look) for key, look in (dots | signs).items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=FONT - 1, frameon=False)
    return figure


_COMPARED = [name for name, method in METHODS.items() if method.times == 2 and name != BASELINE]
_SPEEDUP_METRICS = {  # label, colour, place in the group
    "ode/1": ("ODE, 1 step", "#0072B2", 0.25),
    "ode/2": ("ODE, 2 steps", "#D55E00", 0.0),
    "features-data/2": ("features, 2 steps", "#009E73", -0.25),
}


def _draw_speedups_of(
    panel: Axes, results: dict[Run, History], config: Configuration, problem: str, names: list[str]
) -> None:
    for row, name in enumerate(names):
        values = {metric: speedup(results, config, problem, name, metric) for metric in _SPEEDUP_METRICS}
        for metric, value in values.items():
            if value is not None:
                _, colour, offset = _SPEEDUP_METRICS[metric]
                panel.plot(value.bootstrap(), [row + offset] * 2, color=colour, linewidth=2.5)
                panel.plot(value.mean, row + offset, value.bound or "o", color=colour, markersize=8)
        if not any(values.values()):
            panel.text(1.1, row, "not run", va="center", color="gray", fontsize=FONT - 3)
    panel.axvline(1, color="black", linewidth=1)
    panel.set_xscale("log")
    _plain(panel.xaxis)
    panel.set_ylim(-0.7, len(names) - 0.3)
    panel.set_title(problem, fontsize=FONT)
    panel.grid(alpha=0.3, axis="x")


def draw_gaps(maps: dict[str, Any], names: list[str]) -> Figure:
    """Draw gap maps before training, from ``teacher.json``."""
    start, target = (torch.tensor([maps[end][name] for name in names]).double() for end in ("gap_start", "gap_target"))
    levels = torch.tensor(maps["levels"]).double()
    above = torch.ones(len(levels), len(levels)).triu(1) == 0
    start, target = (gap.masked_fill(above, torch.nan) for gap in (start, target))
    return ap.plot_gap_map(ap.GapMap(tuple(METHODS[name].label for name in names), levels, start, target))


def draw_scales(maps: dict[str, Any], names: list[str]) -> Figure:
    """Draw c_out and the size of the required output over the target of a jump, from ``teacher.json``."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    panels = figure.subplots(2, 3, sharex=True)
    levels = maps["levels"]
    for column, i in zip(panels.T, (0, (len(levels) - 1) // 3, 2 * (len(levels) - 1) // 3), strict=True):
        for panel, key in zip(column, ("c_out", "required"), strict=True):
            for name in names:
                colour, dashes = STYLES[name]
                values = maps[key][name][i][i + 1 :]
                label = METHODS[name].label
                panel.plot(levels[i + 1 :], values, color=colour, linestyle=dashes, linewidth=2.4, label=label)
            panel.set(xscale="log", yscale="log")
            panel.tick_params(labelsize=FONT - 2, which="both")
            _plain(panel.xaxis, subs=(1.0,))
            _plain(panel.yaxis)
            panel.grid(alpha=0.3)
        column[0].set_title(f"from t = {levels[i]:.2g}", fontsize=FONT)
        column[1].axhline(maps["denoised"][i], color="gray", linewidth=6, alpha=0.4, label="first output")
        column[1].set_xlabel("to noise level s", fontsize=FONT)
    panels[0, 0].set_ylabel("$c_{out}$ (RMS over modes)", fontsize=FONT)
    panels[1, 0].set_ylabel("RMS of the required output", fontsize=FONT)
    handles = {line.get_label(): line for line in panels[1, 0].get_lines()}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=FONT - 1, frameon=False)
    return figure


def draw_samples(config: Configuration, folder: Path, problem: str, reference: Tensor) -> Figure | None:
    """Draw images from the same noise: the teacher's, and the students' of the first seed after equal training."""
    if reference.ndim != 4:
        return None
    rows = {"teacher": (reference, reference)}
    size = config.problem(problem)
    for name in config.methods_of(size):
        run = Run(problem, name, config.seeds[0], config.learning_rate, size.iterations)
        path = run.path(folder).with_suffix(".safetensors")
        if path.exists():
            images = load_file(path)
            rows[METHODS[name].label] = (images["1 step"], images["2 steps"])
    figure = Figure(figsize=(13, 0.68 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(len(rows), 2, squeeze=False)
    for row, (label, pair) in zip(panels, rows.items(), strict=True):
        for panel, images in zip(row, pair, strict=True):
            strip = torch.cat(list(images[:8].float()), 2).permute(1, 2, 0)
            panel.imshow((strip.clamp(-1, 1) + 1) / 2, cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=FONT - 3)
    for panel, title in zip(panels[0], ("1 step", "2 steps"), strict=True):
        panel.set_title(title, fontsize=FONT)
    return figure
