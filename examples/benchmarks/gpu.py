"""What the library costs on one GPU: estimators against bare forward passes, and a training step.

    python examples/benchmarks/gpu.py

Prints the teacher passes per second of the estimator beside those of a bare loop at the same batch size, the time of
`hutchinson` + `jvp` at the default estimator's standard error, and what coefficients, students, losses and a training
step take with Analytic-Precond and CTM.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import analytic_precond as ap

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from coefficients import compare_without_networks
from estimators import compare_speed
from quickstart import NetworkTeacher, UNet, load_patches, train_teacher
from training_step import compare_steps


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Return how long something takes, the device's work included."""
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_throughput(device: torch.device, width: int, batch_size: int, num_levels: int, rounds: int) -> None:
    """Print passes per second of the estimator and of a loop that calls the teacher and does nothing else."""
    torch.manual_seed(0)
    teacher = NetworkTeacher(UNet(w=width), 0.5).to(device).eval().requires_grad_(False)  # speed needs no training
    levels, num_batches = ap.log_noise_levels(num_levels), 4
    data = torch.randn(num_batches * batch_size, 3, 32, 32)
    x, passes = data[:batch_size].to(device), 2 * len(data) * num_levels

    @torch.no_grad()
    def bare_loop() -> None:
        for t in levels.to(device, torch.float32):
            for _ in range(2 * num_batches):
                teacher(x, t.expand(batch_size))

    def estimator() -> None:
        ap.estimate_statistics(teacher, data, levels, 2 * len(data), batch_size, progress=False)

    print(
        f"{sum(p.numel() for p in teacher.parameters()) / 1e6:.1f} million parameters, 32x32x3, batches of {batch_size}"
    )
    rates: dict[Callable[[], None], list[float]] = {bare_loop: [], estimator: []}
    for index in range(rounds + 1):
        for run, record in rates.items():
            rate = passes / seconds(run, device)
            if index > 0:  # after warming up
                record.append(rate)
    bare, ours = (statistics.median(record) for record in rates.values())
    print(f"  passes per second: bare loop {bare:.0f}, estimator {ours:.0f}, ratio {ours / bare:.3f} (target 0.95)")
    if device.type == "cuda":
        for run in rates:
            torch.cuda.reset_peak_memory_stats()
            run()
            print(f"  peak memory of the {run.__name__}: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="try everything in seconds; the numbers mean nothing")
    arguments = parser.parse_args()
    device, rounds, tiny = torch.device(arguments.device), 1 if arguments.tiny else arguments.rounds, arguments.tiny
    torch.set_num_threads(1)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")

    print("\nestimator against a bare loop")
    compare_throughput(device, 8 if tiny else 128, 4 if tiny else 256, 3 if tiny else 24, rounds)

    print("\naround the networks")
    compare_without_networks(device, 1 if tiny else 10 * rounds, *((4, 8) if tiny else ()))

    print("\ntraining step")
    compare_steps(device, rounds if tiny else 30, *((8, 2) if tiny else ()))

    print("\nestimators, of the quickstart's network (target: 4 times as long at equal standard error)")
    patches = load_patches()
    teacher = train_teacher(patches.to(device), patches.std().item(), steps=2 if tiny else 200).requires_grad_(False)
    compare_speed(teacher, patches, 16 if tiny else 512, rounds)


if __name__ == "__main__":
    main()
