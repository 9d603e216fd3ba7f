r"""DPM-Solver-v3's empirical model statistics (EMS), from and to the files that its code reads (docs/ems.md).

With $f = (\sigma \epsilon - l^{v3} x) / \alpha$ that solver takes $l^{v3}$, and s and b of the regression
$df/d\lambda \approx s f + b$. In this library's terms $f = -g$, $l^{v3} = 1 - l_t$, $s = s_t$, and
$b = s\, b_t - db_t/d\lambda$ with the intercept $b_t$ (docs/method.md, section 13).
"""

from __future__ import annotations

import math
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ._checks import check_choice, check_count
from .moments import Array
from .noise_levels import log_noise_levels
from .remainder import log_scale_spline
from .splines import linear_coefficients, spline
from .teacher_statistics import TeacherStatistics

_FILES = {"l.npz": ("l",), "sb.npz": ("s", "b")}
_LARGEST = 2**34  # bytes of a file's arrays, as of statistics


class EMS(NamedTuple):
    """Empirical model statistics of DPM-Solver-v3, with this library's l.

    Attributes:
        levels: Decreasing noise levels, uniform in lambda. Shape ``(N + 1,)``.
        l: The linear coefficient l_t, 1 minus that in the file. Shape ``(N + 1, C, H, W)``, or 1 for C, H or W.
        s: The scaling coefficient s_t. Shape as of l, perhaps another one.
        b: The bias of df/dlambda = s f + b with f = -g, as in the file. Shape as of l, perhaps another one.
    """

    levels: Tensor
    l: Tensor
    s: Tensor
    b: Tensor


def save_ems(
    statistics: TeacherStatistics, folder: str | os.PathLike[str], per: str = "element", num_steps: int = 1200
) -> None:
    r"""Write statistics for DPM-Solver-v3: ``l.npz`` and ``sb.npz``, which its ``statistics_dir`` names the folder of.

    The arrays are float32, of shape ``(num_steps + 1, C, H, W)`` or with ones for what shares a value, noisiest level
    first. Their levels are uniform in lambda between the statistics' ends, which the solver has to be given as its
    ``t_start`` and ``t_end`` (as times of its own schedule). Values between the statistics' levels are those of this
    library's splines. The solver integrates by trapezoids and rounds its times to these levels: hence many.

    Args:
        statistics: The teacher's statistics of samples ``(C, H, W)``. Without an intercept b is 0.
        folder: Where to write; made if its parent exists. Files in it are replaced.
        per: ``"element"`` or ``"channel"``, which need ``per_element=True``, or ``"sample"``: what has an l and an s of
            its own. With an intercept, b is always per element.
        num_steps: Number of steps N.

    Raises:
        TypeError: If ``statistics`` is something else.
        ValueError: If samples have no three dimensions, there are no statistics per element, or an option is unknown.
        FileNotFoundError: If the folder's parent does not exist.
    """
    if not isinstance(statistics, TeacherStatistics):
        raise TypeError(f"statistics must be TeacherStatistics, got {type(statistics).__name__}.")
    check_choice(per, ("element", "channel", "sample"), "per")
    check_count(num_steps, 1, "num_steps")
    shape = statistics.header.sample_shape
    if len(shape) != 3:
        raise ValueError(
            f"DPM-Solver-v3 needs statistics of samples (C, H, W), got sample shape {shape}: view data as (C, 1, 1)."
        )
    l, g_rms, s, intercept = _coefficients(statistics, per)
    levels = statistics.levels.numpy()
    lam = np.linspace(-math.log(levels[0]), -math.log(levels[-1]), num_steps + 1)

    s_fine = log_scale_spline(levels, g_rms, s, statistics.header.s_method).derivative()(lam)
    b_fine = np.zeros_like(s_fine)
    if intercept is not None:
        of_levels = spline(levels, intercept)
        b_fine = s_fine * of_levels(lam) - of_levels.derivative()(lam)
    arrays = {"l": 1 - linear_coefficients(levels, l)(lam), "s": s_fine, "b": b_fine}

    folder = Path(folder)
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder to make {folder.name} in, got {folder.parent}.")
    folder.mkdir(exist_ok=True)
    for file, names in _FILES.items():
        _write(folder / file, {name: np.moveaxis(arrays[name], -1, 0).astype(np.float32) for name in names})


