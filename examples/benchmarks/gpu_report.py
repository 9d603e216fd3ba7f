"""All that needs a GPU, in under ten minutes: the tests, the benchmark, and a short run of the paper's recipe.

    python examples/benchmarks/gpu_report.py    # in a checkout, with the `dev` extra

Writes docs/evidence/gpu.md. Each command has a limit in time. What one has printed is written at once, whatever becomes
of the others; one that fails is named at the end, and makes the exit status 1. The recipe runs in fp16 on a network of
EDM's interface that is nothing but convolutions, is resumed once, and draws samples.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # a bare checkout will do: nothing need be installed
sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "support"))
sys.path.insert(0, str(Path(__file__).parents[1] / "paper"))
from networks import load_teacher
from paper_runs import write_data, write_teacher
from plan import costs_of
from settings import Settings, experiment_of

import analytic_precond as ap

ROOT = Path(__file__).parents[2]
RECIPE, SUPPORT = ROOT / "examples" / "paper", ROOT / "tests" / "support"


class Report:
    """A Markdown file that grows, and the commands that have failed."""

    def __init__(self, path: Path, title: str) -> None:
        self.path, self.failed = path, []
        path.write_text(f"# On a GPU\n\n{title}\n")

    def write(self, text: str) -> None:
        """Show and keep some text."""
        print(text, flush=True)
        with self.path.open("a") as file:
            file.write(text + "\n")

    def run(self, name: str, command: list[object], limit: float, lines: int = 200) -> bool:
        """Run a command, and keep the end of what it prints; whether it ended well and in time."""
        start = time.perf_counter()
        folders = [str(ROOT), str(SUPPORT), os.environ.get("PYTHONPATH", "")]
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, folders))}
        with tempfile.TemporaryFile("w+") as output:
            words = [str(word) for word in command]
            process = subprocess.Popen(  # a session of its own: what it has started ends with it
                words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=variables, start_new_session=True
            )
            try:
                code: object = process.wait(limit)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                code = f"none after {limit:g} s"
            output.seek(0)
            said = [line for line in output.read().splitlines() if not re.search(r"%\||\bPASSED\b", line)]  # nor bars
        shown = [Path(word).name if Path(word).is_absolute() else word for word in words[1:]]
        self.write(f"\n## {name}\n\n`{' '.join(shown)}`\n\n```text")
        self.write("\n".join(said[-lines:]))
        self.write(f"```\n\n{time.perf_counter() - start:.0f} s, exit status {code}.\n")
        if code != 0:
            self.failed.append(name)
        return code == 0


def run_recipe(report: Report, device: str, tiny: bool) -> None:
    """Train, go on, and draw samples, with CTM's preconditioning and the paper's; write images and FLOPs per second."""
    width, depth, size, batch = (16, 1, 8, 4) if tiny else (256, 12, 32, 64)
    few, more = (1, 2) if tiny else (15, 40)
    changes = f"resolution={size} distance=squared_error batch_size={batch} num_levels=18".split()
    changes += "statistics_samples=8 statistics_levels=12".split() if tiny else ["statistics_samples=64"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher = write_teacher(folder / "net.pkl", "cifar10_unconditional", size, width=width, depth=depth)
        data = write_data(folder / "data.zip", size)
        experiment = experiment_of("cifar10_unconditional", changes)
        settings = Settings(experiment, "ctm", "fp16", 0, teacher, data)
        costs = costs_of(load_teacher(teacher, experiment), settings)
        for precond in ("ctm", "analytic"):
            run = folder / precond
            files = ["--teacher", teacher, "--data", data, "--output", run, "--device", device]
            train = [sys.executable, RECIPE / "train.py", "--experiment", "cifar10_unconditional", *files]
            train += ["--preconditioning", precond, "--log-every", 10, "--set", *changes]
            evaluate = [sys.executable, RECIPE / "evaluate.py", "--folder", run, "--device", device, "--steps", 1, 2]
            ended = (
                report.run(f"Recipe, {precond}", [*train, f"iterations={few}"], 40, 8)
                and report.run(f"Recipe, {precond}, resumed", [*train, f"iterations={more}"], 40, 8)
                and report.run(f"Samples, {precond}", [*evaluate, "--num-samples", 2 * batch], 25, 8)
            )
            if ended:
                last = json.loads((run / "log.jsonl").read_text().splitlines()[-1])
                speed = last["images_per_second"]
                report.write(
                    f"\n{costs['parameters'] / 1e6:.1f} million parameters, {costs['image'] / 1e9:.0f} GFLOP an image: "
                    f"{speed:.1f} images a second, {speed * costs['image'] / 1e12:.1f} TFLOP/s, peak memory "
                    f"{last['peak_memory_gb']:.1f} GB, last losses {last['trajectory_loss']:.4g} (trajectory) and "
                    f"{last['denoising_loss']:.4g} (denoising)."
                )


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "evidence" / "gpu.md", help="the report")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="try everything in two minutes; the numbers mean nothing")
    arguments = parser.parse_args()
    device, tiny = arguments.device, arguments.tiny
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("this needs CUDA, and torch sees none; --device cpu --tiny tries the script itself")
    card = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    title = (
        f"{card}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, analytic_precond {ap.__version__}. Made by"
    )
    report = Report(arguments.output, f"{title} `examples/benchmarks/gpu_report.py`.")

    tiny_option = ["--tiny"] if tiny else []
    parallel = ["-n", 4] if importlib.util.find_spec("xdist") and not tiny else []
    tests = "tests/test_gpu.py" if tiny else "tests"
    # -v: each failure is named when it happens, should time run out
    report.run("Tests", [sys.executable, "-m", "pytest", "-v", "-m", "gpu", *parallel, "-rfE", tests], 270)
    report.run("Benchmark", [sys.executable, Path(__file__).with_name("gpu.py"), "--device", device, *tiny_option], 180)
    run_recipe(report, device, tiny)
    if report.failed:
        raise SystemExit(f"failed: {', '.join(report.failed)}; {arguments.output} says how")
    print(f"{arguments.output} is complete")


if __name__ == "__main__":
    main()
