r"""DPM-Solver-v3's empirical model statistics (EMS), from and to the files that its code reads (docs/ems.md).

With $f = (\sigma \epsilon - l^{v3} x) / \alpha$ that solver takes $l^{v3}$, and s and b of the regression
$df/d\lambda \approx s f + b$. In this library's terms $f = -g$, $l^{v3} = 1 - l_t$, $s = s_t$, and
$b = s\, b_t - db_t/d\lambda$ with the intercept $b_t$ (docs/method.md, section 13).
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .._checks import check_choice, check_count, check_finite
from .._files import remove_leftovers
from ..interpolation.splines import linear_coefficient, log_scale_spline, spline
from ..noise_levels.grids import log_noise_levels
from .moments import Array
from .teacher_statistics import TeacherStatistics

_FILES = {"l.npz": ("l",), "sb.npz": ("s", "b")}
_LARGEST = 2**34  # bytes of a file's arrays, as of statistics
_COMPRESSED = 2**28  # or as many bytes, or eight times the file's, once unpacked: more is a bomb
_AT_ONCE = 64  # levels: splines of 64x64x3 elements then take megabytes


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

    An interrupted call leaves the old files, or no ``l.npz``; never those of two calls.

    Args:
        statistics: The teacher's statistics of samples ``(C, H, W)``. Without an intercept b is 0.
        folder: Where to write; made if its parent exists. Files in it are replaced.
        per: ``"element"`` or ``"channel"``, which need ``per_element=True``, or ``"sample"``: what has an l and an s of
            its own. With an intercept, b is always per element.
        num_steps: Number of steps N.

    Raises:
        TypeError: If ``statistics`` or ``num_steps`` is something else.
        ValueError: If samples have no three dimensions, there are no statistics per element, an option is out of range,
            float32 does not hold the values, or there is a file where the folder should be.
        FileNotFoundError: If the folder's parent does not exist.
    """
    if not isinstance(statistics, TeacherStatistics):
        raise TypeError(f"statistics must be TeacherStatistics, got {type(statistics).__name__}.")
    check_choice(per, ("element", "channel", "sample"), "per")
    check_count(num_steps, 1, "num_steps")
    shape = statistics.header.sample_shape
    if len(shape) != 3:
        raise ValueError(
            f"DPM-Solver-v3 needs statistics of samples (C, H, W), got sample shape {shape}: view samples with three "
            f"dimensions, vectors as (C, 1, 1), and estimate again."
        )
    folder = Path(folder)
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder to make {folder.name} in, got {folder.parent}.")
    if not folder.is_dir() and os.path.lexists(folder):
        raise ValueError(f"expected a folder to write to, got {folder}, a file or a broken link: name another.")
    for file in _FILES:
        if (folder / file).is_dir():
            raise ValueError(f"expected a folder to write {file} to, got one with a folder of that name: {folder}.")

    arrays = _tables(statistics, per, num_steps)
    for name, array in arrays.items():
        bad = array.size - int(np.isfinite(array).sum())
        if bad:
            raise ValueError(
                f"{name} must be finite in float32, which the files hold, got {bad} of {array.size} values beyond it: "
                f"check the scale of the teacher's output."
            )
    folder.mkdir(exist_ok=True)
    _write(folder, arrays)


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
        TypeError: If an end of the range is no number.
        FileNotFoundError: If one of the files is missing.
        ValueError: If a file is anything else, or they do not fit together. Compressed arrays may have 256 MiB, or
            eight times the bytes of their file.
    """
    arrays: dict[str, Tensor] = {}
    for file, names in _FILES.items():
        arrays |= _read(Path(folder) / file, names)
    shapes = {name: tuple(array.shape) for name, array in arrays.items()}
    try:
        whole = np.broadcast_shapes(*shapes.values())
    except ValueError:
        whole = ()
    num = shapes["l"][0] if shapes["l"] else 0
    fit = len(whole) == 4 and 0 not in whole and all(len(shape) == 4 and shape[0] == num for shape in shapes.values())
    if num < 2 or not fit:
        raise ValueError(f"l, s and b in {folder} must be of shapes like (N + 1, C, H, W), got {shapes}.")
    return EMS(log_noise_levels(num, sigma_min, sigma_max), 1 - arrays["l"], arrays["s"], arrays["b"])


def _tables(statistics: TeacherStatistics, per: str, num_steps: int) -> dict[str, NDArray[np.float32]]:
    """Return what the files hold."""
    l, g_rms, s, intercept = _coefficients(statistics, per)
    levels = statistics.levels.numpy()
    lam = np.linspace(-math.log(levels[0]), -math.log(levels[-1]), num_steps + 1)
    l_at, b_at = linear_coefficient(levels, l), spline(levels, intercept)
    s_at = log_scale_spline(levels, g_rms, s, statistics.header.s_method).derivative()
    db_at = b_at.derivative()

    shapes = {"l": l.shape, "s": s.shape, "b": intercept.shape}
    arrays = {name: np.empty((len(lam), *shape[:-1]), dtype=np.float32) for name, shape in shapes.items()}
    with np.errstate(over="ignore"):  # of float32: save_ems looks at the result
        for start in range(0, len(lam), _AT_ONCE):
            at = lam[start : start + _AT_ONCE]
            s_fine = s_at(at)
            for name, values in (("l", 1 - l_at(at)), ("s", s_fine), ("b", s_fine * b_at(at) - db_at(at))):
                arrays[name][start : start + _AT_ONCE] = np.moveaxis(values, -1, 0)
    return arrays


def _coefficients(statistics: TeacherStatistics, per: str) -> tuple[Array, Array, Array, Array]:
    """Return l, g_rms, s and the intercept, 0 if there is none, with levels last and three dimensions before them."""
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
    intercept = torch.zeros_like(s) if source.intercept is None else source.intercept
    l, g_rms, s, intercept = (v.movedim(0, -1).numpy() for v in (l, g_rms, s, intercept))
    return l, g_rms, s, intercept


def _write(folder: Path, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Replace both files or none, or leave none to load."""
    temporaries = {file: folder / f".{file}.{os.getpid()}.tmp" for file in _FILES}
    try:
        for file, names in _FILES.items():
            remove_leftovers(folder / file)
            with open(temporaries[file], "wb") as opened:
                np.savez(opened, **{name: arrays[name] for name in names})  # type: ignore[arg-type]  # an option is next
                opened.flush()
                os.fsync(opened.fileno())
        (folder / "l.npz").unlink(missing_ok=True)  # no moment has an l of one call and an s of another
        for file in ("sb.npz", "l.npz"):
            os.replace(temporaries[file], folder / file)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def _read(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"expected DPM-Solver-v3's l.npz and sb.npz, got no file at {path}: check the folder.")
    try:
        if not path.is_file():  # a pipe would be waited for
            raise ValueError("it is no regular file")
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        most = min(_LARGEST, max(_COMPRESSED, 8 * path.stat().st_size))
        if size > most:
            raise ValueError(f"its arrays may have {most} bytes, got {size}")
        tensors = {}
        with np.load(path, allow_pickle=False) as file:
            for name in names:
                array = np.asarray(file[name])
                if array.dtype.kind != "f":
                    raise ValueError(f"{name} must hold floating-point numbers, got {array.dtype}")
                with np.errstate(over="ignore"):  # of what is longer than float64
                    tensors[name] = torch.from_numpy(array.astype(np.float64))
                check_finite(tensors[name], name)
        return tensors
    except Exception as error:  # damage makes zipfile, its decompressors and numpy raise nearly anything
        raise ValueError(
            f"expected arrays {names} in {path}, got another or a damaged file: {str(error) or repr(error):.500}"
        ) from error
