r"""The paper's experiments: distil EDM's networks into consistency trajectory models of any preconditioning.

    torchrun --nproc-per-node 4 examples/paper/train.py --experiment cifar10_unconditional \
        --teacher edm-cifar10-32x32-uncond-vp.pkl --data cifar10-32x32.zip --backbone vgg16-397923af.pth --output runs/u

The same command goes on after an interruption. ``--plan`` says what it will cost. README.md has the rest.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from contextlib import closing
from pathlib import Path

import preconditionings
import torch
from checkpoints import RunFolder
from data import Batches, ImageArchive
from iteration import LOGGED, OPTIMIZERS, Distance, Training
from networks import WARNING, load_teacher, make_student
from plan import print_plan
from processes import Processes
from settings import PRECISIONS, Settings, experiment_of, fingerprint, positive, positive_number, share_of_batch
from tqdm import tqdm

import analytic_precond as ap

DIVERGED = (
    "the {} around iteration {}: lower the learning rate, or take --precision bf16 or fp32; {} holds the last "
    "state that was kept"
)


def arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--experiment", choices=sorted(ap.PAPER_EXPERIMENTS), required=True, help="of the paper")
    add("--teacher", type=Path, required=True, help="EDM's pickle")
    add("--data", type=Path, help="zip file of EDM's dataset_tool.py")
    add("--output", type=Path, help="folder of the run")
    add("--backbone", type=Path, help="torchvision's weights of VGG-16, for LPIPS")
    add("--preconditioning", choices=preconditionings.NAMES, default="analytic", help="of the student (analytic)")
    add("--precision", choices=tuple(PRECISIONS), help="of the networks (the experiment's, fp16)")
    add(
        "--batch-gpu", type=positive, help="images of one pass; smaller ones take less memory (a process's whole share)"
    )
    add(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=VALUE",
        help="change settings of ap.paper_experiment",
    )
    add("--seed", type=int, default=0, help="of everything that is drawn (0)")
    add("--log-every", type=positive, default=100, help="iterations (100)")
    add("--save-every", type=positive, default=1000, help="iterations from checkpoint to checkpoint (1000)")
    add("--snapshot-every", type=positive, default=10_000, help="iterations from snapshot to snapshot (10000)")
    add("--device", choices=("cpu", "cuda"), help="where to compute (GPUs where there are any)")
    add("--plan", action="store_true", help="say what the run will cost, and stop")
    add("--cards", type=positive, help="for --plan (the paper's number)")
    add(
        "--peak-tflops",
        type=positive_number,
        default=312.0,
        help="of a card, for --plan (312, an A100's or A800's in fp16)",
    )
    add(
        "--utilisation",
        type=positive_number,
        default=0.15,
        help="of that peak, for --plan (0.15, what the paper's days mean)",
    )
    return parser.parse_args()


def distance_of(experiment: ap.PaperExperiment, backbone: Path | None, device: torch.device) -> Distance:
    """Return what compares two images."""
    known = {"squared_error": ap.squared_error, "pseudo_huber": ap.pseudo_huber}
    if experiment.distance in known:
        return known[experiment.distance]
    if experiment.distance != "lpips":
        raise SystemExit(f"--set: distance must be lpips, {' or '.join(known)}, got {experiment.distance}")
    if backbone is None:
        raise SystemExit("--backbone: LPIPS needs VGG-16's weights, torchvision's vgg16-397923af.pth, got none")
    try:
        return ap.LPIPSDistance("vgg", backbone=backbone).to(device)
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"--backbone: {error}") from error


def settings_of(args: argparse.Namespace) -> Settings:
    """Return the run's settings, checked as far as that needs no files."""
    experiment = experiment_of(args.experiment, args.set)
    for name, known in (("optimizer", OPTIMIZERS), ("ode_solver", ("heun",)), ("inner_target", ("student", "average"))):
        if getattr(experiment, name) not in known:
            raise SystemExit(f"--set: {name} must be {' or '.join(known)}, got {getattr(experiment, name)}")
    for name, low, high in (
        ("batch_size", 1, None), ("iterations", 1, None), ("max_ode_steps", 1, None), ("num_levels", 2, None),
        ("dropout", 0, 1), ("flips", 0, 1), ("learning_rate", 0, None), ("statistics_samples", 1, None),
    ):  # fmt: skip
        value = getattr(experiment, name)
        if value < low or (high is not None and value > high):
            most = "" if high is None else f" and at most {high}"
            raise SystemExit(f"--set: {name} must be at least {low}{most}, got {value}")
    names = {dtype: name for name, dtype in PRECISIONS.items()}
    precision = args.precision or names[experiment.network_dtype]
    return Settings(experiment, args.preconditioning, precision, args.seed, args.teacher, args.data)


