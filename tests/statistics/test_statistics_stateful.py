"""Statistics through any sequence of estimating, saving, loading and merging: no sample is lost or counted twice."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from torch import Tensor

import analytic_precond as ap

LEVELS = torch.tensor([5.0, 2.0, 1.0, 0.5, 0.1], dtype=torch.float64)
DATA = torch.linspace(-1, 1, 60).sin().reshape(20, 3)
PARTS = ("levels", "counts", "sums", "mean_denoised", "mean_data")
VALUES = ("l", "g_rms", "s")
GROUPS = 32  # beyond so many, merging folds them
PAIRS = (2, 5, 8, 40)  # of the runs, by their seed: 1 to 20 groups


class Interruption(Exception):
    """What stops a teacher."""


class Teacher:
    """A teacher that stops after so many calls."""

    def __init__(self, calls: float = math.inf) -> None:
        self.calls = calls

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls -= 1
        if self.calls < 0:
            raise Interruption
        return torch.tanh(x) + 0.1 * x.roll(1, -1) + 0.1


def estimate(seed: int, intercept: bool, teacher: Teacher, resume: Path | None = None) -> ap.TeacherStatistics:
    return ap.estimate_statistics(
        teacher, DATA, LEVELS, 2 * PAIRS[seed % 4], batch_size=8, seed=seed, intercept=intercept, resume=resume,
        progress=False, description="a teacher",
    )  # fmt: skip


@functools.cache
def run(seed: int, intercept: bool) -> ap.TeacherStatistics:
    return estimate(seed, intercept, Teacher())


def tensors(statistics: ap.TeacherStatistics) -> list[Tensor]:
    return [part for name in PARTS if (part := getattr(statistics, name)) is not None]


def fingerprint(statistics: ap.TeacherStatistics) -> str:
    """What must never change."""
    digest = hashlib.sha256(repr(statistics.header).encode())
    for part in tensors(statistics):
        digest.update(part.numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def pooled(seeds: frozenset[int], intercept: bool) -> ap.TeacherStatistics:
    """All groups of all runs side by side, none folded into another."""
    runs = [run(seed, intercept) for seed in sorted(seeds)]
    counts, sums = (torch.cat([getattr(r, name) for r in runs]) for name in ("counts", "sums"))
    means: list[Tensor | None] = [None, None]
    if intercept:
        total = sum(r.counts.sum() for r in runs)
        means = [sum(r.counts.sum() / total * getattr(r, name) for r in runs) for name in PARTS[3:]]  # type: ignore[misc]
    return ap.TeacherStatistics(LEVELS, counts, sums, replace(runs[0].header, seeds=tuple(sorted(seeds))), *means)


class Statistics(RuleBasedStateMachine):
    """The model of statistics is the set of the runs in them; that of a file, whose it is."""

    made = Bundle("made")
    files = Bundle("files")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.prints: dict[int, tuple[ap.TeacherStatistics, str]] = {}
        self.runs: dict[int, frozenset[int]] = {}
        self.saved: dict[Path, ap.TeacherStatistics] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    @initialize(intercept=st.booleans())
    def begin(self, intercept: bool) -> None:
        self.intercept = intercept

    def keep(self, statistics: ap.TeacherStatistics, runs: frozenset[int]) -> ap.TeacherStatistics:
        self.prints[id(statistics)] = statistics, fingerprint(statistics)
        self.runs[id(statistics)] = runs
        return statistics

    @rule(target=made, seed=st.integers(0, 7))
    def estimate(self, seed: int) -> ap.TeacherStatistics:
        return self.keep(run(seed, self.intercept), frozenset({seed}))

    @rule(target=made, seed=st.integers(0, 7), stops=st.lists(st.integers(0, 30), min_size=1, max_size=3))
    def interrupt_and_resume(self, seed: int, stops: list[int]) -> ap.TeacherStatistics:
        path = self.folder / "checkpoint"
        for calls in stops:
            with contextlib.suppress(Interruption):
                estimate(seed, self.intercept, Teacher(calls), path)
        statistics = estimate(seed, self.intercept, Teacher(), path)
        path.unlink(missing_ok=True)
        assert fingerprint(statistics) == fingerprint(run(seed, self.intercept))
        return self.keep(statistics, frozenset({seed}))

    @rule(target=files, statistics=made, number=st.integers(0, 3))
    def save(self, statistics: ap.TeacherStatistics, number: int) -> Path:
        path = self.folder / f"{number}.safetensors"
        statistics.save(path)  # over another's file, perhaps
        self.saved[path] = statistics
        return path

    @rule(target=made, path=files)
    def load(self, path: Path) -> ap.TeacherStatistics:
        loaded = ap.TeacherStatistics.load(path)
        assert fingerprint(loaded) == fingerprint(self.saved[path])
        for name in (*VALUES, "l_stderr", "g_rms_stderr", "s_stderr"):
            assert torch.equal(getattr(loaded, name), getattr(self.saved[path], name)), name
        return self.keep(loaded, self.runs[id(self.saved[path])])

    @rule(target=made, parts=st.lists(made, min_size=1, max_size=4))
    def merge(self, parts: list[ap.TeacherStatistics]) -> object:
        of_parts = [self.runs[id(part)] for part in parts]
        union = frozenset().union(*of_parts)
        if len(union) < sum(map(len, of_parts)):
            with pytest.raises(ValueError, match="runs with different seeds"):
                ap.merge_statistics(parts)
            return multiple()
        merged = ap.merge_statistics(parts)
        assert sorted(merged.header.seeds) == sorted(union)
        assert merged.num_samples == sum(2 * PAIRS[seed % 4] for seed in union)

        expected = pooled(union, self.intercept)
        for name in VALUES:  # sums of the same numbers in another order; differences of them lose digits
            np.testing.assert_allclose(getattr(merged, name), getattr(expected, name), rtol=1e-9, atol=1e-12)
        if self.intercept:
            np.testing.assert_allclose(merged.intercept, expected.intercept, rtol=1e-9, atol=1e-12)
        if len(expected.counts) <= GROUPS:  # then none were folded, and the spread between them is the same
            for name in VALUES:
                error = f"{name}_stderr"
                np.testing.assert_allclose(getattr(merged, error), getattr(expected, error), rtol=1e-6, atol=1e-12)
        assert len(merged.counts) == min(GROUPS, len(expected.counts))
        return self.keep(merged, union)

    @rule(path=consumes(files), statistics=made)
    def a_refused_save_leaves_the_file(self, path: Path, statistics: ap.TeacherStatistics) -> None:
        before = path.read_bytes()
        with pytest.raises(ValueError, match="for its header"):
            replace(statistics, header=replace(statistics.header, description="x" * 2**22)).save(path)
        assert path.read_bytes() == before

    @invariant()
    def nothing_was_changed(self) -> None:
        for statistics, before in self.prints.values():
            assert fingerprint(statistics) == before

    @invariant()
    def no_other_files_are_left(self) -> None:
        assert {*self.folder.iterdir()} == {*self.saved}


TestStatistics = Statistics.TestCase
TestStatistics.settings = settings(max_examples=15, stateful_step_count=25)


def test_runs_of_other_kinds_do_not_mix() -> None:
    with pytest.raises(ValueError, match="agree on the intercept"):
        ap.merge_statistics([run(0, True), run(1, False)])
