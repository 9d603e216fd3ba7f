r"""What the command line is given: teachers and data as Python functions, data as files, files of this library."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import zipfile
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import Dataset

from .._files import check_space, checked_target
from ..fitted_preconditionings.fitted import FittedPreconditioning
from ..fitted_preconditionings.least_squares import LeastSquaresPreconditioning
from ..fitted_preconditionings.per_mode import PerModePreconditioning
from ..fitted_preconditionings.shifted import ShiftedPreconditioning
from ..statistics.teacher_statistics import TeacherStatistics

Loaded = TeacherStatistics | FittedPreconditioning
_FITTED = {
    kind.__name__: kind for kind in (LeastSquaresPreconditioning, PerModePreconditioning, ShiftedPreconditioning)
}

_WRITTEN = {"TeacherStatistics": "a file of statistics", "EstimationState": "a checkpoint"}
_TENSOR_FILES = (".npy", ".npz", ".safetensors")
_PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle")


def load_teacher(teacher: str, data: str | None) -> tuple[object, object]:
    """Return the denoiser and its data, as the functions that are named return them; tensors from files."""
    denoiser, own_data = _from_factory(teacher, "TEACHER"), None
    if isinstance(denoiser, tuple):
        if len(denoiser) != 2:
            raise ValueError(f"TEACHER must return a denoiser or (denoiser, data), got {len(denoiser)} values.")
        denoiser, own_data = denoiser
    if denoiser is None:
        raise TypeError(f"TEACHER must return a denoiser, but {teacher} returned None: does it return the denoiser?")
    if data is not None:
        return denoiser, _load_data(data)
    if own_data is None:
        raise ValueError(f"data are needed, got none: give --data, or let {teacher} return (denoiser, data).")
    return denoiser, own_data


def load_file(path: str) -> Loaded:
    """Read a file of statistics, or of a fitted preconditioning, whichever it is."""
    kind = _FITTED.get(_kind_of(path))
    return load_statistics(path) if kind is None else kind.load(path)


def load_statistics(path: str) -> TeacherStatistics:
    """Read a file of statistics; a checkpoint or a fit, which may be taken for one, is called one."""
    kind = _kind_of(path)
    if kind == "EstimationState":
        raise ValueError(f"expected a file of results, got {path}: it is a checkpoint of a run: show its --output.")
    if kind in _FITTED:
        raise ValueError(
            f"expected a file of statistics, got {path}: it holds the jumps of a {kind}: take the file that estimate "
            f"wrote, or see the jumps by show, or by plot --what coefficients."
        )
    return TeacherStatistics.load(path)


def check_output(path: Path) -> None:
    """Refuse a file that could not be written, before there is anything to write."""
    folder = checked_target(path, "--output").parent
    try:
        check_space(folder)
    except OSError as error:
        raise OSError(error.errno, f"--output: nothing can be written to {folder} ({error.strerror})") from error


def check_kind(path: str, option: str, kind: str) -> None:
    """Refuse a file that an option names if it holds anything but some kind: perhaps it is somebody's data or code."""
    if os.path.exists(path) and _kind_of(path) != kind:
        raise ValueError(
            f"{option} must be {_WRITTEN[kind]}, or one yet to come, got {path}, which is something else or damaged: "
            f"name another."
        )


def _kind_of(path: str) -> str:
    """Return what a file's header says it is, nothing for others, which the loaders explain."""
    try:
        if os.path.isfile(path):
            with safe_open(path, framework="pt") as file:
                return str(json.loads((file.metadata() or {})["header"])["kind"]).removesuffix(" 1")
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, RecursionError):
        pass
    return ""