def train(args: argparse.Namespace, processes: Processes) -> None:
    """Train, or go on."""
    # all that can be wrong is looked at before anything is computed
    with processes.together():
        settings = settings_of(args)
        if args.data is None or args.output is None:
            raise SystemExit("--data and --output are needed to train")
        share, batch_gpu = share_of_batch(settings.experiment.batch_size, processes.size, args.batch_gpu)
        processes.say(WARNING.format(args.teacher))
        net = load_teacher(args.teacher, settings.experiment).to(processes.device)
        distance = distance_of(settings.experiment, args.backbone, processes.device)
        images = ImageArchive(args.data, net.img_resolution, net.label_dim)
        backbone = fingerprint(args.backbone) if settings.experiment.distance == "lpips" else ""
        written = settings.written(
            teacher=fingerprint(args.teacher), data=images.fingerprint, backbone=backbone, batch_gpu=str(batch_gpu)
        )
        folder = RunFolder(args.output, written)
    with closing(folder):
        with processes.together():
            if processes.rank == 0:
                folder.open()
        teacher = ap.denoiser_from_edm(net)
        precond = preconditionings.prepare(settings, teacher, float(net.sigma_data), images, args.output, processes)
        with processes.together():
            student = make_student(net, precond, settings.experiment, args.seed).to(processes.device)
            training = Training(teacher, student, distance, settings, processes, batch_gpu)
            first = folder.resume(training.parts())
        with processes.together():
            if processes.rank == 0:
                folder.cut_log(first)
        batches = Batches(images, settings.experiment.batch_size, args.seed)
        run(args, training, batches, share, folder, first, processes)


def run(
    args: argparse.Namespace,
    training: Training,
    batches: Batches,
    share: int,
    folder: RunFolder,
    first: int,
    processes: Processes,
) -> None:
    """Train from iteration ``first`` on."""
    last, since, sums, start = training.experiment.iterations, first, 0.0, time.perf_counter()
    bar = tqdm(range(first, last), initial=first, total=last, desc="distilling", disable=processes.rank > 0)
    for iteration in bar:
        with processes.together():
            images, labels = batches.share(iteration, processes.rank, share)
        sums = sums + training.step(iteration, images, labels)
        done = iteration + 1
        if done % args.log_every == 0 or done == last:
            values = processes.mean(sums / (done - since)).tolist()
            line = {"iteration": done, **dict(zip(LOGGED, values, strict=True)), "scale": training.scaler.get_scale()}
            line["images_per_second"] = (done - since) * batches.batch_size / (time.perf_counter() - start)
            line["peak_memory_gb"] = peak_memory(processes.device)
            since, sums, start = done, 0.0, time.perf_counter()
            with processes.together():
                if processes.rank == 0:
                    folder.write_log(line)
            bar.set_postfix(loss=f"{line['loss']:.4g}", images=f"{line['images_per_second']:.3g}/s", refresh=False)
            if not line["trajectory_loss"] < float("inf"):
                raise SystemExit(DIVERGED.format(f"loss is {line['trajectory_loss']}", done, folder.checkpoint))
        keep = done % args.save_every == 0 or done == last
        if keep or done % args.snapshot_every == 0:
            with processes.together():
                if processes.rank == 0:
                    if not training.is_finite():
                        raise SystemExit(DIVERGED.format("student is not finite", done, folder.checkpoint))
                    if done % args.snapshot_every == 0 or done == last:
                        folder.snapshot(done, training.average)
                    if keep:  # after the snapshot, which an interruption in between would lose
                        folder.keep(done, training.parts())
    processes.say(f"{folder.path} holds {max(first, last)} iterations: evaluate.py --folder {folder.path} comes next")


def peak_memory(device: torch.device) -> float:
    """Return the most memory that was taken, in GB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """Plan, or train in all processes that torchrun has started."""
    args = arguments()
    if args.plan:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise SystemExit("--plan takes one process: python examples/paper/train.py --plan ...")
        settings = settings_of(args)
        print_plan(load_teacher(args.teacher, settings.experiment), settings, args)
        return
    processes = Processes(args.device)
    try:
        train(args, processes)
    except KeyboardInterrupt:
        raise SystemExit(f"\ninterrupted: the same command goes on from {args.output}") from None
    processes.leave()


if __name__ == "__main__":
    main()
