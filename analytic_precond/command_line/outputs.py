r"""What the command line prints: tables to read, and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from ..diagnostics.comparison import Levels, StatisticsComparison
from ..fitted_preconditionings.fitted import FittedPreconditioning
from ..fitted_preconditionings.least_squares import LeastSquaresPreconditioning
from ..fitted_preconditionings.per_mode import PerModePreconditioning
from ..fitted_preconditionings.shifted import ShiftedPreconditioning
from ..statistics.teacher_statistics import TeacherStatistics
from .inputs import Loaded

_COLUMNS = ("l", "l_stderr", "s", "s_stderr", "g_rms", "g_rms_stderr")


def as_json(value: Mapping[str, Any]) -> str:
    """Return one JSON object; what is not finite must be None already."""
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def described(loaded: Loaded) -> dict[str, Any]:
    """Return what a file holds, without its tables."""
    header = loaded.header
    common: dict[str, Any] = {
        "kind": type(loaded).__name__,
        "description": header.description,
        "sample_shape": list(header.sample_shape),
        "precision": header.precision,
    }
    if isinstance(loaded, TeacherStatistics):
        return common | {
            "num_samples": loaded.num_samples,
            "seeds": list(loaded.header.seeds),
            "l_method": loaded.header.l_method,
            "s_method": loaded.header.s_method,
            "intercept": loaded.mean_data is not None,
            "per_element": loaded.element_means is not None,
        }
    common |= {
        "num_trajectories": loaded.header.num_trajectories,
        "seed": loaded.header.seed,
        "sigma_data": loaded.sigma_data,
    }
    if isinstance(loaded, LeastSquaresPreconditioning | ShiftedPreconditioning):
        common |= {"jumps_from": loaded.sigma_max}
    if isinstance(loaded, PerModePreconditioning):
        common |= {"basis": type(loaded.basis).__name__, "groups_of_modes": loaded.table.num_jumps}
    return common


def tables(loaded: Loaded, rows: Sequence[int]) -> dict[str, Any]:
    """Return some rows of a file's tables, as lists: of the levels, or of the jumps from the noisiest one to them."""
    levels = loaded.levels
    columns = {"levels": levels}
    if isinstance(loaded, TeacherStatistics):
        columns |= {name: getattr(loaded, name) for name in _COLUMNS}
    elif isinstance(loaded, LeastSquaresPreconditioning):
        (c_skip, c_out), (c_skip_stderr, c_out_stderr) = loaded(levels[0], levels), loaded.standard_errors
        columns |= {
            "c_skip": c_skip,
            "c_skip_stderr": c_skip_stderr[0],
            "c_out": c_out,
            "c_out_stderr": c_out_stderr[0],
        }
    elif isinstance(loaded, ShiftedPreconditioning):
        asked = loaded.network_level(levels[0], levels)
        columns |= {**loaded(levels[0], levels)._asdict(), "network_level": asked}
    return {name: _numbers(column[list(rows)]) for name, column in columns.items()}


def nearest_rows(levels: Tensor, wanted: Sequence[float] | None) -> list[int]:
    """Return the indices of the levels nearest to some, in ln t; all without any."""
    if wanted is None:
        return list(range(len(levels)))
    return sorted({int((levels.log() - math.log(t)).abs().argmin()) for t in wanted})


def summary(loaded: Loaded) -> str:
    """Return what a file holds, for people."""
    levels = loaded.levels
    words = described(loaded)
    words |= {"levels": f"{len(levels)} from {levels[0]:g} to {levels[-1]:g}"}
    return "".join(f"{name.replace('_', ' '):<18}{_word(name, value)}\n" for name, value in words.items())


def table(loaded: Loaded, rows: Sequence[int]) -> str:
    """Return some rows of a file's table, for people."""
    columns = tables(loaded, rows)
    if list(columns) == ["levels"]:
        return ""
    columns = {"s" if isinstance(loaded, FittedPreconditioning) else "t": columns.pop("levels"), **columns}
    names = [name.replace("_stderr", " error") for name in columns]
    text = "".join(f"{name:>14}" for name in names) + "\n"
    for row in zip(*columns.values(), strict=True):
        text += "".join(f"{'-' if value is None else format(value, '.6g'):>14}" for value in row) + "\n"
    return f"\n{text}"


def comparison_as_json(first: TeacherStatistics, second: TeacherStatistics, found: StatisticsComparison) -> str:
    """Return a comparison as JSON."""
    return as_json(
        {
            "agree": found.agree,
            "limit_in_standard_errors": found.limit,
            "differences": {name: asdict(difference) for name, difference in found.differences.items()},
            "first": described(first),
            "second": described(second),
        }
    )


def comparison_as_text(first: TeacherStatistics, second: TeacherStatistics, found: StatisticsComparison) -> str:
    """Return a comparison for people."""
    one, other = described(first), described(second)
    text = "".join(
        f"differs in {name.replace('_', ' ')}: {_word(name, one[name])} and {_word(name, other[name])}\n"
        for name in one
        if one[name] != other[name]
    )
    text += f"\n{'':10}{'largest':>12}  {'at':24}{'standard errors':>16}  at\n"
    for name, d in found.differences.items():
        text += f"{name:10}{d.largest:12.4g}  {_place(d.largest_at):24}"
        text += f"{d.most_standard_errors:16.2f}  {_place(d.most_standard_errors_at)}\n"
    verdict = "agree: no difference exceeds" if found.agree else "differ: a difference exceeds"
    return f"{text}\n{verdict} {found.limit:.2f} standard errors\n"


def _place(at: Levels) -> str:
    return f"t = {at[0]:.4g}" + (f", s = {at[1]:.4g}" if len(at) == 2 else "")


def _word(name: str, value: object) -> str:
    """Write a header's value so that no character of it can steer a terminal."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ("x" if name == "sample_shape" else ", ").join(map(str, value)) or "scalar"
    return ascii(value) if name in ("description", "precision") else str(value)


def _numbers(values: Tensor) -> list[float | None]:
    """Return the values, None for those that JSON has no words for."""
    return [value if abs(value) < float("inf") else None for value in values.tolist()]
