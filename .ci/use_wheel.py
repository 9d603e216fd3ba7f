"""Use the installed package as a newcomer does, without any extra. Its argument is the README, whose example is run."""

import math
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

import analytic_precond as ap


def expect(what: str, holds: bool) -> None:
    """Stop unless it holds."""
    if not holds:
        raise SystemExit(f"expected {what}")


def expect_refusal(call: Callable[[], object], words: str) -> None:
    """Call what needs a package that is not there, and look for its name in the error."""
    try:
        call()
    except ImportError as error:
        if words in str(error):
            return
        raise
    raise SystemExit(f"expected an ImportError that says {words!r}, got none")


def command_line(*arguments: str, code: int = 0) -> str:
    """Run ``python -m analytic_precond`` and return all that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "analytic_precond", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    if done.returncode != code:
        raise SystemExit(f"expected exit code {code} of {arguments}, got {done.returncode}:\n{done.stdout}")
    return done.stdout


folder = Path(ap.__file__).parent
expect("the installed package, not the checkout", folder.is_relative_to(sys.prefix))
expect("py.typed beside the modules", (folder / "py.typed").is_file())
for name in ("matplotlib", "lpips", "torchvision", "diffusers", "sklearn", "skimage", "PIL"):
    expect(f"an environment without {name}", find_spec(name) is None)

(example,) = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), flags=re.DOTALL)
used: dict[str, object] = {}
exec(compile(example, "README.md", "exec"), used)
for name, value in (("c_skip", 0.2035), ("c_out", 0.6386)):  # as the example's comment says; its data are random
    expect(f"{name} within 3 % of {value}", abs(float(used[name]) / value - 1) < 0.03)
again = ap.TeacherStatistics.load("teacher.safetensors")
expect("what was saved", all(torch.equal(getattr(again, field), getattr(used["stats"], field)) for field in ("l", "s")))

# what asks most of numpy and scipy; five levels make splines of even degree
fit = ap.ShiftedPreconditioning.fit(
    used["teacher"], used["data"], levels=ap.log_noise_levels(5, 0.5, 5.0), num_trajectories=64, progress=False
)
expect("finite coefficients", all(math.isfinite(c) for c in fit(5.0, 1.0)))

expect_refusal(lambda: ap.plot_statistics(again), "analytic-precond[plot]")
expect_refusal(lambda: ap.LPIPSDistance(), "analytic-precond[lpips]")
expect_refusal(lambda: ap.ConsistencyJumpScheduler, "pip install diffusers")

expect("help with examples", "examples" in command_line("--help").lower())
expect("the file's levels", "120" in command_line("show", "teacher.safetensors"))
expect(
    "the extra", "analytic-precond[plot]" in command_line("plot", "teacher.safetensors", "--output", "a.png", code=2)
)

packages = ("analytic-precond", "torch", "numpy", "scipy", "safetensors", "tqdm")
print("works with", ", ".join(f"{name} {version(name)}" for name in packages), "on Python", sys.version.split()[0])
