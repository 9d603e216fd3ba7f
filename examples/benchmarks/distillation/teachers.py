"""Teachers, trained once, and what all students of one teacher are compared with."""

from pathlib import Path
from typing import NamedTuple

import torch
from configurations import Configuration, Problem
from data_sets import LOADERS
from networks import NetworkTeacher, build_network
from safetensors.torch import load_file
from storage import write_tensors
from torch import Tensor

import analytic_precond as ap


class Reference(NamedTuple):
    """The teacher's own samples.

    Attributes:
        start: Noise at the first level, for all students. Shape ``(E, ...)``.
        ends: Where the teacher's ODE leads from there, by Heun steps on the training grid. Shape ``(E, ...)``.
        trajectory: All points on the way, of the first few. Shape ``(K, A, ...)``.
        samples: The teacher's samples from other noise. Shape ``(E, ...)``.
        fine_ends: The first few ends, on a grid of 80 levels: the error of the training grid. Shape ``(A, ...)``.
    """

    start: Tensor
    ends: Tensor
    trajectory: Tensor
    samples: Tensor
    fine_ends: Tensor


def load_data(problem: Problem, device: str) -> Tensor:
    """Return all samples."""
    return LOADERS[problem.name](problem.size).to(device)


def train_teacher(problem: Problem, config: Configuration, data: Tensor) -> NetworkTeacher:
    """Train by denoising score matching at noise levels that reach from below 0.01 to above 80."""
    sigma_data = data.std().item()
    teacher = NetworkTeacher(build_network(problem, data.shape[1:], seed=0), sigma_data).to(config.device)
    optimizer = torch.optim.Adam(teacher.parameters())
    steps, batch_size = problem.teacher_steps, 2 * config.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x_0 = data[torch.randint(len(data), (batch_size,), generator=generator).to(data.device)]
        noise = torch.randn(x_0.shape, generator=generator).to(data.device)
        t = ap.sample_lognormal_noise_levels(batch_size, -0.4, 2.0, generator).to(data.device)
        loss = ap.denoising_loss(teacher, x_0, noise, t, sigma_data=sigma_data).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teacher.eval()


def load_teacher(problem: Problem, config: Configuration, data: Tensor, folder: Path) -> NetworkTeacher:
    """Return the teacher, trained unless its file exists."""
    path = folder / problem.name / "teacher.safetensors"
    if not path.exists():
        write_tensors(train_teacher(problem, config, data).network.state_dict(), path)
    teacher = NetworkTeacher(build_network(problem, data.shape[1:], seed=0), data.std().item())
    teacher.network.load_state_dict(load_file(path))
    return teacher.to(config.device).eval().requires_grad_(False)


def load_reference(
    problem: Problem, config: Configuration, data: Tensor, teacher: NetworkTeacher, folder: Path
) -> Reference:
    """Return what students are compared with, computed unless its file exists."""
    path = folder / problem.name / "reference.safetensors"
    if not path.exists():
        levels = ap.karras_noise_levels(config.num_levels)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(2, config.num_samples, *data.shape[1:], generator=generator).to(config.device)
        start, other = levels[0].float() * noise
        few = start[: config.num_aligned]
        with torch.no_grad():
            trajectory = ap.solve_ode(teacher, few, levels, trajectory=True)
            ends, samples = (
                torch.cat([ap.solve_ode(teacher, x, levels) for x in n.split(512)]) for n in (start, other)
            )
            fine_ends = ap.solve_ode(teacher, few, ap.karras_noise_levels(80))
        write_tensors(Reference(start, ends, trajectory, samples, fine_ends)._asdict(), path)
    return Reference(**{name: tensor.to(config.device) for name, tensor in load_file(path).items()})
