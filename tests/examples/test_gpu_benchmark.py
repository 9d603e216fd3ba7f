"""examples/benchmarks/gpu.py runs from end to end, on a machine without a GPU too."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from checkout import BENCHMARKS

SCRIPT = BENCHMARKS / "gpu.py"


@pytest.mark.long
def test_tiny_benchmark_prints_every_comparison() -> None:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny"]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout
    number = r"\d+(\.\d+)?"
    assert re.search(rf"passes per second: bare loop {number}, estimator {number}, ratio {number}", printed)
    assert re.search(rf"hutchinson \+ jvp takes {number} times as long as stein \+ transport at equal", printed)
    assert re.search(rf"eager: CTM {number} ms, Analytic-Precond {number} ms, ratio {number}", printed)
