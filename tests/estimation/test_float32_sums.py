"""Statistics of float32 teachers: what is summed in float32 loses nothing, against their outputs in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from full_size import FullSize
from numpy.typing import NDArray
from scipy.interpolate import make_interp_spline
from torch import Tensor

import analytic_precond as ap
from analytic_precond.data.sources import pair_noise

Array = NDArray[np.float64]
LEVELS = ap.log_noise_levels(20)
PAIRS = 512
_K = torch.arange(1.0, 65.0)
SPECTRA = {
    "six": torch.tensor([4.0, 1.0, 0.25, 0.05, 0.01, 0.001]),
    "images": 0.25 * _K**-1.5 / (_K**-1.5).mean(),
    "nearly white": torch.tensor([1.0, 0.9]),  # the remainder is 3e-2 of E below t = 1, and less above
    "whiter": torch.tensor([1.0, 1.001]).repeat(32),  # 3e-4
}


class Recorded:
    """The denoiser of Gaussian data about a mean, bent a little where asked, which remembers what it was told and said.

    Args:
        variances: Those of the elements.
        mean: Their mean.
        bend: How much of D is not linear.
    """

    def __init__(self, variances: Tensor, mean: float = 0.0, bend: float = 0.0) -> None:
        self.variances, self.mean, self.bend = variances, mean, bend
        self.x: list[Tensor] = []
        self.D: list[Tensor] = []

    def data(self) -> Tensor:
        size = (PAIRS, len(self.variances))
        return self.mean + self.variances.sqrt() * torch.randn(size, generator=torch.Generator().manual_seed(0))

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        share = self.variances / (self.variances + t[:, None] ** 2)
        D = self.mean + share * (x - self.mean) + self.bend * share * (1 - share) * x.sin()
        self.x.append(x)
        self.D.append(D)
        return D

    def in_float64(self) -> list[Array]:
        """Return x and D, level by level, in float64. Shapes ``(levels, pairs, halves, d)``."""
        shape = (len(LEVELS), PAIRS, 2, -1)
        return [torch.stack(rows).double().numpy().reshape(shape) for rows in (self.x, self.D)]


def estimate(teacher: Recorded, **options: Any) -> ap.TeacherStatistics:
    size = {"num_samples": 2 * PAIRS, "batch_size": 2 * PAIRS}  # a call for each level
    return ap.estimate_statistics(teacher, teacher.data(), LEVELS, **size, **options, progress=False)


@pytest.mark.parametrize(("mean", "bend"), [(0.0, 0.0), (0.5, 0.3)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_against_float64_sums_of_the_same_outputs(spectrum: str, mean: float, bend: float) -> None:
    """Within a tenth of the standard errors, remainders of 3e-4 of E and those at t = 0.002 included."""
    teacher = Recorded(SPECTRA[spectrum], mean, bend)
    stats = estimate(teacher)
    x, D = teacher.in_float64()
    n = pair_noise(0, 0, PAIRS, teacher.x[0].shape[1:], probes=False)[0].numpy()
    t = LEVELS.float().double().numpy()[:, None, None]  # what the teacher was told
    l = (n * (D[:, :, 0] - D[:, :, 1]) / (2 * t)).sum((1, 2)) / np.square(n).sum()
    np.testing.assert_array_less(abs(stats.l.numpy() - l), 0.1 * stats.l_stderr.numpy())

    squares = np.square(D - l[:, None, None, None] * x).mean((2, 3))  # of g, for each pair
    g_rms = np.sqrt(squares.mean(1))
    found = stats.g_rms.numpy() > 0
    assert found[LEVELS >= 0.03].all()  # what is not is below float32's rounding of D
    assert found.all() or spectrum in ("nearly white", "whiter")
    g_stderr = squares.std(1) / np.sqrt(PAIRS) / (2 * g_rms)
    np.testing.assert_array_less(abs(stats.g_rms.numpy() - g_rms)[found], 0.1 * g_stderr[found])
    if found.all():
        lam = -LEVELS.log().numpy()
        s = make_interp_spline(lam, np.log(g_rms), k=5).derivative()(lam)
        np.testing.assert_array_less(abs(stats.s.numpy() - s), 0.1 * stats.s_stderr.numpy())


@pytest.mark.parametrize(("mean", "bend"), [(0.0, 0.0), (0.5, 0.3)])
def test_single_elements(mean: float, bend: float) -> None:
    """Each element's remainder is much smaller: of independent Gaussian elements there is none."""
    teacher = Recorded(SPECTRA["images"], mean, bend)
    elements = estimate(teacher, per_element=True).elements
    assert elements is not None
    x, D = teacher.in_float64()
    # of the antithetic differences, l is the regression coefficient (docs/method.md, section 13)
    dx, dD = x[:, :, 0] - x[:, :, 1], D[:, :, 0] - D[:, :, 1]
    l = (dx * dD).sum(1) / np.square(dx).sum(1)
    np.testing.assert_allclose(elements.l.numpy(), l, rtol=0, atol=1e-7)
    g_rms = np.sqrt(np.square(D - l[:, None, None] * x).mean((1, 2)))
    if mean == bend == 0:
        assert not elements.g_rms.any()
    found = elements.g_rms.numpy() > 0
    np.testing.assert_allclose(elements.g_rms.numpy()[found], g_rms[found], rtol=1e-3)


def test_an_intercept_of_data_far_from_zero() -> None:
    """With a mean of 15 standard deviations, the square that is taken away is 225 times what is left."""
    size = (LEVELS, 2 * PAIRS, 2 * PAIRS)
    far = Recorded(SPECTRA["images"], 7.5, 0.3)
    wide = Recorded(SPECTRA["images"].double(), 7.5, 0.3)
    found, expected = (
        ap.estimate_statistics(teacher, data, *size, intercept=True, progress=False)
        for teacher, data in ((far, far.data()), (wide, far.data().double()))
    )
    # at lower levels the float32 teacher's own rounding shows; in float32, these were off by 6e-4
    noisy = LEVELS >= 1
    torch.testing.assert_close(found.g_rms[noisy], expected.g_rms[noisy], rtol=1e-6, atol=0)


def test_traces_near_the_number_of_elements() -> None:
    """With Hutchinson's probes there is no noise where J is diagonal, and l is 1 - 1.6e-5 at t = 0.002."""
    teacher = Recorded(torch.full((16,), 0.25))
    stats = ap.estimate_statistics(teacher, teacher.data(), LEVELS, 64, l_method="hutchinson", progress=False)
    t = LEVELS.float().double()
    torch.testing.assert_close(1 - stats.l, t**2 / (0.25 + t**2), rtol=0, atol=1e-7)  # float32's rounding of J
    assert not stats.g_rms.any()


@pytest.mark.parametrize(
    "options",
    [{}, {"per_element": True}, {"l_method": "hutchinson"}, {"s_method": "finite-difference"}],
    ids=lambda options: next(iter(options), "default"),
)
def test_hardly_any_float64(options: dict[str, Any]) -> None:
    data = torch.randn(32, 1024, generator=torch.Generator().manual_seed(0))
    teacher = Recorded(torch.full((1024,), 0.25))
    with FullSize(data.numel()) as watched:
        ap.estimate_statistics(teacher, data, LEVELS, num_samples=64, batch_size=64, progress=False, **options)
    assert watched.share < 0.05  # the noise as it is drawn, and an element's sums; it was 29 to 77 %
