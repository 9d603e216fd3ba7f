"""The soak benchmark, shortly: a compiled training step neither grows nor is compiled again."""

from __future__ import annotations

import sys

import pytest
import torch
from checkout import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))
import soak

CPU = torch.device("cpu")


@pytest.mark.long
def test_training_steps_are_compiled_once_and_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.compiler.reset()
    growth, recompilations = soak.soak(50, "eager", CPU)  # traced and guarded like any backend, but quickly
    assert growth < soak.GROWTH
    assert recompilations == 0

    # and it would see both
    step, left_behind = soak.Run.step, []

    def careless(run: soak.Run) -> None:
        step(run)
        late = len(left_behind) > soak.WARM_UP
        left_behind.append(torch.ones(10 * 2**20 if late else 1))  # 40 MiB: mapped anew, not what other tests freed
        if len(left_behind) == soak.WARM_UP + 5:
            torch.compiler.reset()

    monkeypatch.setattr(soak.Run, "step", careless)
    growth, recompilations = soak.soak(20, "eager", CPU)
    assert growth > soak.GROWTH
    assert recompilations > 0
    torch.compiler.reset()
