"""Distil a teacher into a student that needs one or two steps: Consistency Trajectory Models, complete, on a CPU.

As it stands it trains the quickstart's small U-Net on photograph patches and distils it, in a few minutes. A run that
was interrupted goes on when started again, on the CPU bit for bit.
"""

import argparse
import copy
import os
import pickle
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from matplotlib.figure import Figure
from PIL import Image
from quickstart import NetworkTeacher, UNet, load_patches, train_teacher
from torch import Tensor, nn
from tqdm import tqdm

import analytic_precond as ap

STEPS = (1, 2, 4)  # that samples are made in
RECIPE = "examples/paper/train.py"  # for several processes, classes, half precision, LPIPS


def load_images(path: Path) -> Tensor:
    """Read the images of a folder or zip file, all of one size, as RGB in [-1, 1]. Shape ``(N, 3, H, W)``."""
    archive = zipfile.ZipFile(path) if path.suffix == ".zip" else None
    files = sorted(archive.namelist() if archive else map(str, path.rglob("*")))
    names = [f for f in files if f.lower().endswith((".png", ".jpg", ".jpeg", ".webp")) and "__MACOSX" not in f]
    if not names:
        raise SystemExit(f"--data: expected png, jpg or webp images, found none in {path}")
    images = [np.asarray(Image.open(archive.open(name) if archive else name).convert("RGB")) for name in tqdm(names)]
    if len(shapes := {image.shape for image in images}) > 1:
        raise SystemExit(f"--data: expected images of one size, got {sorted(shapes)}: crop and resize them first")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 127.5 - 1


class TargetTime(nn.Module):
    """A raw EDM network that is also told where to jump to, through its slot for augmentation labels."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, channels = network, network.map_layer0.in_features
        layers = nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels)
        network.map_augment = nn.Sequential(copy.deepcopy(network.map_noise), *layers)

    def forward(self, x: Tensor, c_noise: Tensor, c_target: Tensor) -> Tensor:
        """Return the raw output F."""
        return self.network(x, c_noise, None, augment_labels=c_target)


Teacher = tuple[ap.Denoiser, nn.Module, float]  # with a two-time network that starts as its copy, and sigma_data


def load_edm(path: Path) -> Teacher:
    """Return the teacher of EDM's pickle."""
    print(f"WARNING: {path} is a pickle, and loading it runs the code in it. Go on only with files that you trust.")
    try:
        net = pickle.loads(path.read_bytes())["ema"].eval().requires_grad_(False).float()
    except ModuleNotFoundError as error:
        raise SystemExit(f"--teacher: {error}: EDM's files need its code, NVlabs/edm on PYTHONPATH") from error
    if getattr(net, "label_dim", 0):
        raise SystemExit(
            f"--teacher: expected an unconditional network, got one with {net.label_dim} classes: {RECIPE} takes those"
        )
    network = TargetTime(copy.deepcopy(net.model))
    ap.initialize_from_teacher(network.network, net.model, zero=["map_augment.3"])
    return ap.denoiser_from_edm(net), network.requires_grad_(True), float(net.sigma_data)


def load_teacher(path: Path | None, data: Tensor, output: Path) -> Teacher:
    """Return the teacher of an example's file; where there is none, one that is trained on the data."""
    torch.set_num_threads(1)  # so small a network gains little from more, and loses much where the machine is busy
    path = path or output / "teacher.safetensors"
    if not path.exists():
        save({**train_teacher(data, data.std().item()).network.state_dict(), "sigma_data": data.std()}, path)
    weights = safetensors.torch.load_file(path)
    teacher = NetworkTeacher(UNet(), weights.pop("sigma_data").item())
    teacher.network.load_state_dict(weights)
    network = UNet(two_times=True)
    ap.initialize_from_teacher(network, teacher.network, zero=["embed_target.2"])
    return teacher.eval().requires_grad_(False), network, teacher.edm.sigma_data


def save(state: dict[str, Any], path: Path) -> None:
    """Write a file; one that is interrupted leaves the last one as it was."""
    with path.with_suffix(".tmp").open("wb") as file:
        torch.save(state, file) if path.suffix == ".pt" else file.write(safetensors.torch.save(state))
    path.with_suffix(".tmp").replace(path)


