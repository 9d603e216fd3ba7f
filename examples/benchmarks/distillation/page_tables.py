"""The tables of docs/evidence.md, from the numbers in docs/evidence: one of each kind for each set of data.

python examples/benchmarks/distillation/page_tables.py     # prints them; a test compares them with the page
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from configurations import BASELINE, CPU, LONG, Configuration, Run
from preconditionings import METHODS
from report import ROOT, load_stored
from speedups import History, Speedup, find, speedup
from tables import rms_over_jumps, table

METRICS = {
    "ode/1": "ODE's end, 1 step",
    "ode/2": "ODE's end, 2 steps",
    "features-data/1": "features, 1 step",
    "features-data/2": "features, 2 steps",
}
IMAGES = ("photographs", "digits", "textures")
STORED = ROOT / "docs" / "evidence" / "cpu_results.json"


def number(value: float, down: bool = False) -> str:
    """Write a factor with as many digits as it deserves; a lower bound is not rounded up."""
    digits = 2 if value < 2 else 1 if value < 10 else 0
    return f"{math.floor(value * 10**digits) / 10**digits if down else value:.{digits}f}"


def words(value: Speedup | None) -> str:
    """Write a speed-up; how many seeds get there, where not all do."""
    if value is None:
        return ""
    if value.bound == "<":
        there = sum(note != "never" for note in value.notes)
        return f"{there} of {len(value.notes)} seeds" if there else "never"
    low, high = value.bootstrap()
    prefix = "at least " if value.bound else ""
    return f"{prefix}{number(value.mean, bool(prefix))} [{number(low)}, {number(high)}]"


def names_of(config: Configuration, problem: str) -> list[str]:
    """Return the methods whose students jump anywhere."""
    return [name for name in config.methods_of(config.problem(problem)) if METHODS[name].times == 2]


def speedup_table(results: dict[Run, History], config: Configuration, problem: str) -> str:
    """Return how many times fewer iterations each method needs than CTM's."""
    names = [name for name in names_of(config, problem) if name != BASELINE]
    rows = [[METHODS[n].label, *(words(speedup(results, config, problem, n, m)) for m in METRICS)] for n in names]
    return table([problem, *METRICS.values()], rows)


def final_table(results: dict[Run, History], config: Configuration, problem: str) -> str:
    """Return means over the seeds after training."""
    rows = []
    for name in names_of(config, problem):
        runs = [run for seed in config.seeds if (run := find(results, config, problem, name, seed))]
        rows.append([METHODS[name].label, *(f"{np.mean([run[-1][m] for run in runs]):.3g}" for m in METRICS)])
    return table([f"{problem}, {config.problem(problem).iterations} iterations", *METRICS.values()], rows)


def long_table(results: dict[Run, History], config: Configuration) -> str:
    """Return both methods' distances to the ODE's end in the course of a long training, of the first seed."""
    rows, pairs = [], [(m, name) for m in ("ode/1", "ode/2") for name in config.long_methods]
    for problem in config.problems:
        runs = {n: find(results, config, problem.name, n, config.seeds[0], times=LONG) for n in config.long_methods}
        for times in range(1, LONG + 1):
            iterations = times * problem.iterations
            ends = {n: next(p for p in run or [] if p["iteration"] == iterations) for n, run in runs.items()}
            rows.append([f"{problem.name}, {iterations}", *(f"{ends[name][metric]:.3g}" for metric, name in pairs)])
    labels = [f"{METHODS[name].label}, {metric[-1]} step{'s' * (metric[-1] > '1')}" for metric, name in pairs]
    return table(["iterations", *labels], rows)


def gap_table(results: dict[Run, History], config: Configuration, problem: str, maps: dict[str, Any]) -> str:
    """Return what is known before training beside the speed-up in one step."""
    rows = []
    for name in config.methods:
        known = [f"{rms_over_jumps(maps[key][name]):.3g}" for key in ("gap_start", "gap_target", "c_out")]
        faster = words(speedup(results, config, problem, name, "ode/1")) if name != BASELINE else "1"
        rows.append([METHODS[name].label, *known, faster.split(" [")[0]])
    return table([problem, "gap at start", "at target", "$c_{\\text{out}}$", "faster, 1 step"], rows)


def all_tables(path: Path = STORED, config: Configuration = CPU) -> list[str]:
    """Return the tables in the page's order."""
    results, teachers, _ = load_stored(path)
    return [
        *(speedup_table(results, config, problem.name) for problem in config.problems),
        *(final_table(results, config, problem) for problem in IMAGES),
        long_table(results, config),
        *(gap_table(results, config, problem, teachers[problem]["maps"]) for problem in IMAGES),
    ]


if __name__ == "__main__":
    print("\n".join(all_tables()))
