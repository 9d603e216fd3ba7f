"""Tables of the results, in Markdown, and what their columns mean."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from configurations import BASELINE, LONG, Configuration, Run
from preconditionings import METHODS
from speedups import History, find, iterations_to, speedup

FINAL = {
    "ode/1": "ODE 1",
    "ode/2": "ODE 2",
    "ode/5": "ODE 5",
    "midpoint": "midpoint",
    "pixels-data/1": "pixels 1",
    "pixels-data/2": "pixels 2",
    "pixels-data/5": "pixels 5",
    "features-data/1": "features 1",
    "features-data/2": "features 2",
    "features-data/5": "features 5",
    "pixels-teacher/2": "pixels, teacher, 2",
    "features-teacher/2": "features, teacher, 2",
    "precision/2": "precision 2",
    "recall/2": "recall 2",
    "nearest/2": "nearest 2",
}
SPEEDUPS = (
    "ode/1",
    "ode/2",
    "ode/5",
    "midpoint",
    "pixels-data/2",
    "features-data/1",
    "features-data/2",
    "pixels-teacher/2",
)

EXPLANATION = """
Of all distances and gaps, less is better. Numbers behind a name are steps of sampling. Means over the seeds; ±: half
their range. How it is computed: [metrics.py](../../examples/benchmarks/distillation/metrics.py),
[speedups.py](../../examples/benchmarks/distillation/speedups.py).

- **ODE**: squared distance, mean over elements, to the end of the teacher's ODE from the same noise (Heun's steps on
  the training grid). **midpoint**: the same of the first of two jumps, to the teacher's point at that level, relative
  to that point's mean square.
- **pixels**, **features**: squared Fréchet distance to the data (with "teacher": to the teacher's samples from other
  noise) in 64 principal components, fewer where data have fewer elements, and in the means of random convolutional
  features (of points: random cosines).
- **precision**, **recall**: in the principal components, against the data, k = 3 neighbours. **nearest**: RMS distance,
  per element, to the nearest sample of the data: below the teacher's is memorising, or blur.
- **Teachers**: distances of the teacher's own samples; of samples of the data, the least that can be measured
  ("data:"). **error of the grid**: squared distance between the ends of its ODE on the training grid and on 80 levels.
- **Speed-up**: iterations that the named baseline needs to its own last value, divided by those to the same value.
  Geometric mean and range of the seeds. `<`: an upper bound, one seed or more never gets there and counts as if it did
  at the end. `>`: a lower bound, one or more are as good before training, which counts as the first evaluation. Where
  the baseline itself ends worse than it began, as in "midpoint" on the digits, it says nothing. A curve that reaches a
  value may leave it again.
- **Gaps**: of consistency, at the start and at the target of jumps between ten levels; **c_out**: what multiplies the
  network's output; **D\\***: the output that a perfect student needs. All RMS.
- **Time**: medians over all runs; **ratio** of processor time to the baseline's.
"""


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def present(config: Configuration, problem: str, results: dict[Run, History], times: int | None = None) -> list[str]:
    """Return the methods with a finished run."""
    names = [n for n in config.methods_of(config.problem(problem)) if times is None or METHODS[n].times == times]
    return [n for n in names if any(find(results, config, problem, n, seed) for seed in config.seeds)]


def final_table(results: dict[Run, History], config: Configuration, problem: str, start: bool = False) -> str:
    """Return each method's values after (or before) training: mean over the seeds and half their range."""
    rows = []
    for name in present(config, problem, results):
        runs = [r for seed in config.seeds if (r := find(results, config, problem, name, seed))]
        points = [run[0 if start else -1] for run in runs]
        cells = []
        for metric in FINAL:
            values = [point[metric] for point in points if metric in point]
            spread = f" ± {np.ptp(values) / 2:.1g}" if len(values) > 1 and not start else ""
            cells.append(f"{np.mean(values):.3g}{spread}" if values else "")
        rows.append([METHODS[name].label, *cells])
    return table(["", *FINAL.values()], rows)


def speedup_table(results: dict[Run, History], config: Configuration, problem: str, baseline: str) -> str:
    """Return speed-ups over a baseline, of students of its kind, with bootstrap intervals."""
    names = [n for n in present(config, problem, results, METHODS[baseline].times) if n != baseline]
    rows = {n: [speedup(results, config, problem, n, metric, baseline) for metric in SPEEDUPS] for n in names}
    known = [i for i in range(len(SPEEDUPS)) if any(row[i] for row in rows.values())]
    header = ["", *(FINAL[SPEEDUPS[i]] for i in known)]
    return table(header, [[METHODS[n].label, *(str(row[i] or "") for i in known)] for n, row in rows.items()])


