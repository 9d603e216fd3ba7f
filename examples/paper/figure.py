"""The paper's figure 3 from runs: FID over iterations, one line for each preconditioning.

python examples/paper/figure.py runs/u runs/u-ctm --steps 2 --output figure3.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from settings import positive


def curve(run: Path, steps: int) -> tuple[str, dict[int, float]]:
    """Return a run's preconditioning, and its FID by iteration; of several measurements the last with most samples."""
    results = run / "fid.jsonl"
    if not results.is_file():
        raise SystemExit(
            f"{run} has no FIDs yet: evaluate.py --folder {run} --snapshots all --reference ... --inception ..."
        )
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    of_steps = [line for line in lines if line["steps"] == steps]
    most = max((line["num_samples"] for line in of_steps), default=0)  # FIDs of fewer samples are larger
    fids = {line["iteration"]: line["fid"] for line in of_steps if line["num_samples"] == most}
    if not fids:
        raise SystemExit(f"{run} has FIDs of {sorted({line['steps'] for line in lines})} steps, none of {steps}")
    name = json.loads((run / "settings.json").read_text())["preconditioning"]
    return name, dict(sorted(fids.items()))


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of train.py that evaluate.py has measured")
    parser.add_argument("--steps", type=positive, default=2, help="of the samples (2)")
    parser.add_argument("--output", type=Path, default=Path("figure3.png"), help="picture to write (figure3.png)")
    args = parser.parse_args()
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for run in args.runs:
        name, fids = curve(run, args.steps)
        panel.plot(list(fids), list(fids.values()), marker=".", label=f"{name} ({run.name})")
    panel.set(xlabel="iteration", ylabel=f"FID, {args.steps} steps", yscale="log")
    panel.legend()
    figure.savefig(args.output, dpi=150)
    print(args.output)


if __name__ == "__main__":
    main()
