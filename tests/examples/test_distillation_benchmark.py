"""examples/benchmarks/distillation: the smallest benchmark, killed and started again, and the arithmetic of it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from checkout import BENCHMARKS
from safetensors.torch import load_file

import analytic_precond as ap

pytest.importorskip("skimage", reason="the benchmark's photographs are scikit-image's")

FOLDER = BENCHMARKS / "distillation"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    """Import one of the benchmark's modules, which find each other as scripts do."""
    monkeypatch.syspath_prepend(FOLDER)
    known = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - known:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def start(script: str, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(FOLDER / script), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=280)[0]
    assert process.returncode == 0, output
    return output


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_smoke_benchmark_survives_a_kill_and_reports(tmp_path: Path) -> None:
    results, docs = tmp_path / "smoke", tmp_path / "docs"
    run = start("run.py", "--smoke", "--output", str(tmp_path))
    while run.poll() is None and not list(results.glob("*/runs/*.json")):
        time.sleep(0.2)
    os.killpg(run.pid, signal.SIGKILL)
    output = run.communicate()[0]
    done = {path: path.stat().st_mtime_ns for path in results.glob("*/runs/*.json")}
    assert done, output

    output = finish(start("run.py", "--smoke", "--output", str(tmp_path)))
    assert f"{len(done)} of " in output
    assert all(path.stat().st_mtime_ns == moment for path, moment in done.items())  # not done again

    finish(start("report.py", "--size", "smoke", "--output", str(tmp_path), "--docs", str(docs)))
    runs = json.loads((docs / "evidence" / "smoke_results.json").read_text())["runs"]
    assert len(runs) == len(list(results.glob("*/runs/*.json"))) > len(done)
    untrained: dict[tuple[str, str], set[float]] = {}
    for content in runs:
        for point in content["history"]:
            assert all(math.isfinite(value) for key, value in point.items() if key != "levels")
        untrained.setdefault((content["problem"], content["method"]), set()).add(content["history"][0]["ode/1"])
    assert all(len(values) == 1 for values in untrained.values())  # whatever the seed, a student starts as its teacher
    assert "### Speed-up over CTM, Euler" in (docs / "evidence" / "smoke_tables.md").read_text()
    long_run = results / "digits" / "runs" / "ctm-euler_seed0_lr0.002_9.safetensors"
    assert (long_run.exists(), long_run.with_stem("ctm-euler_seed0_lr0.002_3").exists()) == (True, True)
    names = {path.name for path in (docs / "images" / "evidence").iterdir()}
    assert {
        "smoke_speedups.png",
        "smoke_digits_curves.png",
        "smoke_digits_gaps.png",
        "smoke_digits_samples.png",
    } <= names

    tables = docs / "evidence" / "smoke_tables.md"
    text = tables.read_text()
    tables.unlink()
    finish(start("report.py", "--size", "smoke", "--output", str(tmp_path / "none"), "--docs", str(docs)))
    assert tables.read_text() == text  # from the stored numbers


@pytest.mark.long
@pytest.mark.parametrize("method", ["annealed", "cm"])
def test_an_interrupted_run_goes_on_from_its_last_evaluation(
    load: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str
) -> None:
    sizes, train, run_all = load("configurations"), load("train"), load("run")
    config = dataclasses.replace(sizes.SMOKE, problems=(sizes.SMOKE.problem("spiral"),))
    monkeypatch.setattr(run_all, "_count", lambda _: None)
    run_all.prepare(config, tmp_path, "spiral")
    run = sizes.Run("spiral", method, 0, config.learning_rate, 3)
    counted: list[int] = []

    def interrupt(iterations: int) -> None:
        counted.append(iterations)
        if sum(counted) == 3:  # after the evaluation at iteration 2, in which this one is lost
            raise KeyboardInterrupt

    def result() -> tuple[list[dict[str, object]], dict[str, torch.Tensor]]:
        points = json.loads(run.path(tmp_path).read_text())["history"]
        seconds = ("wall_seconds", "processor_seconds")
        images = load_file(run.path(tmp_path).with_suffix(".safetensors"))
        return [{k: v for k, v in point.items() if k not in seconds} for point in points], images

    with pytest.raises(KeyboardInterrupt):
        train.train(run, config, tmp_path, interrupt)
    assert not run.path(tmp_path).exists()
    counted.clear()
    with pytest.raises(KeyboardInterrupt):  # other settings, other numbers: from the beginning
        train.train(run, dataclasses.replace(config, ema=0.5), tmp_path, interrupt)
    assert counted == [0, 1, 1, 1]
    counted.clear()
    with pytest.raises(KeyboardInterrupt):
        train.train(run, config, tmp_path, interrupt)
    assert counted == [0, 1, 1, 1]
    counted.clear()
    train.train(run, dataclasses.replace(config, processes=1, methods=(method,)), tmp_path, counted.append)
    assert counted == [2, 1]  # the first two were not done again
    history, images = result()
    run.path(tmp_path).unlink()
    train.train(run, config, tmp_path, counted.append)
    assert counted == [2, 1, 0, 1, 1, 1]
    whole, whole_images = result()
    assert history == whole  # to the last bit
    torch.testing.assert_close(images, whole_images, rtol=0, atol=0)
    assert not list(tmp_path.rglob("*.pt"))  # no state of finished runs is kept


