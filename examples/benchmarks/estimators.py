"""Speed and memory of the estimators, on the quickstart's network and patches.

Ratios within one run: the variants take turns, medians are compared. Memory is the peak above the process before.

    python examples/benchmarks/estimators.py
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import torch

import analytic_precond as ap

sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import load_patches, train_teacher

VARIANTS = {"stein + transport": ("stein", "transport"), "hutchinson + jvp": ("hutchinson", "jvp")}
LEVELS = ap.log_noise_levels(12)


def compare_speed(teacher: ap.Denoiser, patches: torch.Tensor, samples: int, rounds: int) -> None:
    """Print wall time at equal samples, and what it becomes at equal standard error of l."""
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


def compare_throughput(teacher: ap.Denoiser, patches: torch.Tensor, samples: int, rounds: int) -> None:
    """Print the estimator's teacher passes per second as a share of a bare loop's, at equal batch size."""

    @torch.no_grad()
    def bare_loop(num_pairs: int, batch_size: int) -> None:
        for _ in range(-(-num_pairs // batch_size)):
            x = patches[torch.arange(batch_size) % len(patches)]
            for t in LEVELS.float():
                for _ in range(2):
                    teacher(x, t.expand(len(x)))

    print("teacher passes per second, as a share of a bare loop's over batches of the same size:")
    for batch_size in (32, 256):
        shares = []
        for seed in range(rounds):
            start = time.perf_counter()
            bare_loop(samples // 2, batch_size)
            middle = time.perf_counter()
            ap.estimate_statistics(teacher, patches, LEVELS, samples, batch_size, seed=seed, progress=False)
            shares.append((middle - start) / (time.perf_counter() - middle))
        print(f"  batch size {batch_size:3d}: {statistics.median(shares):.3f}, median of {rounds}")


def compare_memory(teacher: ap.Denoiser, patches: torch.Tensor) -> None:
    """Print the estimator's peak memory for two sample counts (reads Linux's own peak counter)."""
    print("peak memory of the estimator above the process before it:")
    for samples in (512, 512, 5120):  # the first warms up allocators
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # start the peak counter anew
        before = _status("VmRSS")
        ap.estimate_statistics(teacher, patches, LEVELS, samples, 128, progress=False)
        print(f"  {samples:5d} samples: {(_status('VmHWM') - before) / 1024:6.1f} MiB")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    patches = load_patches()
    teacher = train_teacher(patches, patches.std().item(), steps=200).requires_grad_(False)
    compare_throughput(teacher, patches, arguments.samples, arguments.rounds)
    compare_memory(teacher, patches)
    compare_speed(teacher, patches, arguments.samples, arguments.rounds)


if __name__ == "__main__":
    main()
