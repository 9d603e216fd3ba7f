"""examples/benchmarks/gpu.py and gpu_report.py run from end to end, on a machine without a GPU too."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from checkout import BENCHMARKS

pytestmark = pytest.mark.long

TINY = ["--device", "cpu", "--tiny"]
NUMBER = r"\d+(\.\d+)?"


def test_tiny_report_holds_tests_benchmark_and_recipe(tmp_path: Path) -> None:
    report = tmp_path / "gpu.md"
    command = [sys.executable, str(BENCHMARKS / "gpu_report.py"), *TINY, "--output", str(report)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    written = report.read_text()
    assert run.returncode == 0, written + run.stderr
    assert re.search(r"\d+ (skipped|passed)", written)
    assert re.search(rf"passes per second: bare loop {NUMBER}, estimator {NUMBER}, ratio {NUMBER}", written)
    assert re.search(rf"hutchinson \+ jvp takes {NUMBER} times as long as stein \+ transport at equal", written)
    assert re.search(rf"coefficients, batch 8 +{NUMBER} +{NUMBER} +{NUMBER}\n", written)
    assert re.search(rf"eager: CTM {NUMBER} ms, Analytic-Precond {NUMBER} ms, ratio {NUMBER}", written)
    assert len(re.findall(rf"{NUMBER} images a second", written)) == 2  # CTM's and the paper's
    assert written.count("exit status 0.") == 8


def test_what_fails_or_takes_too_long_is_named_and_loses_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from gpu_report import Report\n"
        "report = Report(pathlib.Path(sys.argv[1]), 'title')\n"
        "report.run('good', [sys.executable, '-c', 'print(1 + 1)'], 60)\n"
        "report.run('bad', [sys.executable, '-c', 'print(20 + 1); raise SystemExit(3)'], 60)\n"
        "report.run('slow', [sys.executable, '-uc', 'import time; print(300 + 1); time.sleep(600)'], 5)\n"
        "report.run('tests', [sys.executable, '-c', 'print(\"a PASSED\\\\nb FAILED\")'], 60)\n"
        "print(report.failed)\n"
    )
    report = tmp_path / "gpu.md"
    run = subprocess.run(
        [sys.executable, "-c", script, str(report)], capture_output=True, text=True, timeout=300, cwd=BENCHMARKS
    )
    assert run.stdout.splitlines()[-1] == "['bad', 'slow']", run.stderr
    written = report.read_text()
    assert [number in written for number in ("\n2\n", "\n21\n", "\n301\n")] == [True] * 3
    assert "\na PASSED\n" not in written
    assert "\nb FAILED\n" in written
    assert "exit status 3." in written
    assert "exit status none after 5 s." in written


def test_the_report_says_that_it_needs_cuda_and_needs_no_installation(tmp_path: Path) -> None:
    # -S: installed packages are found, but not what an editable installation points to
    command = [sys.executable, "-S", str(BENCHMARKS / "gpu_report.py"), "--output", str(tmp_path / "gpu.md")]
    places = {"PYTHONPATH": sysconfig.get_path("purelib"), "CUDA_VISIBLE_DEVICES": "", "PATH": ""}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=places)
    assert run.returncode == 2
    assert "--device cpu --tiny" in run.stderr
    assert not (tmp_path / "gpu.md").exists()
