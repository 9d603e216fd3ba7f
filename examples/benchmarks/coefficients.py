"""What a training step does around its networks: coefficients, a student, a loss, with networks that do nothing.

Times within one run: CTM's closed form and Analytic-Precond take turns, medians are compared. On a GPU calls follow
each other without waiting, as in training; the coefficients are also compiled, and replayed as a CUDA graph.

    python examples/benchmarks/coefficients.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import analytic_precond as ap

Call = Callable[[], object]
CALLS = 20  # of one measurement: with a GPU, the host runs ahead


class NoNetwork(nn.Module):
    """Returns its input."""

    def forward(self, x: Tensor, c_noise: Tensor, c_target: Tensor) -> Tensor:
        """Return ``x``."""
        return x


def medians(functions: dict[str, Call], device: torch.device, rounds: int) -> dict[str, float]:
    """Return the median time of a call of each function in microseconds, measured in turn."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in functions}
    for index in range(rounds + 1):
        for name, function in functions.items():
            wait()
            start = time.perf_counter()
            for _ in range(CALLS):
                function()
            wait()
            if index > 0:  # after warming up
                times[name].append(1e6 * (time.perf_counter() - start) / CALLS)
    return {name: statistics.median(values) for name, values in times.items()}


def replay_of(function: Call) -> Call:
    """Return a replay of a function as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def levels_of(batch: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return noise levels t and s <= t."""
    generator = torch.Generator().manual_seed(0)
    t, s = (0.002 * 40_000**share for share in torch.rand(2, batch, generator=generator))
    return torch.maximum(t, s).clamp(0.002, 80).to(device), torch.minimum(t, s).clamp(0.002, 80).to(device)


@torch.no_grad()
def compare_without_networks(device: torch.device, rounds: int, batch: int = 512, large: int = 65_536) -> None:
    """Print the table."""
    levels = ap.log_noise_levels()
    analytic = ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + 4 * levels**2), torch.tanh(levels.log()))
    preconds = {"CTM": ap.CTMPreconditioning().to(device), "Analytic-Precond": analytic.to(device)}

    def show(name: str, functions: dict[str, Call], few: int = rounds) -> None:
        times = medians(functions, device, few)
        print(
            f"{name:34}" + "".join(f"{times[key]:14.1f}" if key in times else 14 * " " for key in ("bare", *preconds))
        )

    print(f"{'microseconds':34}" + "".join(f"{name:>14}" for name in ("s/t, 1 - s/t", "CTM", "Analytic-P.")))
    for size in (1, batch, large):
        t, s = levels_of(size, device)
        calls: dict[str, Call] = {"bare": lambda t=t, s=s: (s / t, 1 - s / t)}
        calls |= {name: lambda p=p, t=t, s=s: p(t, s) for name, p in preconds.items()}
        show(f"coefficients, batch {size}", calls)
        if device.type == "cuda" and size == batch:
            show("  compiled", {name: torch.compile(call) for name, call in calls.items()})
            show("  replayed as a graph", {name: replay_of(call) for name, call in calls.items()})

    t, s = levels_of(batch, device)
    grid = ap.karras_noise_levels(18)
    x_0, noise = torch.randn(2, batch, 3, generator=torch.Generator().manual_seed(0)).to(device)
    students = {name: ap.ConsistencyTrajectoryModel(NoNetwork(), p).to(device) for name, p in preconds.items()}
    show("student without its network", {name: lambda m=m: m(x_0, t, s) for name, m in students.items()})
    times = ap.sample_jump_times(batch, grid, 17, torch.Generator().manual_seed(0))
    losses = {
        name: lambda m=m: ap.trajectory_distillation_loss(lambda x, t: 0.5 * x, m, m, x_0, noise, times)
        for name, m in students.items()
    }
    show("loss without networks, 17 steps", losses, max(1, rounds // 10))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare_without_networks(torch.device(arguments.device), arguments.rounds)


if __name__ == "__main__":
    main()
