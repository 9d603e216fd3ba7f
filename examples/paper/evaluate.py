r"""Samples of a run's student in a few steps, as EDM's folders of PNGs, and their FID.

    torchrun --nproc-per-node 4 examples/paper/evaluate.py --folder runs/u --steps 1 2 3 5 10 \
        --reference cifar10-32x32.npz --inception weights-inception-2015-12-05-6726825d.pth

Seed i gives the same image, and the same class, for any number of processes, and in any batch.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from checkpoints import load, snapshots
from frechet import Features, frechet_distance, load_inception, load_reference
from networks import WARNING, load_teacher, make_student
from PIL import Image
from preconditionings import load as load_preconditioning
from processes import Processes
from settings import experiment_from, positive
from torch import Tensor
from tqdm import tqdm

import analytic_precond as ap


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "--folder",
        "--run",
        dest="run",
        type=Path,
        required=True,
        help="folder of the run; torchrun takes --run for its own",
    )
    add("--steps", type=positive, nargs="+", default=[1, 2, 3, 5, 10], help="of the samples (1 2 3 5 10)")
    add("--snapshots", default="last", help="last, all, or iterations with commas between (last)")
    add("--num-samples", type=positive, default=50_000, help="seeds from 0 on (50000)")
    add("--batch-gpu", type=positive, default=250, help="images at a time (250)")
    add("--teacher", type=Path, help="EDM's pickle, where it has moved")
    add("--reference", type=Path, help="npz file of EDM's fid.py ref")
    add("--inception", type=Path, help="torch-fidelity's weights, to compute FIDs here")
    add("--no-images", action="store_true", help="write no PNGs")
    add("--device", choices=("cpu", "cuda"), help="where to compute (GPUs where there are any)")
    return parser.parse_args()


def chosen(folder: Path, which: str) -> list[Path]:
    """Return the snapshots that were asked for."""
    found = snapshots(folder)
    if not found:
        raise SystemExit(f"--run: expected a folder of train.py with snapshots, found none in {folder}")
    if which in ("last", "all"):
        return found if which == "all" else found[-1:]
    by_iteration = {int(path.stem.split("-")[1]): path for path in found}
    try:
        return [by_iteration[int(iteration)] for iteration in which.split(",")]
    except (ValueError, KeyError):
        raise SystemExit(f"--snapshots: expected last, all or some of {sorted(by_iteration)}, got {which}") from None


def student_of(path: Path, teacher: Path | None) -> tuple[ap.ConsistencyTrajectoryModel, ap.PaperExperiment, int, int]:
    """Return a snapshot's student, its experiment, its number of classes and its iteration."""
    state = load(path)
    settings, experiment = state["settings"], experiment_from(state["settings"])
    net = load_teacher(teacher or Path(settings["teacher_file"]), experiment)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "table.safetensors")
        if state["preconditioning"] is not None:
            table.write_bytes(state["preconditioning"].numpy().tobytes())
        precond = load_preconditioning(settings["preconditioning"], table, float(net.sigma_data))
    student = make_student(net, precond, experiment, settings["seed"])
    student.load_state_dict(state["student"])
    return student.eval().requires_grad_(False), experiment, net.label_dim, state["iteration"]


@torch.no_grad()
def sample(
    student: ap.ConsistencyTrajectoryModel,
    levels: Tensor,
    seeds: range,
    resolution: int,
    label_dim: int,
    device: torch.device,
) -> Tensor:
    """Return one image for each seed, as EDM rounds them. Shape ``(B, 3, H, W)``, uint8."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same on all devices
    noise = ap.draw_noise((len(seeds), 3, resolution, resolution), generators, device=device)
    condition = {}
    if label_dim:  # of the same generators, after the noise
        classes = torch.stack([torch.randint(label_dim, (), generator=generator) for generator in generators])
        condition = {"class_labels": torch.nn.functional.one_hot(classes, label_dim).float().to(device)}
    images = ap.sample_deterministic(student, levels[0].item() * noise, levels, **condition)
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def write_images(images: Tensor, seeds: range, folder: Path) -> None:
    """Write PNGs as EDM's ``generate.py --subdirs`` names them, which its ``fid.py`` reads."""
    for seed, image in zip(seeds, images.permute(0, 2, 3, 1).cpu().numpy(), strict=True):
        path = folder / f"{seed - seed % 1000:06d}" / f"{seed:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def evaluate(args: argparse.Namespace, processes: Processes) -> None:
    """Sample, and measure."""
    with processes.together():
        if (args.inception is None) != (args.reference is None):
            raise SystemExit(
                "--reference and --inception belong together: FIDs need both; EDM's fid.py reads the images"
            )
        if args.no_images and args.inception is None:
            raise SystemExit("--no-images needs --reference and --inception: there would be nothing left")
        if args.inception and args.num_samples < 2:
            raise SystemExit("--num-samples must be at least 2 for an FID, got 1: a covariance needs two")
        paths = chosen(args.run, args.snapshots)
        inception = load_inception(args.inception, processes.device) if args.inception else None
        reference = load_reference(args.reference, inception, processes.device) if args.reference else None
        processes.say(WARNING.format("the teacher's file"))
    for path in paths:
        with processes.together():
            student, experiment, label_dim, iteration = student_of(path, args.teacher)
            student.to(processes.device)
        for steps in args.steps:
            features = Features(inception)
            folder = args.run / f"samples-{iteration:09d}" / f"steps-{steps:02d}"
            batches = [
                range(n, min(n + args.batch_gpu, args.num_samples)) for n in range(0, args.num_samples, args.batch_gpu)
            ]
            with processes.together():
                own = batches[processes.rank :: processes.size]
                for seeds in tqdm(own, desc=f"{steps} steps", disable=processes.rank > 0):
                    levels = experiment.sampling_levels(steps)
                    images = sample(student, levels, seeds, experiment.resolution, label_dim, processes.device)
                    if not args.no_images:
                        write_images(images, seeds, folder)
                    if inception is not None:
                        features.add(images)
            if reference is not None:
                with processes.together():
                    size = len(reference[0])
                    fid = frechet_distance(*features.result(processes, size), *reference)
                    if processes.rank == 0:
                        write_result(args, {"iteration": iteration, "steps": steps, "fid": fid})
    processes.say(f"done: {args.run}")


def write_result(args: argparse.Namespace, result: dict[str, float]) -> None:
    """Print a result, and add it to the run's."""
    result |= {"num_samples": args.num_samples, "reference": args.reference.name, "features": args.inception.name}
    print(json.dumps(result), flush=True)
    with (args.run / "fid.jsonl").open("a") as file:
        file.write(json.dumps(result) + "\n")


def main() -> None:
    """Evaluate in all processes that torchrun has started."""
    args = arguments()
    processes = Processes(args.device)
    evaluate(args, processes)
    processes.leave()


if __name__ == "__main__":
    main()
