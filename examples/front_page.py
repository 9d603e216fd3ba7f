"""Draw the figure of the documentation's front page: ``python examples/front_page.py`` writes it into docs/images.

Data on a line, in two clusters, so that a jump is a curve that can be drawn; their ideal denoiser is the teacher.
"""

import argparse
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import analytic_precond as ap

FIGURE = Path(__file__).parent.parent / "docs" / "images" / "front_page.png"
START, TARGET = 5.0, 0.5
OTHER = (1.0, 0.1)  # another jump, for the caption
NAMES = {"CTM": "#0072B2", "Analytic-Precond": "#D55E00", "least squares": "#009E73"}


def draw_data(num: int) -> tuple[ap.GaussianMixtureDenoiser, Tensor]:
    """Return the teacher and samples of its data. Shape ``(num, 1)``."""
    means, variances, weights = torch.tensor([-1.0, 0.6]), torch.tensor([0.02, 0.05]), torch.tensor([0.35, 0.65])
    generator = torch.Generator().manual_seed(0)
    cluster = (torch.rand(num, generator=generator) > weights[0]).long()
    data = means[cluster] + variances.sqrt()[cluster] * torch.randn(num, generator=generator)
    return ap.GaussianMixtureDenoiser(means[:, None], variances, weights), data[:, None].double()


def land(teacher: ap.Denoiser, precond: ap.Preconditioning, x: Tensor, t: float, s: float) -> Tensor:
    """Return where an untrained student, whose network is still the teacher, lands."""
    return precond.jump(x, teacher(x, torch.full((len(x),), t, dtype=x.dtype)), t, s)


def miss(teacher: ap.Denoiser, precond: ap.Preconditioning, data: Tensor, t: float, s: float) -> float:
    """Return the RMS distance of untrained jumps from the teacher's ODE."""
    noise = torch.randn(data.shape, generator=torch.Generator().manual_seed(1), dtype=data.dtype)
    truth = ap.heun_solve_between(teacher, data + t * noise, t, s, num_steps=64)
    return (land(teacher, precond, data + t * noise, t, s) - truth).square().mean().sqrt().item()


def label(panel: Axes, title: str, x: str, y: str) -> None:
    """Write a panel's title and axes."""
    panel.set_title(title, fontsize=15, loc="left")
    panel.set_xlabel(x, fontsize=13)
    panel.set_ylabel(y, fontsize=13)
    panel.tick_params(labelsize=12)
    panel.spines[["top", "right"]].set_visible(False)


def noise_axis(panel: Axes, noisiest: float, cleanest: float) -> None:
    """Let the noise fall from left to right."""
    panel.set_xscale("log")
    panel.set_xlim(noisiest, cleanest)
    panel.xaxis.set_major_formatter("{x:g}")


def main() -> None:
    """Measure, draw and print the misses that the caption states."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=FIGURE)
    output = parser.parse_args().output
    teacher, data = draw_data(4096)
    stats = ap.estimate_statistics(teacher, data, progress=False)
    preconds: dict[str, ap.Preconditioning] = {
        "CTM": ap.CTMPreconditioning(),
        "Analytic-Precond": ap.AnalyticPreconditioning(stats),
        "least squares": ap.LeastSquaresPreconditioning.fit(teacher, data, progress=False),
    }

    figure = Figure(figsize=(11, 6), layout="constrained")
    (ode, measured), (coefficients, jump) = figure.subplots(2, 2)

    levels = torch.cat([ap.log_noise_levels(160, 0.02, 10.0), torch.tensor([START, TARGET])]).sort(descending=True)[0]
    x_T = 10.0 * torch.linspace(-1.7, 1.7, 17, dtype=torch.float64)[:, None]
    paths = ap.solve_ode(teacher, x_T, levels, trajectory=True)[..., 0]
    ode.plot(levels, paths, color="0.45", linewidth=1)
    noise_axis(ode, 10.0, 0.02)
    ode.set_ylim(-4, 4)
    for level, name in ((START, "t"), (TARGET, "s")):
        ode.axvline(level, color="black", linewidth=0.8, linestyle=":")
        ode.annotate(f"${name}$", (level, 3.4), xytext=(4, 0), textcoords="offset points", fontsize=15)
    label(ode, "1. A teacher's ODE, from noise to data", "noise level", "$x$")

    for value, stderr, name, style in (
        (stats.l, stats.l_stderr, "$l_t$", "-"),
        (stats.g_rms, stats.g_rms_stderr, "$S$", "--"),
    ):
        [line] = measured.plot(stats.levels, value, style, color="#D55E00", linewidth=2, label=name)
        low, high = value - 1.96 * stderr, value + 1.96 * stderr
        measured.fill_between(stats.levels, low, high, color=line.get_color(), alpha=0.3, linewidth=0)
    noise_axis(measured, 80.0, 0.002)
    measured.legend(frameon=False, fontsize=14)
    label(measured, "2. Two functions, measured (95 % bands)", "noise level", "")

    s = ap.log_noise_levels(200, 0.02, START)
    for name, colour in NAMES.items():
        c_skip, c_out = preconds[name](START, s)
        coefficients.plot(s, c_skip, "--", color=colour, linewidth=2)
        coefficients.plot(s, c_out, color=colour, linewidth=2, label=name)
    noise_axis(coefficients, START, 0.02)
    x_label = f"target $s$ of jumps from $t$ = {START:g}"
    label(coefficients, "3. $c_{skip}$ (dashed), $c_{out}$; colours as in 4", x_label, "")

    x = torch.linspace(-12, 12, 400, dtype=torch.float64)[:, None]
    jump.plot(
        x, ap.heun_solve_between(teacher, x, START, TARGET, num_steps=64), "k", linewidth=3, label="teacher's ODE"
    )
    for name, colour in NAMES.items():
        misses = [miss(teacher, preconds[name], data, *levels) for levels in ((START, TARGET), OTHER)]
        print(f"{name}: {misses[0]:.2f} {misses[1]:.2f}")
        jump.plot(x, land(teacher, preconds[name], x, START, TARGET), color=colour, linewidth=2, label=name)
    jump.legend(frameon=False, fontsize=12)
    label(jump, "4. An untrained student's jump", f"$x_t$ at $t$ = {START:g}", f"$x_s$ at $s$ = {TARGET:g}")
    figure.savefig(output, dpi=100)


if __name__ == "__main__":
    main()
