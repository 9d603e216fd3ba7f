"""examples/paper in several processes: the four experiments, killed runs, faults of one process, evaluation."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkout import ROOT
from paper_runs import (
    RECIPE,
    Running,
    checkpoint_of,
    evaluate_command,
    finish,
    log_of,
    start,
    train,
    train_command,
    write_data,
    write_features,
)
from PIL import Image
from same_bits import assert_same
from scipy.linalg import sqrtm
from torch.distributed.run import get_args_parser

pytestmark = pytest.mark.long


@pytest.mark.parametrize(
    ("experiment", "preconditioning", "precision"),
    [
        ("cifar10_unconditional", "analytic", "fp16"),
        ("cifar10_conditional", "shifted", "bf16"),
        ("ffhq64", "ctm", "fp32"),
        ("imagenet64", "per-mode", "fp16"),
    ],
)
def test_all_experiments_on_two_processes(
    experiment: str, preconditioning: str, precision: str, tmp_path: Path
) -> None:
    options = ["--preconditioning", preconditioning, "--precision", precision, "--batch-gpu", 2]
    changes = ("iterations=2", "flips=1.0", "statistics_samples=32")
    outputs = train(tmp_path, experiment, *options, processes=2, changes=changes)
    assert "holds 2 iterations" in outputs[0]
    assert "Error" not in outputs[1]
    lines = log_of(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [1, 2]
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert all("NaN" not in line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    assert {line["scale"] for line in lines} == {65536.0 if precision == "fp16" else 1.0}
    state = checkpoint_of(tmp_path / "run")
    assert state["settings"]["precision"] == precision
    weights = [w for name, w in state["student"].items() if name.startswith("network.")]
    assert all(w.isfinite().all() for w in weights)
    moved = state["student"]["network.network.map_augment.3.weight"]
    assert moved.abs().max() > 0  # the target time is learned


def kill(running: list[Running]) -> None:
    for process, _ in running:
        process.kill()
    for process, output in running:
        process.join()
        output.unlink()


def test_a_run_that_is_killed_twice_ends_bit_for_bit_as_one_that_is_not(tmp_path: Path) -> None:
    options = ("cifar10_conditional", "--precision", "fp16", "--batch-gpu", 2)
    killed, checkpoint, reached = tmp_path / "killed", tmp_path / "killed" / "checkpoint.pt", 0
    for _ in range(2):
        running = start(train_command(tmp_path, *options, output="killed", changes=("iterations=400",)), 2)
        while not checkpoint.exists() or checkpoint_of(killed)["iteration"] < reached + 2:
            assert all(process.is_alive() for process, _ in running)
            time.sleep(0.02)
        time.sleep(random.random())
        kill(running)
        reached = checkpoint_of(killed)["iteration"]
    last = (f"iterations={reached + 3}",)
    train(tmp_path, *options, output="killed", changes=last, processes=2)
    train(tmp_path, *options, output="whole", changes=last, processes=2)
    found, expected = checkpoint_of(killed), checkpoint_of(tmp_path / "whole")
    assert found["iteration"] == reached + 3
    assert_same(found, expected)
    timed = {"images_per_second", "peak_memory_gb"}
    lines = [
        [{k: v for k, v in line.items() if k not in timed} for line in log_of(run)]
        for run in (killed, tmp_path / "whole")
    ]
    assert lines[0] == lines[1]
    assert [line["iteration"] for line in lines[0]] == list(range(1, reached + 4))


def test_a_full_disk_stops_all_with_the_last_checkpoint_kept(tmp_path: Path) -> None:
    options = ("cifar10_unconditional", "--precision", "fp32", "--preconditioning", "ctm")
    train(tmp_path, *options, processes=2, changes=("iterations=2",))
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    outputs = train(tmp_path, *options, processes=2, code=1, largest_file=20_000)
    for output in outputs:
        assert "cannot be written" in output
        assert "Make room, and start again" in output
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*.tmp"))
    train(tmp_path, *options, processes=2)
    assert checkpoint_of(tmp_path / "run")["iteration"] == 4


@pytest.mark.parametrize("preconditioning", ["analytic", "ctm"])  # found by the estimate, and by an iteration
def test_an_image_that_one_process_cannot_read_stops_all(preconditioning: str, tmp_path: Path) -> None:
    path = write_data(tmp_path / "data.zip")
    with zipfile.ZipFile(path) as archive:
        entry = archive.infolist()[7]
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 120] ^= 1
    path.write_bytes(bytes(content))
    outputs = train(
        tmp_path,
        "ffhq64",
        "--preconditioning",
        preconditioning,
        processes=2,
        code=1,
        changes=("statistics_samples=24",),
    )
    for output in outputs:
        assert "image 00000/img00000007.png of" in output
        assert "cannot be read: Bad CRC-32" in output


def test_refusals_come_from_every_process(tmp_path: Path) -> None:
    for output in train(tmp_path, "ffhq64", processes=2, code=1, changes=("batch_size=7",)):
        assert "batch_size must be a multiple of the 2 processes, got 7" in output


def test_a_process_that_is_lost_stops_the_other(tmp_path: Path) -> None:
    running = start(train_command(tmp_path, "ffhq64", "--preconditioning", "ctm", changes=("iterations=400",)), 2)
    while not (tmp_path / "run" / "checkpoint.pt").exists():
        time.sleep(0.05)
    running[1].process.kill()
    running[1].process.join()
    running[1].output.unlink()
    finish(running[:1], code=1)


def test_evaluation_by_two_processes_is_that_by_one(tmp_path: Path) -> None:
    """And the distances are those of the images that are written, by another formula."""
    packages, weights = write_features(tmp_path)
    np.savez(tmp_path / "ref.npz", mu=np.full(4, 0.5), sigma=np.eye(4))
    train(tmp_path, "imagenet64", "--precision", "fp32", changes=("iterations=2",))
    run = tmp_path / "run"
    options = ["--steps", 1, 2, "--num-samples", 11, "--reference", tmp_path / "ref.npz", "--inception", weights]
    pictures = []
    for processes, batch in ((1, 11), (2, 3)):
        finish(start(evaluate_command(run, *options, "--batch-gpu", batch), processes, (packages,)))
        paths = sorted(run.glob("samples-000000002/steps-02/*/*.png"))
        pictures.append(np.stack([np.asarray(Image.open(path)) for path in paths]).astype(int))
    assert pictures[0].shape == (11, 8, 8, 3)
    assert np.abs(pictures[0] - pictures[1]).max() <= 1  # rounding of other batches, at the edge of a grey level

    results = [json.loads(line) for line in (run / "fid.jsonl").read_text().splitlines()]
    assert [(line["iteration"], line["steps"]) for line in results] == 2 * [(2, 1), (2, 2)]
    assert results[0]["fid"] == pytest.approx(results[2]["fid"], rel=1e-3)
    assert results[1]["fid"] == pytest.approx(results[3]["fid"], rel=1e-3)
    weight = torch.load(weights, weights_only=True)["weight"]
    images = torch.from_numpy(pictures[0]).permute(0, 3, 1, 2).float() / 128 - 1
    features = torch.nn.functional.conv2d(images, weight).relu().mean((2, 3)).double().numpy()
    mean, covariance = features.mean(0), np.cov(features.T)
    expected = np.square(mean - 0.5).sum() + np.trace(covariance + np.eye(4) - 2 * sqrtm(covariance).real)
    assert results[1]["fid"] == pytest.approx(expected, rel=1e-6)

    figure = [RECIPE / "figure.py", run, "--steps", 2, "--output", tmp_path / "figure.png"]
    finish(start([str(word) for word in figure]))
    assert (tmp_path / "figure.png").stat().st_size > 0
    lost = [RECIPE / "figure.py", run, "--steps", 7, "--output", tmp_path / "none.png"]
    assert "has FIDs of [1, 2] steps, none of 7" in finish(start([str(word) for word in lost]), code=1)[0]

    # fewer samples than processes
    finish(start(evaluate_command(run, "--steps", 1, "--num-samples", 1), 2))


def test_lpips_in_half_precision_and_its_bad_backbones(tmp_path: Path) -> None:
    """With torchvision's stand-in and a random network, squeezed into images of 32 pixels by VGG's smallest size."""
    package = tmp_path / "packages" / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from . import models\n")
    (package / "models.py").write_text("from stand_in_torchvision import *\n")
    import stand_in_torchvision

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vgg, other = stand_in_torchvision.vgg16(), stand_in_torchvision.alexnet()
    torch.save(vgg.state_dict(), tmp_path / "vgg.pth")
    torch.save(other.state_dict(), tmp_path / "alex.pth")
    changes = ("distance=lpips", "iterations=1", "batch_size=1", "num_levels=3")
    for backbone, message in (
        ("none.pth", "--backbone: .*no file at"),
        ("alex.pth", "--backbone: .*torchvision's network for net='vgg'"),
    ):
        command = train_command(tmp_path, "cifar10_unconditional", "--backbone", tmp_path / backbone, changes=changes)
        (output,) = finish(start(command, 1, (package.parent,)), code=1)
        assert re.search(message, output), output
    options = ["--backbone", tmp_path / "vgg.pth", "--preconditioning", "ctm", "--precision", "bf16"]
    finish(start(train_command(tmp_path, "cifar10_unconditional", *options, changes=changes), 1, (package.parent,)))
    assert log_of(tmp_path / "run")[0]["trajectory_loss"] > 0
    (plan,) = finish(
        start(train_command(tmp_path, "cifar10_unconditional", "--plan", changes=changes), 1, (package.parent,))
    )
    assert "of them the teacher's and" in plan


def test_torchrun_starts_it_as_the_readme_says(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += train_command(tmp_path, "ffhq64", "--preconditioning", "ctm", "--precision", "bf16")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert checkpoint_of(tmp_path / "run")["iteration"] == 4


def test_torchrun_keeps_no_option_of_the_evaluation_for_itself() -> None:
    """As it does with --run, an abbreviation of its own --run-path."""
    options = ["--steps", 2, "--snapshots", "all", "--num-samples", 4, "--batch-gpu", 2, "--no-images"]
    own = evaluate_command(Path("runs/u"), *options, "--teacher", "t", "--reference", "r", "--inception", "i")
    read = get_args_parser().parse_args(["--nproc-per-node", "4", *own])
    assert [read.training_script, *read.training_script_args] == own
