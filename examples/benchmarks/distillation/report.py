"""Make tables, figures and one file of raw numbers from what run.py wrote. May be called while runs are going on.

python examples/benchmarks/distillation/report.py                 # of distillation_output/cpu
python examples/benchmarks/distillation/report.py --size gpu

Where run.py did not run, tables and figures are made from the numbers in docs/evidence, all but the samples.
"""

import argparse
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
from configurations import BASELINE, CONFIGURATIONS, LONG, Configuration, Run
from figures import draw_curves, draw_gaps, draw_samples, draw_scales, draw_speedups
from matplotlib.figure import Figure
from preconditionings import METHODS
from safetensors.torch import load_file
from speedups import History
from storage import write_json
from tables import (
    EXPLANATION,
    best_rate_table,
    diagnosis_table,
    final_table,
    long_table,
    present,
    rate_table,
    speedup_table,
    teacher_table,
    time_table,
)

ROOT = Path(__file__).parents[3]
DRAWN = (BASELINE, "analytic-backward", "least-squares", "per-mode-dct", "shifted")


def load_results(config: Configuration, folder: Path) -> dict[Run, History]:
    """Return the history of every finished run."""
    results = {}
    for problem in config.problems:
        for path in sorted((folder / problem.name / "runs").glob("*.json")):
            content = json.loads(path.read_text())
            results[Run(**content["run"])] = content["history"]
    return results


def load_stored(path: Path) -> tuple[dict[Run, History], dict[str, Any], str]:
    """Return an earlier report's histories, teachers and provenance."""
    stored = json.loads(path.read_text())
    results = {Run(**{k: v for k, v in run.items() if k != "history"}): run["history"] for run in stored["runs"]}
    return results, stored["teachers"], stored["made"]


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


def problem_tables(results: dict[Run, History], config: Configuration, problem: str, maps: dict[str, Any]) -> list[str]:
    """Return all tables of one problem, with headings."""
    there = present(config, problem, results)
    baselines = [name for name in (BASELINE, "analytic-backward", "cm") if name in there]
    parts = [
        f"## {problem}: after {config.problem(problem).iterations} iterations\n",
        final_table(results, config, problem),
        "Before training:\n",
        final_table(results, config, problem, start=True),
    ]
    for baseline in baselines:
        parts += [
            f"### Speed-up over {METHODS[baseline].label}\n",
            speedup_table(results, config, problem, baseline),
        ]
    return [
        *parts,
        "### Gaps before training, c_out and the required output: RMS over jumps\n",
        diagnosis_table(maps),
        "### Learning rates, one seed\n",
        rate_table(results, config, problem),
        "### Each at its best learning rate: speed-up (rate), one seed\n",
        best_rate_table(results, config, problem),
        "### Longer training, one seed\n",
        long_table(results, config, problem),
        "### Time per iteration\n",
        time_table(results, config, problem),
    ]


def page(results: dict[Run, History], config: Configuration, described: dict[str, Any], made: str) -> str:
    """Return the page of all tables."""
    parts = [f"# Distillation benchmark: tables ({config.name})\n", made + "\n", EXPLANATION.strip() + "\n"]
    parts += ["## Teachers\n", teacher_table(described)]
    for problem, teacher in described.items():
        parts += problem_tables(results, config, problem, teacher["maps"])
    return "\n".join(parts)


def main() -> None:
    """Make the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(CONFIGURATIONS), default="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "distillation_output", help="where run.py wrote")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where tables and figures go")
    args = parser.parse_args()
    config = CONFIGURATIONS[args.size]
    folder, images, evidence = args.output / config.name, args.docs / "images" / "evidence", args.docs / "evidence"
    for place in (images, evidence):
        place.mkdir(parents=True, exist_ok=True)
    raw = evidence / f"{config.name}_results.json"

    if folder.is_dir():
        results, made = load_results(config, folder), provenance(config)
        described = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/teacher.json")}
        runs = [{**vars(run), "history": history} for run, history in results.items()]
    elif raw.is_file():
        results, described, made = load_stored(raw)
    else:
        parser.error(f"neither {folder}, which run.py writes, nor {raw} exists")
    described = {p.name: described[p.name] for p in config.problems if any(run.problem == p.name for run in results)}

    def save(figure: Figure | None, name: str) -> None:
        if figure is not None:
            figure.savefig(images / f"{config.name}_{name}.png", dpi=100)

    for problem, teacher in described.items():
        maps = teacher["maps"]
        save(draw_curves(results, config, problem), f"{problem}_curves")
        save(draw_curves(results, config, problem, LONG), f"{problem}_long_curves")
        save(draw_gaps(maps, [name for name in DRAWN if name in maps["c_out"]]), f"{problem}_gaps")
        save(draw_scales(maps, list(maps["c_out"])), f"{problem}_scales")
        if folder.is_dir():
            reference = load_file(folder / problem / "reference.safetensors")["ends"]
            save(draw_samples(config, folder, problem, reference), f"{problem}_samples")
    if results:
        save(draw_speedups(results, config), "speedups")
    (evidence / f"{config.name}_tables.md").write_text(page(results, config, described, made))
    if folder.is_dir():
        write_json({"made": made, "teachers": described, "runs": runs}, raw)
    print(f"tables and raw numbers are in {evidence}, figures in {images}")


if __name__ == "__main__":
    main()