def rate_table(results: dict[Run, History], config: Configuration, problem: str) -> str:
    """Return final values of the first seed at all learning rates."""
    rates = sorted({config.learning_rate, *config.sweep_rates})
    rows = []
    for name in config.sweep_methods:
        for rate in rates:
            run = find(results, config, problem, name, config.seeds[0], rate)
            if run:
                values = [run[-1][metric] for metric in SPEEDUPS if metric in run[-1]]
                rows.append([METHODS[name].label, f"{rate:g}", *(f"{value:.3g}" for value in values)])
    return table(["", "learning rate", *(FINAL[metric] for metric in SPEEDUPS)], rows)


def best_rate_table(results: dict[Run, History], config: Configuration, problem: str) -> str:
    """Return speed-ups of the first seed with each method at its best learning rate, the baseline's too."""
    rates = (config.learning_rate, *config.sweep_rates)

    def best(name: str, metric: str) -> tuple[History, float] | None:
        runs = [(run, rate) for rate in rates if (run := find(results, config, problem, name, config.seeds[0], rate))]
        return min(runs, key=lambda pair: pair[0][-1][metric], default=None)

    rows = []
    for name in config.sweep_methods:
        cells = []
        for metric in SPEEDUPS:
            own, other = best(name, metric), best(BASELINE, metric)
            if own is None or other is None:
                continue
            goal = other[0][-1][metric]
            reached, note = iterations_to(own[0], metric, goal)
            sign = {"before": ">", "never": "<", "": ""}[note]
            cells.append(f"{sign}{iterations_to(other[0], metric, goal)[0] / reached:.2f} ({own[1]:g})")
        rows.append([METHODS[name].label, *cells])
    return table(["", *(FINAL[metric] for metric in SPEEDUPS)], [row for row in rows if len(row) > 1])


def long_table(results: dict[Run, History], config: Configuration, problem: str) -> str:
    """Return values of the first seed in the course of a long training."""
    rows = []
    for name in config.long_methods:
        run = find(results, config, problem, name, config.seeds[0], times=LONG)
        for point in run or []:
            if point["iteration"] >= config.problem(problem).iterations:
                values = [f"{point[metric]:.3g}" for metric in SPEEDUPS]
                rows.append([METHODS[name].label, str(point["iteration"]), *values])
    return table(["", "iterations", *(FINAL[metric] for metric in SPEEDUPS)], rows)


def rms_over_jumps(values: list[list[float]]) -> float:
    """Return the root mean square of a map over its jumps."""
    return float(np.sqrt(np.mean(np.array(values)[np.triu_indices(len(values), 1)] ** 2)))


def diagnosis_table(maps: dict[str, Any]) -> str:
    """Return what is known before training, RMS over all jumps of the maps."""
    columns = {"gap_start": "gap at the start", "gap_target": "gap at the target", "c_out": "c_out", "required": "D*"}
    rows = [
        [METHODS[name].label, *(f"{rms_over_jumps(maps[column][name]):.3g}" for column in columns)]
        for name in maps["c_out"]
    ]
    return table(["", *columns.values()], rows)


def time_table(results: dict[Run, History], config: Configuration, problem: str) -> str:
    """Return milliseconds per iteration: medians over the runs, and ratios to the baseline."""

    def milliseconds(name: str, clock: str) -> float:
        runs = [h[-1] for r, h in results.items() if (r.problem, r.method) == (problem, name)]
        return 1e3 * float(np.median([point[clock] / point["iteration"] for point in runs]))

    clocks = ("wall_seconds", "processor_seconds")
    names = present(config, problem, results)
    rows = [[METHODS[n].label, *(f"{milliseconds(n, clock):.1f}" for clock in clocks)] for n in names]
    if BASELINE in names:
        for row, name in zip(rows, names, strict=True):
            row.append(f"{milliseconds(name, clocks[1]) / milliseconds(BASELINE, clocks[1]):.3f}")
    return table(["", "wall, ms", "processor, ms", "ratio"], rows)


def teacher_table(described: dict[str, dict[str, Any]]) -> str:
    """Return what a perfect student would score."""
    keys = ("pixels-data", "features-data", "pixels-teacher", "features-teacher")
    rows = []
    for name, d in described.items():
        own = [f"{d['frechet_of_teacher'][key]:.3g}" for key in keys]
        floor = [f"{d['frechet_of_data'][key]:.3g}" for key in keys[:2]]
        checks = [f"{d['checks_of_teacher'][key]:.3g}" for key in ("precision", "recall", "nearest")]
        size = [f"{d['samples']}", f"{d['parameters']}", f"{d['sigma_data']:.3f}"]
        rows.append([name, *size, *own, *floor, *checks, f"{d['squared_error_of_training_grid']:.2g}"])
    header = ["", "samples", "parameters", "σ_data", *(f"teacher: {key}" for key in keys)]
    header += [f"data: {key}" for key in keys[:2]] + ["precision", "recall", "nearest", "error of the grid"]
    return table(header, rows)
