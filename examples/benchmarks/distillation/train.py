"""One run: a student of one teacher with one preconditioning, from one seed.

Within a seed, students of all methods start from the same weights, see the same data and noise in the same order, and
have the same optimiser. What differs is the preconditioning (and for CM the loss).
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from annealed import anneal
from configurations import Configuration, Run
from metrics import STEPS, Evaluation, RandomFeatures
from networks import student_network
from preconditionings import METHODS, Method
from storage import Checkpoint, write_json, write_tensors
from teachers import load_data, load_reference, load_teacher
from torch import Tensor, nn

import analytic_precond as ap


def build_student(method: Method, network: nn.Module, folder: Path, sigma_data: float) -> nn.Module:
    """Return a student of the method's kind."""
    kind = ap.ConsistencyTrajectoryModel if method.times == 2 else ap.ConsistencyModel
    return kind(network, method.load(folder, sigma_data), sigma_data)


def build_distance(config: Configuration, data: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what the loss compares images with."""
    if config.distance == "lpips":
        return ap.LPIPSDistance().to(config.device)
    if config.distance == "random-features" and data.ndim == 4:
        return RandomFeatures(data.shape[1:]).to(config.device).distance
    return ap.squared_error


def sampler(student: nn.Module, method: Method, levels: Tensor) -> Callable[[Tensor, list[int]], Tensor]:
    """Return the function that draws samples with a student, by jumps between levels of the grid."""
    if method.times == 2:
        return lambda x, path: ap.sample_deterministic(student, x, levels[path])
    return lambda x, path: ap.sample_multistep(student, x, levels[path], generator=torch.Generator().manual_seed(4))


def loss_function(
    config: Configuration, method: Method, teacher: ap.Denoiser, student: nn.Module, average: nn.Module, data: Tensor
) -> Callable[[Tensor, Tensor, torch.Generator], Tensor]:
    """Return the loss as a function of clean data, noise, and the generator of noise levels."""
    levels, distance = ap.karras_noise_levels(config.num_levels), build_distance(config, data)
    sigma_data = student.edm.sigma_data
    last_layer = [p for p in student.network.parameters() if p.ndim > 1][-1]

    def consistency(x_0: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        times = ap.sample_adjacent_times(len(x_0), levels, generator)
        return ap.consistency_distillation_loss(teacher, student, average, x_0, noise, times, distance=distance).loss

    def trajectory(x_0: Tensor, noise: Tensor, generator: torch.Generator) -> Tensor:
        times = ap.sample_jump_times(len(x_0), levels, config.max_steps, generator)
        loss = ap.trajectory_distillation_loss(teacher, student, average, x_0, noise, times, distance=distance).loss
        if not config.denoising:
            return loss
        t = ap.sample_lognormal_noise_levels(len(x_0), generator=generator).to(x_0.device)
        denoising = ap.denoising_loss(student.denoise, x_0, noise, t, sigma_data=sigma_data).loss
        return loss + ap.adaptive_balance(loss, denoising, last_layer) * denoising

    return trajectory if method.times == 2 else consistency


def train(run: Run, config: Configuration, folder: Path, count: Callable[[int], None]) -> None:
    """Train and evaluate one student, and write its numbers and some of its samples.

    Args:
        run: Which one.
        config: Sizes.
        folder: Where teachers are found and results go.
        count: Told of iterations as they are done.
    """
    problem, method = config.problem(run.problem), METHODS[run.method]
    data = load_data(problem, config.device)
    teacher = load_teacher(problem, config, data, folder)
    reference = load_reference(problem, config, data, teacher, folder)
    evaluation, levels = Evaluation(config, data, reference), ap.karras_noise_levels(config.num_levels)

    network = student_network(problem, teacher, data.shape[1:], run.seed, method.times)
    student = build_student(method, network, folder / problem.name, data.std().item()).to(config.device).train()
    average = ap.exponential_moving_average(student, config.ema)
    sample = sampler(average, method, levels)
    optimizer = torch.optim.RAdam(student.parameters(), lr=run.learning_rate)
    loss_of = loss_function(config, method, teacher, student, average, data)
    order, times = (torch.Generator().manual_seed(1000 * run.seed + part) for part in (1, 2))

    few = reference.start[:16]
    clock = Clock(config.device)
    parts = {"student": student, "average": average, "optimizer": optimizer, "clock": clock}
    checkpoint = Checkpoint(run.path(folder).with_suffix(".pt"), config.settings_of(run), parts, (order, times))
    history = checkpoint.load()
    done = [point["iteration"] for point in history]
    due, first = set(problem.evaluations(run.iterations, config.shares)) - set(done), max(done, default=0)
    count(first)
    for iteration in range(first, run.iterations + 1):
        if iteration in due:
            detailed = iteration >= problem.iterations
            measured = evaluation(sample, follows_ode=method.times == 2, detailed=detailed)
            history.append({"iteration": iteration, **clock.state_dict(), **measured})
            checkpoint.save(history)
        if iteration in (problem.iterations, run.iterations):  # a long run has images of the usual length, too
            images = {f"{n} step{'s' * (n > 1)}": sample(few, evaluation.paths[n]).half() for n in STEPS}
            write_tensors(images, replace(run, iterations=iteration).path(folder).with_suffix(".safetensors"))
        if iteration == run.iterations:
            break
        for model in (student, average):
            anneal(model, iteration / problem.iterations)
        clock.start()
        x_0 = data[torch.randint(len(data), (config.batch_size,), generator=order).to(data.device)]
        noise = torch.randn(x_0.shape, generator=order).to(data.device)
        loss = loss_of(x_0, noise, times)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(student)
        clock.stop()
        count(1)

    write_json({"run": vars(run), "history": history}, run.path(folder))  # last: it says that the run is complete
    checkpoint.path.unlink()


class Clock:
    """Time spent in training steps: on the clock, and of the processor (other work on the machine does not enter)."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
        self.wall_seconds = self.processor_seconds = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._wall, self._processor = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        """End a step."""
        self.wait()
        self.wall_seconds += time.perf_counter() - self._wall
        self.processor_seconds += time.process_time() - self._processor

    def state_dict(self) -> dict[str, float]:
        """Return the sums."""
        return {"wall_seconds": self.wall_seconds, "processor_seconds": self.processor_seconds}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on from sums."""
        self.wall_seconds, self.processor_seconds = state["wall_seconds"], state["processor_seconds"]
