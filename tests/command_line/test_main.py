"""The command line: it gives what the Python API gives, and says in one line and an exit code what is wrong."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from checkout import DOCS
from PIL import Image
from torch import Tensor

import analytic_precond as ap
from analytic_precond.command_line.main import main

PAGE = (DOCS / "command-line.md").read_text()
TEACHERS = """
import os
import signal
from pathlib import Path
import torch
import analytic_precond as ap

NETWORK = torch.nn.Identity()
DATA, COUNT = torch.linspace(-1, 1, 60).sin().reshape(20, 3), 20

def teacher():
    print("loading")
    return lambda x, t: torch.tanh(x) + 0.1

def both():
    return teacher(), DATA

def data():
    return DATA

def with_argument(x):
    return x

def no_denoiser():
    return 3

def nothing():
    pass

def without_level():
    return Forgetful()

class Forgetful(torch.nn.Module):
    def forward(self, x):
        return x

def with_label():
    return lambda x, t, y: 0 * x

def with_keyword():
    def denoiser(x, t, *, y):
        return 0 * x
    return denoiser

def with_label_in_a_module():
    return Labelled()

class Labelled(torch.nn.Module):
    def forward(self, x, t, y):
        return 0 * x

def three():
    return 1, 2, 3

def missing_weights():
    return open("weights.pt")

def broken():
    return {}["weights"]

def failing():
    def denoiser(x, t):
        raise RuntimeError("out of luck")
    return denoiser

class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x, t):
        return torch.tanh(x) + self.shift

def interrupted():
    calls = []
    def denoiser(x, t):
        calls.append(len(x))
        at = int(Path("interrupt").read_text() or 11) if Path("interrupt").exists() else 0
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return torch.tanh(x) + 0.1
    return denoiser

class Nested:
    make = staticmethod(teacher)
