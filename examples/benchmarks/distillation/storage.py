"""Files that are whole or absent, so that a benchmark may be killed at any time and started again."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield where to write a file, which then takes its place in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    yield temporary
    os.replace(temporary, path)


def write_json(content: object, path: Path) -> None:
    """Write a JSON file."""
    with _whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True))


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file."""
    with _whole(path) as temporary:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)


class Checkpoint:
    """All that a run in progress consists of, written at each evaluation: a killed run goes on from its last.

    Args:
        path: The file.
        settings: Of the run; a file of others is not read.
        parts: What has a state dict.
        generators: What the run draws from.
    """

    def __init__(
        self, path: Path, settings: str, parts: dict[str, Any], generators: tuple[torch.Generator, ...]
    ) -> None:
        self.path, self.settings, self.parts, self.generators = path, settings, parts, generators

    def save(self, history: list[dict[str, Any]]) -> None:
        """Write the state of all parts, and what was measured so far."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        drawn = [generator.get_state() for generator in self.generators]
        content = {"settings": self.settings, "parts": states, "generators": drawn, "history": history}
        with _whole(self.path) as temporary:
            torch.save(content, temporary)

    def load(self) -> list[dict[str, Any]]:
        """Give all parts their last written state, if there is one, and return what was measured up to there."""
        if not self.path.exists():
            return []
        content = torch.load(self.path, map_location="cpu", weights_only=True)
        if content["settings"] != self.settings:
            return []
        for name, part in self.parts.items():
            part.load_state_dict(content["parts"][name])
        for generator, state in zip(self.generators, content["generators"], strict=True):
            generator.set_state(state)
        return content["history"]
