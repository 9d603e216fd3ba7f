"""Figures of training to the plateau: ratios with their intervals, and alignment over training and over levels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from configurations import Configuration, Run
from figures import FONT, STYLES
from matplotlib.figure import Figure
from preconditionings import METHODS
from speedups import History

import analytic_precond as ap

if TYPE_CHECKING:
    from plateau import Comparison

ROWS = ("ode", "pixels-data", "pixels-teacher", "features-data", "features-teacher")
ROW_LABELS = ("ODE's end", "pixels, data", "pixels, teacher", "features, data", "features, teacher", "mid-point")


def draw_ratios(compared: dict[str, dict[str, Comparison]], title: str) -> Figure:
    """Draw plateau values over the baseline's with 95 % intervals, filled where the difference counts."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for panel, steps in zip(panels, (1, 2, 5), strict=True):
        metrics = [f"{row}/{steps}" for row in ROWS] + ["midpoint"] * (steps == 2)
        for k, (name, comparisons) in enumerate(compared.items()):
            ratios = [comparisons[metric] for metric in metrics]
            means = np.array([ratio.mean for ratio in ratios])
            ends = np.array([ratio.interval() for ratio in ratios]).T
            places = np.arange(len(metrics)) + 0.14 * (k - (len(compared) - 1) / 2)
            colour = STYLES[name][0]
            label = f"{METHODS[name].label} ({len(ratios[0].ratios)} seeds)"
            panel.errorbar(means, places, xerr=np.abs(ends - means), fmt="none", ecolor=colour, capsize=4)
            counts = [ratio.counts for ratio in ratios]
            faces = [colour if count else "white" for count in counts]
            panel.scatter(means, places, 60, c=faces, edgecolors=colour, zorder=3)
            panel.scatter([], [], 60, color=colour, label=label)  # for the legend
        panel.axvline(1.0, color="0.5", linewidth=1)
        panel.set_yticks(range(len(ROW_LABELS)), ROW_LABELS)
        panel.set_title(f"{steps} step{'s' * (steps > 1)}", fontsize=FONT)
        panel.tick_params(labelsize=FONT - 2)
        panel.grid(axis="x", alpha=0.3)
    panels[0].set_ylim(len(ROW_LABELS) - 0.5, -0.5)
    figure.suptitle(title, fontsize=FONT)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=FONT - 1, frameon=False)
    return figure


def draw_alignment(results: dict[Run, History], config: Configuration, problem: str) -> Figure:
    """Draw the error of the first of two jumps over training, and at the end over the level that is jumped to."""
    figure = Figure(figsize=(13, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    levels = ap.karras_noise_levels(config.num_levels)[1:].numpy()
    for name in config.methods:
        runs = [history for run, history in results.items() if (run.problem, run.method) == (problem, name)]
        if not runs:
            continue
        colour, dashes = STYLES[name]
        style = {"color": colour, "linestyle": dashes, "linewidth": 2.2, "label": METHODS[name].label}
        midpoints = np.log([[point["midpoint"] for point in run] for run in runs])
        left.plot([point["iteration"] for point in runs[0]], np.exp(midpoints.mean(0)), **style)
        right.plot(levels, np.exp(np.log([run[-1]["levels"] for run in runs]).mean(0)), **style)
    left.set_xscale("symlog", linthresh=config.problem(problem).iterations / 128)
    left.set(
        xlabel="iteration", ylabel="squared error at the mid-point,\nrelative to the teacher's point", yscale="log"
    )
    right.set(
        xlabel="noise level of the intermediate point", ylabel="the same, after training", xscale="log", yscale="log"
    )
    for panel in (left, right):
        panel.xaxis.label.set_fontsize(FONT)
        panel.yaxis.label.set_fontsize(FONT)
        panel.tick_params(labelsize=FONT - 2, which="both")
        panel.grid(alpha=0.3)
    left.set_title(f"{problem}: two jumps", fontsize=FONT)
    right.set_title("jumps from the top to every level", fontsize=FONT)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=FONT - 1, frameon=False)
    return figure
