"""The page "Test your own preconditioning": its file passes under pytest as it is, and fails with a fault in it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import DOCS, ROOT

PAGE = (DOCS / "howto" / "test-your-own.md").read_text()


def run(folder: Path, file: str) -> str:
    (folder / "test_preconditioning.py").write_text(file)
    command = [sys.executable, "-m", "pytest", "-q", "--color=no", f"--rootdir={folder}", folder]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout


@pytest.mark.long  # two processes that import torch
def test_the_file_to_copy(tmp_path: Path) -> None:
    file = next(block for block in re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE))
    assert file.startswith("# test_preconditioning.py")
    assert "4 passed" in run(tmp_path, file)
    wrong = file.replace("SIGMA_DATA * (t - s)", "(t - s)")
    assert wrong != file
    printed = run(tmp_path, wrong)
    assert "1 failed, 3 passed" in printed
    assert "AssertionError: read-out: -t d/ds c_out: got 2, expected 1" in printed


@pytest.mark.long
def test_it_is_imported_by_name_only() -> None:
    """Nothing else in the package imports it, and it brings no test runner and no plots."""
    code = (
        "import sys, torch, analytic_precond; assert 'analytic_precond.testing' not in sys.modules;"
        "import analytic_precond.testing; print(*{name.partition('.')[0] for name in sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert not {"pytest", "hypothesis", "matplotlib", "diffusers", "sklearn"} & set(out.split())
    assert "scipy" in out.split()
