"""What training to the plateau showed: ratios over seeds with tests, speed-ups, alignment. Its protocol: README.md.

python examples/benchmarks/distillation/plateau.py    # of distillation_output/plateau, else of docs/evidence

Writes docs/evidence/plateau_tables.md, docs/evidence/plateau_results.json and figures. May be called while runs go on.
"""

import argparse
import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from configurations import BASELINE, CONFIGURATIONS, PLATEAU_SHARES, Configuration, Run
from plateau_figures import draw_alignment, draw_ratios
from preconditionings import METHODS
from report import ROOT, load_results, load_stored, provenance
from scipy import stats
from speedups import History, iterations_to
from storage import write_json
from tables import table

CONFIG = CONFIGURATIONS["plateau"]
KINDS = ("ode", "pixels-data", "pixels-teacher", "features-data", "features-teacher")
METRICS = (*(f"{kind}/{steps}" for kind in KINDS for steps in (1, 2, 5)), "midpoint")
LABELS = {
    "ode": "ODE's end",
    "pixels-data": "pixels, to the data",
    "pixels-teacher": "pixels, to the teacher's samples",
    "features-data": "features, to the data",
    "features-teacher": "features, to the teacher's samples",
    "midpoint": "mid-point of two jumps",
}
SIGNIFICANT, FLAT, RESAMPLES = 0.05, 0.05, 10_000
Results = dict[Run, History]


@dataclass(frozen=True)
class Comparison:
    """A method against the baseline in one metric on one set of data.

    Attributes:
        ratios: Plateau value over the baseline's, one for each seed that both have finished.
        p: Two-sided, of the paired t test on the logarithms; NaN for one seed.
        corrected: The same by Holm's method over all metrics of the method.
    """

    ratios: tuple[float, ...]
    p: float
    corrected: float = math.nan

    @property
    def mean(self) -> float:
        """The geometric mean over the seeds."""
        return math.exp(np.log(self.ratios).mean())

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of Student's t on the logarithms."""
        logs = np.log(self.ratios)
        half = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / len(logs) ** 0.5
        return self.mean * math.exp(-half), self.mean * math.exp(half)

    @property
    def counts(self) -> bool:
        """Whether the difference does."""
        return self.corrected < SIGNIFICANT

    def __str__(self) -> str:
        if len(self.ratios) < 2:
            return f"{self.mean:.3f}"
        low, high = self.interval()
        text = f"{self.mean:.3f} [{low:.3f}, {high:.3f}]"
        return f"**{text}**" if self.counts else text


def on_plateau(history: History, metric: str, iterations: int) -> np.ndarray:
    """Return a curve's values at the evaluations of the plateau. Shape ``(12,)``."""
    due = {round(share * iterations) for share in PLATEAU_SHARES}
    return np.array([point[metric] for point in history if point["iteration"] in due])


def plateau_value(history: History, metric: str, iterations: int) -> float:
    """Return the geometric mean over the plateau."""
    return math.exp(np.log(on_plateau(history, metric, iterations)).mean())


def drift(history: History, metric: str, iterations: int) -> float:
    """Return the geometric mean of the plateau's second half over that of its first."""
    first, second = np.log(on_plateau(history, metric, iterations)).reshape(2, -1).mean(1)
    return math.exp(second - first)


def pairs_of(results: Results, problem: str, method: str) -> list[tuple[History, History]]:
    """Return the histories of a method and of the baseline, of the seeds that both have finished."""
    runs = {(run.method, run.seed): history for run, history in results.items() if run.problem == problem}
    seeds = sorted(seed for name, seed in runs if name == method and (BASELINE, seed) in runs)
    return [(runs[method, seed], runs[BASELINE, seed]) for seed in seeds]


def methods_of(results: Results, config: Configuration, problem: str) -> list[str]:
    """Return the methods that can be compared with the baseline."""
    return [name for name in config.methods if name != BASELINE and pairs_of(results, problem, name)]


def compare(results: Results, config: Configuration, problem: str, method: str) -> dict[str, Comparison]:
    """Compare a method with the baseline in every metric."""
    iterations, pairs, found = config.problem(problem).iterations, pairs_of(results, problem, method), {}
    for metric in METRICS:
        values = np.log([[plateau_value(history, metric, iterations) for history in pair] for pair in pairs])
        logs = values[:, 0] - values[:, 1]
        p = float(stats.ttest_1samp(logs, 0.0).pvalue) if len(logs) > 1 else math.nan
        found[metric] = Comparison(tuple(np.exp(logs).tolist()), p)
    adjusted = holm([comparison.p for comparison in found.values()])
    return {m: Comparison(c.ratios, c.p, p) for (m, c), p in zip(found.items(), adjusted, strict=True)}


