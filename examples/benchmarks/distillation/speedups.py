"""How many times fewer iterations a method needs than a baseline to the baseline's own final value.

For each seed, the goal is the baseline's value at the end of its training; iterations are those at which a curve first
is as good, interpolated in the logarithm of the iteration between evaluations. Curves that are as good before training
count as if they had needed as long as to the first evaluation (the speed-up is a lower bound), curves that never get
there as if they did at the very end (an upper bound).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from configurations import BASELINE, Configuration, Run
from scipy import stats

History = list[dict[str, Any]]


@dataclass(frozen=True)
class Speedup:
    """A speed-up over several seeds.

    Attributes:
        ratios: One per seed, against the baseline of the same seed.
        notes: One per seed: "before", "never" or "", of `iterations_to`.
    """

    ratios: tuple[float, ...]
    notes: tuple[str, ...]

    @property
    def bound(self) -> str:
        """Return ">" or "<" where a seed's ratio is a lower or an upper bound, "" where all are exact."""
        return ">" if "before" in self.notes else "<" if "never" in self.notes else ""

    @property
    def mean(self) -> float:
        """The geometric mean."""
        return math.exp(float(np.log(self.ratios).mean()))

    def bootstrap(self) -> tuple[float, float]:
        """Return the 95 % percentile interval of the mean over all resamples; of three seeds, their range."""
        logs = np.log(self.ratios)
        means = [np.mean(sample) for sample in itertools.product(logs, repeat=len(logs))]
        low, high = np.exp(np.quantile(means, [0.025, 0.975], method="inverted_cdf"))
        return float(low), float(high)

    def student_t(self) -> tuple[float, float]:
        """Return the 95 % interval if logarithms are normal: wider than the bootstrap's, as few seeds demand."""
        logs = np.log(self.ratios)
        if len(logs) < 2:
            return 0.0, math.inf
        half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
        return self.mean * math.exp(-half), self.mean * math.exp(half)

    def __str__(self) -> str:
        low, high = self.bootstrap()
        return f"{self.bound}{self.mean:.2f} [{low:.2f}, {high:.2f}]"


def shorten(history: History, iterations: int) -> History:
    """Return the part of a run up to an iteration: a long run begins as a short one."""
    return [point for point in history if point["iteration"] <= iterations]


def iterations_to(history: History, metric: str, goal: float) -> tuple[float, str]:
    """Return when a curve first reaches a goal, and "before", "never" or ""."""
    points = [(point["iteration"], point[metric]) for point in history]
    if points[0][1] <= goal:
        return points[1][0], "before"
    for (i, value), (j, next_value) in itertools.pairwise(points):
        if next_value <= goal:
            share = (value - goal) / (value - next_value)
            return (share * j if i == 0 else i * (j / i) ** share), ""
    return points[-1][0], "never"


def speedup(
    results: dict[Run, History], config: Configuration, problem: str, method: str, metric: str, baseline: str = BASELINE
) -> Speedup | None:
    """Return the speed-up over the seeds that both have finished; None without any, or without that metric."""
    ratios, notes = [], []
    for seed in config.seeds:
        own, other = (find(results, config, problem, name, seed) for name in (method, baseline))
        if own is None or other is None or metric not in own[0] or metric not in other[0]:
            continue
        goal = other[-1][metric]
        reached, note = iterations_to(own, metric, goal)
        ratios.append(iterations_to(other, metric, goal)[0] / reached)
        notes.append(note)
    return Speedup(tuple(ratios), tuple(notes)) if ratios else None


def find(
    results: dict[Run, History],
    config: Configuration,
    problem: str,
    method: str,
    seed: int,
    rate: float | None = None,
    times: int = 1,
) -> History | None:
    """Return the history of a run of ``times`` the usual length, out of a longer one if need be."""
    rate, length = rate or config.learning_rate, times * config.problem(problem).iterations
    for run, history in results.items():
        same = (run.problem, run.method, run.seed, run.learning_rate) == (problem, method, seed, rate)
        if same and run.iterations >= length:
            return shorten(history, length)
    return None
