"""What a run is: an experiment of the paper, the preconditioning that is compared, and the files it starts from."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import analytic_precond as ap

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# these may change when a run goes on: how long it is, and what only describes the paper's
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
NOT_COMPARED = ("iterations", "gpus", "gpu", "days", "network_dtype")


@dataclass(frozen=True)
class Settings:
    """A run's settings.

    Attributes:
        experiment: The paper's, or a variant of it.
        preconditioning: Name of the student's.
        precision: Name of what networks compute in, under autocast.
        seed: Of everything that is drawn.
        teacher: EDM's pickle.
        data: EDM's data set.
    """

    experiment: ap.PaperExperiment
    preconditioning: str
    precision: str
    seed: int
    teacher: Path
    data: Path | None

    def written(self, **fingerprints: str) -> dict[str, Any]:
        """Return what is kept in the run's folder, and compared when it goes on."""
        own = dataclasses.asdict(self.experiment) | {"network_dtype": self.precision}
        rest = {"preconditioning": self.preconditioning, "precision": self.precision, "seed": self.seed}
        return own | rest | {"teacher_file": str(self.teacher.resolve())} | fingerprints


def experiment_of(name: str, changes: Sequence[str]) -> ap.PaperExperiment:
    """Return the paper's experiment with settings changed by ``name=value``."""
    experiment, changed = ap.paper_experiment(name), {}
    for change in changes:
        key, _, value = change.partition("=")
        known = getattr(experiment, key, None) if key in {f.name for f in dataclasses.fields(experiment)} else None
        if known is None or isinstance(known, torch.dtype) or key == "name":
            raise SystemExit(
                f"--set: expected NAME=VALUE with a setting of ap.paper_experiment({name!r}), got {change!r}"
            )
        try:
            changed[key] = _TRUTH[value.lower()] if isinstance(known, bool) else type(known)(value)
        except (ValueError, KeyError):
            raise SystemExit(f"--set: expected {key} of type {type(known).__name__}, got {value!r}") from None
    return dataclasses.replace(experiment, **changed)


def experiment_from(written: dict[str, Any]) -> ap.PaperExperiment:
    """Return the experiment of a run from what is kept in its folder."""
    own = {field.name: written[field.name] for field in dataclasses.fields(ap.PaperExperiment)}
    return ap.PaperExperiment(**own | {"network_dtype": PRECISIONS[written["network_dtype"]]})


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return in words what two runs' settings differ in, of all that makes a run; nothing if they are the same."""
    compared = sorted((before.keys() | now.keys()) - {*NOT_COMPARED, "teacher_file"})
    return ", ".join(
        f"{name} {before.get(name)} there, {now.get(name)} now"
        for name in compared
        if before.get(name) != now.get(name)
    )


def fingerprint(path: Path) -> str:
    """Return a hash of a file."""
    with path.open("rb") as file:
        result = hashlib.sha256()
        while part := file.read(2**20):
            result.update(part)
    return result.hexdigest()[:16]


def generator_for(*key: int) -> torch.Generator:
    """Return a generator that depends on the key only: a seed, an iteration, a process."""
    return torch.Generator().manual_seed(seed_for(*key))


def seed_for(*key: int) -> int:
    """Return a seed made of several numbers."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def share_of_batch(batch_size: int, processes: int, batch_gpu: int | None) -> tuple[int, int]:
    """Return the images of one process in an iteration, and in one of its passes."""
    if batch_size % processes:
        raise SystemExit(
            f"batch_size must be a multiple of the {processes} processes, got {batch_size}: --set batch_size=N"
        )
    share = batch_size // processes
    if share % (batch_gpu or share):
        raise SystemExit(f"--batch-gpu must divide a process's share of the batch, {share} images, got {batch_gpu}")
    return share, batch_gpu or share


def positive(text: str) -> int:
    """Return a positive whole number of the command line."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, got {text!r}")
    return int(text)


def positive_number(text: str) -> float:
    """Return a positive number of the command line."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return number
