"""Run the whole benchmark: teachers, fits, students. May be killed at any time; what is done is not done again.

python examples/benchmarks/distillation/run.py            # two cores, under an hour
python examples/benchmarks/distillation/run.py --smoke    # does everything work? under two minutes
python examples/benchmarks/distillation/run.py --plateau  # until curves are flat: many hours
python examples/benchmarks/distillation/run.py --gpu      # 32x32 patches, a U-Net of 10 million parameters
"""

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from configurations import CONFIGURATIONS, Configuration, Run
from tqdm import tqdm

ROOT = Path(__file__).parents[3]


def prepare(config: Configuration, folder: Path, name: str) -> None:
    """Train a teacher and write all that its students need."""
    from diagnosis import describe_teacher
    from preconditionings import fit
    from teachers import load_data, load_reference, load_teacher

    problem = config.problem(name)
    data = load_data(problem, config.device)
    teacher = load_teacher(problem, config, data, folder)
    reference = load_reference(problem, config, data, teacher, folder)
    fit(config, config.methods_of(problem), teacher, data, folder / name)
    describe_teacher(config, problem, teacher, data, reference, folder)
    _count(1)


def train_one(config: Configuration, folder: Path, run: Run) -> None:
    """Train one student."""
    from train import train

    train(run, config, folder, _count)


def _start(counter: Any) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)  # small networks gain little from more; the other cores have runs of their own


def _count(iterations: int) -> None:
    with _counter.get_lock():
        _counter.value += iterations


def work(pool: ProcessPoolExecutor, counter: Any, call: tuple[Any, ...], tasks: dict[Any, int], unit: str) -> int:
    """Run ``function(*arguments, task)`` for all tasks, with one progress bar over their sizes; return the failures."""
    counter.value, failed = 0, 0
    futures = {pool.submit(*call, task): task for task in tasks}
    waiting = set(futures)
    with tqdm(total=sum(tasks.values()), unit=f" {unit}", smoothing=0.02) as bar:
        while waiting:
            done, waiting = wait(waiting, timeout=2)
            for future in done:
                if error := future.exception():
                    failed += 1
                    tqdm.write(f"FAILED: {futures[future]}: {error!r}")
            bar.n = counter.value
            bar.set_postfix_str(f"{len(futures) - len(waiting)} of {len(futures)} done")
    return failed


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--smoke", action="store_const", const="smoke", dest="size", help="does everything work?")
    size.add_argument(
        "--plateau", action="store_const", const="plateau", dest="size", help="train until curves are flat"
    )
    size.add_argument("--gpu", action="store_const", const="gpu", dest="size", help="the larger benchmark")
    parser.set_defaults(size="cpu")
    parser.add_argument("--output", type=Path, default=ROOT / "distillation_output", help="folder for all results")
    parser.add_argument("--processes", type=int, help="runs at a time")
    parser.add_argument("--device", help="e.g. cuda:1")
    parser.add_argument("--distance", choices=("squared", "random-features", "lpips"), help="in the loss")
    parser.add_argument("--problems", nargs="+", help="only these")
    parser.add_argument("--methods", nargs="+", help="only these")
    parser.add_argument("--learning-rates", type=float, nargs="+", help="further ones for the sweep")
    args = parser.parse_args()

    config = CONFIGURATIONS[args.size]
    changes = {k: v for k in ("processes", "device", "distance") if (v := getattr(args, k)) is not None}
    config = replace(config, **changes)
    if args.learning_rates:
        config = replace(config, sweep_rates=tuple(args.learning_rates))
    if args.problems:
        config = replace(config, problems=tuple(config.problem(name) for name in args.problems))
    if args.methods:
        lists = ("methods", "relatives", "sweep_methods", "long_methods")
        config = replace(config, **{k: tuple(m for m in getattr(config, k) if m in args.methods) for k in lists})
    folder = args.output / config.name
    start, failed = time.perf_counter(), 0

    context = multiprocessing.get_context("spawn")
    counter = context.Value("q", 0)
    pool = ProcessPoolExecutor(config.processes, context, _start, (counter,))
    try:
        failed = work(pool, counter, (prepare, config, folder), {p.name: 1 for p in config.problems}, "teachers")
        if not failed:
            runs = config.runs()
            todo = {run: run.iterations for run in runs if not run.path(folder).exists()}
            print(f"{len(runs) - len(todo)} of {len(runs)} runs are there already")
            failed = work(pool, counter, (train_one, config, folder), todo, "iterations")
    finally:
        pool.shutdown(cancel_futures=True)
    print(f"{time.perf_counter() - start:.0f} s; results are in {folder}")
    if failed:
        sys.exit(f"{failed} failed: start again to repeat them")


if __name__ == "__main__":
    main()