def _load_data(spec: str) -> object:
    path, name = Path(spec), ""
    if path.suffix.lower() not in (*_TENSOR_FILES, *_PICKLES) and ":" in spec:
        before, _, after = spec.rpartition(":")
        if Path(before).suffix.lower() not in _TENSOR_FILES:
            return _data_of(_from_factory(spec, "--data"), spec)
        path, name = Path(before), after
    if path.suffix.lower() in _PICKLES:
        raise ValueError(
            f"--data must be a file that runs no code when it is read, got {path}, a pickle: save the tensor with "
            f"numpy.save or safetensors, or load it in a function and name that, as in module:function."
        )
    if path.suffix.lower() not in _TENSOR_FILES:
        raise ValueError(
            f"--data must be module:function or a file ending in {', '.join(_TENSOR_FILES)}, got {spec!r}."
        )
    if not path.is_file():
        raise FileNotFoundError(f"--data must be an existing file, got {path}.")
    try:
        return _read_tensor(path, name)
    except (SafetensorError, zipfile.BadZipFile, EOFError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"--data must be a file of numbers, got {path}: {error}") from error


def _data_of(result: object, spec: str) -> object:
    if not isinstance(result, Iterable | Dataset):  # a tensor can be iterated over too
        raise TypeError(
            f"--data must name a function that returns a tensor, a Dataset, a DataLoader or batches, got {spec}, which "
            f"returned {'None' if result is None else _an(result)}: let it return the data."
        )
    return result


def _an(value: object) -> str:
    name = type(value).__name__
    return f"an {name}" if name[0].lower() in "aeiou" else f"a {name}"


def _read_tensor(path: Path, name: str) -> Tensor:
    if path.suffix.lower() == ".npy":
        if name:
            raise ValueError(f"a .npy file has no names: leave out :{name}.")
        with open(path, "rb") as file:
            if file.read(6) != b"\x93NUMPY":  # numpy would take it for a pickle
                raise ValueError("it is no .npy file.")
        return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))  # read as it is needed
    if path.suffix.lower() == ".npz":
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no .npz file, or damaged.")
        with np.load(path, allow_pickle=False) as arrays:
            return torch.from_numpy(arrays[_chosen(arrays.files, name)])
    with safe_open(path, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(_chosen(list(tensors.keys()), name))
        return tensor


def _chosen(names: list[str], name: str) -> str:
    """Return the name asked for, or the only one."""
    if name in names:
        return name
    if name or len(names) != 1:
        raise ValueError(f"it holds {sorted(names)}, not {name!r}: name one of them, as in data.npz:images.")
    return names[0]


def _from_factory(spec: str, argument: str) -> object:
    """Call a function by its name, without arguments."""
    module_name, _, name = spec.rpartition(":")
    if not module_name or not name:
        raise ValueError(f"{argument} must be package.module:function or path/to/file.py:function, got {spec!r}.")
    module = _import(module_name, argument)
    try:
        factory = attrgetter(name)(module)
    except AttributeError as error:
        raise ImportError(f"{argument}: there is no {name} in {module_name}.") from error
    if not callable(factory):
        raise TypeError(f"{argument} must name a function, got {spec}, {_an(factory)}: wrap it in one.")
    try:
        inspect.signature(factory.forward if isinstance(factory, nn.Module) else factory).bind()
    except TypeError as error:
        raise TypeError(
            f"{argument} must name a function without arguments, which returns what to use, got {spec} ({error})."
        ) from error
    except ValueError:  # one that inspect cannot tell
        pass
    result: object = factory()
    return result


def _import(name: str, argument: str) -> ModuleType:
    """Import a module, from the current folder too, or a file by its path, with its folder for what it imports."""
    path = Path(name).resolve() if name.endswith(".py") else None
    if path is not None and not path.is_file():
        raise FileNotFoundError(f"{argument} must name an existing file, got {path}.")
    for folder in (os.getcwd(), *([] if path is None else [str(path.parent)])):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        module = importlib.import_module(name if path is None else path.stem)
    except ImportError as error:
        raise ImportError(f"{argument}: {name} cannot be imported from {os.getcwd()} ({error}).") from error
    found = getattr(module, "__file__", None)
    if path is not None and (found is None or Path(found).resolve() != path):
        raise ImportError(f"{argument}: {path} has the name of another module ({found}): rename it.")
    return module
