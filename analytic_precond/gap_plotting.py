"""The consistency gap as a picture. Needs matplotlib: ``pip install analytic-precond[plot]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .diagnostics import GapMap
from .figure_style import FONT, new_figure, plain_ticks
from .splines import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DECADES = 3.0  # of the colour scale: what lies further below the largest gap is as good as none


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
        >>> import torch
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
            _decorate(panel)
        panel_row[0].set_ylabel(f"gap {label} of the jump\n\nto noise level $s$", fontsize=FONT)
    for name, panel in zip(gaps.names, panels[0], strict=True):
        panel.set_title(name, fontsize=FONT)
    for panel in panels[-1]:
        panel.set_xlabel("from noise level $t$", fontsize=FONT)
    bar = figure.colorbar(image, ax=panels, extend="min" if np.nanmin(values) < smallest else "neither", pad=0.02)
    bar.set_label("RMS consistency gap", fontsize=FONT)
    bar.ax.tick_params(labelsize=FONT - 2)
    plain_ticks(bar.ax.yaxis, most_decades=2.5)
    return figure


def _edges(levels: Array) -> Array:
    """Return the K + 1 borders of cells around the levels, half-way in ln t."""
    lam = np.log(levels)
    middle = (lam[1:] + lam[:-1]) / 2
    edges: Array = np.exp(np.concatenate([[2 * lam[0] - middle[0]], middle, [2 * lam[-1] - middle[-1]]]))
    return edges


def _decorate(panel: Axes) -> None:
    panel.set(xscale="log", yscale="log")
    panel.set_aspect("equal")
    plain_ticks(panel.xaxis, most_decades=1.5)
    plain_ticks(panel.yaxis, most_decades=1.5)
    panel.tick_params(labelsize=FONT - 2)
    panel.spines[["top", "right"]].set_visible(False)
