"""A run's folder: settings, checkpoints, snapshots and the log. Files are replaced whole or not at all.

All processes must see the folder: on several machines it lies on a file system that they share.
"""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from preconditionings import file_of
from settings import differences


def save(state: object, path: Path) -> None:
    """Write a file; one that fails or is interrupted leaves the last one as it was."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # a full disk, which torch tells of as RuntimeError
        temporary.unlink(missing_ok=True)
        kept = (
            f"{path.name} is what it was"
            if path.exists()
            else "nothing is lost but what came since the last checkpoint"
        )
        raise SystemExit(
            f"{path} cannot be written: {str(error).splitlines()[0]}; {kept}. Make room, and start again"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Read a file of `save`; nothing in it is executed."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise SystemExit(f"expected a file of examples/paper/train.py, got {path}: {error}") from error
    if not isinstance(state, dict) or "settings" not in state:
        raise SystemExit(f"expected a file of examples/paper/train.py, got {path}, which holds no settings")
    return state


class RunFolder:
    """The folder of a run.

    Args:
        path: The folder, made if need be.
        settings: The run's, as they are kept.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path, self.settings = path, settings
        self.checkpoint, self.lock = path / "checkpoint.pt", FileLock(path / ".lock")

    def open(self) -> None:
        """Make the folder, or refuse one of other settings, and one that another run is writing to."""
        kept = self.path / "settings.json"
        if kept.exists():
            try:
                before = dict(json.loads(kept.read_text()))
            except (OSError, ValueError, TypeError) as error:
                raise SystemExit(
                    f"--output: expected settings of examples/paper/train.py, got {kept}: {error}; take another folder"
                ) from error
            if other := differences(before, self.settings):
                raise SystemExit(
                    f"--output: {self.path} is of a run with other settings ({other}): choose another folder"
                )
        elif self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise SystemExit(f"--output: {self.path} holds other files: choose a new folder")
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self.lock.acquire(timeout=0)  # until it is closed, or this process ends in any way
        except Timeout:
            raise SystemExit(f"--output: another run is writing to {self.path}: wait for it, or stop it") from None
        save_text(kept, json.dumps(self.settings, indent=2) + "\n")

    def close(self) -> None:
        """Let others write to the folder."""
        self.lock.release()

    def resume(self, parts: dict[str, Any]) -> int:
        """Load what a checkpoint holds, if there is one; return how many iterations are done."""
        if not self.checkpoint.exists():
            return 0
        state = load(self.checkpoint)
        if other := differences(state["settings"], self.settings):
            raise SystemExit(f"{self.checkpoint} is of a run with other settings ({other}): choose another --output")
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
            return int(state["iteration"])
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise SystemExit(f"{self.checkpoint} does not fit this run: {error}; choose another --output") from error

    def keep(self, iteration: int, parts: dict[str, Any]) -> None:
        """Write the checkpoint: all that the next iteration depends on, as what is drawn depends on its number."""
        states = {name: part.state_dict() for name, part in parts.items()}
        save(states | {"settings": self.settings, "iteration": iteration}, self.checkpoint)

    def snapshot(self, iteration: int, average: torch.nn.Module) -> None:
        """Write the student to evaluate, with the settings, and the statistics or the fit that it rests on."""
        file = file_of(self.settings["preconditioning"], self.path)
        table = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) if file.exists() else None
        state = {
            "settings": self.settings,
            "iteration": iteration,
            "student": average.state_dict(),
            "preconditioning": table,
        }
        save(state, self.path / f"snapshot-{iteration:09d}.pt")

    def write_log(self, line: dict[str, Any]) -> None:
        """Add a line to the log; JSON has no word for numbers that are not finite."""
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with (self.path / "log.jsonl").open("a") as file:
            file.write(json.dumps(finite) + "\n")

    def cut_log(self, iteration: int) -> None:
        """Drop the lines of iterations that come again."""
        log = self.path / "log.jsonl"
        if log.exists():
            whole = [line for line in log.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in whole if json.loads(line)["iteration"] <= iteration]
            save_text(log, "".join(line + "\n" for line in kept))


def save_text(path: Path, text: str) -> None:
    """Write a file of text, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    temporary.replace(path)


def snapshots(folder: Path) -> list[Path]:
    """Return a run's snapshots, the first one first."""
    return sorted(folder.glob("snapshot-*.pt"))
