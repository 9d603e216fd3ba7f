"""What a teacher and its preconditionings are like before any training: floors, gaps, gradient scales, targets."""

import json
from pathlib import Path
from typing import Any

import torch
from configurations import Configuration, Problem
from metrics import Evaluation
from networks import NetworkTeacher
from preconditionings import METHODS
from storage import write_json
from teachers import Reference
from torch import Tensor

import analytic_precond as ap

STEPS = 6  # of Heun's method from one level of the maps to the next


def describe_teacher(
    config: Configuration, problem: Problem, teacher: NetworkTeacher, data: Tensor, reference: Reference, folder: Path
) -> None:
    """Write ``teacher.json``: what a perfect student would score, and maps over jumps from t to s."""
    path = folder / problem.name / "teacher.json"
    names = [name for name in config.methods_of(problem) if METHODS[name].times == 2]
    if path.exists() and set(names) <= set(json.loads(path.read_text())["maps"]["gap_start"]):
        return
    evaluation, sigma_data = Evaluation(config, data, reference), data.std().item()
    half = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(5)).to(data.device)]
    fine = (reference.fine_ends - reference.ends[: len(reference.fine_ends)]).square().mean().item()
    preconditionings = {name: METHODS[name].load(path.parent, sigma_data).to(config.device) for name in names}
    write_json(
        {
            "sigma_data": sigma_data,
            "samples": len(data),
            "parameters": sum(p.numel() for p in teacher.parameters()),
            "frechet_of_teacher": evaluation.frechet(reference.ends),
            "frechet_of_data": evaluation.frechet(half[: config.num_samples]),
            "checks_of_teacher": evaluation.checks(reference.ends),
            "squared_error_of_training_grid": fine,
            "maps": maps(config, teacher, preconditionings, half[:64]),
        },
        path,
    )


@torch.no_grad()
def maps(
    config: Configuration, teacher: NetworkTeacher, preconditionings: dict[str, ap.Preconditioning], x_0: Tensor
) -> dict[str, Any]:
    """Return maps ``[method][t][s]``, 0 where s is not below t.

    They are the consistency gap at both ends; ``c_out``, its RMS over modes: what a gradient is multiplied with on its
    way to the network; and ``required``, the RMS of the output that lands on the teacher's ODE. ``denoised`` is the
    RMS of the student's first output, for each t.
    """
    levels = ap.log_noise_levels(config.num_gap_levels)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(6)).to(x_0.device)
    gaps = ap.gap_map(teacher, preconditionings, x_0, noise, levels, num_steps=STEPS, progress=False)
    K = len(levels)
    c_out, required = ({name: torch.zeros(K, K) for name in preconditionings} for _ in range(2))
    denoised = []
    fine = ap.log_noise_levels((K - 1) * STEPS + 1)
    for i, t in enumerate(levels[:-1].tolist()):
        x_t = x_0.double() + t * noise.double()
        denoised.append(rms(teacher(x_t.float(), torch.full((len(x_t),), t, device=x_t.device))))
        trajectory = ap.solve_ode(teacher, x_t, fine[i * STEPS :], trajectory=True, dtype=torch.float64)[STEPS::STEPS]
        for (name, precond), (j, x_s) in (
            (item, end) for item in preconditionings.items() for end in enumerate(trajectory, start=i + 1)
        ):
            s = levels[j].item()
            c_out[name][i, j] = rms(precond.jump(0 * x_t, noise.double(), t, s)) / rms(noise)
            required[name][i, j] = rms(precond.required_output(x_t, x_s, t, s))
    return {
        "levels": levels.tolist(),
        "gap_start": dict(zip(gaps.names, gaps.start.nan_to_num(0).tolist(), strict=True)),
        "gap_target": dict(zip(gaps.names, gaps.target.nan_to_num(0).tolist(), strict=True)),
        "c_out": {name: values.tolist() for name, values in c_out.items()},
        "required": {name: values.tolist() for name, values in required.items()},
        "denoised": denoised,
    }


def rms(x: Tensor) -> float:
    """Return the root mean square."""
    return x.double().square().mean().sqrt().item()
