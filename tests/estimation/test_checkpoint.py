"""Interruptions: an estimate goes on where it was left, and ends with the same bits."""

from __future__ import annotations

import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from scale_runs import DATA, LEVELS, SOURCES, Failing, Flipped, all_sources, estimate, killed_run, same_bits
from torch import Tensor

import analytic_precond as ap

CALLS = 6  # of a batch: each sample's pair at each of three levels


def interrupted(path: Path, at: int = 5 * CALLS + 3, data: object = DATA, **options: Any) -> None:
    """Leave a checkpoint behind: by default of five batches."""
    with pytest.raises(ValueError, match="tired"):
        estimate(data, Failing(at), **{"resume": path, **options})


def num_kept(path: Path) -> int:
    return int(safetensors.torch.load(path.read_bytes())["counts"].sum())


@pytest.mark.long
def test_a_process_killed_many_times_ends_with_the_same_file(tmp_path: Path) -> None:
    estimate(DATA, intercept=True, num_samples=320).save(tmp_path / "alone")
    alone = (tmp_path / "alone").read_bytes()
    checkpoint, result = tmp_path / "kept", tmp_path / "result"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "analytic_precond"])  # children are forked from there, and start at once
    rng = random.Random(0)

    def live(calls_until_death: float) -> bool:
        """Run until that call and a little longer; return whether the process was killed."""
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=killed_run, args=(checkpoint, result, writer))
        process.start()
        writer.close()
        try:
            while calls_until_death > 0:
                reader.recv_bytes()
                calls_until_death -= 1
            time.sleep(rng.uniform(0, 0.01))  # into a call, a sum, a write
            process.kill()
        except EOFError:  # it has finished
            pass
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return process.exitcode != 0

    kills, kept = 0, [0]
    while kills < 25:
        if live(rng.randint(1, 4 * CALLS)):
            kills += 1
            kept.append(num_kept(checkpoint) if checkpoint.exists() else 0)
            assert kept[-1] >= kept[-2]
        else:
            assert result.read_bytes() == alone
            checkpoint.unlink()
            kept.append(0)
    assert not live(float("inf"))
    assert result.read_bytes() == alone
    assert len(set(kept)) > 10  # most lives got somewhere
    assert not list(tmp_path.glob(".*"))  # nor is anything left of writes that were cut short


@pytest.mark.parametrize("name", sorted(SOURCES.keys() - {"one pair", "three groups"}))
def test_any_source_is_resumed(name: str, tmp_path: Path) -> None:
    make, options = SOURCES[name]
    path = tmp_path / "kept"
    calls = Failing()
    estimate(make(), calls, **options)
    for part in (4, 2, 2, 2, 2):
        try:
            estimate(make(), Failing(calls.calls // part), **options, resume=path)
        except ValueError as error:
            assert "tired" in str(error)  # noqa: PT017 - the last ones may come to the end
    assert same_bits(estimate(make(), **options, resume=path), all_sources()[name])


def test_a_finished_estimate_is_not_made_again(tmp_path: Path) -> None:
    statistics = estimate(DATA, resume=tmp_path / "kept")
    teacher, data = Failing(), Flipped()
    assert same_bits(estimate(DATA, teacher, resume=tmp_path / "kept"), statistics)
    assert teacher.calls == 0
    estimate(data, condition=lambda y: {}, resume=tmp_path / "other")
    asked = len(data.asked)
    estimate(data, condition=lambda y: {}, resume=tmp_path / "other")
    assert len(data.asked) == asked


def test_checkpoints_are_as_frequent_as_asked_for(tmp_path: Path) -> None:
    interrupted(tmp_path / "kept", checkpoint_every=2)
    assert num_kept(tmp_path / "kept") == 4 * 2
    teacher = Failing()
    assert same_bits(estimate(DATA, teacher, resume=tmp_path / "kept"), estimate(DATA))
    assert teacher.calls == (16 - 4) * CALLS


def test_data_that_run_out_are_resumed(tmp_path: Path) -> None:
    def data() -> Iterator[Tensor]:
        yield from DATA[:21].split(2)

    with pytest.warns(UserWarning, match="ran out after 21 of 32"):
        alone = estimate(data(), intercept=True)
    interrupted(tmp_path / "kept", data=data(), intercept=True)
    for _ in range(2):  # the second time nothing is left to measure
        with pytest.warns(UserWarning, match="ran out after 21 of 32"):
            assert same_bits(estimate(data(), intercept=True, resume=tmp_path / "kept"), alone)


def test_control_c_says_how_to_go_on(tmp_path: Path) -> None:
    calls = 0

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 4 * CALLS + 2:
            signal.raise_signal(signal.SIGINT)
        return Failing()(x, t)

    path = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt, match=r"8 of 32 clean samples .*kept: call estimate_statistics"):
        estimate(DATA, teacher, resume=path)
    assert num_kept(path) == 8
    assert same_bits(estimate(DATA, resume=path), estimate(DATA))


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "levels": ({"levels": LEVELS[:2]}, r"levels \[2.0, 0.5, 0.05\], not \[2.0, 0.5\]"),
    "num_samples": ({"num_samples": 66}, "num_samples 64, not 66"),
    "methods": ({"s_method": "jvp"}, "s_method 'transport', not 'jvp'"),
    "seed": ({"seed": 1, "l_method": "exact"}, "l_method 'stein', not 'exact', seed 0, not 1"),
    "intercept": ({"intercept": True}, "intercept False, not True"),
    "condition": ({"condition": lambda: {}}, "condition False, not True"),
    "data": ({"data": DATA[:99]}, r"data 'torch.float64 of shape \(100, 3\).*shape \(99, 3\)"),
    "values": ({"data": DATA + 1}, r"data 'torch.float64 of shape \(100, 3\)"),
    "source": ({"data": list(DATA.split(2))}, r"data 'torch.float64 .*, not 'list'"),
}


