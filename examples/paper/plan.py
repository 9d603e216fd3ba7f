"""What a run costs, before it is spent: counted on a copy of the real network that holds no numbers."""

from __future__ import annotations

import argparse

import torch
from networks import make_student
from processes import Processes
from settings import Settings
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from training import Training

import analytic_precond as ap

META = torch.device("meta")


def print_plan(net: nn.Module, settings: Settings, args: argparse.Namespace) -> None:
    """Say what an iteration, the memory and the whole run come to."""
    experiment = settings.experiment
    costs = costs_of(net, settings)
    cards, batch = args.cards or experiment.gpus, experiment.batch_size
    total = costs["image"] * batch
    seconds = total / (cards * args.peak_tflops * 1e12 * args.utilisation)
    batch_gpu = args.batch_gpu or max(batch // cards, 1)
    fixed, per_image = costs["bytes"] / 1e9, costs["bytes_per_image"] / 1e9
    print(
        f"{experiment.name}: a student of {costs['parameters'] / 1e6:.2f}M parameters\n"
        f"one pass of the network:   {costs['forward'] / 1e9:.2f} GFLOP an image\n"
        f"one iteration:             {costs['image'] / costs['forward']:.1f} passes an image, "
        f"{costs['teacher_passes']:.1f} of them the teacher's and {costs['distance'] / costs['forward']:.1f} those of "
        f"{experiment.distance}; "
        f"{total / 1e12:.0f} TFLOP at batch {batch}\n"
        f"memory of a card, float32: {fixed:.1f} GB, and {per_image:.2f} GB for each image of a pass: "
        f"{fixed + per_image * batch_gpu:.0f} GB at --batch-gpu {batch_gpu}\n"
        f"the run:                   {experiment.iterations} iterations of {seconds:.2f} s, "
        f"{seconds * experiment.iterations / 86400:.1f} days on {cards} cards of {args.peak_tflops:g} TFLOP/s at "
        f"{args.utilisation:.0%} of that (the paper: {experiment.days:g} on {experiment.gpus} {experiment.gpu})"
    )


def costs_of(net: nn.Module, settings: Settings) -> dict[str, float]:
    """Return the costs of one image in FLOPs, by counting an iteration with one step of the teacher, and of memory."""
    experiment = settings.experiment
    student = make_student(net, ap.CTMPreconditioning(sigma_data=float(net.sigma_data)), experiment, 0).to(META)
    net = net.to(META)
    x = torch.zeros(1, net.img_channels, net.img_resolution, net.img_resolution, device=META)
    condition = {"class_labels": torch.zeros(1, net.label_dim, device=META)} if net.label_dim else {}
    # a grid with room for a single step of the teacher: more cost two passes each
    shorter = Settings(experiment, "ctm", "fp32", 0, settings.teacher, None)
    distance = perceptual_distance() if experiment.distance == "lpips" else ap.squared_error

    counts, saved = [], 0
    for compare in (ap.squared_error, distance):
        training = OneStep(ap.denoiser_from_edm(net), student, compare, shorter, Processes("meta"), 1)
        held: dict[int, Tensor] = {}
        with (
            FlopCounterMode(display=False) as counter,
            torch.autograd.graph.saved_tensors_hooks(
                lambda t, held=held: held.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
            ),
        ):
            training.add_gradient(x, torch.Generator(), condition, 1)
        counts.append(counter.get_total_flops())
        own = {p.untyped_storage()._cdata for module in (net, student) for p in module.parameters()}
        saved = sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x, torch.ones(1, device=META), **condition)
    forward, parameters = counter.get_total_flops(), sum(p.numel() for p in student.parameters())

    steps = expected_steps(experiment)
    copies = 1 + 1 + 1 + 2 + len(training.averages)  # teacher, student, gradient, optimiser's two, averages
    return {
        "forward": forward,
        "image": counts[1] + 2 * (steps - 1) * forward,
        "distance": counts[1] - counts[0],
        "teacher_passes": 2 * steps,
        "parameters": parameters,
        "bytes": 4 * copies * parameters,
        "bytes_per_image": saved,
    }


def expected_steps(experiment: ap.PaperExperiment) -> float:
    """Return E[k] for P(k) proportional to k, k up to the most steps."""
    steps = range(1, min(experiment.max_ode_steps, experiment.num_levels - 1) + 1)
    return sum(k * k for k in steps) / sum(steps)


class OneStep(Training):
    """An iteration in which the teacher takes one step."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)
        self.levels = ap.karras_noise_levels(3)[:2]


def perceptual_distance() -> nn.Module:
    """Return LPIPS with weights that nobody looks at."""
    try:
        from torchvision.models import vgg16

        with META:
            shapes = vgg16().state_dict()
        zeros = {name: torch.zeros(weight.shape) for name, weight in shapes.items() if name.startswith("features.")}
        return ap.LPIPSDistance("vgg", backbone=zeros).to(META)
    except (ImportError, RuntimeError) as error:
        raise SystemExit(f"--plan: LPIPS cannot be counted, {error}: or --set distance=squared_error") from error
