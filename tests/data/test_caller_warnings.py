"""Warnings point at the line of the user's that called the package, wherever in it they come from."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import analytic_precond as ap

DATA = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
LEVELS = ap.log_noise_levels(10, 0.1, 10.0)
OPTIONS: dict[str, Any] = {"levels": LEVELS, "num_samples": 32, "progress": False}


def few() -> Iterator[Tensor]:
    return iter(DATA[:8].split(4))


def half(x: Tensor, t: Tensor) -> Tensor:
    return x.half() / 2


def halved(x: Tensor, t: Tensor) -> Tensor:
    return x / 2


class Training(nn.Module):
    """A teacher that was left in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        return x / 2


class Labelled(nn.Module):
    """A teacher that would take labels."""

    def __init__(self) -> None:
        super().__init__()
        self.label_dim = 10

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x / 2


LABELLED = torch.utils.data.TensorDataset(DATA, torch.zeros(40, dtype=torch.long))

# all on one line each, which the warning must name
CALLS: dict[str, Callable[[Path], object]] = {
    "half": lambda path: ap.estimate_statistics(half, DATA, **OPTIONS),
    "half, through functorch": lambda path: ap.estimate_statistics(half, DATA, l_method="hutchinson", **OPTIONS),
    "training": lambda path: ap.estimate_statistics(Training(), DATA, **OPTIONS),
    "training, in a fit": lambda path: ap.LeastSquaresPreconditioning.fit(Training(), DATA, LEVELS, 16),
    "training, in a check": lambda path: ap.check_teacher(Training(), DATA, LEVELS, 32, progress=False),
    "labels": lambda path: ap.estimate_statistics(Labelled(), LABELLED, **OPTIONS),
    "data ran out": lambda path: ap.estimate_statistics(halved, few(), **OPTIONS),
    "data ran out, in a fit": lambda path: ap.LeastSquaresPreconditioning.fit(halved, few(), LEVELS, 16),
    "another batch size": lambda path: ap.estimate_statistics(halved, DATA, batch_size=3, resume=path, **OPTIONS),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_warning_points_at_the_caller(call: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "kept"
    ap.estimate_statistics(halved, DATA, batch_size=4, resume=path, **OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(path)
    places = {(Path(w.filename), w.lineno) for w in caught if w.category is UserWarning}  # torch has its own to say
    assert places == {(Path(__file__), call.__code__.co_firstlineno)}


def test_a_labelled_batch_is_no_walk_through_the_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    walks = []
    monkeypatch.setattr(Labelled, "modules", lambda module: (walks.append(0), nn.Module.modules(module))[1])
    counts = []
    for batch_size in (16, 1):
        walks.clear()
        with pytest.warns(UserWarning, match="class-conditional"):
            ap.estimate_statistics(Labelled(), LABELLED, batch_size=batch_size, **OPTIONS)
        counts.append(len(walks))
    assert counts[0] == counts[1] > 0


def test_a_warning_is_shown_once_for_each_line_that_calls() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            ap.estimate_statistics(half, DATA, **OPTIONS)
        ap.estimate_statistics(half, DATA, **OPTIONS)
    assert len(caught) == 2