def draw(history: np.ndarray, rows: dict[str, Tensor], output: Path) -> None:
    """Write the training curves, and samples from the same noise in rows."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    panel = figure.subplots()
    panel.plot(history[:, 0], history[:, 1:], label=[f"steps: {steps}" for steps in STEPS], marker=".")
    panel.set(xlabel="iteration", ylabel="RMS distance to the teacher's samples", ylim=(0, None))
    panel.legend()
    figure.savefig(output / "curves.png", dpi=150)

    figure = Figure(figsize=(12, 0.85 * len(rows)), layout="constrained")
    for panel, (label, images) in zip(figure.subplots(len(rows), 1), rows.items(), strict=True):
        panel.imshow(torch.cat(list(images[:16]), 2).permute(1, 2, 0).float().clamp(-1, 1) / 2 + 0.5)
        panel.set_ylabel(label, rotation=0, ha="right", va="center")
        panel.set(xticks=[], yticks=[])
    figure.savefig(output / "samples.png", dpi=150)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("distill_output"), help="folder for all files")
    parser.add_argument("--teacher", type=Path, help="EDM's .pkl or an example's teacher.safetensors; None: trains one")
    parser.add_argument("--data", type=Path, help="folder or zip file of images; None: photograph patches")
    parser.add_argument("--preconditioning", choices=("analytic", "ctm"), default="analytic", help="of the student")
    parser.add_argument("--iterations", type=int, default=600, help="steps of training in all")
    parser.add_argument("--batch-size", type=int, default=32, help="images in an iteration")
    parser.add_argument("--num-levels", type=int, default=18, help="levels of the training grid")
    parser.add_argument("--max-steps", type=int, default=17, help="most teacher steps in one jump")
    parser.add_argument("--learning-rate", type=float, default=4e-4, help="of the student's optimizer, RAdam")
    parser.add_argument("--ema", type=float, default=0.99, help="decay of the average; the paper takes 0.999")
    parser.add_argument("--num-samples", type=int, default=512, help="noisy samples per level for the statistics")
    parser.add_argument("--save-every", type=int, default=50, help="iterations between checkpoints")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise SystemExit(f"this example runs in one process, without torchrun: {RECIPE} takes several")
    for name, path in ("teacher", args.teacher), ("data", args.data):
        if path and not path.exists():
            raise SystemExit(f"--{name}: no file or folder {path}")
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)

    def interrupted(*_: Any) -> None:
        kept = [*args.output.glob("checkpoint.pt"), *args.output.glob("*.safetensors"), "the start (nothing is kept)"]
        raise SystemExit(f"\ninterrupted: the same command goes on from {kept[0]}")

    signal.signal(signal.SIGINT, interrupted)

    # the teacher, its statistics, the student
    checked = load_edm(args.teacher) if args.teacher and args.teacher.suffix != ".safetensors" else None
    data = load_images(args.data) if args.data else load_patches()
    teacher, network, sigma_data = checked or load_teacher(args.teacher, data, args.output)
    if (size := getattr(getattr(teacher, "network", None), "img_resolution", data.shape[-1])) != data.shape[-1]:
        raise SystemExit(f"--data: expected images of {size} pixels, the teacher's, got {data.shape[-1]}: resize them")
    teacher = teacher.to(args.device)
    if not (statistics := args.output / "statistics.safetensors").exists():
        ap.estimate_statistics(teacher, data, num_samples=args.num_samples, description="teacher").save(statistics)
    analytic = ap.AnalyticPreconditioning(ap.TeacherStatistics.load(statistics), sigma_data=sigma_data)
    precond = analytic if args.preconditioning == "analytic" else ap.CTMPreconditioning(sigma_data=sigma_data)
    student = ap.ConsistencyTrajectoryModel(network, precond, sigma_data).to(args.device).train()
    average = ap.exponential_moving_average(student, args.ema)
    last_layer = [p for p in network.parameters() if p.ndim == 4][-1]  # the last convolution
    optimizer = torch.optim.RAdam(student.parameters(), lr=args.learning_rate)

    # what the student is compared with: the teacher's own samples from the same noise
    levels = ap.karras_noise_levels(args.num_levels)
    start = 80.0 * ap.draw_noise((64, *data.shape[1:]), torch.Generator().manual_seed(1), device=args.device)
    ends = ap.solve_ode(teacher, start, ap.karras_noise_levels(40))
    paths = {n: ap.karras_noise_levels(n + 1) for n in STEPS}  # as sony/ctm samples: two steps go by 2.515

    # a checkpoint holds all that the next iteration depends on
    generator, first, history = torch.Generator().manual_seed(0), 0, []
    settings = {k: str(v) for k, v in vars(args).items() if k not in ("output", "iterations", "save_every", "device")}
    checkpoint = args.output / "checkpoint.pt"
    parts = {"student": student, "average": average, "optimizer": optimizer}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=args.device)
        if state["settings"] != settings:
            raise SystemExit(f"{checkpoint} is of another run, {state['settings']}: choose another --output")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["dropout"][0].cpu())
        torch.cuda.set_rng_state_all([gpu.cpu() for gpu in state["dropout"][1:]])
        first, history = state["iteration"], state["history"]

    bar = tqdm(range(first, args.iterations + 1), initial=first, total=args.iterations, desc="distilling")
    for iteration in bar:
        due = iteration % args.save_every == 0 or iteration == args.iterations
        if due and (not history or history[-1][0] < iteration):
            model = average.module.eval()
            rows = {f"steps: {n}": ap.sample_deterministic(model, start, path) for n, path in paths.items()}
            model.train()
            history.append([iteration, *((images - ends).square().mean().sqrt().item() for images in rows.values())])
            bar.set_postfix({name: f"{value:.4f}" for name, value in zip(rows, history[-1][1:], strict=True)})
            state = {name: part.state_dict() for name, part in parts.items()} | {"settings": settings}
            state |= {"iteration": iteration, "history": history, "generator": generator.get_state()}
            state["dropout"] = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
            save(state, checkpoint)
            draw(np.array(history), {"teacher": ends, **rows}, args.output)
        if iteration == args.iterations:
            break
        x_0 = data[torch.randint(len(data), (args.batch_size,), generator=generator)].to(args.device)
        noise = torch.randn(x_0.shape, generator=generator).to(args.device)
        times = ap.sample_jump_times(args.batch_size, levels, args.max_steps, generator)
        loss = ap.trajectory_distillation_loss(teacher, student, average, x_0, noise, times).loss
        t = ap.sample_lognormal_noise_levels(args.batch_size, generator=generator).to(args.device)
        denoising = ap.denoising_loss(student.denoise, x_0, noise, t, sigma_data=sigma_data).loss
        optimizer.zero_grad()
        (loss + ap.adaptive_balance(loss, denoising, last_layer) * denoising).backward()
        optimizer.step()
        average.update_parameters(student)
    print(f"checkpoint, curves.png and samples.png are in {args.output.resolve()}")


if __name__ == "__main__":
    main()
