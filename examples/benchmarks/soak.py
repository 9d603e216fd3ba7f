"""Ten thousand training steps with a compiled student: no growth in memory, no recompilation.

Each step draws levels, data and noise, follows the teacher, takes CTM's loss and its gradients, and steps. The network
is tiny, so that what is looked at is everything else. Exits with 1 if memory grows or anything is compiled again.

    python examples/benchmarks/soak.py
"""

import argparse
import gc
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import analytic_precond as ap

WARM_UP = 20  # steps: all graphs are compiled in the first, allocators settle in the next
GROWTH = 4.0  # MiB; one tensor of a step's batch left behind at each of 10,000 steps would be 20


class Network(nn.Module):
    """Two layers that are told both noise levels."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, width), nn.SiLU(), nn.Linear(width, 8))

    def forward(self, x: Tensor, c_noise: Tensor, c_noise_s: Tensor) -> Tensor:  # noqa: D102
        output: Tensor = self.layers(torch.cat([x, torch.stack([c_noise, c_noise_s], 1)], 1))
        return output


class Run:
    """A training run of a tiny student.

    Args:
        backend: Of torch.compile.
        device: Where it trains.
    """

    def __init__(self, backend: str, device: torch.device) -> None:
        torch.manual_seed(0)
        levels = ap.log_noise_levels()
        precond = ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + 4 * levels**2), levels.log().tanh())
        student = ap.ConsistencyTrajectoryModel(Network(), precond).to(device)
        self.student = torch.compile(student, fullgraph=True, backend=backend)
        self.teacher = ap.GaussianDenoiser(0.25).to(device)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4)
        self.grid = ap.karras_noise_levels(18).float()
        self.device = device

    def step(self) -> None:
        """Make one training step on a new batch."""
        times = ap.sample_jump_times(64, self.grid, max_steps=1)
        x_0, noise = torch.randn(2, 64, 8, device=self.device)
        result = ap.trajectory_distillation_loss(self.teacher, self.student, self.student, 0.5 * x_0, noise, times)
        self.optimizer.zero_grad()
        result.loss.backward()
        self.optimizer.step()


def memory(device: torch.device) -> float:
    """Return the MiB that this process has written to, swapped out or not, and on a GPU what it has allocated there."""
    gc.collect()
    status = Path("/proc/self/status")
    if status.exists():  # without mapped files, which the kernel drops and reads again as it likes
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        resident = sum(int(fields[name].split()[0]) for name in ("RssAnon", "VmSwap"))
    else:  # macOS
        resident = int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())]))
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    return resident / 2**10 + allocated / 2**20


def soak(steps: int, backend: str, device: torch.device) -> tuple[float, int]:
    """Return the MiB by which memory grew from the first fifth of the steps to the last, and the recompilations."""
    run = Run(backend, device)
    for _ in range(WARM_UP):
        run.step()
    compiled = counters["stats"]["unique_graphs"]
    readings = []
    for index in range(steps):
        run.step()
        if index % max(1, steps // 50) == 0:
            readings.append(memory(device))
    fifth = max(1, len(readings) // 5)
    growth = statistics.median(readings[-fifth:]) - statistics.median(readings[:fifth])
    return growth, counters["stats"]["unique_graphs"] - compiled


def main() -> None:
    """Run the soak test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--backend", default="inductor", help="of torch.compile; 'eager' compiles nothing")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    start = time.perf_counter()
    growth, recompilations = soak(arguments.steps, arguments.backend, torch.device(arguments.device))
    seconds = time.perf_counter() - start
    print(f"{arguments.steps} steps in {seconds:.0f} s: memory {growth:+.1f} MiB, {recompilations} recompilations")
    if growth > GROWTH or recompilations:
        sys.exit(f"failed: at most {GROWTH:g} MiB of growth and no recompilation are expected")
    print("passed")


if __name__ == "__main__":
    main()
