"""Statistics of single elements and channels against closed forms, and through files, interruptions and processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from problems import gaussian_problem, mixture_problem
from safetensors import safe_open
from scale_runs import DATA, LEVELS, Failing, estimate, in_processes, rational_teacher, same_bits
from torch import Tensor

import analytic_precond as ap
from analytic_precond.statistics.element_statistics import ElementStatistics

PROBLEM = gaussian_problem()
COARSE = ap.log_noise_levels(24)


def of_elements(denoiser: ap.Denoiser, data: Tensor, levels: Tensor = COARSE, **options: Any) -> ap.TeacherStatistics:
    options = {"num_samples": 2 * len(data), "progress": False, "per_element": True, **options}
    return ap.estimate_statistics(denoiser, data, levels, **options)


def elements_of(stats: ap.TeacherStatistics) -> ElementStatistics:
    assert stats.elements is not None
    return stats.elements


@pytest.mark.parametrize("s_method", ["transport", "jvp"])
def test_a_linear_element_is_exact(s_method: str) -> None:
    # D = mean + w (x - mean): one sample's half-differences give w, and nothing is left once the mean is taken out
    problem = gaussian_problem(mean=0.25)
    elements = elements_of(of_elements(problem.denoiser, problem.sample(20, 0), intercept=True, s_method=s_method))
    c = PROBLEM.variances
    w = c / (c + COARSE[:, None] ** 2)
    torch.testing.assert_close(elements.l, w, rtol=0, atol=1e-11)  # rounding of x, 1e-16, over t = 0.002
    assert elements.g_rms.eq(0).all()
    assert elements.s.eq(0).all()
    assert elements.intercept is not None
    torch.testing.assert_close(elements.intercept, 0.25 * (1 - w), rtol=0, atol=1e-11)
    assert elements.reduce("channel") is elements  # one dimension: each element is a channel


@pytest.mark.parametrize(
    ("s_method", "intercept"), [("transport", False), ("finite-difference", False), ("transport", True)]
)
def test_elements_of_a_mixture_have_its_coefficients(s_method: str, intercept: bool) -> None:
    mixture = mixture_problem()
    parts = mixture.denoiser, ap.GaussianDenoiser(0.5)

    def denoiser(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat([part(x[:, i : i + 1], t) for i, part in enumerate(parts)], 1)

    data = torch.cat([mixture.sample(4096, 1), mixture.sample(4096, 2)], 1)
    levels = ap.log_noise_levels(48, 0.02, 20.0)
    elements = elements_of(of_elements(denoiser, data, levels, s_method=s_method, intercept=intercept))
    for k in range(4, 44, 4):
        t = levels[k].item()
        l, g_rms, s = (v.item() for v in (mixture.l(t), mixture.g_rms(t, intercept), mixture.s(t, intercept)))
        # 4096 pairs; up to twice the largest error seen with five seeds
        assert elements.l[k, 0].item() == pytest.approx(l, abs=0.02)
        assert elements.g_rms[k, 0].item() == pytest.approx(g_rms, rel=0.06)
        assert elements.s[k, 0].item() == pytest.approx(s, abs=0.15)


@pytest.mark.parametrize("options", [{}, {"s_method": "jvp"}, {"s_method": "finite-difference", "intercept": True}])
def test_the_mean_over_a_sample_is_the_whole_samples(options: dict[str, Any]) -> None:
    problem = gaussian_problem(mean=0.3)
    stats = of_elements(problem.denoiser, problem.sample(512, 0), **options)
    pooled = elements_of(stats).reduce("sample")
    assert pooled.shape == (1,)
    torch.testing.assert_close(pooled.l[:, 0], stats.l, rtol=1e-9, atol=1e-12)
    for own, whole, error in ((pooled.g_rms, stats.g_rms, stats.g_rms_stderr), (pooled.s, stats.s, stats.s_stderr)):
        # other sums of the same products; with an intercept products of means come from all pairs of units, not from
        # those within groups: another estimate, as good
        close = error if "intercept" in options else 1e-8 * (1 + whole.abs())
        assert ((own[:, 0] - whole).abs() <= close).all()
    if stats.intercept is not None:
        assert pooled.intercept is not None
        torch.testing.assert_close(pooled.intercept, stats.intercept, rtol=1e-9, atol=1e-12)


def test_channels_have_coefficients_of_their_own() -> None:
    channels = gaussian_problem((4.0, 1.0, 0.25)), gaussian_problem((0.05, 0.01, 0.001))
    variances = torch.stack([c.variances for c in channels])[:, None]  # (2, 1, 3)
    data = variances.sqrt() * torch.randn(4096, 2, 1, 3, generator=torch.Generator().manual_seed(0)).double()
    pooled = elements_of(of_elements(ap.GaussianDenoiser(variances), data)).reduce("channel")
    assert pooled.shape == (2, 1, 1)
    for i, channel in enumerate(channels):
        expected = (channel.l(COARSE), channel.g_rms(COARSE))
        # 4096 pairs of 3 elements: the norm of the noise varies by 1 / sqrt(3 * 4096) = 1 %
        torch.testing.assert_close(pooled.l[:, i, 0, 0], expected[0], rtol=0.03, atol=0)
        torch.testing.assert_close(pooled.g_rms[:, i, 0, 0], expected[1], rtol=0.05, atol=0)
    with pytest.raises(ValueError, match="per must be one of 'channel', 'sample'"):
        pooled.reduce("pixel")


def test_the_noise_of_an_elements_l() -> None:
    d, pairs, t = 16, 256, 0.7
    root = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    covariance = root @ root.T / d
    J = torch.linalg.solve(covariance + t**2 * torch.eye(d, dtype=torch.float64), covariance)
    data = torch.randn(pairs, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64) @ root.T / d**0.5
    others = (J**2).sum(1) - J.diagonal() ** 2
    scores = []
    for seed in range(8):
        stats = of_elements(lambda x, t: x @ J, data, torch.tensor([0.7, 0.6]), seed=seed)
        scores.append((elements_of(stats).l[0] - J.diagonal()) / (others / pairs).sqrt())
    # 128 of them: their RMS is within 20 % of 1 but for one case in a thousand
    assert torch.cat(scores).square().mean().sqrt().item() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("options", [{}, {"intercept": True, "s_method": "finite-difference"}])
def test_the_rest_is_as_without(options: dict[str, Any], tmp_path: Path) -> None:
    without, with_elements = estimate(DATA, **options), estimate(DATA, per_element=True, **options)
    assert without.elements is None
    for name in ("sums", "l", "s", "g_rms", "l_stderr", "s_stderr", "g_rms_stderr"):
        assert torch.equal(getattr(without, name), getattr(with_elements, name)), name

    with_elements.save(tmp_path / "file")
    loaded = ap.TeacherStatistics.load(tmp_path / "file")
    assert same_bits(loaded, with_elements)
    assert torch.equal(elements_of(loaded).s, elements_of(with_elements).s)

    other_batches = elements_of(estimate(DATA, per_element=True, batch_size=7, **options))
    torch.testing.assert_close(other_batches.l, elements_of(with_elements).l, rtol=1e-11, atol=0)  # rounding


def test_merging_weighs_runs_by_their_samples() -> None:
    runs = [estimate(DATA, per_element=True, seed=seed, num_samples=n) for seed, n in ((0, 64), (1, 32))]
    merged = ap.merge_statistics(runs)
    first, second = (run.element_means for run in runs)
    assert first is not None
    assert second is not None
    assert merged.element_means is not None
    torch.testing.assert_close(merged.element_means, (2 * first + second) / 3, rtol=1e-14, atol=0)
    assert elements_of(merged).num_units == 48
    with pytest.raises(ValueError, match="agree on per_element"):
        ap.merge_statistics([runs[0], estimate(DATA, seed=1)])


@pytest.mark.parametrize("options", [{}, {"intercept": True, "s_method": "finite-difference"}])
def test_an_interruption_changes_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = tmp_path / "kept"
    with pytest.raises(ValueError, match="tired"):
        estimate(DATA, Failing(40), per_element=True, resume=checkpoint, **options)
    assert checkpoint.exists()
    resumed = estimate(DATA, per_element=True, resume=checkpoint, **options)
    assert same_bits(resumed, estimate(DATA, per_element=True, **options))
    with pytest.raises(ValueError, match="per_element True, not False"):
        estimate(DATA, resume=checkpoint, **options)


def _estimate_a_share(rank: int, size: int, folder: Path) -> tuple[Tensor, Tensor]:
    stats = estimate(DATA, per_element=True, intercept=True, resume=folder / "kept")
    assert stats.element_means is not None
    return stats.element_means, stats.sums


@pytest.mark.long
def test_processes_share_the_work(tmp_path: Path) -> None:
    alone = estimate(DATA, per_element=True, intercept=True)
    results = in_processes(2, tmp_path, _estimate_a_share)
    for means, sums in results:
        assert torch.equal(sums, alone.sums)
        torch.testing.assert_close(means, alone.element_means, rtol=1e-13, atol=1e-15)  # another order of addition
    kept = safetensors.torch.load((tmp_path / "kept").read_bytes())
    assert kept["elements"].shape == (len(LEVELS), 8, 3)


def test_memory_is_what_the_documentation_says(tmp_path: Path) -> None:
    stats = estimate(DATA.reshape(25, 3, 2, 2), rational_teacher, per_element=True)
    assert stats.element_means is not None
    assert stats.element_means.nbytes == 64 * 12 * len(LEVELS)


def test_damage_is_refused(tmp_path: Path) -> None:
    estimate(DATA, per_element=True).save(tmp_path / "file")
    tensors = safetensors.torch.load((tmp_path / "file").read_bytes())
    with safe_open(tmp_path / "file", framework="pt") as file:
        metadata = file.metadata()

    def refused(part: Tensor, message: str) -> None:
        (tmp_path / "bad").write_bytes(safetensors.torch.save(tensors | {"element_means": part}, metadata=metadata))
        with pytest.raises(ValueError, match=message):
            ap.TeacherStatistics.load(tmp_path / "bad")

    good = tensors["element_means"]
    refused(good[:-1].clone(), "element_means must be float64 of shape")
    refused(good.float(), "element_means must be float64 of shape")
    refused(-good, "means of squares")
    refused(torch.full_like(good, 1e200), r"must be below 1e\+100, got up to 1e\+200: the teacher's values are too")
    refused(torch.full_like(good, np.nan), "finite")
    tiny = good.clone()
    tiny[2] = 1e-300
    refused(tiny, "parts that do not fit")
