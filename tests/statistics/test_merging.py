"""A job array: each job saves a file, and the files make one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from scale_runs import DATA, estimate

import analytic_precond as ap


def test_files_of_a_job_array_make_the_statistics_of_all_samples(tmp_path: Path) -> None:
    for job in range(3):
        estimate(DATA, seed=job, intercept=True).save(tmp_path / f"{job}.safetensors")
    merged = ap.merge_statistics([ap.TeacherStatistics.load(path) for path in sorted(tmp_path.glob("*.safetensors"))])
    parts = [estimate(DATA, seed=job, intercept=True) for job in range(3)]
    assert merged.num_samples == 3 * 64
    assert merged.header == replace(parts[0].header, seeds=(0, 1, 2))
    # the mean of jobs of one size, from sums in float64
    l = sum(part.sums.sum(0) for part in parts)
    torch.testing.assert_close(merged.l, l[:, 0] / l[:, 1], rtol=1e-12, atol=0)
    assert merged.mean_data is not None
    means = torch.stack([part.mean_data for part in parts if part.mean_data is not None])
    torch.testing.assert_close(merged.mean_data, means.mean(0), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"precision": "float32"}, r"alike, got precision 'float64' and 'float32'\.$"),
        ({"description": "another"}, r"alike, got description 'a teacher' and 'another'\.$"),
        (
            {"l_method": "exact", "s_method": "jvp"},
            r"alike, got l_method 'stein' and 'exact', s_method 'transport' and 'jvp'\.$",
        ),
    ],
)
def test_what_differs_is_named(change: dict[str, Any], match: str) -> None:
    one, other = estimate(DATA, seed=0), estimate(DATA, seed=1)
    with pytest.raises(ValueError, match=match):
        ap.merge_statistics([one, replace(other, header=replace(other.header, **change))])
