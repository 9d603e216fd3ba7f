"""Speed and memory of the estimators, on the quickstart's network and patches.

Ratios within one run: the variants take turns, medians are compared. Memory is the peak resident size of a process of
its own, above that of a process that only loads everything.

    python examples/benchmarks/estimators.py
"""

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import analytic_precond as ap

sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import load_patches, train_teacher

VARIANTS = {"stein + transport": ("stein", "transport"), "hutchinson + jvp": ("hutchinson", "jvp")}
LEVELS = ap.log_noise_levels(12)


def compare_speed(samples: int, rounds: int) -> None:
    """Print wall time at equal samples, and what it becomes at equal standard error of l."""
    patches = load_patches()
    teacher = train_teacher(patches, patches.std().item(), steps=200).requires_grad_(False)
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    variance: dict[str, list[torch.Tensor]] = {name: [] for name in VARIANTS}
    for seed in range(rounds):
        for name, (l_method, s_method) in VARIANTS.items():
            start = time.perf_counter()
            stats = ap.estimate_statistics(
                teacher, patches, LEVELS, samples, 128, l_method, s_method, seed=seed, progress=False
            )
            variance[name].append(stats.l_stderr**2)
            seconds[name].append(time.perf_counter() - start)
    default, reference = VARIANTS
    equal_samples = statistics.median(seconds[reference]) / statistics.median(seconds[default])
    # the variance falls as 1 / samples: the default needs this many times the reference's samples, per level
    more = torch.stack(variance[default]).mean(0) / torch.stack(variance[reference]).mean(0)
    print(f"{samples} samples, {len(LEVELS)} levels, median of {rounds}:")
    print(f"  {reference} takes {equal_samples:.2f} times as long as {default} at equal samples")
    print("  the same at equal standard error of l, by level:")
    for t, factor in zip(LEVELS.tolist(), more.tolist(), strict=True):
        print(f"    t = {t:8.4g}: {equal_samples / factor:7.2f}  (variance ratio {factor:.2f})")


def peak_memory(samples: int) -> float:
    """Return the peak resident size in MiB of a process that estimates with so many samples."""
    code = [sys.executable, __file__, "--only-estimate", str(samples)]
    return float(subprocess.run(code, check=True, capture_output=True, text=True).stdout)


def only_estimate(samples: int) -> None:
    """Estimate on an untrained network and print the peak resident size in MiB."""
    patches = load_patches()
    teacher = train_teacher(patches, 0.5, steps=1, batch_size=2)
    if samples:
        ap.estimate_statistics(teacher, patches, LEVELS, samples, 128, progress=False)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only-estimate", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only_estimate is not None:
        only_estimate(arguments.only_estimate)
        return
    compare_speed(arguments.samples, arguments.rounds)
    base = peak_memory(0)
    print("peak memory above a process that does not estimate:")
    for samples in (512, 5120):
        print(f"  {samples:5d} samples: {peak_memory(samples) - base:6.1f} MiB")


if __name__ == "__main__":
    main()
