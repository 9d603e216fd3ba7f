"""examples/paper: the four experiments on tiny stand-ins of EDM's networks, and what their parts promise."""

from __future__ import annotations

import dataclasses
import importlib
import re
import runpy
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkout import ROOT
from filelock import FileLock
from paper_runs import (
    CLASSES,
    EXPERIMENTS,
    RECIPE,
    TINY,
    checkpoint_of,
    evaluate_command,
    log_of,
    train,
    train_command,
    write_data,
    write_teacher,
)
from PIL import Image
from same_bits import assert_same

import analytic_precond as ap


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import one of the recipe's modules, which find each other as scripts do."""
    monkeypatch.syspath_prepend(str(RECIPE))
    hidden = {
        name: sys.modules.pop(name) for name in [path.stem for path in RECIPE.glob("*.py")] if name in sys.modules
    }
    with torch.random.fork_rng(devices=[]):
        yield importlib.import_module
    for path in RECIPE.glob("*.py"):
        sys.modules.pop(path.stem, None)
    sys.modules.update(hidden)


@pytest.fixture
def here(load: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Run a script of the recipe in this process."""

    def run(arguments: list[str]) -> None:
        monkeypatch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")

    return run


def test_one_process_from_the_start_to_samples(tmp_path: Path, here: Any) -> None:
    """The conditional experiment, in float32; then once more, which has nothing left to do."""
    command = train_command(tmp_path, "cifar10_conditional", "--precision", "fp32")
    here(command)
    lines = log_of(tmp_path / "run")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        parts = line["trajectory_loss"] + line["balance"] * line["denoising_loss"]
        assert line["loss"] == pytest.approx(parts, rel=1e-5)
        assert min(line["gradient_norm"], line["images_per_second"], line["peak_memory_gb"]) > 0
    stats = ap.TeacherStatistics.load(tmp_path / "run" / "statistics.safetensors")
    assert len(stats.l) == 12
    before = checkpoint_of(tmp_path / "run")
    here(command)
    assert_same(checkpoint_of(tmp_path / "run"), before)

    here(evaluate_command(tmp_path / "run", "--steps", 1, 3, "--num-samples", 5, "--batch-gpu", 2))
    for steps in (1, 3):
        images = sorted((tmp_path / "run" / "samples-000000004" / f"steps-{steps:02}").glob("000000/*.png"))
        assert [path.name for path in images] == [f"{seed:06}.png" for seed in range(5)]
        assert np.asarray(Image.open(images[0])).shape == (8, 8, 3)


def test_the_pages_dry_run_of_own_images(tmp_path: Path, here: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its two commands, as they are written, from the folder above."""
    page = (RECIPE / "README.md").read_text().split("First a dry run")[1]
    (block,) = re.findall(r"^```sh\n(.*?)^```$", page.split("\n## ")[0], flags=re.DOTALL | re.MULTILINE)
    commands = [shlex.split(line) for line in block.replace("\\\n", "").splitlines()]
    write_teacher(tmp_path / "network-snapshot-200000.pkl", "cifar10_unconditional", 16)
    write_data(tmp_path / "images.zip", 16, None)
    monkeypatch.chdir(tmp_path)
    for python, script, *options in commands:
        assert python == "python"
        here([str(ROOT / script), *options])
    assert len([*(tmp_path / "runs" / "dry").glob("samples-000000004/steps-0[12]/*/*.png")]) == 2 * 8


@pytest.mark.parametrize("conditional", [False, True])
def test_the_student_is_its_teacher_at_the_start(conditional: bool, tmp_path: Path, load: Any) -> None:
    networks, experiment = load("networks"), EXPERIMENTS[3 if conditional else 0]
    settings = dataclasses.replace(ap.paper_experiment(experiment), resolution=8, dropout=0.25)
    net = networks.load_teacher(write_teacher(tmp_path / "net.pkl", experiment), settings)
    student = networks.make_student(net, ap.CTMPreconditioning(), settings, seed=3)
    again = networks.make_student(net, ap.CTMPreconditioning(), settings, seed=3)
    assert_same(dict(student.state_dict()), dict(again.state_dict()))  # one embedding in all processes
    assert {m.dropout for m in student.modules() if hasattr(m, "dropout")} == {0.25}

    x = 10 * torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, s = torch.tensor([80.0, 5.0, 0.5, 0.01]), torch.tensor([0.002, 5.0, 0.1, 0.002])
    labels = {"class_labels": torch.eye(CLASSES)[:4]} if conditional else {}
    with torch.no_grad():
        expected = ap.CTMPreconditioning().jump(x, ap.denoiser_from_edm(net)(x, t, **labels), t, s)
        jumped = student.eval()(x, t, s, **labels)
    torch.testing.assert_close(jumped, expected, rtol=1e-5, atol=1e-5)  # float32, scalings computed in another order
    assert student.network.network.map_augment[3].weight.abs().max() == 0
    assert networks.last_layer(student).shape == (3, 16, 3, 3)


def test_every_epoch_takes_every_image_once_whatever_the_processes(tmp_path: Path, load: Any) -> None:
    data = load("data")
    images = data.ImageArchive(write_data(tmp_path / "data.zip"), 8, CLASSES)
    batches = data.Batches(images, batch_size=8, seed=1)
    whole = [batches.share(iteration, 0, 8) for iteration in range(3)]  # two epochs of twelve
    pictures, labels = (torch.cat([batch[part] for batch in whole]) for part in (0, 1))
    halves = [batches.share(1, rank, 4)[0] for rank in (0, 1)]
    assert torch.equal(torch.cat(halves), whole[1][0])
    for epoch in (slice(0, 12), slice(12, 24)):
        assert len(pictures[epoch].flatten(1).unique(dim=0)) == 12
        assert labels[epoch].sum(0).tolist() == [3, 3, 2, 2, 2]
    assert not torch.equal(pictures[:12], pictures[12:])
    assert pictures.min() >= -1
    assert pictures.max() <= 1
    with zipfile.ZipFile(images.path) as archive, archive.open(images.names[3]) as file:
        expected = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    torch.testing.assert_close((images[3][0] + 1) * 127.5, expected.float(), rtol=0, atol=1e-4)
    assert images[3][1].argmax() == 3


def test_frechet_distance_of_gaussians(load: Any) -> None:
    """Against the closed form for covariances that commute, and the matrix root for others."""
    frechet = load("frechet")
    mean = np.array([1.0, -2.0])
    found = frechet.frechet_distance(mean, np.diag([4.0, 9.0]), 0 * mean, np.diag([1.0, 16.0]))
    assert found == pytest.approx(5 + (2 - 1) ** 2 + (3 - 4) ** 2)
    rng = np.random.default_rng(0)
    a, b = (x @ x.T for x in rng.normal(size=(2, 5, 9)))
    from scipy.linalg import sqrtm

    expected = np.trace(a + b - 2 * sqrtm(a @ b).real)
    assert frechet.frechet_distance(np.zeros(5), a, np.zeros(5), b) == pytest.approx(expected, rel=1e-8)


def test_the_plans_counts_are_those_of_the_real_iteration(tmp_path: Path, load: Any) -> None:
    """One step of the teacher counted, more extrapolated: against all of them counted."""
    plan, settings = load("plan"), load("settings")
    experiment = settings.experiment_of(
        "cifar10_unconditional", ["resolution=8", "distance=squared_error", "num_levels=3"]
    )
    net = load("networks").load_teacher(write_teacher(tmp_path / "net.pkl", "cifar10_unconditional"), experiment)
    own = settings.Settings(experiment, "ctm", "fp32", 0, tmp_path / "net.pkl", None)
    costs = plan.costs_of(net, own)
    width, pixels = 16, 64
    macs = pixels * 9 * (3 * width + width * width + width * 3) + 2 * width * width
    assert costs["forward"] == 2 * macs
    assert costs["teacher_passes"] == pytest.approx(2 * (1 + 4) / 3)  # k = 1, 2 with weights 1, 2
    # a student's gradient 3, target 2, through the target 2 to 3, denoising 3, the balance about 1 to 2
    assert 10 < costs["image"] / costs["forward"] - costs["teacher_passes"] < 14
    assert costs["parameters"] > sum(p.numel() for p in net.parameters())


def test_images_are_mirrored(tmp_path: Path, load: Any) -> None:
    settings, iteration = load("settings"), load("iteration")
    losses = []
    for flips, mirrored in (("1", False), ("0", True), ("0", False)):
        experiment = settings.experiment_of("cifar10_unconditional", [*TINY, f"flips={flips}"])
        net = load("networks").load_teacher(write_teacher(tmp_path / "net.pkl", "cifar10_unconditional"), experiment)
        student = load("networks").make_student(net, ap.CTMPreconditioning(), experiment, 0)
        own = settings.Settings(experiment, "ctm", "fp32", 0, tmp_path, None)
        process = load("processes").Processes("cpu")
        training = iteration.Training(ap.denoiser_from_edm(net), student, ap.squared_error, own, process, 4)
        images = torch.linspace(-1, 1, 4 * 3 * 64).reshape(4, 3, 8, 8)
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0)
        logged = training.add_gradient(images.flip(-1) if mirrored else images, generator, {}, passes=1)
        losses.append(logged[0].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.long
def test_processes_and_passes_take_the_mean_of_their_gradients(tmp_path: Path, load: Any) -> None:
    """Two processes of two passes each against all four in this process, for the one step of a large learning rate."""
    changes = ("iterations=1", "learning_rate=1")
    train(
        tmp_path, "cifar10_unconditional", "--precision", "fp32", "--preconditioning", "ctm", "--batch-gpu", 2,
        processes=2, changes=changes,
    )  # fmt: skip
    moved = checkpoint_of(tmp_path / "run")["student"]

    settings, training = load("settings"), load("iteration")
    experiment = settings.experiment_of("cifar10_unconditional", [*TINY, *changes])
    own = settings.Settings(experiment, "ctm", "fp32", 0, tmp_path, None)
    net = load("networks").load_teacher(tmp_path / "cifar10_unconditional.pkl", experiment)
    student = load("networks").make_student(net, ap.CTMPreconditioning(), experiment, 0)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    batches = load("data").Batches(load("data").ImageArchive(tmp_path / "data.zip", 8), 8, 0)
    for rank in (0, 1):
        process = load("processes").Processes("cpu")
        process.rank = rank
        step = training.Training(ap.denoiser_from_edm(net), student, ap.squared_error, own, process, 2)
        torch.manual_seed(settings.seed_for(0, 0, rank, training.DROPOUT))
        generator = settings.generator_for(0, 0, rank, training.DRAWS)
        images, _ = batches.share(0, rank, 4)
        for part in images.split(2):
            step.add_gradient(part, generator, {}, passes=2)
    for parameter in student.parameters():
        parameter.grad /= 2
    step.optimizer.step()
    for name, weight in student.network.state_dict().items():
        change, found = weight - before[f"network.{name}"], moved[f"network.{name}"] - before[f"network.{name}"]
        torch.testing.assert_close(found, change, rtol=1e-3, atol=1e-6)  # float32, sums in another order
    assert change.abs().max() > 1e-4


BAD = {
    "no teacher": (["--teacher", "nofile.pkl"], (), "--teacher: expected a network of NVlabs/edm, got nofile.pkl"),
    "no pickle": (["--teacher", "DATA"], (), "--teacher: expected NVlabs/edm's pickle with a network 'ema'"),
    "other size": ([], ("resolution=32",), "has images of 32 pixels, got a network for 8"),
    "unconditional": (
        ["--teacher", "UNCONDITIONAL"],
        (),
        "needs a class-conditional network, got an unconditional one",
    ),
    "batch": (["--batch-gpu", "3"], (), "--batch-gpu must divide a process's share of the batch, 8 images, got 3"),
    "no data": (["--data", "nofile.zip"], (), "--data: expected a zip file of EDM's dataset_tool.py, got nofile.zip"),
    "no zip": (["--data", "TEACHER"], (), "--data: expected a zip file of EDM's dataset_tool.py"),
    "no labels": (
        ["--data", "UNLABELLED"],
        (),
        "--data: the teacher has 5 classes, which need a dataset.json with a label of each image",
    ),
    "null labels": (["--data", "NULL"], (), "got one without labels"),
    "strange labels": (["--data", "STRANGE"], (), "from 0 to 4, got 7"),
    "other images": (["--data", "LARGE"], (), "expected images of 8 pixels, the teacher's, got .* with 16x16"),
    "setting": ([], ("lr=1",), r"--set: expected NAME=VALUE with a setting of ap.paper_experiment"),
    "kind": ([], ("batch_size=much",), "--set: expected batch_size of type int, got 'much'"),
    "no backbone": ([], ("distance=lpips",), "--backbone: LPIPS needs VGG-16's weights"),
    "no steps": ([], ("max_ode_steps=0",), "max_ode_steps must be at least 1, got 0"),
    "no batch": ([], ("batch_size=0",), "batch_size must be at least 1, got 0"),
    "mirrored": ([], ("flips=2",), "flips must be at least 0 and at most 1, got 2"),
    "no truth": ([], ("class_conditional=maybe",), "expected class_conditional of type bool, got 'maybe'"),
    "optimizer": ([], ("optimizer=sgd",), "optimizer must be radam or adam, got sgd"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_written(case: str, tmp_path: Path, here: Any) -> None:
    options, changes, message = BAD[case]
    command = train_command(tmp_path, "cifar10_conditional", *options, changes=changes)
    made: dict[str, Callable[[Path], Path]] = {
        "DATA": lambda path: tmp_path / "data.zip",
        "TEACHER": lambda path: tmp_path / "cifar10_conditional.pkl",
        "UNCONDITIONAL": lambda path: write_teacher(path, "cifar10_unconditional"),
        "UNLABELLED": lambda path: write_data(path, labels=None),
        "NULL": lambda path: write_data(path, labels=[]),
        "STRANGE": lambda path: write_data(path, labels=[[f"00000/img{i:08}.png", 7] for i in range(12)]),
        "LARGE": lambda path: write_data(path, size=16),
    }
    with pytest.raises(SystemExit, match=message):
        here([str(made[word](tmp_path / word)) if word in made else word for word in command])
    assert not (tmp_path / "run").exists()


def test_a_folder_of_other_settings_is_refused_and_left_as_it_is(tmp_path: Path, here: Any) -> None:
    here(train_command(tmp_path, "cifar10_unconditional", "--precision", "fp32"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    other = train_command(
        tmp_path, "cifar10_unconditional", "--precision", "fp32", "--preconditioning", "ctm", "--seed", 1
    )
    with pytest.raises(
        SystemExit, match=r"other settings \(preconditioning analytic there, ctm now, seed 0 there, 1 now\)"
    ):
        here(other)
    with pytest.raises(SystemExit, match="statistics_levels 12 there, 13 now"):
        here(train_command(tmp_path, "cifar10_unconditional", "--precision", "fp32", changes=("statistics_levels=13",)))
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="holds other files: choose a new folder"):
        here(train_command(tmp_path, "cifar10_unconditional", output="other"))


def test_passes_of_another_size_are_other_settings(tmp_path: Path, here: Any) -> None:
    options = ("cifar10_unconditional", "--precision", "fp32", "--preconditioning", "ctm")
    here(train_command(tmp_path, *options, "--batch-gpu", 4, changes=("iterations=1",)))
    with pytest.raises(SystemExit, match=r"other settings \(batch_gpu 4 there, 2 now\)"):
        here(train_command(tmp_path, *options, "--batch-gpu", 2))
    here(train_command(tmp_path, *options, "--batch-gpu", 4))


def test_a_folder_is_written_to_by_one_run_at_a_time(tmp_path: Path, here: Any) -> None:
    command = train_command(tmp_path, "cifar10_unconditional", "--precision", "fp32", "--preconditioning", "ctm")
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run" / ".lock"), pytest.raises(SystemExit, match=r"another run is writing to .*run"):
        here(command)
    assert [path.name for path in (tmp_path / "run").iterdir()] in ([".lock"], [])
    here(command)  # the other has ended: wait for it


def test_damaged_files_of_a_run_are_named(tmp_path: Path, here: Any) -> None:
    command = train_command(tmp_path, "cifar10_unconditional", "--precision", "fp32", "--preconditioning", "ctm")
    here(command)
    checkpoint, settings = tmp_path / "run" / "checkpoint.pt", tmp_path / "run" / "settings.json"
    state, text = torch.load(checkpoint), settings.read_text()
    for damaged in ({name: state[name] for name in state if name != "optimizer"}, state | {"student": {}}):
        torch.save(damaged, checkpoint)
        with pytest.raises(SystemExit, match=r"checkpoint.pt does not fit this run"):
            here(command)
    for damage in ("{", "[1]", "null"):
        settings.write_text(damage)
        with pytest.raises(SystemExit, match=r"--output: expected settings of .*settings.json"):
            here(command)
        assert settings.read_text() == damage
    settings.write_text(text)


def test_weights_that_are_not_finite_are_not_kept(tmp_path: Path, here: Any) -> None:
    options = ("cifar10_unconditional", "--precision", "fp32", "--preconditioning", "ctm", "--save-every", 1)
    changes = ("iterations=1", "learning_rate=inf")
    with pytest.raises(SystemExit, match=r"the student is not finite around iteration 1: lower the learning rate"):
        here(train_command(tmp_path, *options, changes=changes))
    assert not list((tmp_path / "run").glob("*.pt"))


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path, load: Any) -> None:
    folder = load("checkpoints").RunFolder(tmp_path, {})
    folder.write_log({"iteration": 1, "gradient_norm": float("nan"), "scale": float("inf")})
    assert log_of(tmp_path) == [{"iteration": 1, "gradient_norm": None, "scale": None}]


@pytest.mark.parametrize("option", ["--utilisation", "--peak-tflops"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "much"])
def test_a_plan_needs_positive_numbers(
    option: str, value: str, tmp_path: Path, here: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        here(train_command(tmp_path, "cifar10_unconditional", "--plan", f"{option}={value}"))
    assert f"expected a positive number, got '{value}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (np.zeros(3), np.eye(3), r"shapes \(3,\) and \(3, 3\) for 4 features"),
        (np.zeros(4), np.ones(4), r"shapes \(4,\) and \(4,\) for 4 features"),
        (np.zeros(4), np.full((4, 4), np.nan), "not finite"),
        (np.zeros(4), None, "sigma"),
    ],
)
def test_references_must_fit_the_network(
    mean: np.ndarray, covariance: np.ndarray | None, message: str, tmp_path: Path, load: Any
) -> None:
    def network(images: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.ones(len(images), 4),)

    arrays = {"mu": mean, "sigma": covariance}
    np.savez(tmp_path / "ref.npz", **{name: array for name, array in arrays.items() if array is not None})
    read = load("frechet").load_reference
    with pytest.raises(SystemExit, match=rf"--reference: expected an npz file .*{message}"):
        read(tmp_path / "ref.npz", network, torch.device("cpu"))
    np.save(tmp_path / "mean.npy", mean)
    with pytest.raises(SystemExit, match="--reference: expected an npz file"):
        read(tmp_path / "mean.npy", network, torch.device("cpu"))
    np.savez(tmp_path / "good.npz", mu=np.zeros(4), sigma=np.eye(4))
    assert read(tmp_path / "good.npz", network, torch.device("cpu"))[1].trace() == 4


def test_evaluation_refuses_what_it_cannot_do(tmp_path: Path, here: Any) -> None:
    with pytest.raises(SystemExit, match="with snapshots, found none in"):
        here(evaluate_command(tmp_path))
    with pytest.raises(SystemExit, match="--reference and --inception belong together"):
        here(evaluate_command(tmp_path, "--reference", tmp_path / "ref.npz"))
    with pytest.raises(SystemExit, match="there would be nothing left"):
        here(evaluate_command(tmp_path, "--no-images"))
    here(train_command(tmp_path, "cifar10_unconditional", "--precision", "fp32", "--preconditioning", "ctm"))
    with pytest.raises(SystemExit, match=r"expected last, all or some of \[2, 4\], got 3"):
        here(evaluate_command(tmp_path / "run", "--snapshots", 3))
    files = ["--reference", tmp_path / "ref.npz", "--inception", tmp_path / "inception.pth"]
    np.savez(tmp_path / "ref.npz", mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(SystemExit, match=r"--inception: expected weights-inception.*no file"):
        here(evaluate_command(tmp_path / "run", *files))
    (tmp_path / "inception.pth").touch()
    with pytest.raises(SystemExit, match=r"needs torch-fidelity.*analytic-precond\[fid\]"):
        here(evaluate_command(tmp_path / "run", *files))
