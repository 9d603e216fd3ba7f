"""How many teacher passes do good coefficients take? Errors of c_skip and c_out against many more samples.

The teachers are those of the distillation benchmark (trained unless their files exist), and an exact one: Gaussian
pixels with a power-law spectrum, whose coefficients are known in closed form.

    python examples/benchmarks/sample_budget.py                      # half an hour, most of it for references
    python examples/benchmarks/sample_budget.py --teachers gaussian  # half a minute
    python examples/benchmarks/sample_budget.py --smoke
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import analytic_precond as ap
from analytic_precond.fitted_preconditionings.bases import CosineBasis

sys.path.insert(0, str(Path(__file__).parent / "distillation"))
from configurations import CPU, SMOKE

ROOT = Path(__file__).parents[2]
PAPER = (120, 4096)  # levels and noisy samples per level, half of them clean samples
BUDGETS = (PAPER, (40, 1024), (40, 512), (40, 256), (30, 164), (20, 128))
REFERENCE = (121, 16384)
REFERENCE_SEED = 12345


def gaussian_problem(size: int = 16, num: int = 20_000) -> tuple[ap.Denoiser, Tensor, ap.AnalyticPreconditioning]:
    """Return Gaussian data whose power falls with frequency as in natural images, the teacher, and the truth."""
    frequency = torch.arange(size, dtype=torch.float64)
    c = 1 / (0.25 + frequency[:, None] ** 2 + frequency**2)
    c = 0.25 * c / c.mean()
    generator = torch.Generator().manual_seed(0)
    modes = CosineBasis((size, size))
    white = torch.randn(num, size, size, generator=generator, dtype=torch.float64)
    white /= white.square().mean(0).sqrt()  # all that follows depends on these moments: the truth is the data set's
    data = modes.from_modes(c.sqrt() * white)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        share = c / (c + ap.expand_to(t, x).double() ** 2)
        return modes.from_modes(share * modes.to_modes(x.double())).to(x.dtype)

    # docs/method.md, section 8
    levels = ap.log_noise_levels(480)
    t2 = levels[:, None, None] ** 2
    w = c / (c + t2)
    dw = 2 * t2 * c / (c + t2) ** 2
    l = w.mean((1, 2), keepdim=True)
    a, da = w - l, dw - dw.mean((1, 2), keepdim=True)
    s = (a * (da + a * (w - 1)) * (c + t2)).sum((1, 2)) / (a**2 * (c + t2)).sum((1, 2))
    return teacher, data, ap.AnalyticPreconditioning.from_coefficients(levels, l.flatten(), s)


def trained_problem(
    name: str, config: Any, folder: Path, reference: tuple[int, int]
) -> tuple[ap.Denoiser, Tensor, ap.AnalyticPreconditioning]:
    """Return a trained teacher, its data, and its coefficients from many samples (in a file, once they are there)."""
    from teachers import load_data, load_teacher

    problem = config.problem(name)
    data = load_data(problem, "cpu")
    teacher = load_teacher(problem, config, data, folder)
    num_levels, num_samples = reference
    path = folder / name / f"sample_budget_{num_levels}x{num_samples}.safetensors"
    if not path.exists():
        estimate(teacher, data, num_levels, num_samples, REFERENCE_SEED, progress=True).save(path)
    return teacher, data, ap.AnalyticPreconditioning(ap.TeacherStatistics.load(path))


def estimate(
    teacher: ap.Denoiser, data: Tensor, num_levels: int, num_samples: int, seed: int, progress: bool = False
) -> ap.TeacherStatistics:
    """Estimate with the defaults."""
    levels = ap.log_noise_levels(num_levels)
    return ap.estimate_statistics(teacher, data, levels, num_samples, 128, seed=seed, progress=progress)


def random_jumps(num: int) -> tuple[Tensor, Tensor]:
    """Draw jumps between levels that are log-uniform from 80 to 0.002."""
    generator = torch.Generator().manual_seed(7)
    ln = torch.rand(num, 2, generator=generator, dtype=torch.float64) * math.log(80 / 0.002) + math.log(0.002)
    s, t = ln.sort(-1).values.exp().unbind(-1)
    return t, s


def report(
    name: str, problem: tuple[ap.Denoiser, Tensor, ap.AnalyticPreconditioning], budgets: Sequence[tuple[int, int]],
    rounds: int,
) -> None:  # fmt: skip
    """Print the largest errors over jumps: their median over seeds, and the largest of all seeds."""
    teacher, data, reference = problem
    t, s = random_jumps(4000)
    truth = reference(t, s)
    print(f"{name}, {rounds} seeds (the paper's budget: 1), largest errors over {len(t)} jumps:")
    for num_levels, num_samples in budgets:
        errors = []
        for seed in range(1 if (num_levels, num_samples) == PAPER else rounds):
            c = ap.AnalyticPreconditioning(estimate(teacher, data, num_levels, num_samples, seed))(t, s)
            errors.append([(c.c_out / truth.c_out - 1).abs().max(), (c.c_skip - truth.c_skip).abs().max()])
        table = torch.tensor(errors)
        out, skip = table.median(0).values.tolist()
        worst = table[:, 0].max().item()
        passes = num_levels * num_samples
        share = math.prod(PAPER) / passes
        print(
            f"  {num_levels:3d} levels x {num_samples:4d} = {passes:7,d} passes, 1/{share:<3.0f} of the paper's:",
            end="",
        )
        print(f" c_out {100 * out:5.2f} % (worst seed {100 * worst:5.2f} %), c_skip {skip:.4f}", flush=True)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teachers", nargs="+", default=["gaussian", "digits", "textures", "spiral", "photographs"])
    parser.add_argument("--rounds", type=int, default=9, help="seeds for each budget")
    parser.add_argument("--output", type=Path, default=ROOT / "distillation_output", help="folder with teachers")
    parser.add_argument("--smoke", action="store_true", help="only see that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config, names, budgets, rounds, reference = CPU, arguments.teachers, BUDGETS, arguments.rounds, REFERENCE
    if arguments.smoke:
        config, names, budgets, rounds, reference = SMOKE, ["gaussian", "spiral"], ((12, 32),), 2, (24, 64)
    for name in names:
        if name == "gaussian":
            problem = gaussian_problem()
        else:
            problem = trained_problem(name, config, arguments.output / config.name, reference)
        report(name, problem, budgets, rounds)


if __name__ == "__main__":
    main()
