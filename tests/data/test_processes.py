"""Several processes: the numbers of one, whatever their number; and all stop where one fails."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import warnings
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import pytest
import scale_runs
import torch
import torch.distributed as dist
from scale_runs import (
    DATA,
    SOURCES,
    Failing,
    Flipped,
    all_sources,
    estimate,
    in_processes,
    outcome,
    rational_teacher,
    same_bits,
)
from torch import Tensor


def shard(rank: int, size: int) -> list[Tensor]:
    """A process's own data: 7 samples for the first, 14 for the second, ... each around a number of its own."""
    return list((rank + DATA[: 7 * (rank + 1)]).split(2))


def good_runs(rank: int, size: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = all_sources()
    data = Flipped()
    results["of a Dataset"] = estimate(data), data.asked
    results["of shards"] = estimate(shard(rank, size), intercept=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results["of a shard that is empty"] = estimate(shard(rank, size) if rank else [])
    with contextlib.redirect_stderr(io.StringIO()) as bar:
        estimate(DATA, progress=True)
    results["bar"] = bar.getvalue()
    results["warnings"] = [str(warning.message) for warning in caught]
    return results


UNSHARED = """
import torch, warnings, analytic_precond as ap
levels, settings = ap.log_noise_levels(2, 1.0, 2.0), {"num_samples": 4, "progress": False}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ap.estimate_statistics(ap.GaussianDenoiser(0.25), torch.ones(4, 1), levels, **settings)
    torch.distributed.init_process_group("gloo")  # the advice
    ap.estimate_statistics(ap.GaussianDenoiser(0.25), torch.ones(4, 1), levels, **settings)
torch.distributed.destroy_process_group()
print([str(warning.message)[:68] for warning in caught])
"""


@pytest.mark.long
def test_processes_that_share_nothing_are_told(tmp_path: Path) -> None:
    script = tmp_path / "estimate.py"
    script.write_text(UNSHARED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    output = subprocess.run(
        command, capture_output=True, text=True, timeout=100, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    said = "['this is one of 2 processes, but torch.distributed is not initialised']"
    assert output.stdout.splitlines() == [said, said], output.stderr


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.long)])
def test_several_processes_give_the_numbers_of_one(size: int, tmp_path: Path) -> None:
    every = in_processes(size, tmp_path, good_runs)
    for name, alone in all_sources().items():
        for rank in range(size):
            assert same_bits(every[rank][name], alone), (name, rank)

    # each loads its share of the samples, and no other
    asked = [result["of a Dataset"][1] for result in every]
    indices = list(chain(*asked))
    assert len(indices) == len(set(indices)) == 32
    assert max(map(len, asked)) - min(map(len, asked)) <= 2  # a group

    # shards count one after the other, each as often as its share of the 16 groups asks for
    shares = [2 * ((rank + 1) * 16 // size - rank * 16 // size) for rank in range(size)]
    rows = [row for rank in range(size) for row in islice(cycle(torch.cat(shard(rank, size)).split(1)), shares[rank])]
    alone = estimate(rows, intercept=True)
    for result in every:
        assert same_bits(result["of shards"], every[0]["of shards"])
        # sums of the same numbers, in batches that the ends of shards cut otherwise
        torch.testing.assert_close(result["of shards"].sums, alone.sums, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(result["of shards"].mean_denoised, alone.mean_denoised, rtol=1e-12, atol=1e-12)

        # a process without data leaves its groups out
        assert result["of a shard that is empty"].num_samples == 2 * (32 - shares[0])
    assert [len(result["warnings"]) for result in every] == [1] + [0] * (size - 1)
    assert ["statistics of a teacher: 100%" in result["bar"] for result in every] == [True] + [False] * (size - 1)
    assert every[1]["bar"] == ""
    assert every[0]["warnings"][0].startswith(f"data ran out after 0 of {shares[0]} clean samples")


class Unreadable(Flipped):
    """A data set that the second process cannot read to the end."""

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if len(self.asked) == 9 and dist.get_rank() == 1:
            raise FileNotFoundError("no such image")
        return super().__getitem__(index)


def failing_runs(rank: int, size: int, folder: Path) -> dict[str, Any]:
    second = rank == 1
    teacher = Failing(20 if second else None)
    (folder / "file").touch()
    runs = {
        "teacher": lambda: estimate(DATA, teacher),
        "argument": lambda: estimate(DATA, num_samples=0 if second else 64),
        "no teacher": lambda: estimate(DATA, None if second else rational_teacher),  # type: ignore[arg-type]
        "seed": lambda: estimate(DATA, seed=rank),
        "data": lambda: estimate(DATA[: 50 + rank]),
        "loading": lambda: estimate(Unreadable()),
        "shapes": lambda: estimate([DATA[:, : 2 + rank]]),
        "resume on one": lambda: estimate(DATA, resume=folder / "x" if second else None),
        "folder": lambda: estimate(DATA, resume=folder / "file" / "x"),
        "interruption": lambda: estimate(DATA, Failing(30 if second else None, KeyboardInterrupt)),
    }
    results = {name: outcome(run) for name, run in runs.items()}
    return {**results, "calls": teacher.calls, "after all": estimate(DATA)}


@pytest.mark.long
def test_all_processes_stop_with_the_error_of_one(tmp_path: Path) -> None:
    first, second = in_processes(2, tmp_path, failing_runs)
    for name, error in {
        "teacher": "ValueError: a tired teacher",
        "argument": "ValueError: num_samples must be at least 2, got 0",
        "no teacher": "TypeError: denoiser must be callable",
        "loading": "FileNotFoundError: no such image",
    }.items():
        assert second[name].startswith(error)
        assert first[name].startswith(f"RuntimeError: process 1 of 2 stopped with {error}")
    # the other process hears of it after the same batch, of six calls at three levels
    assert second["calls"] == 20
    assert first["calls"] == 24

    differences = {
        "seed": "seed 0 and 1",
        "data": r"data 'torch.float64 of shape (50, 3) with values ",
        "resume on one": "checkpoint_every 0 and 1",
    }
    for name, difference in differences.items():
        for result in (first, second):
            assert result[name].startswith(
                f"ValueError: all processes must ask for the same, got in processes 0 and 1 {difference}"
            )
    for result in (first, second):
        assert "data must hold samples of one shape, got (3,) in process 1 after (2,)" in result["shapes"]

    assert first["folder"].startswith("FileNotFoundError: resume must name a file in an existing folder")
    assert second["folder"].startswith("RuntimeError: process 0 of 2 stopped with FileNotFoundError: resume must")
    assert second["interruption"] == "KeyboardInterrupt: a tired teacher"
    assert first["interruption"].startswith("RuntimeError: process 0 of 2 has lost another process")

    for result in (first, second):
        assert same_bits(result["after all"], estimate(DATA))


def killed_run(rank: int, size: int, folder: Path) -> Any:
    def teacher(x: Tensor, t: Tensor) -> Tensor:
        if rank == 1 and t[0] < 0.1:
            os.kill(os.getpid(), signal.SIGKILL)
        return rational_teacher(x, t)

    return outcome(lambda: estimate(DATA, teacher))


@pytest.mark.long
def test_the_others_outlive_a_killed_process(tmp_path: Path) -> None:
    first, second, third = in_processes(3, tmp_path, killed_run)
    assert second is None
    for rank, result in ((0, first), (2, third)):
        assert result.startswith(f"RuntimeError: process {rank} of 3 has lost another process")


RESUMED = ("intercept", "shuffling DataLoader twice over")


def resumed_runs(rank: int, size: int, folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name in RESUMED:
        make, options = SOURCES[name]
        path = folder / name
        outcome(lambda: estimate(make(), Failing(20 if rank == 1 else None), **options, resume=path))  # noqa: B023
        if rank == 0:
            (folder / f"{name}, interrupted").write_bytes(path.read_bytes())
        results[name] = estimate(make(), **options, resume=path)
    own = folder / "own"
    outcome(lambda: estimate(shard(rank, size), Failing(20 if rank == 1 else None), intercept=True, resume=own))
    results["of shards, interrupted"] = estimate(shard(rank, size), intercept=True, resume=own)
    results["of shards"] = estimate(shard(rank, size), intercept=True)
    return results


@pytest.mark.long
def test_several_processes_resume(tmp_path: Path) -> None:
    every = in_processes(2, tmp_path, resumed_runs)
    for result in every:
        for name in RESUMED:
            assert same_bits(result[name], all_sources()[name])
        assert same_bits(result["of shards, interrupted"], result["of shards"])

    # one process goes on where two were interrupted, with the batches that they left
    for name in RESUMED:
        make, options = SOURCES[name]
        teacher = Failing()
        resumed = estimate(make(), teacher, **options, resume=tmp_path / f"{name}, interrupted")
        assert same_bits(resumed, all_sources()[name])
        assert teacher.calls == (16 - 2 * 3) * 6
    # but not with shards that it does not have
    with pytest.raises(ValueError, match=r"a checkpoint of this request, got .*own with .*shards 2, not 1"):
        estimate(shard(0, 2), intercept=True, resume=tmp_path / "own")


@pytest.mark.long
def test_torchrun(tmp_path: Path) -> None:
    script = str(Path(scale_runs.__file__))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, script, str(tmp_path)], check=True, timeout=300, env=environment, capture_output=True)
    estimate(DATA, intercept=True).save(tmp_path / "alone.safetensors")
    alone = (tmp_path / "alone.safetensors").read_bytes()
    assert (tmp_path / "0.safetensors").read_bytes() == alone
    assert (tmp_path / "1.safetensors").read_bytes() == alone


def test_a_group_of_one_process_is_like_none(process_group: None) -> None:
    assert same_bits(estimate(DATA), estimate(DATA))