"""
LEVELS = ["--levels", "2", "1", "0.5", "0.1"]
CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
COLUMNS = ("l", "l_stderr", "s", "s_stderr", "g_rms", "g_rms_stderr")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module of teachers, forgotten afterwards."""
    (tmp_path / "teachers.py").write_text(TEACHERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    sys.modules.pop("teachers", None)


def api(seed: int = 0, num_samples: int = 40, **options: Any) -> ap.TeacherStatistics:
    data = torch.linspace(-1, 1, 60).sin().reshape(20, 3)
    levels = torch.tensor([2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
    options = {"description": "teachers:teacher", "progress": False, **options}
    return ap.estimate_statistics(
        lambda x, t: torch.tanh(x) + 0.1, data, levels, num_samples=num_samples, seed=seed, **options
    )


def estimate(*arguments: str, output: str = "a.st", samples: int = 40) -> int:
    return main(["estimate", *arguments, *LEVELS, "--num-samples", str(samples), "--output", output])


def module(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "analytic_precond", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


def strict_json(text: str) -> dict[str, Any]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    result: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return result


def only_line(text: str) -> str:
    (line,) = [line for line in text.splitlines() if line and not line.startswith(("loading", "statistics of"))]
    return line


# --- estimate


@pytest.mark.parametrize(
    ("options", "same"),
    [
        ([], {}),
        (["--seed", "7", "--intercept", "--batch-size", "auto"], {"seed": 7, "intercept": True, "batch_size": "auto"}),
        (["--per-element"], {"per_element": True}),
        (
            ["--l-method", "exact", "--s-method", "finite-difference", "--batch-size", "3", "--device", "cpu"],
            {"l_method": "exact", "s_method": "finite-difference", "batch_size": 3},
        ),
    ],
)
def test_estimate_writes_what_the_api_would(folder: Path, options: list[str], same: dict[str, Any]) -> None:
    assert estimate("teachers:teacher", "--data", "teachers:data", *options) == 0
    api(**same).save("b.st")
    assert (folder / "a.st").read_bytes() == (folder / "b.st").read_bytes()


def test_the_grid_of_levels_is_the_api_s(folder: Path) -> None:
    grid = ["--num-levels", "5", "--sigma-min", "0.1", "--sigma-max", "3"]
    assert main(["estimate", "teachers:both", "--num-samples", "8", "--output", "a.st", *grid]) == 0
    assert torch.equal(ap.TeacherStatistics.load("a.st").levels, ap.log_noise_levels(5, 0.1, 3.0))


def test_options_have_the_api_s_defaults(folder: Path) -> None:
    assert main(["estimate", "teachers:both", "--output", "a.st"]) == 0
    found = ap.TeacherStatistics.load("a.st")
    data = torch.linspace(-1, 1, 60).sin().reshape(20, 3)
    ap.estimate_statistics(lambda x, t: torch.tanh(x) + 0.1, data, progress=False, description="teachers:both").save(
        "b.st"
    )
    assert found.num_samples == 4096
    assert (folder / "a.st").read_bytes() == (folder / "b.st").read_bytes()


@pytest.mark.parametrize("teacher", ["teachers.py:teacher", "./teachers.py:teacher", "teachers:Nested.make"])
def test_a_teacher_may_be_named_in_several_ways(teacher: str) -> None:
    assert estimate(teacher, "--data", "teachers:data") == 0
    assert torch.equal(ap.TeacherStatistics.load("a.st").l, api().l)


def test_a_file_elsewhere_imports_its_neighbours(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("elsewhere", "here"):
        (folder / name).mkdir()
    (folder / "elsewhere/its_neighbour.py").write_text("SHIFT = 0.1\n")
    (folder / "elsewhere/a_teacher.py").write_text(
        "import torch\nfrom its_neighbour import SHIFT\ndef make(): return lambda x, t: torch.tanh(x) + SHIFT\n"
    )
    (folder / "teachers.py").rename(folder / "here/teachers.py")
    monkeypatch.chdir(folder / "here")
    assert estimate("../elsewhere/a_teacher.py:make", "--data", "teachers:data") == 0
    assert torch.equal(ap.TeacherStatistics.load("a.st").l, api().l)
    for name in ("a_teacher", "its_neighbour"):
        del sys.modules[name]


def test_data_come_from_files() -> None:
    data = torch.linspace(-1, 1, 60).sin().reshape(20, 3)
    np.save("x.npy", data.numpy())
    np.savez("one.npz", data.numpy())
    np.savez("two.npz", images=data.numpy(), labels=np.arange(20))
    safetensors.torch.save_file({"images": data, "labels": torch.arange(20)}, "x.safetensors")
    expected = api()
    for spec in ("x.npy", "one.npz", "two.npz:images", "x.safetensors:images", str(Path("x.npy").resolve())):
        assert estimate("teachers:teacher", "--data", spec) == 0
        assert torch.equal(ap.TeacherStatistics.load("a.st").sums, expected.sums)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_network_runs_where_it_is_told(device: str) -> None:
    assert estimate("teachers:Network", "--data", "teachers:data", "--device", device) == 0
    found = ap.TeacherStatistics.load("a.st")
    torch.testing.assert_close(found.l, api().l, rtol=1e-5, atol=0)  # in float32, of differences over t >= 0.1


def test_stdout_carries_results_only(capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate("teachers:both", "--json") == 0
    captured = capsys.readouterr()
    assert strict_json(captured.out)["description"] == "teachers:both"
    assert "loading" in captured.err
    assert "passes" in captured.err  # the progress bar


def test_an_interrupted_estimate_goes_on(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # batches of 4 clean samples at 4 levels take 8 calls of 4 rows: the eleventh is in the second batch
    command = ["estimate", "teachers:interrupted", "--data", "teachers:data", *LEVELS, "--num-samples", "40"]
    command += ["--batch-size", "4", "--output", "a.st", "--resume", "a.resume"]
    Path("interrupt").touch()
    assert main(command) == 130
    kept = r"\ninterrupted: 4 of 20 clean samples .*are kept in a\.resume: call .* again .*\n$"
    assert re.search(kept, capsys.readouterr().err)
    assert not (folder / "a.st").exists()
    Path("interrupt").unlink()
    assert main(command) == 0
    api(description="teachers:interrupted", batch_size=4).save("b.st")
    assert (folder / "a.st").read_bytes() == (folder / "b.st").read_bytes()


def test_an_interruption_before_there_is_a_checkpoint_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("interrupt").write_text("1")
    assert estimate("teachers:interrupted", "--data", "teachers:data", "--resume", "a.resume") == 130
    expected = "\ninterrupted before the first batch was finished: nothing is kept in a.resume yet\n"
    assert capsys.readouterr().err.endswith(expected)
    assert not Path("a.resume").exists()


def test_an_interruption_without_a_checkpoint_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    Path("interrupt").touch()
    arguments = ["teachers:interrupted", "--data", "teachers:data", "--batch-size", "1"]
    assert estimate(*arguments) == 130
    assert capsys.readouterr().err.endswith("interrupted, nothing is kept (estimate has --resume)\n")


# --- refusals


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere:make"], r"TEACHER: nowhere cannot be imported from .* \(No module named 'nowhere'\)"),
        (["nowhere.py:make"], r"TEACHER must name an existing file, got .*nowhere\.py"),
        (["teachers"], r"TEACHER must be package\.module:function or .*got 'teachers'"),
        (["teachers:nobody"], r"TEACHER: there is no nobody in teachers"),
        (["teachers:DATA"], r"TEACHER must name a function, got teachers:DATA, a Tensor"),
        (["teachers:COUNT"], r"TEACHER must name a function, got teachers:COUNT, an int"),
        (["teachers:nothing"], r"teachers:nothing returned None: does it return the denoiser\?"),
        (
            ["teachers:without_level", "--data", "teachers:data"],
            r"TEACHER must return a denoiser that is callable as D\(x, t\), got Forgetful \(.* positional .*\): wrap",
        ),
        *(
            (
                [f"teachers:{teacher}", "--data", "teachers:data"],
                rf"TEACHER must return a denoiser that is callable as D\(x, t\), got {kind} \(.*missing.*'y'\): wrap",
            )
            for teacher, kind in (
                ("with_label", "function"),
                ("with_keyword", "function"),
                ("with_label_in_a_module", "Labelled"),
            )
        ),
        (["teachers:NETWORK"], r"without arguments, .*got teachers:NETWORK \(missing .*'input'\)"),
        (["teachers:with_argument"], r"without arguments, .*got teachers:with_argument \(missing .*'x'\)"),
        (
            ["teachers:no_denoiser", "--data", "teachers:data"],
            r"TEACHER must return a denoiser that is callable as D\(x, t\), got int",
        ),
        (["teachers:three"], r"TEACHER must return a denoiser or \(denoiser, data\), got 3 values"),
        (["teachers:missing_weights"], r"No such file or directory: 'weights.pt' \(.*teachers\.py, line \d+\)"),
        (["teachers:teacher"], r"data are needed, got none: give --data"),
        (
            ["teachers:teacher", "--data", "teachers:no_denoiser"],
            r"--data must .* returns a tensor, .*got teachers:no_denoiser, which returned an int",
        ),
        (["teachers:teacher", "--data", "teachers:nothing"], r"--data must .* returned None: let it return the data"),
        (["teachers:teacher", "--data", "x.pt"], r"runs no code when it is read, got x\.pt, a pickle"),
        (["teachers:teacher", "--data", "x.npy"], r"--data must be an existing file, got x\.npy"),
        (["teachers:teacher", "--data", "folder"], r"--data must be module:function or a file ending in .*'folder'"),
        (["teachers:both", "--num-levels", "4"], r"give --levels, or --num-levels, .*got both"),
        (["teachers:both", "--resume", "./a.st"], r"--resume must be another file than --output"),
        (["teachers:both", "--resume", "teachers.py"], r"--resume must be a checkpoint, or one yet to come, got teach"),
        (["teachers:both", "--device", "abacus"], r"--device must be one that torch has here, got abacus: Expected"),
        pytest.param(
            ["teachers:both", "--device", "cuda"], r"--device must be one that torch has here, got cuda: ", id="cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA"),
        ),
        (["teachers:both", "--seed", "-1"], r"seed must be at least 0, got -1"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert estimate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(rf"^error: .*{match}", only_line(captured.err))
    assert not Path("a.st").exists()


@pytest.mark.parametrize(
    ("file", "match"),
    [
        ("objects.npy", "Python objects in dtype"),
        ("objects.npz:arr_0", "allow_pickle=False"),
        ("two.npz", r"it holds \['a', 'b'\], not '': name one of them"),
        ("two.npz:c", r"it holds \['a', 'b'\], not 'c': name one of them"),
        ("words.npy", "can't convert np.ndarray of type numpy.str_"),
        ("noise.npz", r"it is no \.npz file, or damaged\.$"),
        ("numbers.npy:images", r"a \.npy file has no names: leave out :images\.$"),
        ("noise.safetensors", "header"),
        ("empty.npy", r"it is no \.npy file\.$"),
        ("text.npy", r"it is no \.npy file\.$"),
    ],
)
def test_files_of_anything_else_are_refused(file: str, match: str, capsys: pytest.CaptureFixture[str]) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, ("executed",)

    np.save("objects.npy", np.array([Trap()], dtype=object))
    np.savez("objects.npz", np.array([Trap()], dtype=object))
    np.savez("two.npz", a=np.zeros(2), b=np.zeros(2))
    np.save("words.npy", np.array(["a"]))
    Path("noise.npz").write_bytes(pickle.dumps([Trap()]))
    Path("noise.safetensors").write_bytes(b"\xff" * 64)
    np.save("numbers.npy", np.zeros(2))
    Path("text.npy").write_text("1 2 3\n")
    Path("empty.npy").touch()
    assert estimate("teachers:teacher", "--data", file) == 2
    line = only_line(capsys.readouterr().err)
    assert re.search(rf"^error: --data must be a file of numbers, got {file.partition(':')[0]}: .*{match}", line)
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("output", "match"),
    [
        ("nowhere/a.st", r"--output must be in an existing folder, got nowhere"),
        (".", r"--output must be a file, got the folder"),
        (os.devnull, r"--output must be a regular file, got .*, which is none: name another"),
        ("pipe", r"--output must be a regular file, got pipe"),
        ("dangling", r"--output must be in an existing folder, got .*nowhere: create it first"),
        ("teachers.py", r"--output must be a file of statistics, or one yet to come, got teachers\.py, which is som"),
        ("data.safetensors", r"--output must be a file of statistics, .*got data\.safetensors"),
        ("link", r"--output must be a file of statistics, .*got link"),
        pytest.param(
            "/proc/self/a.st", r"--output: nothing can be written to /proc/self", id="unwritable",
            marks=pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder nobody can write to"),
        ),
    ],
)  # fmt: skip
def test_an_output_is_tried_before_the_teacher_is_loaded(
    output: str, match: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo("pipe")
    Path("dangling").symlink_to("nowhere/a.st")
    safetensors.torch.save_file({"images": torch.zeros(20, 3)}, "data.safetensors")
    Path("link").symlink_to("data.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert estimate("teachers.py:both", "--data", "data.safetensors", output=output) == 2
    captured = capsys.readouterr()
    assert re.search(rf"^error: (\[Errno \d+\] )?{match}", only_line(captured.err))
    assert "teachers" not in sys.modules
    assert before == {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("there", [False, True])
def test_a_link_is_written_through(there: bool, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    elsewhere, names = folder / "elsewhere", {"a.st", "b.st", "a.png", "a.resume"}
    elsewhere.mkdir()
    for name in names:
        (folder / name).symlink_to(f"elsewhere/{name}")
    if there:
        saved("a.st", seed=1)
        saved("b.st", seed=1)
        (elsewhere / "a.png").touch()
        (elsewhere / ".a.resume.killed.tmp").touch()
    assert estimate("teachers:teacher", "--data", "teachers:data", "--resume", "a.resume") == 0
    saved("b.st")
    assert main(["plot", "a.st", "--output", "a.png"]) == 0
    assert all((folder / name).is_symlink() for name in names)
    assert {path.name for path in elsewhere.iterdir()} == names
    assert (elsewhere / "a.st").read_bytes() == (elsewhere / "b.st").read_bytes()
    assert (elsewhere / "a.png").read_bytes().startswith(b"\x89PNG")
    err = capsys.readouterr().err
    assert "\nwritten to a.st\n" in err
    assert err.endswith("written to a.png\n")


def test_what_is_no_regular_file_is_not_replaced(folder: Path) -> None:
    os.mkfifo("pipe")
    with pytest.raises(ValueError, match="path must be a regular file, got pipe"):
        saved("pipe")
    assert not (folder / "pipe").is_file()


def test_a_failed_estimate_leaves_the_previous_file(folder: Path) -> None:
    assert estimate("teachers:both") == 0
    before = (folder / "a.st").read_bytes()
    assert estimate("teachers:failing", "--data", "teachers:data") == 2
    assert (folder / "a.st").read_bytes() == before
    assert estimate("teachers:both", "--seed", "1") == 0
    assert (folder / "a.st").read_bytes() != before
    assert {path.name for path in folder.iterdir()} == {"teachers.py", "a.st"}


@pytest.mark.parametrize(
    ("teacher", "last"), [("broken", "KeyError: 'weights'"), ("failing", "RuntimeError: out of luck")]
)
def test_faults_in_the_teacher_come_with_their_traceback(
    teacher: str, last: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert estimate(f"teachers:{teacher}", "--data", "teachers:data") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == last
    assert any("teachers.py" in line for line in lines)


def test_a_file_with_the_name_of_another_module_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("json.py").write_text("def make(): return lambda x, t: x\n")
    assert estimate("json.py:make") == 2
    assert re.search(r"json\.py has the name of another module \(.*\): rename it", capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["guess"],
        ["estimate", "a:b"],
        ["estimate", "a:b", "--output", "c", "--num-samples", "many"],
        ["estimate", "a:b", "--output", "c", "--batch-size", "big"],
        ["show", "a", "--levels", "0"],
        ["show", "a", "--levels", "nan"],
        ["compare", "a"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert "error: " in err
    assert len(err.splitlines()) == 2  # one of usage
    assert "_" not in err.partition("error: ")[2]  # argparse calls types by their names in the code


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["show", "--levels", "80", "1", "a.st"], "got 'a.st': name files before --levels"),
        (
            ["plot", "--output", "a.png", "--what", "coefficients", "--from", "80", "a.st"],
            "got 'a.st': name files before --from",
        ),
        (
            ["estimate", "--output", "b.st", "--levels", "80", "t:make"],
            "got 't:make': name the teacher before --levels",
        ),
    ],
)
def test_levels_swallow_what_follows(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    usage, error = capsys.readouterr().err.splitlines()
    assert re.match(rf"usage: python -m analytic_precond {arguments[0]} (FILE|TEACHER) ", usage)
    assert error.endswith(f"expected a noise level, {match}")


def test_the_number_of_levels_is_checked_by_its_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "teachers:both", "--num-levels", "1", "--output", "a.st"]) == 2
    assert only_line(capsys.readouterr().err) == "error: --num-levels must be at least 2, got 1."


# --- show


def saved(name: str = "a.st", **options: Any) -> ap.TeacherStatistics:
    statistics = api(**options)
    statistics.save(name)
    return statistics


def test_json_holds_the_api_s_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    statistics = saved(intercept=True, seed=2**64 - 1)
    assert main(["show", "a.st", "--json"]) == 0
    shown = strict_json(capsys.readouterr().out)
    for name in ("levels", *COLUMNS):
        assert shown.pop(name) == getattr(statistics, name).tolist()
    assert shown == {
        "kind": "TeacherStatistics", "description": "teachers:teacher", "sample_shape": [3], "precision": "float32",
        "num_samples": 40, "seeds": [2**64 - 1], "l_method": "stein", "s_method": "transport", "intercept": True,
        "per_element": False,
    }  # fmt: skip


def test_json_has_no_infinity(capsys: pytest.CaptureFixture[str]) -> None:
    saved(num_samples=2)  # one pair: no standard errors
    assert main(["show", "a.st", "--json"]) == 0
    assert strict_json(capsys.readouterr().out)["l_stderr"] == [None] * 4
    assert main(["show", "a.st"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[2] == "-"


def test_the_table_shows_the_api_s_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    statistics = saved()
    assert main(["show", "a.st", "--levels", "0.9", "1.2", "100"]) == 0  # 1 is nearest to two of them
    header, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert header.split() == ["t", *chain.from_iterable((name, name, "error") for name in ("l", "s", "g_rms"))]
    for row, level in zip(rows, (0, 1), strict=True):
        expected = [float(getattr(statistics, name)[level]) for name in ("levels", *COLUMNS)]
        assert [float(word) for word in row.split()] == pytest.approx(expected, rel=5e-6)  # six digits


def test_a_description_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    saved(description="\x1b[2J\ud800")
    assert main(["show", "a.st"]) == 0
    out = capsys.readouterr().out
    assert r"'\x1b[2J\ud800'" in out
    assert "\x1b" not in out


def linear_teacher(x: Tensor, t: Tensor) -> Tensor:
    return x / (1 + ap.expand_to(t, x) ** 2)


FIT = {"levels": torch.tensor([4.0, 1.0, 0.25]), "num_trajectories": 8, "progress": False, "description": "linear"}


def test_fitted_files_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    data = torch.randn(16, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    fit = ap.LeastSquaresPreconditioning.fit(linear_teacher, data, **FIT)
    fit.save("fit.st")
    assert main(["show", "fit.st", "--json"]) == 0
    shown = strict_json(capsys.readouterr().out)
    assert shown["kind"] == "LeastSquaresPreconditioning"
    assert (shown["num_trajectories"], shown["sigma_data"], shown["jumps_from"]) == (8, 0.5, 4.0)
    assert shown["levels"] == [4.0, 1.0, 0.25]
    c_skip, c_out = fit(4.0, fit.levels)
    assert (shown["c_skip"], shown["c_out"]) == (c_skip.tolist(), c_out.tolist())
    assert shown["c_out_stderr"] == fit.standard_errors.c_out[0].tolist()
    assert main(["show", "fit.st", "--levels", "1"]) == 0
    row = [float(word) for word in capsys.readouterr().out.splitlines()[-1].split()]
    names = ("levels", "c_skip", "c_skip_stderr", "c_out", "c_out_stderr")
    assert row == pytest.approx([shown[name][1] for name in names], rel=5e-6)  # six digits

    shifted = ap.ShiftedPreconditioning.fit(
        linear_teacher, data, **{**FIT, "levels": ap.log_noise_levels(6, 0.25, 4.0)}
    )
    shifted.save("shifted.st")
    assert main(["show", "shifted.st", "--json"]) == 0
    shown = strict_json(capsys.readouterr().out)
    assert (shown["kind"], shown["jumps_from"]) == ("ShiftedPreconditioning", 4.0)
    assert shown["c_out"] == shifted(4.0, shifted.levels).c_out.tolist()
    assert shown["network_level"] == shifted.network_level(shifted.levels[0], shifted.levels).tolist()

    ap.PerModePreconditioning.fit(linear_teacher, data, **FIT).save("modes.st")
    assert main(["show", "modes.st", "--json"]) == 0
    shown = strict_json(capsys.readouterr().out)
    assert (shown["kind"], shown["basis"], shown["sample_shape"]) == (
        "PerModePreconditioning",
        "CosineBasis",
        [1, 4, 4],
    )
    assert 1 <= shown["groups_of_modes"] <= 16
    assert main(["show", "modes.st"]) == 0
    assert "sample shape      1x4x4\n" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["show"], ["compare", "a.st"], ["plot", "--output", "a.png"]])
@pytest.mark.parametrize("content", [None, b"", b"no file of ours", b"\xff" * 100])
def test_other_files_are_refused(command: list[str], content: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    saved()
    if content is not None:
        Path("other.st").write_bytes(content)
    assert main([*command, "other.st"]) == 2
    captured = capsys.readouterr()
    line = only_line(captured.err)
    assert re.search(r"^error: expected a TeacherStatistics 1 file.*other\.st", line)
    assert ("(it is no safetensors file)" in line) == (content is not None)
    assert captured.out == ""


def test_files_of_another_kind_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    saved(resume="a.resume")
    data = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    ap.LeastSquaresPreconditioning.fit(linear_teacher, data, **FIT).save("fit.st")
    for command in (["show"], ["compare", "a.st"], ["plot", "--output", "a.png"]):
        assert main([*command, "a.resume"]) == 2
        assert only_line(capsys.readouterr().err).endswith("a.resume: it is a checkpoint of a run: show its --output.")
    for command in (["compare", "a.st"], ["plot", "--output", "a.png"]):
        assert main([*command, "fit.st"]) == 2
        line = only_line(capsys.readouterr().err)
        assert "got fit.st: it holds the jumps of a LeastSquaresPreconditioning: take the file that estimate" in line
        assert line.endswith("or see the jumps by show, or by plot --what coefficients.")
    assert main(["show", "fit.st"]) == 0
    assert main(["plot", "fit.st", "--what", "coefficients", "--from", "4", "--output", "a.png"]) == 0
    with pytest.raises(ValueError, match=r"header says 'LeastSquares.*: write .*; load one of another class by that\."):
        ap.TeacherStatistics.load("fit.st")
    ap.LeastSquaresPreconditioning.load("fit.st")


def test_a_damaged_fit_is_called_one(capsys: pytest.CaptureFixture[str]) -> None:
    header = {"header": json.dumps({"kind": "LeastSquaresPreconditioning 1"})}
    safetensors.torch.save_file({"x": torch.zeros(1)}, "fit.st", header)
    assert main(["show", "fit.st"]) == 2
    assert "expected a LeastSquaresPreconditioning in fit.st" in only_line(capsys.readouterr().err)


# --- plot


@pytest.mark.parametrize(("output", "magic"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.SVG", b"<?xml")])
def test_pictures_are_written(folder: Path, output: str, magic: bytes) -> None:
    saved()
    (folder / output).write_text("an older picture")
    assert main(["plot", "a.st", "--output", output]) == 0
    assert (folder / output).read_bytes().startswith(magic)
    assert {path.name for path in folder.iterdir()} == {"teachers.py", "a.st", output}


def test_the_files_asked_for_are_drawn(folder: Path) -> None:
    (folder / "b").mkdir()
    for name in ("first.st", "second.st", "b/first.st"):
        saved(name)
    data = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    ap.LeastSquaresPreconditioning.fit(linear_teacher, data, **FIT).save("fit.st")

    def texts(*arguments: str) -> str:
        assert main(["plot", *arguments, "--output", "a.svg"]) == 0
        return (folder / "a.svg").read_text()

    picture = texts("first.st", "second.st")
    assert "<!-- first -->" in picture  # matplotlib's comments on texts that it draws as outlines
    assert "<!-- second -->" in picture
    picture = texts("first.st", "b/first.st")
    assert "<!-- b/first.st -->" in picture
    picture = texts("first.st", "fit.st", "--what", "coefficients", "--from", "2", "1.5")
    assert "<!-- fit -->" in picture
    assert "<!-- jumps from $t$ = 1.5 -->" in picture


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--output", "a.doc"], r"--output must end in \.png, \.pdf or \.svg, got a\.doc"),
        (["--output", "a"], r"--output must end in .*, got a"),
        (["--output", "nowhere/a.png"], r"--output must be in an existing folder"),
        (["--output", "a.png", "--from", "1"], r"--from belongs to jumps"),
        (["--output", "a.png", "--what", "coefficients"], r"t must lie within each preconditioning's range, got 80, 5"),
    ],
)
def test_pictures_that_cannot_be(arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    saved()
    assert main(["plot", "a.st", *arguments]) == 2
    assert re.search(f"^error: {match}", only_line(capsys.readouterr().err))


def test_without_matplotlib_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plot", "a.st", "--output", "a.png"]) == 2
    assert only_line(capsys.readouterr().err).endswith("pip install analytic-precond[plot]")


# --- compare


def test_compare_tells_equal_from_other(capsys: pytest.CaptureFixture[str]) -> None:
    one, _ = saved("a.st", num_samples=400), saved("b.st", num_samples=400, seed=1)
    other = ap.estimate_statistics(
        lambda x, t: 1.3 * torch.tanh(x), torch.linspace(-1, 1, 60).reshape(20, 3), one.levels, 400, progress=False
    )
    other.save("c.st")
    assert main(["compare", "a.st", "b.st"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("differs in seeds: 0 and 1\n\n")
    assert "\nagree: no difference exceeds " in out
    assert main(["compare", "a.st", "c.st"]) == 1
    assert "\ndiffer: a difference exceeds " in capsys.readouterr().out
    assert main(["compare", "a.st", "c.st", "--json"]) == 1
    shown = strict_json(capsys.readouterr().out)
    assert shown["agree"] is False
    assert shown["second"]["description"] == other.header.description
    level = int((one.l - other.l).abs().argmax())
    assert shown["differences"]["l"]["largest"] == (one.l - other.l).abs().max().item()
    assert shown["differences"]["l"]["largest_at"] == [one.levels[level].item()]


@pytest.mark.parametrize(
    ("levels", "num_samples", "match"),
    [
        ([2.0, 1.0, 0.5, 0.1], 2, "statistics must have standard errors, got 2 samples: take 8 at least"),
        ([2.0, 1.0, 0.5], 40, "must share their noise levels, got 4 and 3 of them, at index 0 2 and 2: estimate"),
        ([2.0, 1.0, 0.4, 0.1], 40, "must share their noise levels, got 4 and 4 of them, at index 2 0.5 and 0.4: est"),
    ],
)
def test_what_cannot_be_compared(
    levels: list[float], num_samples: int, match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved("a.st")
    data, grid = torch.linspace(-1, 1, 60).reshape(20, 3), torch.tensor(levels)  # float32
    ap.estimate_statistics(linear_teacher, data, grid, num_samples, progress=False).save("b.st")
    assert main(["compare", "a.st", "b.st"]) == 2
    assert match in only_line(capsys.readouterr().err)


# --- the process


def test_help_has_examples_that_parse(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ([], ["estimate"], ["show"], ["plot"], ["compare"]):
        with pytest.raises(SystemExit) as stop:
            main([*command, "--help"])
        assert stop.value.code == 0
        examples = capsys.readouterr().out.partition("examples:\n")[2].replace("\\\n", "")
        lines = [line.strip() for line in examples.splitlines() if line.strip().startswith("python -m")]
        assert lines
        for line in lines:
            words = shlex.split(line.partition("&&")[0].partition(" > ")[0].replace("--device cuda", ""))
            assert words[:3] == ["python", "-m", "analytic_precond"]
            assert main(words[3:]) == 2  # they parse, but there are no such files here


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"analytic-precond {ap.__version__}\n"


def test_the_module_runs_as_a_program(folder: Path) -> None:
    arguments = ["estimate", "teachers:both", *LEVELS, "--num-samples", "40", "--json", "--output", "a.st"]
    done = module(*arguments)
    assert done.returncode == 0, done.stderr
    assert strict_json(done.stdout)["l"] == api().l.tolist()
    assert module("show", "missing.st").returncode == 2


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and signals of POSIX")
def test_a_closed_pipe_is_no_error(folder: Path) -> None:
    saved()
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "analytic_precond", "show", "a.st"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=300, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


# --- docs/command-line.md


def test_a_folder_of_pictures_is_data(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "folder.py").write_text(re.findall(r"^```python\n(# folder\.py\n.*?)^```$", PAGE, re.S | re.M)[0])
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    pixels[0, 0, 0] = 0, 0, 255
    (folder / "pictures").mkdir()
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"pictures/{number}.png")
    monkeypatch.syspath_prepend(str(folder))
    expected = pixels.astype("float32") / 127.5 - 1
    images = importlib.import_module("folder").images()
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, torch.from_numpy(expected.transpose(0, 3, 1, 2)), rtol=0, atol=1e-6)
    assert images[0, :, 0, 0].tolist() == [-1, -1, 1]
    assert estimate("teachers:teacher", "--data", "folder:images", samples=8) == 0
    assert ap.TeacherStatistics.load("a.st").header.sample_shape == (3, 4, 5)
    del sys.modules["folder"]


def numbers_and_words(text: str) -> tuple[list[float], list[str]]:
    number = r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]\d+)?(?![\w.]*\w)"
    return [float(n) for n in re.findall(number, text)], re.sub(number, "#", text).split()


def test_the_page_runs_and_shows_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)
    assert PAGE.count("```") == 2 * len(blocks)
    commands, printed = 0, ""
    for language, text in blocks:
        if language == "python":
            (folder / text.splitlines()[0].removeprefix("# ")).write_text(text)
        elif language == "sh":
            for line in text.splitlines():
                command, _, code = line.partition("  # exit code ")
                words = shlex.split(command)
                assert words[:3] == ["python", "-m", "analytic_precond"]
                assert main(words[3:]) == int(code or 0)
                printed, commands = capsys.readouterr().out, commands + 1
        else:
            assert language == "text"
            (shown, shown_words), (found, found_words) = numbers_and_words(text), numbers_and_words(printed)
            assert shown_words == found_words
            assert shown == pytest.approx(found, rel=0.02, abs=1e-6)  # float64 sums in another order
    assert commands == 8
