r"""Files of tensors with a header: safetensors, written atomically, never unpickled."""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

_LARGEST_FILE = 2**34  # bytes: means of 120 levels of samples of 17 million elements; larger ones are holes or noise
_LONGEST_HEADER = 2**22  # bytes: a million seeds
_POSIX = os.name == "posix"
_ONE_DAY = 24 * 60 * 60  # seconds


def write_tensors(
    path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write tensors and a JSON header; an existing file is replaced whole or not at all."""
    path = checked_target(Path(path), "path")
    # one key, since safetensors writes several in an order that changes from run to run
    metadata = {"header": json.dumps({"kind": kind, **header}, sort_keys=True)}
    content = serialize({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata)
    _check_size(len(content), content[:8])
    replace_file(path, content)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; where a link stands, the file that it leads to."""
    path = target_of(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def target_of(path: Path) -> Path:
    """Return the path to write to: where a link leads, even to a file yet to come; else the path."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def checked_target(path: Path, name: str) -> Path:
    """Return the path to write to, unless no file could be written there."""
    if path.is_dir():
        raise ValueError(f"{name} must be a file, got the folder {path}: add a file name.")
    if path.exists() and not path.is_file():
        raise ValueError(f"{name} must be a regular file, got {path}, which is none: name another.")
    path = target_of(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{name} must be in an existing folder, got {path.parent}: create it first.")
    return path


def check_space(folder: Path, num_bytes: int = 0) -> None:
    """Raise OSError for a folder that no file of so many bytes can be written to, for want of permission or space."""
    with tempfile.TemporaryFile(dir=folder):
        pass
    # a quota that the file system does not tell of goes unnoticed until a file is written
    if shutil.disk_usage(folder).free < num_bytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def remove_leftovers(path: Path) -> None:
    """Remove what processes left beside a file that were killed while they wrote it."""
    path = target_of(path)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if not _is_in_use(leftover):
            leftover.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the header and the tensors that `write_tensors` wrote, as they lie on disk.

    They change or vanish with the file, and cost memory once they are read. Check their dtypes and shapes first, and
    copy what is to stay.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: If it is anything else, or not whole.
    """
    path = Path(path)
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"expected a {kind} file, got no file at {path}: check the path, or write it with save."
        )
    try:
        if not path.is_file():  # a pipe would be waited for, a device has no end
            raise ValueError("it is no regular file")
        with open(path, "rb") as start:
            _check_size(path.stat().st_size, start.read(8))
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            found = header.pop("kind", None) if isinstance(header, dict) else None
            if found != kind:
                raise ValueError(f"its header says {found!r:.100}, not {kind!r}")
            return header, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(
            f"expected a {kind} file as written by save, got {path}, which is not one or is damaged ({error!s:.500}): "
            f"write it again or fetch it again; load one of another class by that."
        ) from error


def sample_shape_of(header: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the sample shape that a file's header says, checked: no product of it overflows."""
    shape = header.get("sample_shape")
    if (
        not isinstance(shape, list)
        or len(shape) > 60
        or not all(type(size) is int and 0 < size < 2**60 for size in shape)
        or math.prod(shape) >= 2**60
    ):
        raise ValueError(f"header field 'sample_shape' must hold positive integers, got {shape!r}")
    return tuple(shape)


def _check_size(size: int, first_bytes: bytes) -> None:
    """Refuse what can only be damage, however consistent. The first eight bytes are the header's length."""
    header = int.from_bytes(first_bytes, "little")
    if size <= _LARGEST_FILE and 8 + header > size:
        raise ValueError("it is no safetensors file")
    if size > _LARGEST_FILE or header > _LONGEST_HEADER:
        raise ValueError(
            f"a file may have {_LARGEST_FILE} bytes, {_LONGEST_HEADER} of them for its header, got {size} and {header}"
        )


def _is_in_use(temporary: Path) -> bool:
    """Whether the process whose number a file has in its name runs on this machine, and may be writing it."""
    if not _POSIX:  # os.kill would end the process there, whatever the signal: so what is old is nobody's
        return time.time() - temporary.stat().st_mtime < _ONE_DAY
    try:
        os.kill(int(temporary.name.split(".")[-2]), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:  # somebody else's
        return True
    return True
