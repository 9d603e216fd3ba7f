"""A training step with Analytic-Precond against the same step with CTM's closed form.

Forward, backward and optimiser step of a U-Net on 32x32x3 images, batch 32. The two students share one network and take
turns; the printed ratio is that of their median times. On a GPU the step is also run compiled, and with PyTorch's
synchronisation check set to raise.

    python examples/benchmarks/training_step.py
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import analytic_precond as ap

sys.path.insert(0, str(Path(__file__).parents[1]))
from quickstart import UNet


class TwoTimeUNet(UNet):
    """The quickstart's U-Net with a target noise level."""

    def forward(self, x: Tensor, c_noise: Tensor, c_noise_s: Tensor) -> Tensor:  # noqa: D102
        return super().forward(x, c_noise + 0.1 * c_noise_s)


def make_step(student: nn.Module, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """Return a function that makes one training step."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    x_t, t, s, target = batch

    def step() -> None:
        loss = (student(x_t, t, s) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def median_times(steps: list[Callable[[], None]], rounds: int, device: torch.device) -> list[float]:
    """Return the median milliseconds of each step, run in turn."""
    times: list[list[float]] = [[] for _ in steps]
    for index in range(rounds + 3):
        order = list(zip(steps, times, strict=True))
        for step, record in order if index % 2 else reversed(order):  # neither always goes first
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if index >= 3:  # after warming up
                record.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(record) for record in times]


def compare_steps(device: torch.device, rounds: int, width: int = 56, batch_size: int = 32) -> None:
    """Print the time of a step with each preconditioning, and on a GPU make sure that it waits for nothing."""
    levels = ap.log_noise_levels()
    analytic = ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + 4 * levels**2), torch.tanh(levels.log()))
    network = TwoTimeUNet(w=width).to(device)
    students = [ap.ConsistencyTrajectoryModel(network, p).to(device) for p in (ap.CTMPreconditioning(), analytic)]
    print(f"{sum(p.numel() for p in network.parameters()) / 1e6:.1f} million parameters on {device}")

    generator = torch.Generator().manual_seed(0)
    t = 0.002 * 40_000 ** torch.rand(batch_size, generator=generator)
    s = 0.002 * (t / 0.002) ** torch.rand(batch_size, generator=generator)
    x_0, noise = torch.randn(2, batch_size, 3, 32, 32, generator=generator)
    x_t = 0.5 * x_0 + ap.expand_to(t, x_0) * noise
    batch = tuple(v.to(device) for v in (x_t, t.clamp(0.002, 80), torch.minimum(s, t).clamp(0.002, 80), 0.5 * x_0))

    modes: dict[str, Callable[[nn.Module], nn.Module]] = {"eager": lambda student: student}
    if device.type == "cuda":
        modes["compiled"] = torch.compile
    for mode, wrap in modes.items():
        steps = [make_step(wrap(student), batch) for student in students]
        ctm, ours = median_times(steps, rounds, device)
        print(f"{mode}: CTM {ctm:.2f} ms, Analytic-Precond {ours:.2f} ms, ratio {ours / ctm:.4f}")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
            try:
                steps[1]()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            print(f"no host synchronisation in the {mode} step")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare_steps(torch.device(arguments.device), arguments.rounds)


if __name__ == "__main__":
    main()