def history(*values: float) -> list[dict[str, float]]:
    return [{"iteration": i, "m": value} for i, value in zip((0, 1, 2, 4, 8), values, strict=True)]


def test_iterations_to_a_goal(load: object) -> None:
    iterations_to = load("speedups").iterations_to
    curve = history(16.0, 8.0, 4.0, 2.0, 1.0)
    assert iterations_to(curve, "m", 12.0) == (0.5, "")  # linear before the first evaluation
    assert iterations_to(curve, "m", 3.0) == (pytest.approx(2 * 2**0.5), "")  # then in the logarithm of the iteration
    assert iterations_to(curve, "m", 20.0) == (1, "before")
    assert iterations_to(curve, "m", 0.5) == (8, "never")
    assert iterations_to(history(9.0, 3.0, 9.0, 9.0, 9.0), "m", 3.0) == (1, "")  # the first time counts


def test_speedup_of_a_curve_that_runs_ahead(load: object) -> None:
    speedups, sizes = load("speedups"), load("configurations")
    problem = sizes.Problem("digits", size=8, width=8, iterations=8)
    config = sizes.Configuration("test", (problem,), seeds=(0, 1))
    results = {}
    for seed in config.seeds:
        slow, fast = (sizes.Run("digits", name, seed, config.learning_rate, 8) for name in ("ctm-euler", "cm"))
        results[slow], results[fast] = history(16.0, 8.0, 4.0, 2.0, 1.0), history(16.0, 4.0, 1.0, 0.5, 0.2)
    measured = speedups.speedup(results, config, "digits", "cm", "m")
    assert measured.ratios == (4.0, 4.0)
    assert (measured.mean, measured.bound) == (pytest.approx(4.0), "")
    assert speedups.Speedup((1.0, 4.0), ("", "")).bootstrap() == pytest.approx((1.0, 4.0))  # two seeds: their range


def test_a_speedup_is_a_bound_if_one_seed_is(load: object) -> None:
    speedups, words = load("speedups"), load("page_tables").words
    assert speedups.Speedup((2.0, 3.0), ("", "before")).bound == ">"
    assert speedups.Speedup((2.0, 3.0), ("", "never")).bound == "<"
    assert words(speedups.Speedup((2.0, 8.0), ("", ""))) == "4.0 [2.0, 8.0]"
    assert words(speedups.Speedup((1.5, 1.5, 1.0), ("", "", "never"))) == "2 of 3 seeds"
    assert words(speedups.Speedup((1.0, 1.0), ("never", "never"))) == "never"
    assert words(speedups.Speedup((3.57, 3.57), ("", "before"))) == "at least 3.5 [3.6, 3.6]"  # not rounded up


def test_the_pages_tables_are_those_of_the_stored_numbers(load: object) -> None:
    report, pages = load("report"), load("page_tables")
    evidence = (pages.ROOT / "docs" / "evidence.md").read_text()
    for table in pages.all_tables():
        assert table in evidence, table.splitlines()[0]

    config = load("configurations").CPU
    results, teachers, made = report.load_stored(pages.STORED)
    described = {problem.name: teachers[problem.name] for problem in config.problems}
    assert report.page(results, config, described, made) == pages.STORED.with_name("cpu_tables.md").read_text()


def test_frechet_distance_of_diagonal_normals(load: object) -> None:
    metrics: ModuleType = load("metrics")
    x = torch.tensor([1.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 9.0])).double()
    y = torch.tensor([1.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 1.0])).double()
    # |m - m'|^2 + sum (sqrt(c) - sqrt(c'))^2
    assert metrics.frechet_distance(x, y) == pytest.approx(4.0 + 1.0 + 4.0, rel=1e-12)