def holm(p: list[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979)."""
    order, adjusted, largest = sorted(range(len(p)), key=lambda i: p[i]), [math.nan] * len(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest if p[i] == p[i] else math.nan
    return adjusted


def smoothed(history: History, metric: str) -> History:
    """Return a curve whose values are geometric means of themselves and their neighbours."""
    logs = [math.log(point[metric]) for point in history]
    means = [np.mean(logs[max(0, i - 1) : i + 2]) for i in range(len(logs))]
    return [{"iteration": point["iteration"], metric: math.exp(m)} for point, m in zip(history, means, strict=True)]


def speedup(results: Results, config: Configuration, problem: str, method: str, metric: str) -> str:
    """Return how many times fewer iterations a method needs to the baseline's plateau, in words."""
    logs, notes = [], []
    for own, other in pairs_of(results, problem, method):
        goal = plateau_value(other, metric, config.problem(problem).iterations)
        reached, note = iterations_to(smoothed(own, metric), metric, goal)
        logs.append(math.log(iterations_to(smoothed(other, metric), metric, goal)[0] / reached))
        notes.append(note)
    if not logs:
        return ""
    if "never" in notes:
        return f"{sum(note != 'never' for note in notes)} of {len(notes)} seeds get there"
    low, high = np.exp(bootstrap(np.array(logs)))
    interval = f" [{low:.2f}, {high:.2f}]" if len(logs) > 1 else ""
    return f"{'>' if 'before' in notes else ''}{math.exp(np.mean(logs)):.2f}{interval}"


def bootstrap(logs: np.ndarray) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean: of all resamples, or of many."""
    if len(logs) ** len(logs) <= RESAMPLES:
        means = [np.mean(sample) for sample in itertools.product(logs, repeat=len(logs))]
    else:
        means = np.random.default_rng(0).choice(logs, (RESAMPLES, len(logs))).mean(1)
    low, high = np.quantile(means, [0.025, 0.975], method="inverted_cdf")
    return float(low), float(high)


def name_of(metric: str) -> str:
    """Return a metric in words."""
    kind, _, steps = metric.partition("/")
    return f"{LABELS[kind]}, {steps} step{'s' * (steps != '1')}" if steps else LABELS[kind]


def tables(results: Results, config: Configuration, problem: str) -> list[str]:
    """Return the tables of one set of data, with headings."""
    iterations = config.problem(problem).iterations
    methods = methods_of(results, config, problem)
    base = [history for run, history in results.items() if (run.problem, run.method) == (problem, BASELINE)]
    compared = {name: compare(results, config, problem, name) for name in methods}
    rows = []
    for metric in METRICS:
        value = math.exp(np.mean([math.log(plateau_value(history, metric, iterations)) for history in base]))
        change = math.exp(np.mean([math.log(drift(history, metric, iterations)) for history in base]))
        flat = "" if abs(change - 1) < FLAT else f" (not flat: {change:.2f})"
        rows.append([name_of(metric), f"{value:.3g}{flat}", *(str(compared[name][metric]) for name in methods)])
    labels = [f"{METHODS[name].label} ({len(pairs_of(results, problem, name))} seeds)" for name in methods]
    faster = [[name_of(m), *(speedup(results, config, problem, name, m) for name in methods)] for m in METRICS]
    return [
        f"## {problem}\n\nPlateau values over CTM's; bold: Holm-corrected p below {SIGNIFICANT:g}.\n",
        table(["", f"CTM ({len(base)} seeds)", *labels], rows),
        "Iterations of CTM to its own plateau value, over those to the same value:\n",
        table(["", *labels], faster),
    ]


def main() -> None:
    """Make the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "distillation_output", help="where run.py wrote")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where tables and figures go")
    args = parser.parse_args()
    folder, raw = args.output / CONFIG.name, args.docs / "evidence" / f"{CONFIG.name}_results.json"
    if folder.is_dir():
        results, made = load_results(CONFIG, folder), provenance(CONFIG)
        runs = [{**vars(run), "history": history} for run, history in results.items()]
        write_json({"made": made, "teachers": {}, "runs": runs}, raw)
    elif raw.is_file():
        results, _, made = load_stored(raw)
    else:
        parser.error(f"neither {folder}, which run.py --plateau writes, nor {raw} exists")
    parts = ["# Training to the plateau: tables\n", made + "\n"]
    for problem in (p.name for p in CONFIG.problems if any(run.problem == p.name for run in results)):
        parts += tables(results, CONFIG, problem)
        images = args.docs / "images" / "evidence"
        images.mkdir(parents=True, exist_ok=True)
        names = methods_of(results, CONFIG, problem)  # of fewer than three seeds, intervals tell nothing
        names = [name for name in names if len(pairs_of(results, problem, name)) > 2]
        compared = {name: compare(results, CONFIG, problem, name) for name in names}
        figures = {
            "alignment": draw_alignment(results, CONFIG, problem),
            "ratios": draw_ratios(compared, f"{problem}, long training: values over CTM's"),
        }
        for name, figure in figures.items():
            figure.savefig(images / f"{CONFIG.name}_{problem}_{name}.png", dpi=100)
    (args.docs / "evidence" / f"{CONFIG.name}_tables.md").write_text("\n".join(parts))
    print(f"tables and raw numbers are in {raw.parent}")


if __name__ == "__main__":
    main()
