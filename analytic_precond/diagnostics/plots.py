r"""Pictures of statistics, preconditionings and gaps. Needs matplotlib: ``pip install analytic-precond[plot]``.

Figures are built without pyplot and returned: nothing is shown, and no global setting of matplotlib is touched.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_positive
from .._precision import wide_dtype
from ..interpolation.splines import Array
from ..noise_levels.grids import log_noise_levels
from ..preconditionings.base import Preconditioning
from ..preconditionings.hand_crafted import CMPreconditioning
from ..statistics.teacher_statistics import TeacherStatistics
from .consistency_gap import GapMap
from .plot_style import FONT, decorate, legend, new_figure, plain_ticks, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_ROWS = ("$c_{skip}$", "$c_{skip}\\,/\\,(s/t)$", "$c_{out}$", "$c_{out}\\,/\\,(1 - s/t)$")
_DECADES = 3.0  # of the gaps' colour scale: what lies further below the largest is as good as none
_BAND, _POINTS = 0.25, 256  # opacity of intervals, points per curve of a preconditioning


def plot_statistics(stats: TeacherStatistics | Mapping[str, TeacherStatistics], sigma_data: float = 0.5) -> Figure:
    r"""Draw a teacher's $l_t$, $s_t$ and the remainder's RMS over the noise level t, with 95 % intervals.

    Beside $l_t$ stands EDM's Gaussian guess $\sigma_{data}^2 / (\sigma_{data}^2 + t^2)$: what it would be for white
    Gaussian data of that standard deviation.

    Args:
        stats: Statistics of one teacher, or of several by name; their levels may differ.
        sigma_data: Standard deviation of the data, for the guess.

    Returns:
        A figure of three panels; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If ``stats`` holds anything but statistics.
        ValueError: If ``stats`` is empty or ``sigma_data`` is not positive.

    Examples:
        >>> from analytic_precond import GaussianDenoiser, estimate_statistics
        >>> data = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
        >>> stats = estimate_statistics(GaussianDenoiser(1.0), data, num_samples=64, progress=False)
        >>> l_panel, s_panel, g_panel = plot_statistics({"Gaussian": stats}).axes
        >>> float(l_panel.lines[0].get_ydata()[0])  # 1 / (1 + 80^2)
        0.00015623
    """
    teachers = _by_name(stats, TeacherStatistics, "stats")
    check_positive(sigma_data, "sigma_data")
    figure = new_figure(12.0, 4.6)
    l_panel, s_panel, g_panel = figure.subplots(1, 3, sharex=True)
    for (name, teacher), style in zip(teachers.items(), styles(), strict=False):
        g_rms = teacher.g_rms.where(teacher.g_rms > 0, torch.nan)  # a linear teacher has no remainder to show
        _line_with_band(l_panel, teacher.levels, teacher.l, teacher.l_stderr, name, style)
        _line_with_band(s_panel, teacher.levels, teacher.s, teacher.s_stderr, name, style)
        _line_with_band(g_panel, teacher.levels, g_rms, teacher.g_rms_stderr, name, style)
    if any(bool((teacher.g_rms > 0).any()) for teacher in teachers.values()):
        g_panel.set_yscale("log")
        plain_ticks(g_panel.yaxis, most_decades=2.5)

    t = np.unique(np.concatenate([teacher.levels.numpy() for teacher in teachers.values()]))
    guess = sigma_data**2 / (sigma_data**2 + t**2)
    l_panel.plot(t, guess, color="0.35", linewidth=1.5, label=f"EDM's Gaussian guess (σ_data = {sigma_data:.3g})")
    l_panel.fill_between([], [], color="0.35", alpha=_BAND, linewidth=0, label="95 % interval")

    decorate(l_panel, "noise level $t$", "linear coefficient $l_t$")
    decorate(s_panel, "noise level $t$", "scaling coefficient $s_t$")
    decorate(g_panel, "noise level $t$", "RMS of $g = D - l_t\\,x$")
    legend(figure, l_panel)
    return figure


def plot_preconditioning(
    preconditionings: Preconditioning | Mapping[str, Preconditioning],
    t: float | Sequence[float] = (80.0, 5.0, 0.5),
    sigma_min: float = 0.002,
) -> Figure:
    r"""Draw $c_{skip}(t, s)$ and $c_{out}(t, s)$ over s, in one column for each noise level t to start from.

    Args:
        preconditionings: One preconditioning, or several by name to compare. `CMPreconditioning` is a dot at the one
            level that it reaches.
        t: Noise levels to start from.
        sigma_min: Smallest noise level to reach; a preconditioning that ends above it is drawn to its own end.

    Returns:
        A figure of four rows: c_skip, c_skip relative to the s/t of CTM's Euler step, c_out, and c_out relative to
        1 - s/t. ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If ``preconditionings`` holds anything else, or ``t`` is not made of numbers.
        ValueError: If there is nothing to draw, levels ``t`` are out of range (the error lists which), or a consistency
            model reaches 0, which has no place on a logarithmic axis.

    Examples:
        >>> from analytic_precond import CTMPreconditioning
        >>> c_skip, _, c_out, _ = plot_preconditioning({"CTM": CTMPreconditioning()}, t=5.0).axes
        >>> float(c_out.lines[0].get_ydata()[-1])  # 1 - 0.002 / 5
        0.9996
    """
    named = _by_name(preconditionings, Preconditioning, "preconditionings")
    starts = _starts(t)
    check_positive(sigma_min, "sigma_min")
    _check_reach(named, starts, sigma_min)
    figure = new_figure(4.0 * max(2, len(starts)), 9.0)
    panels = figure.subplots(4, len(starts), squeeze=False, sharex="col", height_ratios=(3, 2.2, 3, 2.2))
    for column, start in zip(panels.T, starts, strict=True):
        for (name, precond), style in zip(named.items(), styles(), strict=False):
            s, curves = _curves(precond, start, sigma_min)
            dot = {"linestyle": "none", "marker": "o", "markersize": 9} if len(s) == 1 else {}
            for panel, curve in zip(column, curves, strict=True):
                panel.plot(s, curve, label=name, **style | dot)
        column[0].set_title(f"jumps from $t$ = {start:g}", fontsize=FONT)
        _log_if_wide(column[0], least_decades=0, smallest=sigma_min / start)
        _log_if_wide(column[1], least_decades=1, smallest=1)
        for panel, label in zip(column, _ROWS, strict=True):
            decorate(panel, "noise level $s$" if panel is column[-1] else "", label)
    figure.align_ylabels(panels)
    legend(figure, panels[0, 0])
    return figure


def plot_gap_map(gaps: GapMap) -> Figure:
    r"""Draw the RMS consistency gap over the jumps from t to s, one column for each preconditioning.

    The upper row shows $D^* - D(x_t, t)$, what training has to change, the lower one $D^* - D(x_s, s)$. All panels
    share one logarithmic colour scale, of three decades at most.

    Args:
        gaps: What `gap_map` returned.

    Returns:
        A figure of two rows; ``figure.savefig(path)`` writes it.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If ``gaps`` is something else.

    Examples:
        >>> rms = torch.tensor([[[torch.nan, 0.25], [torch.nan, torch.nan]]])
        >>> figure = plot_gap_map(GapMap(("CTM",), torch.tensor([4.0, 1.0]), start=rms, target=rms / 2))
        >>> float(figure.axes[0].collections[0].get_array().max())
        0.25
    """
    if not isinstance(gaps, GapMap):
        raise TypeError(f"gaps must be a GapMap, got {type(gaps).__name__}: call gap_map first.")
    columns = len(gaps.names)
    figure = new_figure(2.2 + 4.2 * columns, 8.4)
    panels = figure.subplots(2, columns, squeeze=False, sharex=True, sharey=True)
    from matplotlib.colors import LogNorm

    values = np.stack([gaps.start.numpy(), gaps.target.numpy()])
    largest = float(np.nanmax(values)) or 1.0
    smallest = max(float(np.nanmin(values)), largest * 10**-_DECADES)
    norm = LogNorm(min(smallest, 0.5 * largest), largest, clip=True)
    edges = _edges(gaps.levels.numpy())
    for row, label, panel_row in zip(values, ("at the start", "at the target"), panels, strict=True):
        for gap, panel in zip(row, panel_row, strict=True):
            image = panel.pcolormesh(edges, edges, gap.T, norm=norm, cmap="viridis")  # [i, j] is at x = t_i, y = t_j
            decorate(panel, "from noise level $t$" if panel in panels[-1] else "", "", grid=False)
            panel.set(yscale="log", aspect="equal")
            plain_ticks(panel.yaxis, most_decades=1.5)
        panel_row[0].set_ylabel(f"gap {label} of the jump\n\nto noise level $s$", fontsize=FONT)
    for name, panel in zip(gaps.names, panels[0], strict=True):
        panel.set_title(name, fontsize=FONT)
    bar = figure.colorbar(image, ax=panels, extend="min" if np.nanmin(values) < smallest else "neither", pad=0.02)
    bar.set_label("RMS consistency gap", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 2)
    plain_ticks(bar.ax.yaxis, most_decades=2.5)
    return figure


def _curves(precond: Preconditioning, t: float, sigma_min: float) -> tuple[Array, tuple[Array, ...]]:
    """Return noise levels s from t down, or the only one there is, and the values of the four rows there."""
    tensor = next(precond.buffers(), torch.zeros(0, device="cpu"))  # on the device to compute on
    levels = log_noise_levels(_POINTS, _end(precond, sigma_min), t)
    levels = levels[-1:] if isinstance(precond, CMPreconditioning) else levels
    levels = levels.to(tensor.device, wide_dtype(tensor.device))
    s, c_skip, c_out = (v.detach().cpu().double().numpy() for v in (levels, *precond(t, levels)))
    if c_skip.shape != s.shape:
        first = ", ".join([":"] + ["0"] * (c_skip.ndim - 1))
        raise TypeError(
            f"preconditionings must have one pair of coefficients per jump, got {type(precond).__name__} with one per "
            f"mode or element: draw those of one yourself, e.g. precond(t, s).c_out[{first}] over levels s."
        )
    euler = (t - s) / t
    c_out_ratio = np.divide(c_out, euler, out=np.full_like(c_out, np.nan), where=euler > 0)
    return s, (c_skip, c_skip / (s / t), c_out, c_out_ratio)


def _by_name(value: object, kind: type[Any], argument: str) -> dict[str, Any]:
    """Return what to draw under its names, or raise."""
    if isinstance(value, kind):
        return {value.header.description if isinstance(value, TeacherStatistics) else type(value).__name__: value}
    expected = f"{argument} must be one {kind.__name__} or a dict of them by name"
    if not isinstance(value, Mapping):
        raise TypeError(f"{expected}, got {type(value).__name__}.")
    for name, item in value.items():
        if not isinstance(name, str) or not isinstance(item, kind):
            raise TypeError(f"{expected}, got a dict with {name!r}: {type(item).__name__}.")
    if not value:
        raise ValueError(f"{expected}, got an empty dict: add at least one.")
    return dict(value)


def _starts(t: object) -> list[float]:
    """Return the noise levels to start from as a list of floats, or raise."""
    values = [t] if isinstance(t, int | float) else list(t) if isinstance(t, Sequence) else None
    if values is None or isinstance(t, str) or not all(type(v) in (int, float) for v in values):
        raise TypeError(f"t must be a noise level or a sequence of them, got {t!r}: write e.g. (80.0, 5.0, 0.5).")
    if not values:
        raise ValueError("t must hold at least one noise level to start from, got none: write e.g. (80.0, 5.0, 0.5).")
    return [float(v) for v in values]


def _end(precond: Preconditioning, sigma_min: float) -> float:
    """Return the level that curves end at; a consistency model has no other."""
    return precond.sigma_min if isinstance(precond, CMPreconditioning) else max(sigma_min, precond.sigma_min)


def _check_reach(preconditionings: Mapping[str, Preconditioning], starts: Sequence[float], sigma_min: float) -> None:
    """Refuse levels to start from that some preconditioning does not have above its end."""
    faults = []
    for name, precond in preconditionings.items():
        low, high = _end(precond, sigma_min), precond.sigma_max
        if low == 0:
            raise ValueError(
                f"preconditionings must reach a level above 0, as its axis is logarithmic, got {name!r}, which reaches "
                f"0 only: draw it with a small one, e.g. CMPreconditioning(sigma_min=0.002)."
            )
        outside = [t for t in starts if not low < t <= high * (1 + 1e-6)]  # float32 grids end at 79.99998474
        if outside:
            faults.append(f"{', '.join(f'{t:g}' for t in outside)} for {name!r} ({low:g} < t <= {high:g})")
    if faults:
        raise ValueError(f"t must lie within each preconditioning's range, got {'; '.join(faults)}: choose others.")


def _line_with_band(panel: Axes, t: Tensor, value: Tensor, stderr: Tensor, name: str, style: dict[str, Any]) -> None:
    """Draw an estimate and its 95 % interval; an infinite error, of too few samples, has no band."""
    panel.plot(t, value, label=name, **style)
    half = 1.96 * stderr.where(stderr.isfinite(), torch.nan)
    panel.fill_between(t, value - half, value + half, color=style["color"], alpha=_BAND, linewidth=0)


def _log_if_wide(panel: Axes, least_decades: float, smallest: float) -> None:
    """Make the axis logarithmic where the values span enough; with negative ones, linear within ``smallest`` of 0."""
    low, high = panel.dataLim.intervaly
    if low <= 0:
        panel.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(smallest)))
    elif high > low * 10**least_decades:
        panel.set_yscale("log")
        if high < 300 * low:  # else powers of ten read better
            plain_ticks(panel.yaxis, most_decades=2.5)


def _edges(levels: Array) -> Array:
    """Return the K + 1 borders of cells around the levels, half-way in ln t."""
    lam = np.log(levels)
    middle = (lam[1:] + lam[:-1]) / 2
    edges: Array = np.exp(np.concatenate([[2 * lam[0] - middle[0]], middle, [2 * lam[-1] - middle[-1]]]))
    return edges
