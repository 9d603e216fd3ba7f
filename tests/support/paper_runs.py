"""Runs of examples/paper on tiny stand-ins of EDM's networks, in processes of their own as torchrun starts them."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import resource
import runpy
import socket
import sys
import tempfile
import zipfile
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from checkout import ROOT
from edm_stand_in import DhariwalUNet, EDMPrecond, SongUNet
from PIL import Image

RECIPE = ROOT / "examples" / "paper"
EXPERIMENTS = ("cifar10_unconditional", "cifar10_conditional", "ffhq64", "imagenet64")
CLASSES = 5
TINY = (
    "resolution=8 distance=squared_error batch_size=8 iterations=4 num_levels=6 statistics_samples=8 "
    "statistics_levels=12"
).split()


def write_teacher(path: Path, experiment: str, size: int = 8, **network: int) -> Path:
    """Pickle a network as EDM's are: of another architecture for ImageNet, with classes where there are some."""
    label_dim = CLASSES if experiment in ("cifar10_conditional", "imagenet64") else 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = DhariwalUNet if experiment == "imagenet64" else SongUNet
        net = EDMPrecond(kind(label_dim=label_dim, **network), label_dim=label_dim, img_resolution=size)
        path.write_bytes(pickle.dumps({"ema": net, "loss_fn": None}))
    return path


def write_data(path: Path, size: int = 8, labels: object = "all") -> Path:
    """Write a zip file as EDM's dataset_tool.py does; labels "all", none, or what dataset.json is to hold."""
    rng, names = np.random.default_rng(0), [f"00000/img{i:08}.png" for i in range(12)]
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(file, "png")
            archive.writestr(name, file.getvalue())
        if labels is not None:
            every = [[name, i % CLASSES] for i, name in enumerate(names)]
            archive.writestr("dataset.json", json.dumps({"labels": every if labels == "all" else labels}))
    return path


class Running(NamedTuple):
    """A process, and the file with all that it says."""

    process: BaseProcess
    output: Path


@cache
def context() -> Any:
    """Processes that need not import torch: a server of their own has, and forks."""
    server = multiprocessing.get_context("forkserver")
    slow = ["torch._dynamo", "torch.distributed.fsdp", "scipy.interpolate", "matplotlib.figure"]  # imported where used
    server.set_forkserver_preload(["torch", "numpy", "PIL.Image", "analytic_precond", "tqdm", *slow])
    return server


def _main(arguments: list[str], variables: dict[str, str], folders: list[str], output: Path, largest: int) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(variables)
    if largest:  # files end there, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    torch.set_num_threads(1)
    script, sys.argv = arguments[0], list(arguments)
    sys.path[:0] = [str(RECIPE), *folders, str(ROOT / "tests" / "support")]
    runpy.run_path(script, run_name="__main__")


def start(
    arguments: list[str], processes: int = 1, folders: tuple[Path, ...] = (), largest_file: int = 0
) -> list[Running]:
    """Start processes with the variables that torchrun gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    running = []
    for rank in range(processes):
        own = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": processes,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        output = Path(tempfile.mkstemp(suffix=f".{rank}.log")[1])
        variables = {name: str(value) for name, value in own.items()}
        process = context().Process(
            target=_main, args=(arguments, variables, [str(f) for f in folders], output, largest_file)
        )
        process.start()
        running.append(Running(process, output))
    return running


def finish(running: list[Running], code: int = 0) -> list[str]:
    """Return what each process has said; code: what all must end with."""
    outputs = []
    for process, output in running:
        process.join(120)
        outputs.append(output.read_text())
        alive = process.is_alive()
        if alive:
            process.kill()
        output.unlink()
        assert not alive, outputs[-1]
        assert process.exitcode == code, outputs[-1]
    return outputs


def train(
    folder: Path,
    experiment: str,
    *options: object,
    processes: int = 1,
    code: int = 0,
    largest_file: int = 0,
    **more: Any,
) -> list[str]:
    return finish(start(train_command(folder, experiment, *options, **more), processes, (), largest_file), code)


def train_command(
    folder: Path, experiment: str, *options: object, output: str = "run", changes: tuple[str, ...] = ()
) -> list[str]:
    """Return the command of a tiny run on the files of a folder; what options repeat overrides."""
    teacher, data = folder / f"{experiment}.pkl", folder / "data.zip"
    if not teacher.exists():
        write_teacher(teacher, experiment)
    if not data.exists():
        write_data(data)
    files = ["--teacher", teacher, "--data", data, "--output", folder / output, "--device", "cpu"]
    often = ["--log-every", 1, "--save-every", 2, "--snapshot-every", 2]
    every = [RECIPE / "train.py", "--experiment", experiment, *files, *often, "--set", *TINY, *changes, *options]
    return [str(word) for word in every]


def evaluate_command(folder: Path, *options: object) -> list[str]:
    return [str(word) for word in (RECIPE / "evaluate.py", "--folder", folder, "--device", "cpu", *options)]


def write_features(folder: Path) -> tuple[Path, Path]:
    """Write a package with torch-fidelity's interface, and random weights for it; return its folder, and their file."""
    package, weights = folder / "packages" / "torch_fidelity", folder / "inception.pth"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "feature_extractor_inceptionv3.py").write_text(
        "import torch\n"
        "class FeatureExtractorInceptionV3(torch.nn.Module):\n"
        "    def __init__(self, name, features_list, feature_extractor_weights_path=None):\n"
        "        super().__init__()\n"
        "        assert (name, features_list) == ('inception-v3-compat', ['2048'])\n"
        "        self.weight = torch.load(feature_extractor_weights_path, weights_only=True)['weight']\n"
        "    def forward(self, images):\n"
        "        assert images.dtype == torch.uint8\n"
        "        return (torch.nn.functional.conv2d(images.float() / 128 - 1, self.weight).relu().mean((2, 3)),)\n"
    )
    torch.save({"weight": torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))}, weights)
    return package.parent, weights


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def checkpoint_of(folder: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return state