def test_annealed_jumps_go_from_one_preconditioning_to_another(load: object) -> None:
    class AskedBelow(ap.CTMPreconditioning):
        told_lower_level = True

        def network_level(self, t: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
            return (t * s) ** 0.5

    annealed: ModuleType = load("annealed")
    start, end = AskedBelow("variance"), ap.CTMPreconditioning()
    precond = annealed.AnnealedPreconditioning(start, end)
    student = ap.ConsistencyTrajectoryModel(torch.nn.Identity(), precond)
    average = ap.exponential_moving_average(student, 0.9)
    t, s = torch.tensor([80.0, 4.0, 1.0]), torch.tensor([0.002, 1.0, 1.0])
    for progress, share in ((0.0, 0.0), (0.125, 0.5), (0.2, 0.8), (0.25, 1.0), (1.0, 1.0)):
        for model in (student, average):
            annealed.anneal(model, progress)
            found = next(m for m in model.modules() if isinstance(m, annealed.AnnealedPreconditioning))
            for c, first, last in zip(found(t, s), start(t, s), end(t, s), strict=True):
                torch.testing.assert_close(c, (1 - share) * first + share * last)
            # q = sqrt(t s) at first, t at last: the exponents of t and s in between
            torch.testing.assert_close(found.network_level(t, s), t ** (0.5 + share / 2) * s ** (0.5 - share / 2))
    torch.testing.assert_close(precond(t, t).c_skip, torch.ones(3))
    assert (precond.sigma_min, precond.sigma_max) == (start.sigma_min, start.sigma_max)


def plateau_run(module: ModuleType, sizes: ModuleType, method: str, seed: int, values: dict[float, float]) -> object:
    """A run whose every metric follows ``values``, from the share of the training."""
    problem = module.CONFIG.problem("digits")
    history = [
        {"iteration": round(share * problem.iterations), **dict.fromkeys(module.METRICS, value), "levels": [value] * 17}
        for share, value in values.items()
    ]
    return sizes.Run("digits", method, seed, module.CONFIG.learning_rate, problem.iterations), history


def test_plateaus_are_compared_by_seed(load: object) -> None:
    module, sizes = load("plateau"), load("configurations")
    shares = module.CONFIG.shares
    results = dict(
        plateau_run(
            module,
            sizes,
            method,
            seed,
            {share: factor * (seed + 1) * (9.0 if share < 0.3 else 1.0) for share in shares},
        )
        for seed, ratio in enumerate((0.8, 0.5, 0.8))
        for method, factor in (("ctm-euler", 1.0), ("shifted", ratio))
    )
    (found, *others) = module.compare(results, module.CONFIG, "digits", "shifted").values()
    assert found.ratios == pytest.approx((0.8, 0.5, 0.8))  # CTM's own differences between seeds do not enter
    assert found.mean == pytest.approx(0.32 ** (1 / 3))
    # ln 0.8, ln 0.5, ln 0.8: mean -0.3798, standard error 0.1567, t = 2.424 with two degrees of freedom
    assert found.p == pytest.approx(0.1363, abs=2e-4)
    assert found.corrected == 1.0 == others[-1].corrected  # times 16 metrics, none below another
    low, high = found.interval()
    assert (math.log(low), math.log(high)) == pytest.approx(
        (-0.3798 - 4.3027 * 0.1567, -0.3798 + 4.3027 * 0.1567), abs=1e-3
    )
    assert module.drift(next(iter(results.values())), "midpoint", 3000) == pytest.approx(1.0)
    text = "".join(module.tables(results, module.CONFIG, "digits"))
    assert "0.684 [0.349, 1.342]" in text
    assert "shifted least squares (3 seeds)" in text
    assert module.draw_alignment(results, module.CONFIG, "digits").axes[0].get_lines()[0].get_ydata()[
        -1
    ] == pytest.approx(6 ** (1 / 3))


def test_p_values_are_corrected_for_their_number(load: object) -> None:
    """Holm 1979, by hand: the smallest times 4, the next times 3, ..., never below one before it."""
    assert load("plateau").holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_speedups_are_read_off_smoothed_curves(load: object) -> None:
    module, sizes = load("plateau"), load("configurations")
    curve = [{"iteration": i, "midpoint": v} for i, v in ((0, 8.0), (1, 1.0), (2, 8.0), (4, 8.0))]
    assert [point["midpoint"] for point in module.smoothed(curve, "midpoint")] == pytest.approx([8**0.5, 4.0, 4.0, 8.0])
    slow = {share: max(1.0, 0.5 / share) if share else 99.0 for share in module.CONFIG.shares}
    fast = {share: max(1.0, 0.25 / share) if share else 99.0 for share in module.CONFIG.shares}
    results = dict(
        plateau_run(module, sizes, method, seed, values)
        for seed in (0, 1)
        for method, values in (("ctm-euler", slow), ("shifted", fast))
    )
    words = module.speedup(results, module.CONFIG, "digits", "shifted", "midpoint")
    assert float(words.split()[0]) == pytest.approx(2.0, rel=0.1)  # half the iterations, but for smoothing
    assert words.split()[1:] == [f"[{words.split()[0]},", f"{words.split()[0]}]"]  # both seeds alike


def test_the_plateau_s_tables_and_page_follow_from_the_stored_numbers(load: object) -> None:
    module, evidence = load("plateau"), load("report").ROOT / "docs" / "evidence"
    results, _, _ = load("report").load_stored(evidence / "plateau_results.json")
    text = (evidence / "plateau_tables.md").read_text()
    assert all(part in text for part in module.tables(results, module.CONFIG, "digits"))
    page = evidence.with_suffix(".md").read_text().split("## Trained on to the plateau")[1].split("## Why")[0]
    numbers = re.findall(r"\b[01]\.\d{3}\b", page)
    assert len(numbers) > 3
    assert all(number in text for number in numbers)
