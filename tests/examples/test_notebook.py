"""The notebook: it runs in a fresh kernel, to the outputs that it stores, and reads without running."""

from __future__ import annotations

import base64
import io
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from checkout import ROOT
from PIL import Image

NOTEBOOK = ROOT / "examples" / "coefficient_curves.ipynb"
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def run(notebook: Path, folder: Path) -> Any:
    """Run a notebook in a kernel that sees no one's settings, and return it with its outputs."""
    own = {
        name: str(folder) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    environment = {**os.environ, **own, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "refresh_notebook.py"), "--notebook", str(notebook)]
    command += ["--output", str(folder / "run.ipynb")]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert process.returncode == 0, process.stderr
    return nbformat.read(folder / "run.ipynb", as_version=4)


def texts(output: Any) -> str:
    """Return an output without its picture."""
    if output.output_type == "stream":
        return str(output.text)
    return "\n".join(str(value) for mime, value in output.get("data", {}).items() if mime != "image/png")


def kinds(cell: Any) -> list[tuple[str, list[str]]]:
    return [(output.output_type, sorted(output.get("data", {}))) for output in cell.outputs]


@pytest.fixture(scope="module")
def stored() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def test_what_is_stored_is_clean(stored: Any) -> None:
    assert NOTEBOOK.stat().st_size < 1_000_000
    nbformat.validate(stored)
    assert stored.metadata.language_info == {"name": "python"}  # no versions
    code = [cell for cell in stored.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    for cell in stored.cells:
        assert cell.metadata == {}, cell.id
        assert "TODO" not in cell.source
        assert "from analytic_precond" not in cell.source  # only what the package offers at its top
    for cell in code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", texts(output)
            assert not re.search(r"Warning|Traceback|(?<![\w.])/\w+/\w|[A-Z]:\\| at 0x", texts(output)), texts(output)


def test_every_figure_is_there_and_explained(stored: Any) -> None:
    """A figure stands between a text and one that says what to see, whose decimals stand in the figure's cell."""
    drawn = 0
    for before, cell, after in zip(stored.cells, stored.cells[1:], stored.cells[2:], strict=False):
        if cell.cell_type != "code" or cell.id == "setup":
            continue
        pictures = [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        assert len(pictures) == 1, cell.id
        shades = Image.open(io.BytesIO(base64.b64decode(pictures[0]))).convert("L").getextrema()
        assert shades[0] < 128 < shades[1]
        drawn += 1
        assert before.cell_type == after.cell_type == "markdown"
        assert after.source.startswith("**What to see.** ")
        shown = cell.source + "".join(map(texts, cell.outputs))
        decimals = re.findall(r"\d+\.\d+", after.source)
        assert [number for number in decimals if not re.search(rf"(?<!\d){re.escape(number)}(?!\d)", shown)] == []
    assert drawn == 9


def test_it_says_how_to_open_it(stored: Any) -> None:
    """The extra brings a kernel, for any editor, and no Jupyter Lab."""
    lines = (
        '.venv/bin/pip install -e ".[notebook]" jupyterlab',
        ".venv/bin/jupyter lab examples/coefficient_curves.ipynb",
    )
    assert "\n".join(lines) in stored.cells[0].source


def test_links_lead_somewhere(stored: Any) -> None:
    prose = [cell for cell in stored.cells if cell.cell_type == "markdown"]
    links = [link for cell in prose for link in re.findall(r"\]\(([^)#]+)", cell.source)]
    assert links
    assert [link for link in links if not (NOTEBOOK.parent / link).is_file()] == []


@pytest.mark.long
def test_it_runs_to_the_outputs_that_it_stores(stored: Any, tmp_path: Path) -> None:
    fresh = run(NOTEBOOK, tmp_path)
    for old, new in zip(stored.cells, fresh.cells, strict=True):
        assert new.source == old.source
        if old.cell_type != "code":
            continue
        assert kinds(new) == kinds(old), old.id
        for old_output, new_output in zip(old.outputs, new.outputs, strict=True):
            old_text, new_text = texts(old_output), texts(new_output)
            assert NUMBER.sub("#", new_text) == NUMBER.sub("#", old_text)
            # seeds are fixed: another torch or processor rounds otherwise, by less than this and the last digit printed
            for old_number, new_number in zip(NUMBER.findall(old_text), NUMBER.findall(new_text), strict=True):
                digit = 10.0 ** -len(old_number.partition(".")[2])
                assert float(new_number) == pytest.approx(float(old_number), rel=0.02, abs=1.5 * digit), old.id
