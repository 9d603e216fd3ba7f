"""Files that are whole or absent, so that a benchmark may be killed at any time and started again."""

import json
import os
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write_json(content: object, path: Path) -> None:
    """Write a JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True))
    os.replace(temporary, path)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
    os.replace(temporary, path)
