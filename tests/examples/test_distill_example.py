"""examples/distill.py: interrupted runs, and teachers and images in the form of other codebases."""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout import ROOT
from edm_stand_in import EDMPrecond, SongUNet
from PIL import Image
from safetensors.torch import save_file
from same_bits import assert_same

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
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    return output


def load(path: Path) -> dict[str, Any]:
    checkpoint: dict[str, Any] = torch.load(path / "checkpoint.pt", weights_only=True)
    return checkpoint


@pytest.mark.long
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


@pytest.mark.long
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


@pytest.fixture
def distill(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("distill")


@pytest.mark.parametrize(
    ("option", "name"), [("--teacher", "nofile.pkl"), ("--teacher", "nofile.safetensors"), ("--data", "nofolder")]
)
def test_files_that_do_not_exist_are_named_in_one_line(
    option: str, name: str, distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["distill.py", option, name])
    with pytest.raises(SystemExit, match=rf"^{option}: no file or folder {name}$"):
        distill.main()
    assert list(tmp_path.iterdir()) == []


def test_it_refuses_several_processes_with_a_pointer_to_the_recipe(
    distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["distill.py", "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match=r"runs in one process.*examples/paper/train\.py takes several"):
        distill.main()
    assert not (tmp_path / "run").exists()
    assert (ROOT / distill.RECIPE).is_file()


def test_the_teacher_is_checked_before_any_data_are_read(
    distill: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(path: Path) -> torch.Tensor:
        raise AssertionError("no data may be read")

    monkeypatch.setattr(signal, "signal", lambda *_: None)  # main would keep Ctrl-C for itself
    conditional = tmp_path / "conditional.pkl"
    conditional.write_bytes(pickle.dumps({"ema": EDMPrecond(SongUNet(label_dim=5), label_dim=5)}))
    options = ["--data", str(folder / "images.zip"), "--output", str(tmp_path / "run"), "--teacher"]
    with monkeypatch.context() as patched, torch.random.fork_rng(devices=[]):
        patched.setattr(distill, "load_images", read)
        patched.setattr(sys, "argv", ["distill.py", *options, str(conditional)])
        with pytest.raises(SystemExit, match=r"got one with 5 classes: examples/paper/train\.py takes those"):
            distill.main()

    large = tmp_path / "large.pkl"
    large.write_bytes(pickle.dumps({"ema": EDMPrecond(SongUNet(), img_resolution=32)}))
    monkeypatch.setattr(sys, "argv", ["distill.py", *options, str(large)])
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(SystemExit, match="images of 32 pixels, the teacher's, got 8"),
    ):
        distill.main()


def test_help_explains_every_option_and_its_default(
    distill: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["distill.py", "--help"])
    with pytest.raises(SystemExit):
        distill.main()
    text = capsys.readouterr().out
    assert " ".join(text.split()).count("(default: ") == text.count("\n  --") == 13  # argparse: where there is a text
    assert "`" not in text


def test_its_own_teacher_takes_one_thread_and_a_file_for_everybody(
    distill: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrained one, that would otherwise take most of a minute to train."""

    def trained(data: torch.Tensor, sigma_data: float) -> Any:
        assert torch.get_num_threads() == 1
        return distill.NetworkTeacher(distill.UNet(), sigma_data)

    monkeypatch.setattr(distill, "train_teacher", trained)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        teacher, _, sigma_data = distill.load_teacher(None, torch.tensor([0.0, 1.0]), tmp_path)
        monkeypatch.delattr(distill, "train_teacher")
        again, *_ = distill.load_teacher(None, torch.zeros(2), tmp_path)  # from the file
    finally:
        torch.set_num_threads(threads)
    assert sigma_data == pytest.approx(0.5**0.5)
    assert_same(dict(again.state_dict()), dict(teacher.state_dict()))
    (tmp_path / "new").touch()
    assert (tmp_path / "teacher.safetensors").stat().st_mode == (tmp_path / "new").stat().st_mode
    assert {path.name for path in tmp_path.iterdir()} == {"new", "teacher.safetensors"}


@pytest.mark.long
def test_interrupted_it_says_from_where_it_goes_on(folder: Path) -> None:
    """By Ctrl-C, before there is anything to keep and after."""
    command = [sys.executable, str(SCRIPT), "--output", str(folder / "none")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = ""
    while "training the network" not in output and (character := process.stdout.read(1)):
        output += character
    process.send_signal(signal.SIGINT)
    output += process.communicate(timeout=200)[0]
    assert output.endswith("\ninterrupted: the same command goes on from the start (nothing is kept)\n")
    assert process.returncode == 1
    assert "Traceback" not in output

    checkpoint = folder / "run" / "checkpoint.pt"
    process = start(folder, "--data", str(folder / "images"), "--output", str(checkpoint.parent))
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=200)[0]
    assert output.endswith(f"\ninterrupted: the same command goes on from {checkpoint}\n")
    assert process.returncode == 1
    assert "Traceback" not in output


@pytest.mark.long
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
