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


def test_what_is_no_list_says_how_to_write_one(tmp_path: Path) -> None:
    one, other, path = estimate(DATA, seed=0), estimate(DATA, seed=1), tmp_path / "one.safetensors"
    one.save(path)
    mixed = [one, str(path)]
    for given, got in (
        (one, "TeacherStatistics"), (None, "NoneType"), ({one}, "set"), (str(path), "str"), (mixed, "list with str")
    ):  # fmt: skip
        with pytest.raises(TypeError, match=rf"list of TeacherStatistics, got {got}: write merge_statistics\(\[a, b"):
            ap.merge_statistics(given)  # type: ignore[arg-type]
    assert ap.merge_statistics([ap.TeacherStatistics.load(path), other]).num_samples == 2 * one.num_samples


class TestSeveralShapes:
    """Aspect-ratio buckets of one teacher: white noise of variance 1 or 4, for which the closed form is known."""

    levels = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)

    def bucket(self, shape: tuple[int, ...], scale: float, seed: int, num: int = 512, **options: Any) -> Any:
        data = scale * torch.randn(num, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

        def teacher(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:  # not linear: there is a remainder
            return x / (1 + ap.expand_to(t, x) ** 2) + 0.1 * torch.sin(x) * scale

        return ap.estimate_statistics(
            teacher, data, self.levels, num_samples=2 * num, seed=seed, progress=False, description="one", **options
        )

    def test_each_sample_counts_the_same(self, tmp_path: Path) -> None:
        small, large = self.bucket((2, 2), 1.0, 0), self.bucket((3, 4), 2.0, 1, num=256)
        merged = ap.merge_statistics([small, large])
        assert merged.header.sample_shape == ()
        assert merged.num_samples == 1536
        # the noise's own square, which l is relative to, scatters by 1 %
        torch.testing.assert_close(merged.l, (2 * small.l + large.l) / 3, rtol=1e-3, atol=1e-3)
        # all samples' means, from each part's own sums: l, and the mean square of D - l x
        means = zip(self.means(small), self.means(large), strict=True)
        trace, norm, EE, Ex, xx = ((2 * a / 4 + b / 12) / 3 for a, b in means)
        torch.testing.assert_close(merged.l, trace / norm, rtol=1e-12, atol=0)
        k = merged.l - torch.where(self.levels < 1, 1.0, 0.0)
        torch.testing.assert_close(merged.g_rms, (EE - 2 * k * Ex + k**2 * xx).sqrt(), rtol=1e-10, atol=0)
        merged.save(tmp_path / "merged.safetensors")
        assert torch.equal(ap.TeacherStatistics.load(tmp_path / "merged.safetensors").s, merged.s)
        ap.AnalyticPreconditioning(merged)

    def means(self, stats: Any) -> Any:
        return (stats.sums.sum(0) / stats.counts.sum())[:, :5].T

    def test_in_any_order_and_grouping(self) -> None:
        parts = [self.bucket((2, 2), 1.0, 0), self.bucket((3, 4), 2.0, 1), self.bucket((2, 2), 1.0, 2)]
        together = ap.merge_statistics(parts)
        in_steps = ap.merge_statistics([parts[2], ap.merge_statistics(parts[:2])])
        for name in ("l", "s", "g_rms"):
            torch.testing.assert_close(getattr(together, name), getattr(in_steps, name), rtol=1e-10, atol=1e-12)

    def test_one_shape_cut_in_two_is_that_of_one(self) -> None:
        """Of white data elements are independent: samples of 4 and of 12 elements have the same l, s and g_rms."""
        small, large = self.bucket((2, 2), 1.0, 0, num=4096), self.bucket((3, 4), 1.0, 1, num=4096)
        merged = ap.merge_statistics([small, large])
        for name in ("l", "s", "g_rms"):
            stderr = getattr(merged, f"{name}_stderr")
            assert bool(((getattr(merged, name) - getattr(large, name)).abs() < 4 * stderr).all())

    def test_not_with_parts_per_element(self) -> None:
        parts = [self.bucket((2, 2), 1.0, 0, intercept=True), self.bucket((3, 4), 1.0, 1, intercept=True)]
        with pytest.raises(ValueError, match=r"share their sample shape, got \(2, 2\) beside others: estimate without"):
            ap.merge_statistics(parts)
