"""One iteration: CTM's two losses, in any precision, over passes and processes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from networks import last_layer
from processes import Processes
from settings import PRECISIONS, Settings, generator_for, seed_for
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import analytic_precond as ap

OPTIMIZERS = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam}
DRAWS, DROPOUT = 0, 1  # streams of random numbers

Distance = Callable[[Tensor, Tensor], Tensor]


class Training:
    """All that an iteration changes: the student, its averages, the optimiser, the loss scale.

    What is drawn depends on the seed, the iteration and the process, and on nothing that happened before.

    Args:
        teacher: The teacher.
        student: Starts as it.
        distance: What compares two images.
        settings: The run's.
        processes: Those that share a batch.
        batch_gpu: Images of one pass.
    """

    def __init__(
        self,
        teacher: ap.Denoiser,
        student: ap.ConsistencyTrajectoryModel,
        distance: Distance,
        settings: Settings,
        processes: Processes,
        batch_gpu: int,
    ) -> None:
        experiment, device = settings.experiment, processes.device
        self.teacher, self.student, self.distance = teacher, student.train(), distance
        self.experiment, self.seed, self.rank, self.batch_gpu = experiment, settings.seed, processes.rank, batch_gpu
        self.device, self.dtype = device, PRECISIONS[settings.precision]
        self.averages = {
            decay: ap.exponential_moving_average(student, decay) for decay in (experiment.target_ema, experiment.ema)
        }
        self.optimizer = OPTIMIZERS[experiment.optimizer](student.parameters(), lr=experiment.learning_rate)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        self.wrapped = student
        if processes.size > 1:
            ids = [device] if device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(student, ids, gradient_as_bucket_view=True)
        self.last_layer, self.levels = last_layer(student), ap.karras_noise_levels(experiment.num_levels)

    @property
    def average(self) -> ap.ConsistencyTrajectoryModel:
        """The student that is evaluated."""
        return self.averages[self.experiment.ema].module

    def parts(self) -> dict[str, object]:
        """Return what a checkpoint holds."""
        averages = {f"average_{decay}": average for decay, average in self.averages.items()}
        return {"student": self.student, "optimizer": self.optimizer, "scaler": self.scaler, **averages}

    def is_finite(self) -> bool:
        """Whether the student's weights are numbers; waits for the device."""
        norms = torch._foreach_norm([p.detach() for p in self.student.parameters()])
        return bool(torch.stack(norms).isfinite().all())

    def step(self, iteration: int, images: Tensor, labels: Tensor | None) -> Tensor:
        """Train on a process's share of a batch; return `LOGGED`, without waiting for the device."""
        torch.manual_seed(seed_for(self.seed, iteration, self.rank, DROPOUT))
        generator = generator_for(self.seed, iteration, self.rank, DRAWS)
        starts = range(0, len(images), self.batch_gpu)
        logged = []
        for start in starts:
            rows = slice(start, start + self.batch_gpu)
            condition = {} if labels is None else {"class_labels": labels[rows].to(self.device)}
            more = start != starts[-1] and self.wrapped is not self.student
            with self.wrapped.no_sync() if more else nullcontext():
                logged.append(self.add_gradient(images[rows], generator, condition, len(starts)))
        self.scaler.unscale_(self.optimizer)
        norms = torch._foreach_norm([p.grad for p in self.student.parameters() if p.grad is not None])
        self.scaler.step(self.optimizer)  # not where fp16 has overflowed: the scale is lowered instead
        self.scaler.update()
        self.optimizer.zero_grad()
        for average in self.averages.values():
            average.update_parameters(self.student)
        return torch.cat([torch.stack(logged).mean(0), torch.linalg.vector_norm(torch.stack(norms))[None]])

    def add_gradient(
        self, images: Tensor, generator: torch.Generator, condition: dict[str, Tensor], passes: int
    ) -> Tensor:
        """Add a pass's gradient; return the losses and the balance."""
        experiment, batch = self.experiment, len(images)
        noise = torch.randn((2, *images.shape), generator=generator).to(self.device)
        times = ap.sample_jump_times(batch, self.levels, experiment.max_ode_steps, generator)
        t = experiment.sample_denoising_levels(batch, generator).to(self.device)
        mirrored = (torch.rand(batch, generator=generator) < experiment.flips).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        x_0, sigma_data = images.to(self.device), self.student.edm.sigma_data
        target = self.averages[experiment.target_ema]

        # without autocast's cache of weights, which must not pass from a call without gradients to one with
        half = self.dtype != torch.float32
        with torch.autocast(self.device.type, self.dtype, cache_enabled=False) if half else nullcontext():
            trajectory = ap.trajectory_distillation_loss(
                self.teacher,
                self.wrapped,
                target,
                x_0,
                noise[0],
                times,
                distance=self.distance,
                sigma_data=sigma_data,
                inner=self.student if experiment.inner_target == "student" else target,
                **condition,
            ).loss
            denoising = ap.denoising_loss(
                self.student.denoise, x_0, noise[1], t, sigma_data=sigma_data, **condition
            ).loss
        # of scaled losses: in fp16 the gradients of small ones vanish
        balance = ap.adaptive_balance(self.scaler.scale(trajectory), self.scaler.scale(denoising), self.last_layer)
        loss = trajectory + experiment.denoising_weight * balance * denoising
        self.scaler.scale(loss / passes).backward()
        return torch.stack([loss.detach(), trajectory.detach(), denoising.detach(), balance])


LOGGED = ("loss", "trajectory_loss", "denoising_loss", "balance", "gradient_norm")
