"""Make tables, figures and one file of raw numbers from the stored results. May be called while runs are going on.

python examples/benchmarks/distillation/report.py                 # of distillation_output/cpu
python examples/benchmarks/distillation/report.py --size gpu
"""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from configurations import BASELINE, CONFIGURATIONS, LONG, Configuration, Run
from figures import draw_curves, draw_gaps, draw_samples, draw_scales, draw_speedups
from matplotlib.figure import Figure
from preconditionings import METHODS
from safetensors.torch import load_file
from speedups import History, find, iterations_to, speedup
from storage import write_json

ROOT = Path(__file__).parents[3]
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
DRAWN = (BASELINE, "analytic-backward", "least-squares", "per-mode-dct", "shifted")
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


def load_results(config: Configuration, folder: Path) -> dict[Run, History]:
    """Return the history of every finished run."""
    results = {}
    for problem in config.problems:
        for path in sorted((folder / problem.name / "runs").glob("*.json")):
            content = json.loads(path.read_text())
            results[Run(**content["run"])] = content["history"]
    return results


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
    """Return speed-ups with bootstrap intervals, and (in brackets) Student's."""
    rows = []
    for name in present(config, problem, results, times=2):
        values = [speedup(results, config, problem, name, metric, baseline) for metric in SPEEDUPS]
        if name != baseline:
            rows.append([METHODS[name].label, *("" if v is None else str(v) for v in values)])
    return table(["", *(FINAL[metric] for metric in SPEEDUPS)], rows)


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


def diagnosis_table(maps: dict[str, Any]) -> str:
    """Return what is known before training, RMS over all jumps of the maps."""

    def over_jumps(values: list[list[float]]) -> float:
        jumps = np.array(values)[np.triu_indices(len(values), 1)]
        return float(np.sqrt(np.mean(jumps**2)))

    columns = {"gap_start": "gap at the start", "gap_target": "gap at the target", "c_out": "c_out", "required": "D*"}
    rows = [
        [METHODS[name].label, *(f"{over_jumps(maps[column][name]):.3g}" for column in columns)]
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


def provenance(config: Configuration) -> str:
    """Return the command, the commit and the class of machine."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {config.processes} runs at a time on one thread each"
    if config.device.startswith("cuda") and torch.cuda.is_available():
        machine = torch.cuda.get_device_name()
    flag = "" if config.name == "cpu" else f" --{config.name}"
    return (
        f"Made by `python examples/benchmarks/distillation/run.py{flag}` and `report.py`; commit "
        f"{git.stdout.strip() or 'unknown'}; {machine}; PyTorch {torch.__version__.split('+')[0]}."
    )


def main() -> None:
    """Make the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(CONFIGURATIONS), default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "distillation_output", help="where run.py wrote")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where tables and figures go")
    args = parser.parse_args()
    config = CONFIGURATIONS[args.size]
    folder, images, evidence = args.output / config.name, args.docs / "images" / "evidence", args.docs / "evidence"
    images.mkdir(parents=True, exist_ok=True)
    results = load_results(config, folder)
    problems = [p.name for p in config.problems if any(run.problem == p.name for run in results)]
    described = {name: json.loads((folder / name / "teacher.json").read_text()) for name in problems}

    def save(figure: Figure | None, name: str) -> None:
        if figure is not None:
            figure.savefig(images / f"{config.name}_{name}.png", dpi=100)

    parts = [f"# Distillation benchmark: tables ({config.name})\n", provenance(config) + "\n"]
    parts += [
        "What the columns are: `examples/benchmarks/distillation/metrics.py`.\n",
        "## Teachers\n",
        teacher_table(described),
    ]
    for problem in problems:
        parts += [
            f"## {problem}: after {config.problem(problem).iterations} iterations\n",
            final_table(results, config, problem),
        ]
        parts += ["Before training:\n", final_table(results, config, problem, start=True)]
        for baseline in (BASELINE, "analytic-backward"):
            if baseline in present(config, problem, results):
                parts += [
                    f"### Speed-up over {METHODS[baseline].label}\n",
                    speedup_table(results, config, problem, baseline),
                ]
        parts += [
            "### Gaps before training, c_out and the required output: RMS over jumps\n",
            diagnosis_table(described[problem]["maps"]),
        ]
        parts += ["### Learning rates, one seed\n", rate_table(results, config, problem)]
        parts += [
            "### Each at its best learning rate: speed-up (rate), one seed\n",
            best_rate_table(results, config, problem),
        ]
        parts += ["### Longer training, one seed\n", long_table(results, config, problem)]
        parts += ["### Time per iteration\n", time_table(results, config, problem)]
        save(draw_curves(results, config, problem), f"{problem}_curves")
        save(draw_curves(results, config, problem, LONG), f"{problem}_long_curves")
        maps = described[problem]["maps"]
        save(draw_gaps(maps, [name for name in DRAWN if name in maps["c_out"]]), f"{problem}_gaps")
        save(draw_scales(maps, list(maps["c_out"])), f"{problem}_scales")
        reference = load_file(folder / problem / "reference.safetensors")["ends"]
        save(draw_samples(config, folder, problem, reference), f"{problem}_samples")
    if results:
        save(draw_speedups(results, config), "speedups")
    evidence.mkdir(parents=True, exist_ok=True)
    (evidence / f"{config.name}_tables.md").write_text("\n".join(parts))
    raw = [{**vars(run), "history": history} for run, history in results.items()]
    write_json(
        {"made": provenance(config), "teachers": described, "runs": raw}, evidence / f"{config.name}_results.json"
    )
    print(f"tables and raw numbers are in {evidence}, figures in {images}")


if __name__ == "__main__":
    main()
