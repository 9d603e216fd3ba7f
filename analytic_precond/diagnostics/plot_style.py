r"""What all figures look like: size, fonts, line styles, ticks, legend. Needs matplotlib."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, cycle, repeat
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


# Okabe and Ito's colours without the yellow, too pale for a line; dashes tell lines apart in grey and where they meet
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", (0, (4, 1.5)), (0, (1.2, 1)), (0, (6, 1.2, 1.2, 1.2)), (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)))
FONT = 15  # points; figures are about 12 inches wide and still readable at half that


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure that belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib, got none: pip install analytic-precond[plot]") from error
    return Figure(figsize=(width, height), layout="constrained")


def styles() -> Iterator[dict[str, Any]]:
    """Yield line styles; the first is the widest, so that it shows under a line that coincides with it."""
    widths = chain([3.2, 2.6], repeat(2.2))
    for colour, dashes, width in zip(cycle(_COLOURS), cycle(_DASHES), widths, strict=False):
        yield {"color": colour, "linestyle": dashes, "linewidth": width}


def plain_ticks(axis: Axis, most_decades: float) -> None:
    """Write 0.01, 0.1, 1 on a log axis, and 2 and 5 of each decade where it spans few."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < low * 10**most_decades else (1.0,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def decorate(panel: Axes, x_label: str, y_label: str, grid: bool = True) -> None:
    """Dress a panel over noise levels."""
    panel.set_xscale("log")
    plain_ticks(panel.xaxis, most_decades=1.5)
    panel.set_xlabel(x_label, fontsize=FONT)
    panel.set_ylabel(y_label, fontsize=FONT)
    panel.tick_params(labelsize=FONT - 2)
    panel.spines[["top", "right"]].set_visible(False)
    if grid:
        panel.grid(color="#DDDDDD", linewidth=0.8)


def legend(figure: Figure, panel: Axes) -> None:
    """Put one legend under all panels, in as few rows as the names allow."""
    entries = panel.get_legend_handles_labels()
    widths = [len(label) + 12 for label in entries[1]]  # in letters, with the line and the gaps

    def fits(columns: int) -> bool:
        rows = math.ceil(len(widths) / columns)
        return sum(max(widths[i : i + rows]) for i in range(0, len(widths), rows)) <= 10 * figure.get_figwidth()

    columns = max(filter(fits, range(1, len(widths) + 1)), default=1)
    figure.legend(*entries, loc="outside lower center", ncols=columns, fontsize=FONT - 1, frameon=False, handlelength=3)
