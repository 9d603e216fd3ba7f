"""examples/distill.py: interrupted runs, and teachers and images in the form of other codebases."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edm_stand_in import EDMPrecond, SongUNet
from PIL import Image
from safetensors.torch import save_file

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "examples" / "distill.py"
SETTINGS = ["--num-samples", "8", "--batch-size", "4", "--save-every", "2", "--max-steps", "3", "--device", "cpu"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pickled EDM checkpoint, and images in a folder and in a zip file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = EDMPrecond(SongUNet(augment=False, dropout=0.1))
    with (tmp_path / "network-snapshot.pkl").open("wb") as file:
        pickle.dump({"ema": network, "loss_fn": None}, file)
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "00000").mkdir(parents=True)
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("dataset.json", "{}")
        archive.writestr("__MACOSX/00000/._img00000000.png", "what macOS adds to its zip files")
        for i in range(8):
            path = tmp_path / "images" / "00000" / f"img{i:08}.png"
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
            archive.write(path, f"00000/{path.name}")
    return tmp_path


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    """Start the example on the checkpoint."""
    command = [sys.executable, str(SCRIPT), *SETTINGS, "--teacher", str(folder / "network-snapshot.pkl"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    return output


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path / "checkpoint.pt", weights_only=True)
    return checkpoint


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(folder: Path) -> None:
    options = ["--data", str(folder / "images.zip"), "--iterations", "400"]
    killed = start(folder, *options, "--output", str(folder / "killed"))
    checkpoint = folder / "killed" / "checkpoint.pt"
    while killed.poll() is None and not (checkpoint.exists() and load(checkpoint.parent)["iteration"] >= 2):
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    reached = load(folder / "killed")["iteration"]
    assert 2 <= reached < 400

    stop = str(reached + 4)  # of the interrupted run, and of one that never stopped
    options[-1] = stop
    output = finish(start(folder, *options, "--output", str(folder / "killed")))
    assert "is a pickle, and loading it runs the code in it" in output
    finish(start(folder, *options, "--output", str(folder / "whole")))
    resumed, whole = load(folder / "killed"), load(folder / "whole")
    assert resumed["iteration"] == whole["iteration"] == reached + 4
    assert_same(resumed, whole)
    for name in ("curves.png", "samples.png", "statistics.safetensors"):
        assert (folder / "whole" / name).stat().st_size > 0


@pytest.mark.slow
def test_a_folder_of_images_another_preconditioning_and_refusals(folder: Path) -> None:
    options = ["--data", str(folder / "images"), "--iterations", "2", "--output", str(folder / "run")]
    finish(start(folder, *options, "--preconditioning", "ctm"))
    history = load(folder / "run")["history"]
    assert len(history) == 2
    assert np.isfinite(history).all()

    process = start(folder, *options)  # the same folder for an analytic student
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 1
    assert "is of another run" in output

    (folder / "empty").mkdir()
    process = start(folder, "--data", str(folder / "empty"), "--output", str(folder / "none"))
    assert "expected png, jpg or webp images, found none" in process.communicate(timeout=200)[0]
    assert process.returncode == 1


@pytest.mark.slow
def test_the_photographs_and_a_teacher_of_the_examples_own(tmp_path: Path) -> None:
    """An untrained one, that would otherwise take most of a minute to train."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from quickstart import UNet
    finally:
        sys.path.pop(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        weights = UNet().state_dict()
    save_file({**weights, "sigma_data": torch.tensor(0.5)}, tmp_path / "teacher.safetensors")
    command = [sys.executable, str(SCRIPT), *SETTINGS, "--iterations", "1", "--output", str(tmp_path / "run")]
    command += ["--teacher", str(tmp_path / "teacher.safetensors"), "--num-levels", "3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert output.returncode == 0, output.stderr
    assert "pickle" not in output.stdout
    assert load(tmp_path / "run")["iteration"] == 1