@pytest.mark.parametrize(("options", "match"), OTHERS.values(), ids=OTHERS.keys())
def test_the_checkpoint_of_another_request_is_refused(options: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = tmp_path / "kept"
    interrupted(path)
    before = path.read_bytes()
    teacher = Failing()
    with pytest.raises(ValueError, match="resume must name a checkpoint of this request, got .* with " + match):
        estimate(options.pop("data", DATA), teacher, **options, resume=path)
    assert teacher.calls == 0
    assert path.read_bytes() == before


def test_other_samples_are_refused(tmp_path: Path) -> None:
    interrupted(tmp_path / "kept", data=list(DATA.split(4)))
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) in process 0 after \(3,\)"):
        estimate(list(DATA[:, :2].split(4)), resume=tmp_path / "kept")
    with pytest.raises(ValueError, match=r"one dtype, got float32 in process 0 after float64"):
        estimate(list(DATA.float().split(4)), resume=tmp_path / "kept")


def test_another_batch_size_is_told_and_changes_rounding_only(tmp_path: Path) -> None:
    interrupted(tmp_path / "kept", intercept=True)
    with pytest.warns(UserWarning, match=r"made with batch_size=2, not 5.*up to rounding only") as record:
        resumed = estimate(DATA, batch_size=5, intercept=True, resume=tmp_path / "kept")
    assert [warning.filename for warning in record] == [estimate.__code__.co_filename]  # it points at the caller
    alone = estimate(DATA, intercept=True)
    # sums of the same numbers in another order
    torch.testing.assert_close(resumed.sums, alone.sums, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(resumed.mean_denoised, alone.mean_denoised, rtol=1e-12, atol=1e-12)


def as_statistics(path: Path) -> None:
    estimate(DATA).save(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def without_counts(path: Path) -> None:
    edit(path, lambda tensors: tensors.pop("counts"))


def too_many(path: Path) -> None:
    edit(path, lambda tensors: tensors["counts"].fill_(3))


def not_finite(path: Path) -> None:
    edit(path, lambda tensors: tensors["values"].fill_(float("nan")))


def other_progress(path: Path) -> None:
    edit(path, lambda tensors: tensors["counts"].fill_(2))


def edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    with safetensors.safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("damage", [as_statistics, cut, without_counts, too_many, not_finite, other_progress])
def test_anything_else_is_refused_and_left_as_it_is(damage: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "kept"
    interrupted(path, intercept=True)
    damage(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="resume must name a checkpoint or a file yet to come"):
        estimate(DATA, intercept=True, resume=path)
    assert path.read_bytes() == before


@contextmanager
def free_bytes(num: int) -> Iterator[None]:
    """Let the disk have so much space left, as far as the system says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(total=2**40, used=2**40 - num, free=num))
        yield


@pytest.mark.parametrize("begun", [False, True])
def test_a_full_disk_is_told_before_the_teacher_is_asked(begun: bool, tmp_path: Path) -> None:
    path, teacher = tmp_path / "kept", Failing()
    if begun:
        interrupted(path, intercept=True)
    before = path.read_bytes() if begun else b""
    with free_bytes(2000), pytest.raises(OSError, match=r"cannot be written beside it \(No space left on device\)"):
        estimate(DATA, teacher, intercept=True, resume=path)
    assert teacher.calls == 0
    assert (path.read_bytes() if path.exists() else b"") == before
    assert not list(tmp_path.glob(".*"))


def test_the_space_made_sure_of_is_enough_and_not_much_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []  # the file that is there, and the one beside it that replaces it
    replace = os.replace

    def watch(source: Path, target: Path) -> None:
        peaks.append(source.stat().st_size + (target.stat().st_size if target.exists() else 0))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    data = DATA.repeat(1, 300)
    # of batches of one sample every other leaves a group open
    options: dict[str, Any] = {"intercept": True, "batch_size": 1}
    estimate(data, resume=tmp_path / "kept", **options)
    assert len(peaks) == 32
    teacher = Failing()
    with free_bytes(max(peaks) - 1), pytest.raises(OSError, match="cannot be written beside it"):
        estimate(data, teacher, resume=tmp_path / "new", **options)
    assert teacher.calls == 0
    one_open_group = 3 * 2 * 900 * 8  # of three levels, by E and x: not in both of the files at once
    with free_bytes(max(peaks) + one_open_group + 2 * 2**16):  # for headers of any length
        estimate(data, resume=tmp_path / "new", **options)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    path, before = tmp_path / "kept", resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = 0

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3 * CALLS + 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        return Failing()(x, t)

    try:
        with pytest.raises(
            OSError, match=r"cannot be written \(File too large\). It still holds 6 clean samples; free"
        ):
            estimate(DATA, teacher, resume=path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert num_kept(path) == 6
    assert not list(tmp_path.glob(".*"))
    assert same_bits(estimate(DATA, resume=path), estimate(DATA))


def test_a_folder_that_cannot_be_written_is_told_before_the_teacher_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    teacher = Failing()
    for path, error, match in (
        (tmp_path / "file" / "kept", FileNotFoundError, "a file in an existing folder, got .*file: create it first"),
        (tmp_path / "missing" / "kept", FileNotFoundError, "a file in an existing folder, got .*missing"),
        (tmp_path / "folder", ValueError, "got .*folder, which is not one"),
        (Path("/proc/kept"), OSError, "/proc/kept: .* bytes cannot be written beside it"),  # not even root can
        (3, TypeError, "resume must be the path of a file, got 3"),
    ):
        with pytest.raises(error, match=match):
            estimate(DATA, teacher, resume=path)
    with pytest.raises(ValueError, match=r"checkpoint_every must be at least 1, got 0\. It counts batches"):
        estimate(DATA, teacher, resume=tmp_path / "kept", checkpoint_every=0)
    assert teacher.calls == 0
    assert not (tmp_path / "kept").exists()


def test_what_killed_writes_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".kept.123.tmp").touch()
    (tmp_path / ".other.123.tmp").touch()
    estimate(DATA, resume=tmp_path / "kept")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.123.tmp", "kept"]


def test_another_teachers_weights_are_noticed(tmp_path: Path) -> None:
    """The same class, the same shapes: what a retrained network looks like."""
    teachers = [ap.GaussianDenoiser(torch.tensor([1.0, variance, 0.1])) for variance in (0.5, 0.6)]
    options = {"levels": LEVELS, "num_samples": 16, "progress": False, "resume": tmp_path / "state"}
    data = DATA[:, :3].float()
    ap.estimate_statistics(teachers[0], data, **options)
    with pytest.raises(ValueError, match="weights"):
        ap.estimate_statistics(teachers[1], data, **options)
    changed = data.clone()
    changed[90] += 1
    with pytest.raises(ValueError, match="with values"):
        ap.estimate_statistics(teachers[0], changed, **options)
