"""Measure what ``import analytic_precond`` takes beyond ``import torch``: both in turn, the least of many runs."""

import subprocess
import sys

ROUNDS = 20
TIMED = """
import time
wall, cpu = time.perf_counter(), time.process_time()
import {}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""

# the first imports warm the disk's cache and write bytecode
names = ("torch", "analytic_precond")
runs = [
    [subprocess.check_output([sys.executable, "-c", TIMED.format(name)], text=True).split() for name in names]
    for _ in range(ROUNDS + 1)
][1:]
for column, kind in enumerate(("wall", "CPU")):
    torch, package = (min(float(run[which][column]) for run in runs) for which in range(len(names)))
    print(f"{kind} time: torch {torch:.2f} s, analytic_precond {package:.2f} s, difference {package - torch:+.2f} s")
