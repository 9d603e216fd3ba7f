"""Files of tensors with a header: safetensors, written atomically, never unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor


def write_tensors(
    path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    """Write tensors and a JSON header; an existing file is replaced whole or not at all."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"expected an existing folder to write {path.name} to, got {path.parent}: create it first."
        )
    if path.is_dir():
        raise ValueError(f"expected the path of a file to write, got the folder {path}: add a file name.")
    # one key, since safetensors writes several in an order that changes from run to run
    metadata = {"header": json.dumps({"kind": kind, **header}, sort_keys=True)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(serialize({name: t.contiguous() for name, t in tensors.items()}, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what `write_tensors` wrote; raise FileNotFoundError or ValueError for anything else."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"expected a {kind} file, got no file at {path}: check the path, or write it with save."
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            found = header.pop("kind", None) if isinstance(header, dict) else None
            if found != kind:
                raise ValueError(f"its header says {found!r:.100}, not {kind!r}")
            # cloned: the file's own tensors are mapped from disk, and change or vanish with it
            return header, {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, ValueError, TypeError, OSError, RecursionError) as error:
        raise ValueError(
            f"expected a {kind} file as written by save, got {path}, which is not one or is damaged ({error}): "
            f"write it again or fetch it again."
        ) from error