def load_ems(folder: str | os.PathLike[str], sigma_min: float = 0.002, sigma_max: float = 80.0) -> EMS:
    r"""Read DPM-Solver-v3's ``l.npz`` and ``sb.npz``. Nothing in them is executed.

    The files do not say which noise levels they belong to; by custom the folder's name does, as in
    ``0.002_80.0_1200_1024`` (range, steps, samples). For schedules with an alpha, levels are $\sigma / \alpha$.

    Args:
        folder: The folder of both.
        sigma_min: The cleanest level.
        sigma_max: The noisiest level.

    Returns:
        The statistics. For scalars ``(N + 1, 1, 1, 1)``, ``AnalyticPreconditioning.from_coefficients(ems.levels,
        ems.l.flatten(), ems.s.flatten())`` makes jumps of them, else ``PerElementPreconditioning.from_coefficients``.

    Raises:
        FileNotFoundError: If one of the files is missing.
        ValueError: If a file is anything else, or they do not fit together.
    """
    arrays: dict[str, Tensor] = {}
    for file, names in _FILES.items():
        arrays |= {name: torch.from_numpy(array) for name, array in _read(Path(folder) / file, names).items()}
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    try:
        whole = np.broadcast_shapes(*shapes.values())
    except ValueError:
        whole = ()
    num = shapes["l"][0] if shapes["l"] else 0
    if len(whole) != 4 or num < 2 or any(len(shape) != 4 or shape[0] != num for shape in shapes.values()):
        raise ValueError(f"l, s and b in {folder} must be of shapes like (N + 1, C, H, W), got {shapes}.")
    return EMS(log_noise_levels(num, sigma_min, sigma_max), 1 - arrays["l"], arrays["s"], arrays["b"])


def _coefficients(statistics: TeacherStatistics, per: str) -> tuple[Array, Array, Array, Array | None]:
    """Return l, g_rms, s, and the intercept if there is one, with levels last and three dimensions before them."""
    source: Any = statistics
    if per != "sample":
        source = statistics.elements
        if source is None:
            raise ValueError(
                f"statistics must hold sums per element for per={per!r}, got none: call estimate_statistics with "
                f"per_element=True, or save per='sample'."
            )
        source = source if per == "element" else source.reduce(per)
    l, g_rms, s = (v.reshape(len(v), *v.shape[1:] or (1, 1, 1)) for v in (source.l, source.g_rms, source.s))
    intercept = source.intercept
    tables = (v.movedim(0, -1).numpy() for v in (l, g_rms, s))
    return (*tables, None if intercept is None else intercept.movedim(0, -1).numpy())


def _write(path: Path, arrays: dict[str, NDArray[np.float32]]) -> None:
    """Replace a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its next argument is an option
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Array]:
    if not path.exists():
        raise FileNotFoundError(f"expected DPM-Solver-v3's l.npz and sb.npz, got no file at {path}: check the folder.")
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _LARGEST:
            raise ValueError(f"its arrays may have {_LARGEST} bytes, got {size}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: np.asarray(file[name]) for name in names}
        for name, array in arrays.items():
            if array.dtype.kind != "f" or not np.isfinite(array).all():
                raise ValueError(f"{name} must hold finite floating-point numbers, got {array.dtype}")
        return {name: array.astype(np.float64) for name, array in arrays.items()}
    except (ValueError, KeyError, EOFError, OSError, MemoryError, zipfile.BadZipFile, NotImplementedError) as error:
        raise ValueError(f"expected arrays {names} in {path}, got another or a damaged file: {error!s:.500}") from error
