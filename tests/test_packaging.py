"""What is released: the wheel's and the sdist's contents, one version everywhere, extras that exist, a light import."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email import message_from_string
from email.message import Message
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest
from checkout import ROOT

import analytic_precond as ap
from analytic_precond.command_line.main import main

MODULES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "analytic_precond").rglob("*.py")}


def build(source: Path, folder: Path, *targets: str) -> None:
    """Build from a source tree; without isolation, so that no network is needed."""
    options = [option for target in targets for option in ("--target", target)]
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder), *options]
    subprocess.run(command, cwd=source, check=True, capture_output=True)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist and the wheel made from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    build(ROOT, folder, "sdist", "wheel")
    return folder


@pytest.fixture
def wheel(built: Path) -> Iterator[zipfile.ZipFile]:
    (path,) = built.glob("*.whl")
    with zipfile.ZipFile(path) as file:
        yield file


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_string(wheel.read(name).decode())


def test_wheel_has_the_package_its_types_and_its_licence_only(wheel: zipfile.ZipFile) -> None:
    information = f"analytic_precond-{ap.__version__}.dist-info"
    assert set(wheel.namelist()) == MODULES | {
        "analytic_precond/py.typed",
        *(f"{information}/{name}" for name in ("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")),
    }


def test_sdist_is_enough_to_test_document_and_build_the_same_wheel(
    built: Path, tmp_path: Path, wheel: zipfile.ZipFile
) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as file:
        file.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    names = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    single = {"LICENSE", "CITATION.cff", "Makefile", "constraints.txt", "mkdocs.yml", ".importlinter", ".ci/run"}
    folders = ("tests", "docs", "examples")
    kinds = {".py", ".md", ".png", ".npz", ".json", ".ipynb", ".css"}
    needed = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds}
    # what a test or an example that runs at the same time writes beside itself
    needed = {path for path in needed if not {"__pycache__", ".ipynb_checkpoints"} & set(path.parts)}
    assert single | MODULES | {path.relative_to(ROOT).as_posix() for path in needed} <= names
    assert not {name for name in names if re.match(r"\.venv/|\.git/|dist/|site/|\..*cache/", name)}

    build(source, tmp_path, "wheel")
    (path,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(path) as again:
        assert {info.filename: info.CRC for info in again.infolist()} == {
            info.filename: info.CRC for info in wheel.infolist()
        }


def test_metadata(metadata: Message) -> None:
    assert metadata["Name"] == "analytic-precond"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    always = {line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line}
    assert {re.split("[>=]", line)[0] for line in always} == {"torch", "numpy", "scipy", "safetensors", "tqdm"}
    assert all(re.fullmatch(r"\w+>=[\d.]+", line) for line in always)  # floors, which CI installs; no ceilings


def test_extras_that_anything_names_exist(metadata: Message) -> None:
    extras = set(metadata.get_all("Provides-Extra", []))
    assert {"plot", "lpips", "examples", "benchmarks", "docs", "dev"} <= extras
    texts = [*(ROOT / "analytic_precond").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = {
        extra.strip()
        for path in texts
        for found in re.findall(r"analytic-precond\[([\w, -]+)\]", path.read_text())
        for extra in found.split(",")
    }
    assert {"plot", "lpips"} <= named <= extras


def test_one_version(metadata: Message) -> None:
    assert metadata["Version"] == ap.__version__ == version("analytic-precond")
    (cited,) = re.findall(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert cited == ap.__version__
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    released = headings[1:] if headings[0] == "[Unreleased]" else headings
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in released)
    assert not released or released[0].startswith(f"[{ap.__version__}] - ")


@pytest.mark.parametrize("package", ["analytic_precond", "training.third_party.analytic_precond"])
def test_a_copied_folder_works_uninstalled(tmp_path: Path, package: str) -> None:
    """Copied into a training repository under any name, a submodule of it, or on PYTHONPATH: no metadata are needed."""
    copy = tmp_path.joinpath(*package.split("."))
    shutil.copytree(ROOT / "analytic_precond", copy, ignore=shutil.ignore_patterns("__pycache__"))
    code = f"""
import importlib, importlib.metadata, pathlib, pkgutil, sys

def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)

importlib.metadata.version = importlib.metadata.distribution = missing
ap = importlib.import_module({package!r})
assert pathlib.Path(ap.__file__).parent == pathlib.Path({str(copy)!r})
names = [module.name for module in pkgutil.walk_packages(ap.__path__, ap.__name__ + ".")]
for name in names:
    if "__main__" not in name and "diffusers_scheduler" not in name:
        importlib.import_module(name)
assert len(names) > 80
assert {package!r} == "analytic_precond" or "analytic_precond" not in sys.modules, "it reaches for the installed one"
c_skip, c_out = ap.CTMPreconditioning()(4.0, 1.0)
print(ap.__version__, c_skip.item(), c_out.item())
importlib.import_module(f"{{ap.__name__}}.command_line.main").main(["--version"])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False, capture_output=True, text=True)
    expected = [ap.__version__, "0.25", "0.75", "analytic-precond", ap.__version__]
    assert (run.stdout.split(), run.stderr) == (expected, "")


def test_console_script() -> None:
    (script,) = entry_points(group="console_scripts", name="analytic-precond")
    assert script.load() is main
    command = [str(Path(sys.executable).with_name("analytic-precond")), "--help"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "estimate" in printed


def test_import_takes_no_extra_and_no_scipy() -> None:
    """Scipy's splines and optimisers take a third of torch's time, and are only needed to build tables and to fit."""
    code = (
        "import sys, torch; before = set(sys.modules); import analytic_precond;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    new = set(out.split()) - sys.stdlib_module_names
    assert "analytic_precond" in new
    assert new <= {"analytic_precond", "torch", "numpy", "safetensors", "tqdm"}


def test_release_page_names_files_that_exist() -> None:
    page = (ROOT / "docs/release.md").read_text()
    files = set(re.findall(r"`([\w./]*\.(?:toml|cff|md|sh|py|txt)|\.ci/\w+)(?: [^`]*)?`", page))
    assert {"pyproject.toml", "CITATION.cff", "CHANGELOG.md", ".ci/run", ".ci/check_wheel.sh"} <= files
    assert not {name for name in files if not (ROOT / name).is_file()}
