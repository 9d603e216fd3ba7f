"""Time of AnalyticPreconditioning(t, s) against CTM's closed form.

Ratios within one run: the variants take turns, medians are compared.

    python examples/benchmarks/coefficients.py
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import analytic_precond as ap


def bare_ctm(t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """CTM's coefficients as a training code would write them, without any check."""
    return s / t, 1 - s / t


def medians(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median time of each function in microseconds, called in turn."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    levels = ap.log_noise_levels()
    l, s_t = 1 / (1 + 4 * levels**2), torch.tanh(levels.log())
    analytic = ap.AnalyticPreconditioning.from_coefficients(levels, l, s_t).to(arguments.device)
    ctm = ap.CTMPreconditioning()
    generator = torch.Generator().manual_seed(0)
    print(f"{'batch':>8}{'s/t, 1 - s/t':>16}{'CTMPrecond.':>16}{'AnalyticPrecond.':>18}   microseconds")
    for batch in (1, 512, 65_536):
        t = (0.002 * 40_000 ** torch.rand(batch, generator=generator)).clamp(0.002, 80).to(arguments.device)
        s = (0.002 * (t / 0.002) ** torch.rand(batch, generator=generator).to(t)).clamp(max=t)
        row = medians(
            {"bare": lambda: bare_ctm(t, s), "ctm": lambda: ctm(t, s), "analytic": lambda: analytic(t, s)},  # noqa: B023
            arguments.rounds,
        )
        print(f"{batch:8d}{row['bare']:16.1f}{row['ctm']:16.1f}{row['analytic']:18.1f}")


if __name__ == "__main__":
    main()
