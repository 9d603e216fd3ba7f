"""The figures show the numbers, and nothing but the figure changes."""

from __future__ import annotations

import subprocess
import sys
from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from problems import gaussian_problem

import analytic_precond as ap
from analytic_precond.diagnostics.plots import plot_preconditioning, plot_statistics

PROBLEM = gaussian_problem()
LEVELS = ap.log_noise_levels(24)


def gaussian_statistics(num_samples: int = 256, seed: int = 0) -> ap.TeacherStatistics:
    variances = PROBLEM.variances
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(num_samples, len(variances), dtype=torch.float64, generator=generator) * variances.sqrt()
    teacher = ap.GaussianDenoiser(variances)
    return ap.estimate_statistics(
        teacher, data, LEVELS, num_samples, l_method="exact", s_method="jvp", seed=seed, progress=False
    )


@pytest.fixture(scope="module")
def stats() -> ap.TeacherStatistics:
    return gaussian_statistics()


@pytest.fixture
def table() -> ap.AnalyticPreconditioning:
    """Levels from 10 to 0.01 only."""
    levels = ap.log_noise_levels(32, 0.01, 10.0)
    return ap.AnalyticPreconditioning.from_coefficients(levels, 1 / (1 + 4 * levels**2), 0.1 * levels)


def curve(panel: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (line,) = [line for line in panel.lines if line.get_label() == label]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def legend_texts(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def draw(figure: Figure, path: Path) -> None:
    """Render, under the tests' rule that warnings are errors."""
    figure.savefig(path / "figure.png", dpi=40)
    assert (path / "figure.png").stat().st_size > 1000


# statistics


def test_statistics_are_the_data(stats: ap.TeacherStatistics) -> None:
    panels = plot_statistics({"teacher": stats}).axes
    for panel, values in zip(panels, (stats.l, stats.s, stats.g_rms), strict=True):
        t, y = curve(panel, "teacher")
        np.testing.assert_array_equal(t, stats.levels)
        np.testing.assert_array_equal(y, values)

    # and the statistics are those of the Gaussian: l exactly, the others to the samples' spread
    t = LEVELS.numpy()
    np.testing.assert_allclose(curve(panels[0], "teacher")[1], PROBLEM.l(t), rtol=1e-12)
    np.testing.assert_allclose(curve(panels[1], "teacher")[1], PROBLEM.s(t), atol=0.3)
    np.testing.assert_allclose(curve(panels[2], "teacher")[1], PROBLEM.g_rms(t), rtol=0.2)


def test_gaussian_guess(stats: ap.TeacherStatistics) -> None:
    figure = plot_statistics(stats, sigma_data=0.25)
    t, guess = curve(figure.axes[0], "EDM's Gaussian guess (σ_data = 0.25)")
    np.testing.assert_allclose(guess, 1 / (1 + 16 * t**2), rtol=1e-12)
    assert (t.min(), t.max()) == (0.002, 80.0)


def test_bands_are_95_percent_intervals(stats: ap.TeacherStatistics) -> None:
    panels = plot_statistics(stats).axes
    columns = ((stats.l, stats.l_stderr), (stats.s, stats.s_stderr), (stats.g_rms, stats.g_rms_stderr))
    for panel, (value, stderr) in zip(panels, columns, strict=True):
        vertices = panel.collections[0].get_paths()[0].vertices
        for t, v, e in zip(stats.levels.tolist(), value.tolist(), stderr.tolist(), strict=True):
            at_t = vertices[np.isclose(vertices[:, 0], t, rtol=1e-12), 1]
            assert at_t.min() == pytest.approx(v - 1.96 * e, abs=1e-12)
            assert at_t.max() == pytest.approx(v + 1.96 * e, abs=1e-12)


def test_statistics_axes(stats: ap.TeacherStatistics) -> None:
    panels = plot_statistics(stats).axes
    assert [panel.get_xscale() for panel in panels] == ["log"] * 3
    assert [panel.get_yscale() for panel in panels] == ["linear", "linear", "log"]
    assert {panel.get_xlabel() for panel in panels} == {"noise level $t$"}
    for panel, symbol in zip(panels, ("$l_t$", "$s_t$", "$g = D - l_t"), strict=True):
        assert symbol in panel.get_ylabel()


def test_one_teacher_is_named_by_its_header(stats: ap.TeacherStatistics) -> None:
    assert legend_texts(plot_statistics(stats))[0] == "GaussianDenoiser"


def test_teachers_side_by_side(stats: ap.TeacherStatistics, tmp_path: Path) -> None:
    """Two teachers with grids of their own, told apart by colour and by dashes."""
    other = ap.estimate_statistics(
        ap.GaussianMixtureDenoiser(torch.tensor([[-1.0], [1.0]]), 0.1),
        torch.tensor([[-1.0], [1.0]]),
        ap.log_noise_levels(8, 0.01, 20.0),
        num_samples=64,
        progress=False,
    )
    figure = plot_statistics({"first": stats, "second": other})
    assert legend_texts(figure) == ["first", "second", "EDM's Gaussian guess (σ_data = 0.5)", "95 % interval"]
    assert [len(curve(figure.axes[2], name)[0]) for name in ("first", "second")] == [24, 8]
    one, two = figure.axes[1].lines
    assert to_hex(str(one.get_color())) != to_hex(str(two.get_color()))
    assert one.get_linestyle() != two.get_linestyle()
    draw(figure, tmp_path)


def test_teacher_without_remainder(tmp_path: Path) -> None:
    """A single point: g is 0 everywhere, which a log axis cannot show."""
    data = torch.zeros(4, 2, dtype=torch.float64)
    stats = ap.estimate_statistics(ap.EmpiricalDenoiser(data), data, LEVELS, num_samples=8, progress=False)
    figure = plot_statistics(stats)
    assert np.isnan(curve(figure.axes[2], "EmpiricalDenoiser")[1]).all()
    draw(figure, tmp_path)


def test_too_few_samples_for_errors(tmp_path: Path) -> None:
    """One pair of samples has infinite standard errors: the lines are drawn, without bands."""
    stats = gaussian_statistics(num_samples=2)
    assert torch.isinf(stats.l_stderr).all()
    figure = plot_statistics(stats)
    assert np.isfinite(curve(figure.axes[0], "GaussianDenoiser")[1]).all()
    draw(figure, tmp_path)


# preconditionings


@pytest.mark.parametrize("t", [80.0, 5.0, 0.5])
def test_ctm_in_closed_form(t: float) -> None:
    c_skip, skip_ratio, c_out, out_ratio = plot_preconditioning({"CTM": ap.CTMPreconditioning()}, t=t).axes
    s, values = curve(c_skip, "CTM")
    assert (s[0], s[-1]) == (t, 0.002)
    np.testing.assert_allclose(values, s / t, rtol=1e-14)
    np.testing.assert_allclose(curve(c_out, "CTM")[1], 1 - s / t, atol=1e-15)
    np.testing.assert_allclose(curve(skip_ratio, "CTM")[1], 1, rtol=1e-14)
    np.testing.assert_allclose(curve(out_ratio, "CTM")[1][1:], 1, rtol=1e-12)  # 0 / 0 at s = t is left out


def test_curves_are_the_coefficients(table: ap.AnalyticPreconditioning) -> None:
    figure = plot_preconditioning({"table": table, "CTM": ap.CTMPreconditioning()}, t=(10.0, 0.5), sigma_min=0.01)
    for column, t in enumerate((10.0, 0.5)):
        s, c_skip = curve(figure.axes[column], "table")
        expected = table(t, torch.from_numpy(s))
        np.testing.assert_array_equal(c_skip, expected.c_skip)
        np.testing.assert_array_equal(curve(figure.axes[4 + column], "table")[1], expected.c_out)
        assert np.isfinite(c_skip).all()


def test_a_table_is_drawn_to_its_own_end(table: ap.AnalyticPreconditioning) -> None:
    panel = plot_preconditioning({"table": table, "CTM": ap.CTMPreconditioning()}, t=1.0).axes[0]
    assert curve(panel, "table")[0].min() == 0.01
    assert curve(panel, "CTM")[0].min() == 0.002


def test_a_consistency_model_is_a_dot_beside_curves(table: ap.AnalyticPreconditioning, tmp_path: Path) -> None:
    """It has one level to reach, even below where the others are asked to end."""
    named = {"CM": ap.CMPreconditioning(), "CTM": ap.CTMPreconditioning(), "table": table}
    figure = plot_preconditioning(named, t=(10.0, 0.5), sigma_min=0.01)
    for column, t in enumerate((10.0, 0.5)):
        euler, v = 1 - 0.002 / t, 0.25
        c_skip = v / ((t - 0.002) ** 2 + v) - euler * v / (t**2 + v)  # the class's docstring
        expected = (c_skip, c_skip / (0.002 / t), euler, 1.0)
        for panel, value in zip(figure.axes[column::2], expected, strict=True):
            (s,), (y,) = curve(panel, "CM")
            assert s == 0.002
            assert y == pytest.approx(value, rel=1e-9)  # the difference of two fractions cancels
            assert curve(panel, "CTM")[0].min() == 0.01
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert [lines[name].get_marker() for name in named] == ["o", "None", "None"]
    assert legend_texts(figure) == ["CM", "CTM", "table"]
    draw(figure, tmp_path)
    draw(plot_preconditioning(ap.CMPreconditioning()), tmp_path)


def test_a_consistency_model_that_reaches_0_says_what_can_be_drawn() -> None:
    named = {"ECT": ap.CMPreconditioning(sigma_min=0.0), "CTM": ap.CTMPreconditioning()}
    with pytest.raises(ValueError, match=r"got 'ECT', which reaches 0 only: .*CMPreconditioning\(sigma_min=0\.002\)"):
        plot_preconditioning(named)
    plot_preconditioning(named | {"ECT": ap.CMPreconditioning(sigma_min=0.002)}, t=5.0)


def test_preconditioning_axes(table: ap.AnalyticPreconditioning, tmp_path: Path) -> None:
    figure = plot_preconditioning({"table": table, "CTM": ap.CTMPreconditioning()}, t=(10.0, 5.0, 0.5))
    assert len(figure.axes) == 12
    assert all(panel.get_xscale() == "log" for panel in figure.axes)
    assert all(panel.get_yscale() == "log" for panel in figure.axes[:3])
    assert all(panel.get_yscale() == "linear" for panel in figure.axes[6:9])
    assert all("c_{skip}" in panel.get_ylabel() for panel in figure.axes[:6])
    assert all("c_{out}" in panel.get_ylabel() for panel in figure.axes[6:])
    assert [panel.get_xlabel() for panel in figure.axes[-3:]] == ["noise level $s$"] * 3
    assert [panel.get_title() for panel in figure.axes[:3]] == [f"jumps from $t$ = {t}" for t in ("10", "5", "0.5")]
    assert legend_texts(figure) == ["table", "CTM"]
    draw(figure, tmp_path)


def test_negative_c_skip_stays_visible(stats: ap.TeacherStatistics, tmp_path: Path) -> None:
    """The forward form's long jumps overshoot (-0.0023 from 80 to 0.002): a log axis would hide it."""
    figure = plot_preconditioning({"forward": ap.AnalyticPreconditioning(stats, "forward")}, t=80.0)
    assert curve(figure.axes[0], "forward")[1].min() < 0
    assert figure.axes[0].get_yscale() == "symlog"
    draw(figure, tmp_path)


def test_single_preconditioning_is_named_by_its_class() -> None:
    assert legend_texts(plot_preconditioning(ap.CTMPreconditioning(), t=1)) == ["CTMPreconditioning"]


def test_float32_end_of_the_range() -> None:
    """A Karras grid in float32 starts at 79.99998474."""
    levels = ap.karras_noise_levels(20).float() * 0.9999998
    zero = torch.zeros_like(levels)
    precond = ap.AnalyticPreconditioning.from_coefficients(levels, zero, zero)
    assert precond.sigma_max < 80
    assert np.isfinite(curve(plot_preconditioning({"table": precond}).axes[0], "table")[1]).all()


def test_many_names_have_styles_of_their_own(tmp_path: Path) -> None:
    names = [f"a rather long name of preconditioning {i}" for i in range(9)]
    figure = plot_preconditioning({name: ap.CTMPreconditioning() for name in names}, t=3.0)
    styles = [(line.get_color(), str(line._dash_pattern)) for line in figure.axes[0].lines]
    assert all(a != b for a, b in combinations(styles, 2))
    draw(figure, tmp_path)
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1


# errors


@pytest.mark.parametrize(
    ("stats", "error", "message"),
    [
        (None, TypeError, "one TeacherStatistics or a dict of them by name, got NoneType"),
        ([1], TypeError, "got list"),
        ({"a": 1.0}, TypeError, "got a dict with 'a': float"),
        ({}, ValueError, "got an empty dict"),
    ],
)
def test_bad_statistics(stats: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_statistics(stats)  # type: ignore[arg-type]


@pytest.mark.parametrize(("sigma_data", "error"), [(0.0, ValueError), (-1.0, ValueError), ("0.5", TypeError)])
def test_bad_sigma_data(stats: ap.TeacherStatistics, sigma_data: float, error: type[Exception]) -> None:
    with pytest.raises(error, match="sigma_data must be"):
        plot_statistics(stats, sigma_data)


@pytest.mark.parametrize(
    ("preconditionings", "error", "message"),
    [
        (3, TypeError, "one Preconditioning or a dict of them by name, got int"),
        ({1: ap.CTMPreconditioning()}, TypeError, "got a dict with 1: CTMPreconditioning"),
        ({"EDM": ap.EDMPreconditioning()}, TypeError, "'EDM': EDMPreconditioning"),
        ({}, ValueError, "got an empty dict"),
    ],
)
def test_bad_preconditionings(preconditionings: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_preconditioning(preconditionings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("t", "error", "message"),
    [
        ("80", TypeError, "sequence of them, got '80'"),
        ((80.0, None), TypeError, "got"),
        (True, TypeError, "got True"),
        ((), ValueError, "at least one noise level"),
    ],
)
def test_bad_start(t: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plot_preconditioning(ap.CTMPreconditioning(), t)  # type: ignore[arg-type]


def test_starts_out_of_range_are_listed(table: ap.AnalyticPreconditioning) -> None:
    preconditionings = {"CTM": ap.CTMPreconditioning(), "table": table}
    with pytest.raises(
        ValueError, match=r"0.001 for 'CTM' \(0.002 < t <= inf\); 80, 0.001 for 'table' \(0.01 < t <= 10\)"
    ):
        plot_preconditioning(preconditionings, t=(80.0, 5.0, 0.001))
    with pytest.raises(ValueError, match="nan for 'table'"):
        plot_preconditioning({"table": table}, t=float("nan"))


def test_bad_sigma_min() -> None:
    with pytest.raises(ValueError, match="sigma_min must be positive"):
        plot_preconditioning(ap.CTMPreconditioning(), sigma_min=0.0)


# matplotlib


def test_missing_matplotlib_names_the_extra(stats: ap.TeacherStatistics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install analytic-precond\[plot\]"):
        plot_statistics(stats)
    with pytest.raises(ImportError, match=r"pip install analytic-precond\[plot\]"):
        plot_preconditioning(ap.CTMPreconditioning())


def test_no_settings_change(stats: ap.TeacherStatistics, table: ap.AnalyticPreconditioning) -> None:
    before = dict(mpl.rcParams)
    plot_statistics(stats)
    plot_preconditioning(table, t=5.0)
    assert dict(mpl.rcParams) == before


def test_no_pyplot_and_no_matplotlib_until_needed(tmp_path: Path) -> None:
    program = (
        "import sys, analytic_precond as ap\n"
        "from analytic_precond.diagnostics.plots import plot_preconditioning\n"
        "assert 'matplotlib' not in sys.modules\n"
        "plot_preconditioning(ap.CTMPreconditioning(), t=5.0).savefig(sys.argv[1])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "figure.png")], check=True)


def test_one_pair_per_mode_is_refused() -> None:
    data = torch.randn(64, 2, 2, generator=torch.Generator().manual_seed(0))
    precond = ap.PerModePreconditioning.fit(
        ap.GaussianDenoiser(1.0), data, ap.log_noise_levels(6), num_trajectories=32, progress=False
    )
    with pytest.raises(TypeError, match="got PerModePreconditioning with one per mode"):
        ap.plot_preconditioning(precond)
